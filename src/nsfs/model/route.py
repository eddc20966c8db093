"""The route to a registry: what is measured of it, and what follows for the ranges that are asked for over it.

Owns `RouteMeter`, which estimates round trip and rate from answers as they arrive, and the arithmetic of ranges: how
large one should be, how many fill it, how many useless bytes are worth less than one more request. All of it is
pure; who measures gives the times.

Invariants: a route that nobody measured yet has round trip and rate 0, and what is planned for it is what the limits
say.
"""

from __future__ import annotations

from collections import deque
from math import ceil
from typing import Final, NamedTuple

from msgspec import Struct

_ANSWERS: Final = 32
_WINDOWS: Final = 8
_WINDOW_SECONDS: Final = 0.02
_WINDOW_BYTES: Final = 64 << 10
_WINDOW_ENOUGH: Final = 4 << 20

_MOST_UNDER_WAY: Final = 1 << 40

_TRIPS_PER_RANGE: Final = 4
"""A range is worth so many round trips of a full route: the wait before it is then a fifth of its time, and another
range beside it fills that."""
_LEAST_RANGE: Final = 512 << 10


class Route(Struct, frozen=True, gc=False, array_like=True):
    """What is known of a route."""

    name: str = ""
    """Whose connections to which registry: what shares it shares its places. Empty for none, as to a local file."""
    round_trip: float = 0.0
    """Seconds from a request on an open connection until the answer begins."""
    rate: float = 0.0
    """Bytes a second, of all connections together."""

    @property
    def under_way(self) -> int:
        """Bytes that are on the way when it is full: those that a round trip costs.

        0 where that makes no sense: another worker may say anything of its route.
        """
        found = self.round_trip * self.rate
        return int(found) if 0 < found < _MOST_UNDER_WAY else 0


class RouteMeter:
    """Estimates a route from its answers; times are seconds of one clock, in the order in which they are given.

    The round trip is the shortest of the latest 32: longer ones waited for a server, a handshake, or behind other
    bytes. The rate is the best of the latest 8 windows, each of at least 64 KiB and 20 ms in which some body was under
    way: worse ones waited for whoever read them, or shared the way with somebody else. A body's first piece counts
    for nothing, since it came with the answer's head.
    """

    def __init__(self) -> None:
        self._answers: deque[float] = deque(maxlen=_ANSWERS)
        self._rates: deque[float] = deque(maxlen=_WINDOWS)
        self._bodies = 0
        self._since = 0.0
        """Up to when the window's time is counted, while a body is under way."""
        self._seconds = 0.0
        self._bytes = 0

    def answered(self, seconds: float) -> None:
        """An answer began so long after its request was sent."""
        self._answers.append(seconds)

    def began(self, now: float) -> None:
        """A body's first piece is here."""
        self._tick(now)
        self._bodies += 1

    def received(self, now: float, size: int) -> None:
        """A further piece is here."""
        self._tick(now)
        self._bytes += size
        if (self._seconds >= _WINDOW_SECONDS and self._bytes >= _WINDOW_BYTES) or self._bytes >= _WINDOW_ENOUGH:
            self._rates.append(self._bytes / max(self._seconds, 1e-6))
            self._seconds, self._bytes = 0.0, 0

    def ended(self, now: float) -> None:
        """A body that began has nothing more to come, or was given up."""
        self._tick(now)
        self._bodies -= 1

    def route(self, name: str) -> Route:
        """What is known now."""
        return Route(name, min(self._answers, default=0.0), max(self._rates, default=0.0))

    def _tick(self, now: float) -> None:
        if self._bodies:
            self._seconds += max(0.0, now - self._since)
        self._since = now


class RangeLimits(NamedTuple):
    """How ranges over a route are chosen. Sizes are bytes."""

    size: int
    """The most of one range, unless one span is larger."""
    slack: int
    """What is fetched for nothing rather than to make two ranges, where all of them have a place at once."""
    wide_slack: int
    """The same where they have not, and a range that waits for its place costs its part of a round trip."""
    at_once: int
    """Places."""
    filling: int
    """So many ranges of that size keep it full."""


def plan_limits(route: Route, *, most: int, slack: int, places: int) -> RangeLimits:
    """What suits `route`: `most` bytes at once and `places` at most, `slack` at least.

    Ranges that all have a place travel together: a gap costs its bytes, a further range little. With more ranges than
    places a further one costs round trip / places of the route's time, which is worth as many bytes as it moves
    in that time.
    """
    under_way = route.under_way
    size = min(most, max(_TRIPS_PER_RANGE * under_way, _LEAST_RANGE)) if under_way else most
    filling = 1 + ceil(under_way / max(size, 1))
    return RangeLimits(size, slack, max(slack, under_way // places), places, min(max(2, filling), places))
