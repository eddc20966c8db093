"""A hundred isolated namespaces: how soon each can be asked, and what a worker is of its own.

A call that asks the worker of a namespace for nothing is timed from a connected client: the first one of each, with
which the domain is made (uid, key, pool, FUSE connection) and its worker starts; and the first one behind the death of
each worker, which is another's start. The workers are idle when their memory is counted, and have had no job forked.
"""

from __future__ import annotations

import os
import re
import signal
import time
from contextlib import suppress
from statistics import median, quantiles
from typing import TYPE_CHECKING

from bench.harness import Bench, Figure, say
from nsfs.errors import NsfsError
from nsfs.model.report import ImageReport
from nsfs.serve import api
from nsfs.serve.client import open_control
from nsfs_daemon import run_daemon

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nsfs.serve.client import Control

NAMESPACES = 100
_PRIVATE_GOAL = 15
"""MiB of a worker."""
_START_GOAL = 30
"""Milliseconds from a worker's death to the next one's answer."""


def measure(bench: Bench) -> None:
    """All of it."""
    names = [f"tenant-{number}" for number in range(NAMESPACES)]
    with run_daemon(f"{bench.scratch('namespaces')}/nsfs") as daemon, open_control(daemon.socket) as control:
        first = [_ask(control, name) for name in names]
        workers = daemon.workers()
        private = [_kib([pid], "Private_(?:Clean|Dirty)") / 1024 for pid in workers.values()]
        total = _kib([daemon.pid, *_children(daemon.pid), *workers.values()], "Pss") / 1024
        again = [_ask_again(control, name, workers[f"ns/{name}"]) for name in names]
    _say("first call of a namespace", first)
    _say("a worker that died, to the next one's answer", again)
    say(f"  {len(names)} namespaces: {total:.0f} MiB in all, {total / len(names):.1f} MiB each")
    for figure in (
        _figure("a worker's private memory", "MiB", private, _PRIVATE_GOAL),
        _figure(f"proportional memory of {NAMESPACES} namespaces, with the daemon", "MiB", [total]),
        _figure("a namespace's first call", "ms", first),
        _figure("a namespace's first call, p99", "ms", [_p99(first)]),
        _figure("the start of a worker", "ms", again, _START_GOAL),
        _figure("the start of a worker, p99", "ms", [_p99(again)]),
    ):
        bench.add(figure)


def _figure(name: str, unit: str, samples: Sequence[float], goal: float | None = None) -> Figure:
    return Figure(name=name, unit=unit, samples=samples, higher_is_better=False, goal=goal)


def _say(what: str, samples: Sequence[float]) -> None:
    say(f"  {what}: p50 {median(samples):.1f} ms, p99 {_p99(samples):.1f} ms")


def _p99(samples: Sequence[float]) -> float:
    return quantiles(samples, n=100)[98]


def _ask(control: Control, namespace: str) -> float:
    """Milliseconds until the namespace's worker says that it knows no such image."""
    request = api.ImageRequest(reference="oci:/nonexistent", namespace=namespace)
    begun = time.perf_counter()
    with suppress(NsfsError):
        control.call("Inspect", request, ImageReport)
    return (time.perf_counter() - begun) * 1000


def _ask_again(control: Control, namespace: str, worker: int) -> float:
    """The same, of a worker that is killed first."""
    os.kill(worker, signal.SIGKILL)
    return _ask(control, namespace)


def _children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        return [int(child) for child in file.read().split()]


def _kib(pids: Sequence[int], kind: str) -> int:
    """A line, or several, of proc(5)'s smaps_rollup, over processes."""
    found = 0
    for pid in pids:
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
            found += sum(int(kib) for kib in re.findall(rf"^{kind}: +(\d+)", file.read(), re.MULTILINE))
    return found
