"""A first pull to a readable mount against containerd's: as fast as the machine goes, and over a line that limits.

Each sample of nsfs has a fresh daemon with an empty pool, each of containerd an empty store; the worker's start and the
command's own are in the time, the servers' are not: of ours its fork server's, which works later than the daemon
answers.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from typing import TYPE_CHECKING

from bench import images
from bench.containerd import Containerd, run_containerd
from bench.harness import Bench, Figure, say, seconds, write_out
from nsfs.bench.line import Shape, run_line
from nsfs_daemon import run_daemon
from registry import push_layout

if TYPE_CHECKING:
    from collections.abc import Callable

GOAL = 2.5
_MBIT, _ROUND_TRIP_MS = 100.0, 30.0
_ROUND_TRIPS = 6
_OVER_THE_LIMIT = 1.05


def measure(bench: Bench) -> None:
    """All of it."""
    built = [images.build(recipe) for recipe in (images.PYTHON, images.JDK, images.SCIPY)]
    for image in built:
        push_layout(image.layout, bench.registry, image.recipe.name)
    scratch = bench.scratch("pull")
    with run_containerd(f"{scratch}/c") as server:
        say(f"  containerd {server.version}")
        for image in built:
            _measure_first_pull(bench, server, scratch, image)
        for image in built[:2]:
            _measure_over_a_line(bench, server, scratch, image)


def _measure_first_pull(bench: Bench, server: Containerd, scratch: str, image: images.Built) -> None:
    reference = f"{bench.registry.host}/{image.recipe.name}:latest"
    ours, theirs = [], []
    for _ in range(bench.samples):
        theirs.append(_their_pull(server, scratch, reference))
        ours.append(_our_pull(scratch, reference))
    bench.add(
        Figure(
            name=f"first pull, {image.recipe.name}, {image.size >> 20} MiB in {len(image.layers)} layers",
            unit="s",
            samples=ours,
            baseline=theirs,
            baseline_name=f"containerd {server.version.partition('+')[0]}",
            higher_is_better=False,
            goal=GOAL,
        )
    )


def _their_pull(server: Containerd, scratch: str, reference: str) -> float:
    write_out(scratch)
    took = server.pull(reference)
    server.remove(reference)
    return took


def _our_pull(scratch: str, reference: str) -> float:
    """Until a file in the mount can be read."""
    write_out(scratch)
    os.makedirs(f"{scratch}/mnt", exist_ok=True)
    with run_daemon(f"{scratch}/nsfs") as daemon:
        daemon.nsfs("inspect", "oci:/nowhere", "--namespace", "warm-up", check=False)  # by the fork server
        took = seconds(_mount_and_read(lambda: daemon.nsfs("mount", reference, f"{scratch}/mnt"), f"{scratch}/mnt"))
        daemon.nsfs("umount", f"{scratch}/mnt")
    shutil.rmtree(f"{scratch}/nsfs")
    return took


def _mount_and_read(mount: Callable[[], object], root: str) -> Callable[[], None]:
    def act() -> None:
        mount()
        with open(f"{root}/etc/debian_version", "rb") as file:
            file.read()

    return act


def _measure_over_a_line(bench: Bench, server: Containerd, scratch: str, image: images.Built) -> None:
    """As multiples of what the line itself takes: all compressed bytes, and six round trips."""
    limit = image.size * 8 / _MBIT / 1e6 + _ROUND_TRIPS * _ROUND_TRIP_MS / 1000
    with contextlib.ExitStack() as stack:
        line = stack.enter_context(run_line(bench.registry.host, Shape(_MBIT * 1e6 / 8, _ROUND_TRIP_MS / 1000)))
        reference = f"{line.host}/{image.recipe.name}:latest"
        theirs = [_their_pull(server, scratch, reference) / limit]
        ours = [_our_pull(scratch, reference) / limit for _ in range(min(2, bench.samples))]
    name = f"{_MBIT:.0f} Mbit/s, {_ROUND_TRIP_MS:.0f} ms, {image.recipe.name}: time over the line's"
    bench.add(Figure(name=name, unit="x", samples=ours, higher_is_better=False, goal=_OVER_THE_LIMIT))
    bench.add(Figure(name=f"{name}, containerd", unit="x", samples=theirs, higher_is_better=False))
