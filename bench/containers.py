"""Containers through containerd: one snapshot, a hundred starts at once, and the first output over a line that limits.

Both sides are snapshotters of one containerd, asked through it, so that its own part is in both. What is started first
over a line is started on a node that never saw the image; with an existing index, on one that has seen it, and has
evicted every byte of its contents.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from statistics import quantiles
from typing import TYPE_CHECKING

from bench import estargz, images
from bench.harness import Bench, Figure, say, seconds
from containerd import NEWER
from nodes import Node, run_node
from nsfs.bench.line import Shape, run_line
from registry import push_layout
from snapshots_api import Backend

if TYPE_CHECKING:
    from collections.abc import Iterator

_NAMESPACE = "bench"
_OURS, _THEIRS = "nsfs", "overlayfs"
_CALLS = 200
"""Snapshots in one sample."""
_CROWD = 100
_HERE = "here\n"
_MBIT, _ROUND_TRIP_MS = 100.0, 30.0
_ROOT = {"containerd.io/gc.root": "now"}
"""The label that keeps a snapshot from containerd's garbage collection."""


def measure(bench: Bench) -> None:
    """All of it."""
    image = images.build(images.PYTHON)
    push_layout(image.layout, bench.registry, "plain")
    push_layout(estargz.convert(image), bench.registry, "estargz")
    reference = f"{bench.registry.host}/plain:latest"
    with _fresh_node(bench) as node:
        for snapshotter in (_OURS, _THEIRS):
            node.pull(reference, "--snapshotter", snapshotter, namespace=_NAMESPACE)
        _measure_calls(bench, node)
        _measure_crowd(bench, node, reference)
    _measure_first_output(bench, image)


@contextlib.contextmanager
def _fresh_node(bench: Bench) -> Iterator[Node]:
    scratch = bench.scratch("node")
    with run_node(scratch, NEWER) as node:
        yield node
        node.clear(_NAMESPACE)
    shutil.rmtree(scratch)


def _measure_calls(bench: Bench, node: Node) -> None:
    """Prepare and Mounts of a container, one after the other."""
    took: dict[str, list[list[float]]] = {_OURS: [], _THEIRS: []}
    for _ in range(bench.samples):
        for snapshotter, samples in took.items():
            with Backend(node.containerd.socket, snapshotter, _NAMESPACE) as backend:
                samples.append(_time_calls(backend))
    for percent in (50, 99):
        ours, theirs = ([quantiles(sample, n=100)[percent - 1] for sample in samples] for samples in took.values())
        bench.add(_figure(f"Prepare and Mounts, {percent}th percentile of {_CALLS}", "ms", ours, theirs))


def _time_calls(backend: Backend) -> list[float]:
    """Milliseconds of each."""
    listed = backend.select()
    (top,) = {info.name for info in listed} - {info.parent for info in listed}

    def call(key: str) -> float:
        def prepare() -> None:
            backend.prepare(key, top, labels=_ROOT)
            backend.mounts(key)

        took = seconds(prepare) * 1000
        backend.remove(key)
        return took

    return [call(f"k{number}") for number in range(_CALLS)]


def _measure_crowd(bench: Bench, node: Node, reference: str) -> None:
    took: dict[str, list[float]] = {_OURS: [], _THEIRS: []}
    for _ in range(min(2, bench.samples)):
        for snapshotter, samples in took.items():
            samples.append(_start_crowd(node, reference, snapshotter))
    bench.add(_figure(f"{_CROWD} containers at once, until all have run", "s", took[_OURS], took[_THEIRS]))


def _start_crowd(node: Node, reference: str, snapshotter: str) -> float:
    """Seconds until each has said something and is gone."""
    server = node.containerd
    ctr = [*server.enter, f"{server.binaries}/ctr", "-a", server.socket, "-n", _NAMESPACE]
    command = [*ctr, "run", "--rm", "--snapshotter", snapshotter, reference]
    start = time.perf_counter()
    running = [
        subprocess.Popen([*command, f"{snapshotter}{number}", "/bin/echo", "here"], stdout=subprocess.PIPE, text=True)
        for number in range(_CROWD)
    ]
    said = [process.communicate()[0] for process in running]
    if said != [_HERE] * _CROWD:
        raise RuntimeError(f"of {_CROWD} containers only so many ran: {said.count(_HERE)}")
    return time.perf_counter() - start


def _measure_first_output(bench: Bench, image: images.Built) -> None:
    """Pull and run, until python3 has printed something."""
    say(f"  {image.recipe.name}: {image.size >> 20} MiB in {len(image.layers)} layers, over {_MBIT:.0f} Mbit/s")
    seen: dict[str, list[float]] = {}
    theirs: list[float] = []
    with run_line(bench.registry.host, Shape(_MBIT * 1e6 / 8, _ROUND_TRIP_MS / 1000)) as line:
        for _ in range(min(3, bench.samples)):
            for kind in ("plain", "estargz"):
                for what, took in _our_first_outputs(bench, f"{line.host}/{kind}:latest"):
                    seen.setdefault(f"{kind}, {what}", []).append(took)
            with _fresh_node(bench) as node:
                theirs.append(_first_output(node, f"{line.host}/plain:latest", _THEIRS))
    for what, ours in seen.items():
        name = f"{_MBIT:.0f} Mbit/s, {_ROUND_TRIP_MS:.0f} ms, {what}: first output"
        bench.add(_figure(name, "s", ours, theirs))


def _our_first_outputs(bench: Bench, reference: str) -> Iterator[tuple[str, float]]:
    """On a node that never saw the image; and where its index is all that is left of it."""
    with _fresh_node(bench) as node:
        yield "never seen", _first_output(node, reference, _OURS)
        node.clear(_NAMESPACE)
        node.daemon.nsfs("evict", reference, "--namespace", _NAMESPACE)
        yield "with an index", _first_output(node, reference, _OURS)


def _first_output(node: Node, reference: str, snapshotter: str) -> float:
    def start() -> None:
        node.pull(reference, "--snapshotter", snapshotter, namespace=_NAMESPACE)
        options = ("--snapshotter", snapshotter)
        command = ("python3", "-c", "print(1)")
        said = node.containerd.run(reference, "first", *command, options=options, namespace=_NAMESPACE)
        if said != "1\n":
            raise RuntimeError(f"python3 said: {said!r}")

    return seconds(start)


def _figure(name: str, unit: str, ours: list[float], theirs: list[float]) -> Figure:
    return Figure(
        name=name, unit=unit, samples=ours, baseline=theirs, baseline_name="overlayfs", higher_is_better=False
    )
