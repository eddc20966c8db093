"""Whether a clock tells two cases apart: pairs of calls are timed until a leak of a millisecond would be seen.

Owns how the samples are taken: both cases of a pair in an order that chance decides, by one who is honest and by one
with a leak of LEAK planted into one of the cases. Pairs are taken until such a leak would be seen with a probability of
SURE. Then the planted one has to be seen, and the honest one's times must not differ. What is timed is the test's own.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

import ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LEAK: Final = 0.001
"""Seconds."""
SURE: Final = 0.95
BATCH: Final = 100
"""Pairs between two looks at the power."""
LEAST: Final = 500
"""Pairs, however even they are: a tenant is given a thousand of each call."""
MOST: Final = 5000

Times = dict[str, float]
"""Seconds by call."""


class Watch:
    """Adds up the seconds that each call takes; a `leak` comes on top."""

    def __init__(self, leak: float) -> None:
        self.times: Times = defaultdict(float)
        self._leak = leak

    @contextmanager
    def of(self, call: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        if self._leak:
            time.sleep(self._leak)
        self.times[call] += time.perf_counter() - begun


class Pair(Protocol):
    """Two cases of which one should not be told from the other."""

    def time(self, who: str, watch: Watch, *, first: bool) -> None:
        """Have `who` make the calls of one of the cases."""


@dataclass
class Comparison:
    """What was measured so far: the first case's times less the second's, call by call."""

    honest: list[Times] = field(default_factory=list)
    planted: list[Times] = field(default_factory=list)

    def add(self, pair: Pair, number: int) -> None:
        """Time a pair: as b, and as c, of whose first cases a leak tells."""
        self.honest.append(_difference(pair, "b", 0, random.Random(number)))
        self.planted.append(_difference(pair, "c", LEAK, random.Random(-number - 1)))

    def powers(self) -> Times:
        """By call, the probability with which a leak would be seen."""
        return {call: ranks.power([each[call] for each in self.honest], LEAK) for call in self.honest[0]}

    def is_sure(self) -> bool:
        return bool(self.honest) and min(self.powers().values()) >= SURE

    def is_over(self) -> bool:
        return len(self.honest) >= MOST or (len(self.honest) >= LEAST and self.is_sure())

    def scores(self, differences: list[Times]) -> Times:
        return {call: ranks.score([each[call] for each in differences]) for call in differences[0]}

    def check(self) -> None:
        """Fail where nothing can be said, where the planted leak is not seen, and where there is one."""
        honest, planted, pairs = self.scores(self.honest), self.scores(self.planted), len(self.honest)
        print({"pairs": pairs, "powers": self.powers(), "scores": honest, "planted": planted})
        assert self.is_sure(), f"no statement is possible on this machine, with {pairs} pairs: {self.powers()}"
        assert min(planted.values()) > ranks.CRITICAL, f"the planted leak is not seen: {planted}"
        assert all(abs(score) < ranks.CRITICAL for score in honest.values()), f"with {pairs} pairs: {honest}"


def compare(batch_from: Callable[[range], Iterator[Pair]]) -> Comparison:
    """Time pairs, made BATCH by BATCH by their numbers, until enough is known."""
    found = Comparison()
    while not found.is_over():
        numbers = range(len(found.honest), len(found.honest) + BATCH)
        for number, pair in zip(numbers, batch_from(numbers), strict=True):
            found.add(pair, number)
    return found


def _difference(pair: Pair, who: str, leak: float, chance: random.Random) -> Times:
    times: dict[bool, Times] = {}
    for first in chance.sample((True, False), 2):
        watch = Watch(leak if first else 0)
        pair.time(who, watch, first=first)
        times[first] = watch.times
    return {call: times[True][call] - times[False][call] for call in times[True]}
