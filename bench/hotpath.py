"""Where the processor's time goes: a read hit, a read miss, an index and a view, each while py-spy looks.

Every process of a daemon is sampled, its workers' jobs included; threads that wait are not. The stacks go to
bench/results/hotpath/<what>.folded, for any flame graph, and what they come to to <what>.txt: for each function the
share of samples that were in it, and in it or what it called. Sampling itself stops a process for a moment, so the
figures are of use against each other.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench import REPOSITORY, images, stacks
from bench.harness import Bench, Figure, say
from bench.maps import forget_maps
from nsfs.bench.node import Node
from nsfs.bench.pages import drop_caches, regular_files
from nsfs.serve import api
from nsfs.serve.client import open_control
from nsfs_daemon import Daemon, run_daemon
from registry import push_layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_RATE = 100
"""Samples a second."""
_SECONDS = 8.0
"""Of reading."""
_SMALL = 4096
_FILES, _LAYERS = 50_000, 10
_TOP = 12
_NAMESPACE = "default"
_WAITING = {
    "Condition.wait (threading.py",
    "EpollIOManager.get_events (trio/_core/_io_epoll.py",
    "Popen._try_wait (subprocess.py",
    "WorkerThread._work (trio/_core/_thread_cache.py",
    "_Holder.run (nsfs/serve/holder.py",
    "_Server.run (nsfs/serve/forkserver.py",
    "_serve (grpc/_server.py",
    "_worker (concurrent/futures/thread.py",
}
"""Where a thread with nothing to do is; on a loaded machine it is now and then taken for one that runs."""
_ENTRIES = ("(nsfs/serve/forkserver.py", "(nsfs/serve/joblending.py")
"""How each forked process begins."""
_SPY = os.path.join(os.path.dirname(sys.executable), "py-spy")


@dataclass(frozen=True, slots=True)
class _Stacks:
    """What was seen: how often each stack, outermost function first."""

    counts: dict[tuple[str, ...], int]

    @property
    def total(self) -> int:
        """Samples."""
        return sum(self.counts.values())

    def own(self) -> Counter[str]:
        """Samples in each function itself."""
        found: Counter[str] = Counter()
        for frames, count in self.counts.items():
            found[frames[-1]] += count
        return found

    def inclusive(self) -> Counter[str]:
        """Samples in each function of nsfs or in what it called."""
        found: Counter[str] = Counter()
        for frames, count in self.counts.items():
            for frame in filter(_is_telling, set(frames)):
                found[frame] += count
        return found


def measure(bench: Bench) -> None:
    """All of it."""
    scratch = bench.scratch("hotpath")
    image = images.build(images.NUMPY)
    push_layout(image.layout, bench.registry, "numpy")
    push_layout(stacks.many_files(f"{scratch}/layout", _FILES, _LAYERS), bench.registry, "maps")
    _measure_index(bench, scratch, f"{bench.registry.host}/numpy:latest")
    with _running(f"{scratch}/read") as (daemon, node):
        _measure_reads(bench, daemon, node, scratch)
    _measure_view(bench, scratch, f"{bench.registry.host}/maps:latest")


@contextlib.contextmanager
def _running(directory: str) -> Iterator[tuple[Daemon, Node]]:
    with run_daemon(directory) as daemon, open_control(daemon.socket) as control:
        yield daemon, Node(control, daemon.root, daemon.run)


def _measure_index(bench: Bench, scratch: str, reference: str) -> None:
    with _running(f"{scratch}/index") as (daemon, node):
        node.resolve(reference, _NAMESPACE)  # starts the worker
        _profile(bench, daemon, "index build", lambda: node.index(reference, _NAMESPACE))


def _measure_view(bench: Bench, scratch: str, reference: str) -> None:
    target = f"{scratch}/view-mnt"
    os.mkdir(target)
    with _running(f"{scratch}/view") as (_, node):
        node.mount(reference, target, _NAMESPACE)
        node.umount(target)
    forget_maps(f"{scratch}/view/root")
    with _running(f"{scratch}/view") as (daemon, node):
        node.resolve(reference, _NAMESPACE)

        def mount() -> None:
            node.mount(reference, target, _NAMESPACE)

        _profile(bench, daemon, "view build", mount)
        node.umount(target)


def _measure_reads(bench: Bench, daemon: Daemon, node: Node, scratch: str) -> None:
    reference, target = f"{bench.registry.host}/numpy:latest", f"{scratch}/mnt"
    os.mkdir(target)
    node.complete(reference, _NAMESPACE)
    node.mount(reference, target, _NAMESPACE, profile="off")
    paths = sorted(regular_files(target))
    random.Random(1).shuffle(paths)
    try:
        drop_caches()
        _profile(bench, daemon, "read hit", lambda: _read(paths))
        node.control.call("Unpin", api.ImageRequest(reference=reference, namespace=_NAMESPACE), api.PinReport)
        node.evict(reference, _NAMESPACE)
        drop_caches()
        _profile(bench, daemon, "read miss", lambda: _read(paths))
    finally:
        node.umount(target)


def _read(paths: list[str]) -> int:
    """The beginning of files, for some seconds at most; how many."""
    deadline = time.monotonic() + _SECONDS
    for number, path in enumerate(paths):
        if time.monotonic() > deadline:
            return number
        with open(path, "rb", buffering=0) as file:
            file.read(_SMALL)
    return len(paths)


def _profile(bench: Bench, daemon: Daemon, what: str, action: Callable[[], int | None]) -> None:
    """Do it, and say what it took and where."""
    directory = f"{REPOSITORY}/bench/results/hotpath"
    os.makedirs(directory, exist_ok=True)
    path = f"{directory}/{what.replace(' ', '-')}"
    with _spied(daemon.pid, f"{path}.folded"):
        began = time.monotonic()
        times = action() or 1
        took = time.monotonic() - began
    found = _load(f"{path}.folded")
    with open(f"{path}.txt", "w", encoding="utf-8") as file:
        file.write(_render(what, found))
    say(_render(what, found))
    for name, seconds in (("", took), (", processor", found.total / _RATE)):
        value = seconds / times * 1000
        bench.add(Figure(name=f"{what}{name}", unit="ms", samples=[value], higher_is_better=False))


@contextlib.contextmanager
def _spied(pid: int, path: str) -> Iterator[None]:
    """Sample the process and its children into `path` while the block runs."""
    options = ["--pid", str(pid), "--subprocesses", "--function", "--format", "raw", "--rate", str(_RATE)]
    with subprocess.Popen([_SPY, "record", *options, "--output", path], stdout=subprocess.PIPE, text=True) as spy:
        assert spy.stdout is not None
        if not any("Sampling process" in line for line in spy.stdout):
            raise RuntimeError(f"py-spy does not start: {spy.wait()}")
        try:
            yield
        finally:
            spy.send_signal(signal.SIGINT)
            spy.communicate()


def _load(path: str) -> _Stacks:
    """What py-spy wrote: frames between semicolons, outermost first, then how often."""
    counts: Counter[tuple[str, ...]] = Counter()
    with open(path, encoding="utf-8") as file:
        for line in file:
            stack, _, count = line.rstrip("\n").rpartition(" ")
            frames = tuple(frame for frame in stack.split(";") if not frame.startswith("process "))
            if frames and frames[-1].partition(":")[0] not in _WAITING:
                counts[frames] += int(count)
    return _Stacks(counts)


def _is_telling(frame: str) -> bool:
    return "(nsfs/" in frame and not any(entry in frame for entry in _ENTRIES)


def _render(what: str, found: _Stacks) -> str:
    lines = [f"{what}: {found.total} samples, {found.total / _RATE:.2f} s of processors"]
    for title, counts in (("itself", found.own()), ("with what it calls, ours", found.inclusive())):
        lines.append(f"  {title}")
        lines += [f"  {count / found.total:7.1%}  {frame}" for frame, count in counts.most_common(_TOP)]
    return "\n".join(lines) + "\n"
