"""From nothing to the first output of real programs over a slow line: `nsfs bench` over a set of images.

Owns a private containerd, whose pull is the eager way. Samples of an interrupted run stay in bench/results/starts and
are gone on with; once all are there, the report and the pictures are what is left. STARTS names images of the set, by
commas.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING

from bench import REPOSITORY, images
from bench.containerd import run_containerd
from bench.harness import FORGET_ALL, Bench, Figure, chosen_images, say
from nsfs.bench.command import run_command, with_config
from nsfs.bench.journal import NAME
from nsfs.bench.line import Shape
from nsfs.bench.model import WAYS, Way
from nsfs.bench.node import run_node
from nsfs.bench.pages import drop_caches
from nsfs.bench.picture import draw
from nsfs.bench.roots import NAMESPACE
from nsfs.bench.run import measure as measure_starts
from nsfs.bench.stage import Wish
from nsfs.cli.render import render_json
from nsfs.serve.config import load_system_config
from nsfs_daemon import NSFS
from registry import push_layout

if TYPE_CHECKING:
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


def measure(bench: Bench) -> None:
    """All figures of this group."""
    with run_containerd(bench.scratch("containerd")) as containerd:
        for name in chosen_images([recipe.name for recipe in images.SET]):
            image = images.build(images.RECIPES[name])
            push_layout(image.layout, bench.registry, name)
            _publish(bench, image)
            _report(bench, name, _measure(bench, image, containerd.server.socket))


def _publish(bench: Bench, image: images.Built) -> None:
    """Put an artifact beside the image, whose pack is what a start reads."""
    reference = f"{bench.registry.host}/{image.recipe.name}:latest"
    directory = bench.scratch("publish")
    os.makedirs(f"{directory}/mnt")
    with run_node(directory, load_system_config(), {}) as node:
        command = with_config(image.recipe.command, image.recipe.ready, node.resolve(reference, NAMESPACE).config)
        node.index(reference, NAMESPACE)
        node.evict(reference, NAMESPACE)
        drop_caches()
        node.mount(reference, f"{directory}/mnt", NAMESPACE, profile="record")
        try:
            run_command(f"{directory}/mnt", command, timeout=_TIMEOUT)
        finally:
            node.umount(f"{directory}/mnt")
        subprocess.run([*NSFS, "--socket", f"{node.run}/nsfs.sock", "index", "push", reference], check=True)
    shutil.rmtree(directory)


def _measure(bench: Bench, image: images.Built, socket: str) -> Report:
    name = image.recipe.name
    output = f"{REPOSITORY}/bench/results/starts/{name}"
    wish = Wish(
        reference=f"{bench.registry.host}/{name}:latest",
        words=image.recipe.command,
        wait_for=image.recipe.ready,
        shape=_LINE,
        ways=(*WAYS, Way.PACK),
        samples=bench.samples,
        seed=None,
        directory=bench.scratch(name),
        output=output,
        containerd=socket,
        timeout=_TIMEOUT,
        forget_all=FORGET_ALL,
    )
    report = measure_starts(wish, load_system_config(), lambda text: say(f"  {name}: {text}"))
    draw(report, output)
    with open(f"{output}/report.json", "w") as file:
        file.write(render_json(report) + "\n")
    os.remove(f"{output}/{NAME}")
    return report


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
