"""Who asks a fetcher for bytes, and where each of its sequences of reads is.

Owns the recognition of sequential access: in the stream of a layer, where files that are read in order lie in order.
Concurrency: one event loop.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from nsfs.model.route import RangeLimits, Route, plan_limits

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from nsfs.core.fetchplan import Table
    from nsfs.core.ports import Blob

_SLACK = 256 << 10
"""Bytes of stream that a sequence of reads may leave out, or read twice."""
_BEHIND = 512 << 10
"""Bytes of stream before a sequence's first miss that come with its first step: who reads one file of a directory reads
others, in any order."""
_SINGLE = 2
"""Sequences of a view of which nothing comes ahead where they begin with one block: who looks at single files reads no
more of them. A start goes on to others, whose first files are as small as any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchConfig:
    """Limits of a domain's fetcher. Times in seconds, sizes in bytes."""

    places: int = 12
    """Ranges that are on one route at a time."""
    decode_threads: int = 2
    range_limit: int = 4 << 20
    """The most that is asked for at once, unless one span is larger; less where that suits the route."""
    range_slack: int = 16 << 10
    """What is fetched for nothing rather than to make two ranges, at least."""
    read_ahead_least: int = 512 << 10
    read_ahead_first: int = 1 << 20
    """The most of a sequence's first step: what a full route has under way, if that is more than the least."""
    read_ahead_most: int = 4 << 20
    background_rate: int = 0
    """Bytes a second of what nobody is known to want; 0 for as many as come."""
    kept_bytes: int = 16 << 20
    """Decoded spans that are kept for blocks which straddle two, and for a pool that cannot take any."""
    retry_least: float = 0.1
    retry_most: float = 10.0
    retry_permanent: float = 60.0
    """Where trying again is not expected to help, but a reader waits for ever."""
    retry_after_most: float = 3600.0

    def limits(self, route: Route) -> RangeLimits:
        """How ranges over `route` are to be chosen."""
        return plan_limits(route, most=self.range_limit, slack=self.range_slack, places=self.places)


@dataclass(eq=False, slots=True, weakref_slot=True)
class LayerSource:
    """One layer as a view asks it: where its bytes are, and who can fetch them.

    `table` may be exchanged at any time for a later one of the same layer; a table without spans gets them by
    `make_spans`, which returns the new table. Of a layer that can only be had whole the new table has none either; then
    `make_spans` has put all its contents into the pool.
    """

    key: str
    table: Table
    blob: Blob
    make_spans: Callable[[], Awaitable[Table]] | None = None
    route: Callable[[], Route] = Route
    """What is known now of the way to the blob."""
    is_retired: bool = False
    """Another has taken its place; nothing begins to be fetched by it any more."""
    awaited: Callable[[int, int], trio.Event | None] = lambda _start, _end: None
    """What to wait for before these bytes of the stream are fetched, as they come otherwise; None for nothing."""


class View:
    """Who asks: a map's own layer first, then the lower layers whose addresses it has.

    At most `waiting` of its misses are worked on at a time; further ones queue, in order. Who does not `reads_on` wants
    nothing that lies around what is asked for.
    """

    def __init__(self, name: str, sources: Sequence[LayerSource], *, waiting: int = 64, reads_on: bool = True) -> None:
        self.name = name
        self.sources = tuple(sources)
        self.reads_on = reads_on
        self.limiter = trio.CapacityLimiter(waiting)
        self.heads: deque[Head] = deque(maxlen=16)
        """Its sequences of reads, the latest last."""

    def passed(self, address: int, size: int) -> Head | None:
        """The sequence whose read-ahead a hit has caught up with; mostly None."""
        for head in self.heads:
            if address <= head.mark < address + size:
                head.goes_on = True
                return head
        return None

    def missed(self, layer: int, start: int, end: int, *, is_small: bool) -> Head | None:
        """The sequence that is to be fetched further ahead now that a miss lacks the stream from `start`.

        The miss brings the stream up to `end`. None for the first miss of one of the view's first sequences where it
        `is_small`, so that the kernel reads nothing around it, or where no sequence lately went on after its first:
        there reads jump about.
        """
        if not self.reads_on:
            return None
        for head in self.heads:
            if head.layer == layer and head.start <= start <= head.end + _SLACK:
                head.goes_on = True
                if start >= head.end - _SLACK // 2:
                    head.end = max(end, head.end)
                    return head
        jumps = len(self.heads) == self.heads.maxlen and not any(head.goes_on for head in self.heads)
        self.heads.append(Head(layer, max(0, start - _BEHIND), end))
        is_single = is_small and len(self.heads) <= _SINGLE
        return None if jumps or is_single else self.heads[-1]


@dataclass(eq=False, slots=True)
class Head:
    """Where a sequence of reads is, in the stream of one layer of a view."""

    layer: int
    start: int
    """From here it was last fetched ahead."""
    end: int
    """Up to here it is fetched, or on its way."""
    window: int = 0
    """Bytes of the last step."""
    steps: int = 0
    mark: int = -1
    """Who reads this address has come so far that more is to be fetched."""
    goes_on: bool = False
    """More of it was read than its first miss."""

    def advance(self, config: FetchConfig, under_way: int) -> range:
        """The stream's next part; from the third on it is twice as long as the last.

        The first one suits what the route has `under_way`, and has what lies around the miss, too.
        """
        first = max(config.read_ahead_least, min(under_way, config.read_ahead_first))
        self.start = self.end if self.steps else self.start
        self.window = min(first if self.steps < 2 else self.window * 2, config.read_ahead_most)
        self.steps += 1
        self.mark = -1
        self.end += self.window
        return range(self.start, self.end)
