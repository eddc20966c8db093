"""From nothing to the first output of real programs over a slow line: `nsfs bench` over a set of images.

Owns a private containerd, whose pull is the eager way. Samples of an interrupted run stay in bench/results/starts and
are gone on with; once all are there, the report and the pictures are what is left. STARTS names images of the set, by
commas.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from bench import REPOSITORY, images
from bench.containerd import run_containerd
from bench.harness import FORGET_ALL, IS_FULL, Bench, Figure, chosen_images, say
from nsfs.bench.journal import NAME
from nsfs.bench.line import Shape
from nsfs.bench.model import Way
from nsfs.bench.picture import draw
from nsfs.bench.run import measure as measure_starts
from nsfs.bench.stage import Wish
from nsfs.cli.render import render_json
from nsfs.errors import BusyError
from nsfs.serve.config import load_system_config
from registry import push_layout

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nsfs.bench.model import Report

_LINE = Shape(12.5e6, 0.03)
_SOONER = {Way.FIRST: None, Way.INDEXED: 3.0, Way.PROFILE: 5.0, Way.PACK: 6.0}
"""Times sooner than eager; None has no goal of its own."""
_SOONER_BY_PACK = dict.fromkeys(("numpy", "java", "gcc", "node"), 9.0) | {"tex": 20.0}
"""The same, for images of which more is wanted."""
_OF_LIMIT = {Way.PROFILE: 3.0, Way.PACK: 1.5}
"""Times the limit."""
_FETCHED = 1.3
"""Bytes that come by a pack, over those touched, compressed."""
_EQUAL = 1 / 1.05
"""What is no loss."""
_EQUAL_RUNS = ((Way.LOCAL, Way.OVERLAY, "overlayfs"), (Way.FIRST, Way.EAGER, "after an eager pull"))
"""Runs, whose they are held against, and that one's name."""
_TIMEOUT = 120.0
_BY_LINE = frozenset({Way.EAGER, Way.FIRST})
"""Ways that fetch all of an image: what they take is the line's time, and varies little."""
_LARGE = 150e6
"""Bytes of blobs from which on one sample of those is enough, where half an hour is all there is."""
_READY, _READY_RATE = 15.0, 20e6
"""Seconds until the ways of an image are ready, and bytes of it a second."""
_LINE_RATE, _START = 8e6, 5.0
"""Bytes a second of what fetches and unpacks an image; seconds of a start, and of what is around it."""


def measure(bench: Bench) -> None:
    """All figures of this group."""
    todo = [images.build(images.RECIPES[name]) for name in chosen_images([recipe.name for recipe in images.SET])]
    began, done = time.monotonic(), list[images.Built]()
    with run_containerd(bench.scratch("containerd")) as containerd:
        while todo:
            left = _left(time.monotonic() - began, done, todo, bench.samples)
            say(f"  image {len(done) + 1} of {len(done) + len(todo)}; {left / 60:.0f} min to go, as it seems")
            image = todo.pop(0)
            push_layout(image.layout, bench.registry, image.recipe.name)
            _report(bench, image.recipe.name, _measure(bench, image, containerd.server.socket))
            done.append(image)
    for image in done:
        os.remove(f"{_output(image)}/{NAME}")


def _left(elapsed: float, done: Sequence[images.Built], todo: Sequence[images.Built], samples: int) -> float:
    """Seconds that the images in `todo` will take, as those that are `done` did."""
    expected = sum(_expect(image, samples) for image in done)
    return sum(_expect(image, samples) for image in todo) * (elapsed / expected if expected else 1.0)


def _expect(image: images.Built, samples: int) -> float:
    """Seconds that an image takes on the machine of bench/README.md."""
    by_line = len(_BY_LINE) * (1 if _once(image) else samples)
    return _READY + image.size / _READY_RATE + by_line * image.size / _LINE_RATE + samples * len(Way) * _START


def _once(image: images.Built) -> frozenset[Way]:
    """The ways of which there is one sample."""
    return _BY_LINE if image.size > _LARGE and not IS_FULL else frozenset()


def _output(image: images.Built) -> str:
    return f"{REPOSITORY}/bench/results/starts/{image.recipe.name}"


def _measure(bench: Bench, image: images.Built, socket: str) -> Report:
    name, output = image.recipe.name, _output(image)
    once = _once(image)
    if once and bench.samples > 1:
        seconds = image.size / _LINE.rate
        say(f"  {name}: one sample of {' and '.join(sorted(once))}, as the line alone takes {seconds:.0f} s of each")
    wish = Wish(
        reference=f"{bench.registry.host}/{name}:latest",
        words=image.recipe.command,
        wait_for=image.recipe.ready,
        shape=_LINE,
        ways=tuple(Way),
        samples=bench.samples,
        once=once,
        seed=None,
        directory=bench.scratch(name),
        output=output,
        containerd=socket,
        timeout=_TIMEOUT,
        publish=True,
        forget_all=FORGET_ALL,
    )
    report = _take(wish, lambda text: say(f"  {name}: {text}"))
    draw(report, output)
    with open(f"{output}/report.json", "w") as file:
        file.write(render_json(report) + "\n")
    return report


def _take(wish: Wish, tell: Callable[[str], None]) -> Report:
    """Go on where an interrupted run was, unless it was of another image or of other code."""
    try:
        return measure_starts(wish, load_system_config(), tell)
    except BusyError as error:
        tell(f"begins anew: {error.message}")
        os.remove(f"{wish.output}/{NAME}")
        return measure_starts(wish, load_system_config(), tell)


def _report(bench: Bench, name: str, report: Report) -> None:
    if report.limit is not None:
        say(f"  {name}: limit {report.limit.seconds:.2f} s, {report.limit.compressed / 1e6:.2f} MB compressed touched")
    eager = _seconds(report, Way.EAGER)
    sooner = _SOONER | ({Way.PACK: _SOONER_BY_PACK[name]} if name in _SOONER_BY_PACK else {})
    for way, goal in sooner.items():
        ours = _seconds(report, way)
        bench.add(_figure(f"{name}: first output, {way}", ours, eager, report.plan.baseline, goal))
    if report.limit is not None:
        for way, goal in _OF_LIMIT.items():
            bench.add(_times(f"{name}: of the limit, {way}", _seconds(report, way), report.limit.seconds, goal))
        fetched = [float(sample.settled) for sample in report.samples if sample.way == Way.PACK]
        bench.add(_times(f"{name}: fetched over touched, pack", fetched, report.limit.compressed, _FETCHED))
    for way, theirs, whose in _EQUAL_RUNS:
        bench.add(_figure(f"{name}: run, {way}", _runs(report, way), _runs(report, theirs), whose, _EQUAL))


def _figure(name: str, ours: list[float], theirs: list[float], whose: str, goal: float | None) -> Figure:
    return Figure(
        name=name,
        unit="s",
        samples=ours,
        baseline=theirs,
        baseline_name=whose,
        higher_is_better=False,
        goal=goal,
    )


def _times(name: str, ours: list[float], least: float, goal: float) -> Figure:
    return Figure(name=name, unit="x", samples=[value / least for value in ours], higher_is_better=False, goal=goal)


def _seconds(report: Report, way: Way) -> list[float]:
    return [sample.seconds for sample in report.samples if sample.way == way]


def _runs(report: Report, way: Way) -> list[float]:
    return [sample.phases["run"] for sample in report.samples if sample.way == way]
