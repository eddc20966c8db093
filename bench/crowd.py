"""Twenty containers of one image at once: what comes over a slow line, and when the last of them is up.

Ours start on a node that has the image's index and profile and none of its contents, and on one that has all of it;
overlayfs's over what containerd unpacked, each with directories of its own for what is written. Caches are cold. Beside
it, one container alone over the line: twenty are to fetch what one does.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bench import images
from bench.containerd import run_containerd
from bench.harness import FORGET_ALL, Bench, Figure, say
from nsfs.bench.command import rehearse, run_command
from nsfs.bench.line import FREE, Shape
from nsfs.bench.model import Way
from nsfs.bench.roots import StackedRoot
from nsfs.bench.stage import Stage, Wish, open_stage
from nsfs.serve.config import load_system_config
from registry import push_layout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nsfs.bench.roots import Root

_CROWD = 20
_LINE = Shape(12.5e6, 0.03)
_TIMEOUT = 300.0
_LAST_UP = 1 / 1.5
_BYTES_OF_ONE = 1 / 1.05


@dataclass(frozen=True, slots=True)
class _Start:
    """Seconds until the last was up, and what came over the line until it was quiet again."""

    seconds: float
    received: int


def measure(bench: Bench) -> None:
    """All of it."""
    image = images.build(images.NUMPY)
    push_layout(image.layout, bench.registry, "crowd")
    with run_containerd(bench.scratch("containerd")) as containerd:
        wish = _wish(bench, image, containerd.server.socket)
        with open_stage(wish, load_system_config(), lambda text: say(f"  {text}")) as stage:
            stage.make_ready()
            _measure(bench, stage)


def _wish(bench: Bench, image: images.Built, socket: str) -> Wish:
    return Wish(
        reference=f"{bench.registry.host}/crowd:latest",
        words=image.recipe.command,
        wait_for=image.recipe.ready,
        shape=_LINE,
        ways=(Way.PROFILE, Way.LOCAL, Way.OVERLAY),
        samples=bench.samples,
        seed=None,
        directory=bench.scratch("crowd"),
        output="",
        containerd=socket,
        timeout=_TIMEOUT,
        forget_all=FORGET_ALL,
    )


def _measure(bench: Bench, stage: Stage) -> None:
    alone, beside, local, theirs = [], [], [], []
    for _ in range(bench.samples):
        alone.append(_start(stage, Way.PROFILE, 1))
        beside.append(_start(stage, Way.PROFILE, _CROWD))
        local.append(_start(stage, Way.LOCAL, _CROWD))
        theirs.append(_start(stage, Way.OVERLAY, _CROWD))
    bench.add(_last_up("profile known, over the line", beside, theirs))
    bench.add(_last_up("local", local, theirs))
    bench.add(
        Figure(
            name=f"{_CROWD} at once, over the line",
            unit="MB",
            samples=[start.received / 1e6 for start in beside],
            baseline=[start.received / 1e6 for start in alone],
            baseline_name="one alone",
            higher_is_better=False,
            goal=_BYTES_OF_ONE,
        )
    )


def _last_up(name: str, ours: Sequence[_Start], theirs: Sequence[_Start]) -> Figure:
    return Figure(
        name=f"{_CROWD} at once, {name}: last up",
        unit="s",
        samples=[start.seconds for start in ours],
        baseline=[start.seconds for start in theirs],
        baseline_name="overlayfs, local",
        higher_is_better=False,
        goal=_LAST_UP,
    )


def _start(stage: Stage, way: Way, number: int) -> _Start:
    """So many containers by one way, each with a mount of its own."""
    with stage.open_root(way) as root:
        stage.line.shape = FREE
        root.prepare()
        roots = [_own(stage, root, index) for index in range(number)]
        targets = [f"{stage.target}-{index}" for index in range(number)]
        for target in targets:
            os.makedirs(target, exist_ok=True)
        for each in roots:
            stage.forget(each)
        rehearse()
        stage.line.shape = _LINE
        before, began = stage.line.received, time.monotonic()
        try:
            with ThreadPoolExecutor(number) as pool:
                last = max(pool.map(lambda shown, target: _start_one(stage, shown, target), roots, targets))
            stage.line.wait_until_quiet()
            return _Start(last - began, stage.line.received - before)
        finally:
            for shown, target in zip(roots, targets, strict=True):
                shown.umount(target)


def _own(stage: Stage, root: Root, index: int) -> Root:
    """With a place of its own for what is written."""
    if not isinstance(root, StackedRoot):
        return root
    scratch = f"{stage.directory}/writes-{index}"
    os.makedirs(scratch, exist_ok=True)
    return StackedRoot(replace(root.stack, scratch=scratch))


def _start_one(stage: Stage, root: Root, target: str) -> float:
    root.mount(target)
    return run_command(target, stage.command, timeout=_TIMEOUT)
