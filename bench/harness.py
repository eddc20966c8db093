"""What the groups of figures share: the stage they run on, how a figure is stated, and how often it is measured.

A figure is a list of samples of nsfs and, where there is something to compare with, as many of that, taken in turns in
the same run. Values compare by their medians. Nothing here decides what is good: a goal is stated beside a figure, and
the report says whether it was reached.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from bench import CACHE
from registry import Registry, run_registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


FORGET_ALL = os.environ.get("FORGET") != "image"
"""Whether all caches of the machine go before a start, or its image's pages alone."""


IS_FULL = os.environ.get("BENCH") == "full"
"""Whether more is asked for than half an hour has."""


def chosen_images(usual: Sequence[str]) -> list[str]:
    """The names of the images that STARTS has, by commas; the `usual` ones without."""
    return [name for name in os.environ.get("STARTS", "").split(",") if name] or list(usual)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured thing. `goal` is for the ratio where there is a baseline, else for the value.

    `enough` is a value that reaches the goal whatever the ratio is.
    """

    name: str
    unit: str
    samples: Sequence[float]
    baseline: Sequence[float] = ()
    baseline_name: str = ""
    higher_is_better: bool
    goal: float | None = None
    enough: float | None = None

    @property
    def value(self) -> float:
        """The median of nsfs's samples."""
        return median(self.samples)

    @property
    def ratio(self) -> float | None:
        """How many times as good as the baseline, above 1 where nsfs is better; None without a baseline."""
        if not self.baseline:
            return None
        better = self.value / median(self.baseline)
        return better if self.higher_is_better else 1 / better

    @property
    def reached(self) -> bool | None:
        """Whether the goal was; None if there is none."""
        if self.goal is None:
            return None
        if self.ratio is not None:
            return self.ratio >= self.goal or (self.enough is not None and self._is_at_least_as_good_as(self.enough))
        return self._is_at_least_as_good_as(self.goal)

    def _is_at_least_as_good_as(self, value: float) -> bool:
        return self.value >= value if self.higher_is_better else self.value <= value

    def report(self) -> dict[str, Any]:
        """For the JSON file."""
        return {
            "name": self.name,
            "unit": self.unit,
            "value": self.value,
            "samples": list(self.samples),
            "baseline": {"name": self.baseline_name, "value": median(self.baseline), "samples": list(self.baseline)}
            if self.baseline
            else None,
            "ratio": self.ratio,
            "goal": self.goal,
            "enough": self.enough,
            "reached": self.reached,
            "higher_is_better": self.higher_is_better,
        }


@dataclass(slots=True)
class Bench:
    """Where figures are measured: a scratch directory on the filesystem under test, a registry, a number of samples."""

    directory: str
    registry: Registry
    samples: int
    figures: list[Figure] = field(default_factory=list)
    _numbers: int = 0

    def scratch(self, name: str) -> str:
        """A new directory."""
        self._numbers += 1
        path = f"{self.directory}/{self._numbers}-{name}"
        os.makedirs(path)
        return path

    def add(self, figure: Figure) -> None:
        """Keep a figure, and show it."""
        self.figures.append(figure)
        verdict = {None: "", True: "reached", False: "MISSED"}[figure.reached]
        ratio = f"{figure.ratio:.2f} x {figure.baseline_name}" if figure.ratio is not None else ""
        goal = f"goal {figure.goal:g}: {verdict}" if figure.goal is not None else ""
        say(f"  {figure.name:<58} {figure.value:>12,.2f} {figure.unit:<8} {ratio:<34} {goal}")


@contextlib.contextmanager
def open_bench(directory: str, samples: int) -> Iterator[Bench]:
    """A stage in `directory`, which must be on an ordinary disk filesystem."""
    with run_registry() as registry:
        yield Bench(directory, registry, samples)


def say(text: str) -> None:
    """Talk on stderr."""
    print(text, file=sys.stderr, flush=True)


def seconds(action: Callable[[], object]) -> float:
    """How long `action` takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def write_out(path: str) -> None:
    """Have the filesystem of `path` write what it holds back; others may be as slow as they are."""
    subprocess.run(["sync", "--file-system", path], check=True)


def touch_program() -> str:
    """The compiled touch.c."""
    source = os.path.join(os.path.dirname(__file__), "touch.c")
    program = f"{CACHE}/touch"
    if not os.path.exists(program) or os.stat(program).st_mtime < os.stat(source).st_mtime:
        os.makedirs(CACHE, exist_ok=True)
        subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", program, source], check=True)
    return program


def touch(mode: str, paths: str, root: str, rounds: int = 1) -> float:
    """Run touch.c over the list in the file `paths` below `root`; the best round's figure."""
    command = [touch_program(), mode, paths, str(rounds)]
    said = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    numbers = [float(line) for line in said.split()]
    return max(numbers) if mode == "seq" else min(numbers)


def list_files(root: str, path: str, *predicates: str) -> int:
    """Write the NUL-ended names below `root` into the file `path`; returns their number."""
    found = subprocess.run(
        ["find", ".", "-mindepth", "1", *predicates, "-print0"], cwd=root, check=True, capture_output=True
    )
    with open(path, "wb") as file:
        file.write(found.stdout)
    return found.stdout.count(b"\0")
