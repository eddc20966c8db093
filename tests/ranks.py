"""Whether pairs of times differ: Wilcoxon's signed-rank test, and how sure it is to see a difference. Pure."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

CRITICAL = 3.29
"""Standard deviations beyond which chance gets once in a thousand times, in either direction."""


def score(differences: Sequence[float]) -> float:
    """How far from even the signed ranks are, in standard deviations; chance alone gives a standard normal one."""
    ordered = sorted((difference for difference in differences if difference), key=abs)
    n = len(ordered)
    signed = sum(math.copysign(rank, difference) for rank, difference in enumerate(ordered, 1))
    return signed / math.sqrt(n * (n + 1) * (2 * n + 1) / 6) if n else 0.0


def power(differences: Sequence[float], shift: float, *, trials: int = 200, seed: int = 0) -> float:
    """How often a shift of all differences would be seen, among samples like this one of which it is not known."""
    chance = random.Random(seed)

    def seen() -> bool:
        drawn = (chance.choice((-1, 1)) * chance.choice(differences) + shift for _ in differences)
        return score(list(drawn)) > CRITICAL

    return sum(seen() for _ in range(trials)) / trials
