"""What one tenant's reading costs another's.

A file that is local and not in the page cache is read alone, and beside a tenant who reads all the time, by four
processes at once; then bytes that are absent, beside one who fetches all the time, from a registry of his own over a
slow line. Each namespace is isolated and has its own worker. Where two tenants want all that there is, half of it is
each one's share. What the greedy one read meanwhile is counted: a run in which one of his processes read nothing is no
figure.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import TYPE_CHECKING

from bench import stacks
from bench.harness import Bench, Figure
from images import Image, file, write_oci_layout
from nsfs.bench.line import Shape, run_line
from nsfs_daemon import run_daemon
from registry import push_layout
from users import estargz_layer, noise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from nsfs_daemon import Daemon

_SIZE = 64 << 20
_PIECE = 1 << 20
_SECONDS = 2.0
_GREEDY = 4
_SHARE = 0.5
_MISSES = 40
_MBIT, _ROUND_TRIP_MS = 100.0, 30.0
_READ_ON = f"""
import os, signal, sys

def end(*_):
    print(read)
    sys.exit()

file, begin = os.open(sys.argv[1], os.O_RDONLY), int(sys.argv[2])
read = len(os.pread(file, {_PIECE}, begin))
signal.signal(signal.SIGTERM, end)
print(flush=True)
while True:
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    for at in range(begin, {_SIZE}, {_PIECE}):
        read += len(os.pread(file, {_PIECE}, at))
"""


def measure(bench: Bench) -> None:
    """All of it."""
    scratch = bench.scratch("fairness")
    push_layout(stacks.many_bytes(f"{scratch}/local", _SIZE), bench.registry, "local")
    for number, name in enumerate(("meek", "greedy")):
        layer = estargz_layer([file("large", noise(_SIZE, number))], chunk_size=_PIECE)
        push_layout(str(write_oci_layout(f"{scratch}/{name}-layout", Image((layer,)))), bench.registry, name)
    with run_daemon(f"{scratch}/nsfs") as daemon:
        _measure_hits(bench, daemon, scratch)
        _measure_misses(bench, daemon, scratch)


def _measure_hits(bench: Bench, daemon: Daemon, scratch: str) -> None:
    reference = f"{bench.registry.host}/local"
    names = {"meek": reference, "greedy": reference}
    with _mounted(daemon, names, scratch) as (meek, greedy):
        alone, beside, greed = _in_turns(bench.samples, lambda: _megabytes(meek), greedy)
    _add(bench, "one tenant's cold reads beside another's who reads all the time", "MB/s", alone, beside)
    _add_greed(bench, "what the other one read meanwhile", greed)


def _measure_misses(bench: Bench, daemon: Daemon, scratch: str) -> None:
    with run_line(bench.registry.host, Shape(_MBIT * 1e6 / 8, _ROUND_TRIP_MS / 1000)) as line:
        names = {"meek": f"{bench.registry.host}/meek", "greedy": f"{line.host}/greedy"}

        def forget() -> None:
            for name, reference in names.items():
                daemon.nsfs("evict", reference, "--namespace", name)

        with _mounted(daemon, names, scratch) as (meek, greedy):
            alone, beside, greed = _in_turns(bench.samples, lambda: _milliseconds(meek), greedy, forget)
    _add(bench, "one tenant's misses beside another's over a slow line", "ms", alone, beside)
    _add_greed(bench, "what the other one fetched meanwhile", greed)


@contextmanager
def _mounted(daemon: Daemon, names: dict[str, str], scratch: str) -> Iterator[list[str]]:
    """The large file of each namespace's image."""
    with ExitStack() as stack:
        for name, reference in names.items():
            stack.enter_context(daemon.mounted(reference, f"{scratch}/{name}", "--namespace", name))
        yield [f"{scratch}/{name}/large" for name in names]


def _in_turns(
    samples: int, measured: Callable[[], float], greedy: str, prepare: Callable[[], None] = lambda: None
) -> tuple[list[float], list[float], list[float]]:
    """Samples alone, samples beside the greedy one, and how many MB a second he read meanwhile."""
    alone, beside = [], []
    greed: list[float] = []
    for _ in range(samples):
        prepare()
        alone.append(measured())
        prepare()
        with _read_all_the_time(greedy, greed):
            beside.append(measured())
    return alone, beside, greed


@contextmanager
def _read_all_the_time(path: str, greed: list[float]) -> Iterator[None]:
    """Processes that read, each from another place on; what they read is added to `greed`, in MB a second.

    The block begins once each has read something.
    """
    begun = time.perf_counter()
    commands = [[sys.executable, "-c", _READ_ON, path, str(at)] for at in range(0, _SIZE, _SIZE // _GREEDY)]
    readers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    try:
        for reader in readers:
            assert reader.stdout is not None
            reader.stdout.readline()
        yield
        for reader in readers:
            reader.send_signal(signal.SIGTERM)
        read = [int(reader.communicate()[0]) for reader in readers]
        if min(read) == 0:
            raise RuntimeError(f"a greedy reader read nothing: {read}")
        greed.append(sum(read) / (time.perf_counter() - begun) / 1e6)
    finally:
        for reader in readers:
            reader.kill()
            reader.wait()


def _megabytes(path: str) -> float:
    """Of a file, a second, past the page cache."""
    read, begun = 0, time.perf_counter()
    file = os.open(path, os.O_RDONLY)
    try:
        while time.perf_counter() - begun < _SECONDS:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            for at in range(0, _SIZE, _PIECE):
                read += len(os.pread(file, _PIECE, at))
    finally:
        os.close(file)
    return read / (time.perf_counter() - begun) / 1e6


def _milliseconds(path: str) -> float:
    """The median of reads of a byte that is absent, far from each other."""
    took = []
    file = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        for at in random.Random(0).sample(range(0, _SIZE, _PIECE), _MISSES):
            begun = time.perf_counter()
            os.pread(file, 1, at)
            took.append((time.perf_counter() - begun) * 1000)
    finally:
        os.close(file)
    return median(took)


def _add(bench: Bench, name: str, unit: str, alone: Sequence[float], beside: Sequence[float]) -> None:
    figure = Figure(
        name=name,
        unit=unit,
        samples=beside,
        baseline=alone,
        baseline_name="alone",
        higher_is_better=unit == "MB/s",
        goal=_SHARE,
    )
    bench.add(figure)


def _add_greed(bench: Bench, name: str, greed: Sequence[float]) -> None:
    bench.add(Figure(name=name, unit="MB/s", samples=greed, higher_is_better=True))
