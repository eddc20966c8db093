"""What a bench is: ways, samples, the limit, and the order of things. Pure.

Invariants: a plan's ways are distinct; the order of the samples follows from plan and seed alone, so that a run that
was interrupted goes on in the order that it began.
"""

from __future__ import annotations

import enum
import random
from statistics import median
from typing import TYPE_CHECKING

from msgspec import Struct, structs

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

PHASES = ("resolve", "index", "mount", "run")
ROUND_TRIPS = 4
"""What the least start takes of them: where the image is, what it is, what of it is needed, and that."""


class Way(enum.StrEnum):
    """How the root filesystem comes about."""

    EAGER = "eager"
    """The whole image is fetched first, by a node that has nothing of it."""
    FIRST = "first"
    """Lazily, by a node that has never seen the image."""
    INDEXED = "indexed"
    """Lazily, by a node that has the image's index and none of its contents."""
    PROFILE = "profile"
    """The same, where the node also knows what a start of the image reads first."""
    PACK = "pack"
    """Lazily, by a node that has never seen the image and believes the artifact that lies beside it."""
    LOCAL = "local"
    """nsfs has all of it, and none of it is in memory."""
    OVERLAY = "overlay"
    """What `eager` unpacked is there, stacked by overlayfs, and none of it is in memory."""


WAYS = tuple(str(way) for way in Way if way is not Way.PACK)
"""Those that need nothing beside the image."""
FETCHING = frozenset({Way.EAGER, Way.FIRST, Way.INDEXED, Way.PROFILE, Way.PACK})
"""Ways that have to fetch something."""


class Plan(Struct, frozen=True, kw_only=True):
    """What a bench compares."""

    reference: str
    digest: str
    """Of the manifest."""
    command: list[str]
    wait_for: str
    rate: float
    """Bytes a second; 0 is no limit."""
    round_trip: float
    """Seconds."""
    ways: list[str]
    baseline: str
    """Who does `eager`."""
    version: str
    """Of nsfs, and which code that is."""

    def is_continued_by(self, other: Plan) -> bool:
        """Whether samples of both compare: all is equal but where the image is had."""
        return structs.replace(self, reference=other.reference) == other


class Turn(Struct, frozen=True):
    """One sample to be taken."""

    way: str
    number: int


class Sample(Struct, frozen=True, kw_only=True):
    """One start."""

    way: str
    number: int
    phases: dict[str, float]
    """Seconds of each of PHASES; `run` ends with the first output."""
    received: int
    """Bytes that came over the line until then."""
    settled: int
    """The same, until the line was quiet again."""
    cached: int
    """Bytes of what is read that were in memory before; 0 where there was nothing of it."""
    trace: list[tuple[float, int]]
    """(seconds since the start, bytes so far)."""

    @property
    def seconds(self) -> float:
        """From nothing to the first output."""
        return sum(self.phases.values())


class Touched(Struct, frozen=True):
    """The pages that a start reads."""

    files: int
    size: int
    """Bytes, in whole pages."""
    compressed: int
    """Bytes of them as one zlib stream of level 6."""


class Limit(Struct, frozen=True, kw_only=True):
    """What no start of this image can be quicker than, over this line."""

    run: float
    """Seconds of the run where all is local."""
    files: int
    touched: int
    """Bytes of the pages that a start reads."""
    compressed: int
    """The same, compressed."""
    seconds: float


class WayReport(Struct, frozen=True, kw_only=True):
    """What the samples of one way come to: medians."""

    way: str
    samples: int
    seconds: float
    phases: dict[str, float]
    received: int
    settled: int
    of_limit: float | None
    """Times the limit."""
    sooner: float | None
    """Times sooner than the eager way."""
    overhead: float | None
    """Bytes fetched over bytes touched, compressed."""


class ImageFacts(Struct, frozen=True, kw_only=True):
    """The image."""

    size: int
    """Bytes of its layers' blobs."""
    layers: int


class Report(Struct, frozen=True, kw_only=True):
    """`nsfs bench`."""

    plan: Plan
    image: ImageFacts
    seed: int
    machine: dict[str, str]
    ways: list[WayReport]
    limit: Limit | None
    samples: list[Sample]


def plan_turns(ways: Sequence[str], samples: int, seed: int, once: Collection[str] = ()) -> list[Turn]:
    """So many samples of each way, but of those in `once` a single one.

    Each round is shuffled by itself, so that none is measured early or late.
    """
    shuffled = random.Random(seed)  # noqa: S311  an order, not a secret
    turns = []
    for number in range(samples):
        round_ = [Turn(way, number) for way in ways if number == 0 or way not in once]
        turns += shuffled.sample(round_, len(round_))
    return turns


def plan_rest(turns: Iterable[Turn], done: Iterable[Sample]) -> list[Turn]:
    """Those that are still to be taken."""
    taken = {Turn(sample.way, sample.number) for sample in done}
    return [turn for turn in turns if turn not in taken]


def estimate_rest(rest: Iterable[Turn], took: Mapping[str, float]) -> float | None:
    """Seconds until these are taken, as long as one of its way took last; None where one of a way is yet to come."""
    known = [took.get(turn.way) for turn in rest]
    return None if None in known else sum(filter(None, known))


def plan_limit(plan: Plan, run: float, touched: Touched) -> Limit:
    """The least that a start takes: a local run, the pages that it reads, compressed, and ROUND_TRIPS."""
    fetching = touched.compressed / plan.rate if plan.rate else 0.0
    return Limit(
        run=run,
        files=touched.files,
        touched=touched.size,
        compressed=touched.compressed,
        seconds=run + fetching + ROUND_TRIPS * plan.round_trip,
    )


def local_run(samples: Sequence[Sample]) -> float | None:
    """Seconds of a run where all is local: overlayfs's, and where there is none, ours; None without samples."""
    for way in (Way.OVERLAY, Way.LOCAL):
        if runs := [sample.phases["run"] for sample in samples if sample.way == way]:
            return median(runs)
    return None


def summarize(plan: Plan, samples: Sequence[Sample], limit: Limit | None) -> list[WayReport]:
    """A report for each way that has samples, in the plan's order."""
    of_way = {way: [sample for sample in samples if sample.way == way] for way in plan.ways}
    eager = _median(of_way.get(Way.EAGER, []), lambda sample: sample.seconds)
    return [_summarize_way(way, found, limit, eager) for way, found in of_way.items() if found]


def _summarize_way(way: str, samples: Sequence[Sample], limit: Limit | None, eager: float | None) -> WayReport:
    seconds = median(sample.seconds for sample in samples)
    settled = round(median(sample.settled for sample in samples))
    fetches = limit is not None and limit.compressed > 0 and way in FETCHING
    return WayReport(
        way=way,
        samples=len(samples),
        seconds=seconds,
        phases={phase: median(sample.phases[phase] for sample in samples) for phase in PHASES},
        received=round(median(sample.received for sample in samples)),
        settled=settled,
        of_limit=seconds / limit.seconds if limit else None,
        sooner=eager / seconds if eager else None,
        overhead=settled / limit.compressed if limit and fetches else None,
    )


def _median(samples: Sequence[Sample], of: Callable[[Sample], float]) -> float | None:
    return median(map(of, samples)) if samples else None
