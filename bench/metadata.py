"""Warm metadata through stacks of 10 and 128 layers against overlayfs over the same layers in directories; cold stat.

The tools are written in C (touch.c, find), so that no interpreter's time makes two figures look alike.
"""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

from bench import images, stacks
from bench.harness import Bench, Figure, list_files, say, seconds, touch
from nsfs.bench.pages import drop_caches
from nsfs_daemon import Daemon, run_daemon
from registry import push_layout

if TYPE_CHECKING:
    from collections.abc import Callable

GOAL = 0.95
_IMPORT = "import asyncio, ctypes, email.message, http.client, json, numpy, sqlite3, unittest, xml.etree.ElementTree"


def measure(bench: Bench) -> None:
    """All of it."""
    plain = images.build(images.PYTHON)
    for count in (10, 128):
        _measure_stack(bench, stacks.deepen(plain, count))
    _measure_cold_stat(bench)


def _measure_stack(bench: Bench, built: images.Built) -> None:
    count = len(built.layers)
    scratch = bench.scratch(f"stack-{count}")
    push_layout(built.layout, bench.registry, f"stack/{count}")
    with (
        stacks.overlay(built, scratch) as merged,
        run_daemon(f"{scratch}/nsfs") as daemon,
        daemon.mounted(f"{bench.registry.host}/stack/{count}", f"{scratch}/mnt"),
    ):
        roots = (f"{scratch}/mnt", merged)
        everything, regular = f"{scratch}/all", f"{scratch}/files"
        names = [list_files(root, everything) for root in reversed(roots)]
        say(f"  {count} layers, {names[0]} names")
        assert names[0] == names[1]
        list_files(roots[0], regular, "-type", "f")
        ways: dict[str, Callable[[str], float]] = {
            "stat": lambda root: touch("stat", everything, root, 5),
            "open, read, close": lambda root: touch("open", regular, root, 5),
            "find": _find,
            "python import": _import,
        }
        for name, way in ways.items():
            _compare(bench, f"{name}, warm, {count} layers", way, roots, GOAL if count == 10 else None)


def _compare(bench: Bench, name: str, way: Callable[[str], float], roots: tuple[str, str], goal: float | None) -> None:
    """Take samples of both in turns, after one of each that does not count: it warms the caches."""
    pairs = [tuple(way(root) for root in roots) for _ in range(bench.samples + 1)][1:]
    unit = "ns each" if name.startswith(("stat", "open")) else "s"
    ours, theirs = zip(*pairs, strict=True)
    bench.add(
        Figure(
            name=name,
            unit=unit,
            samples=ours,
            baseline=theirs,
            baseline_name="overlayfs",
            higher_is_better=False,
            goal=goal,
        )
    )


def _find(root: str) -> float:
    """All names with their types and sizes."""
    command = ["find", root, "-printf", "%y %s %p\n"]
    return min(seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)) for _ in range(3))


def _import(root: str) -> float:
    command = ["chroot", root, "python3", "-B", "-c", _IMPORT]
    return min(seconds(lambda: subprocess.run(command, check=True)) for _ in range(3))


def _measure_cold_stat(bench: Bench) -> None:
    """The metadata of one view after its caches were dropped, as stats a second."""
    scratch = bench.scratch("cold-stat")
    layout = stacks.many_files(f"{scratch}/layout", 50_000, 1)
    push_layout(layout, bench.registry, "many")
    with run_daemon(f"{scratch}/nsfs") as daemon, daemon.mounted(f"{bench.registry.host}/many", f"{scratch}/mnt"):
        (view,) = views(daemon)
        names = f"{scratch}/names"
        list_files(view, names)
        samples = []
        for _ in range(bench.samples):
            drop_caches()
            samples.append(1e9 / touch("stat", names, view))
    bench.add(Figure(name="stat, cold, one view", unit="/s", samples=samples, higher_is_better=True, goal=100_000))


def views(daemon: Daemon) -> list[str]:
    """Where the daemon's EROFS views are mounted."""
    with open("/proc/self/mountinfo") as mounts:
        lines = [line.split() for line in mounts]
    return [line[4] for line in lines if line[4].startswith(f"{os.path.realpath(daemon.run)}/") and "erofs" in line]
