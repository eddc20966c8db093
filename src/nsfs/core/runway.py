"""What is in the air, what came down and what did not: the state behind a fetcher, without a decision about readers.

Concurrency: one event loop, and no function here is async: each leaves its state consistent.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

import trio

from nsfs.errors import NsfsError, UnreachableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from nsfs.core.fetchplan import Batch
    from nsfs.core.fetchview import FetchConfig, LayerSource
    from nsfs.core.landing import Decoded

NO_SPANS = -1
"""Stands for the spans themselves of a layer that has none yet, where a group's first span would stand."""

_KEPT_FAILURES = 4096

GroupKey = tuple[str, int]
"""Layer, and the first span of a group."""


class Priority(IntEnum):
    """For what a range is fetched; the lower one goes first."""

    READ = 0
    """Somebody waits for it."""
    PROFILE = 1
    """A start of the image is known to read it."""
    AHEAD = 2
    """It lies ahead of a sequence of reads."""
    BACKGROUND = 3
    """Nobody is known to want it."""


@dataclass(eq=False, slots=True)
class Flight:
    """One range on its way.

    When `landed` is set, each of its groups is in `decoded` or has a failure; or it was called off, and has neither.
    """

    source: LayerSource
    batch: Batch | None
    priority: Priority
    started: float
    landed: trio.Event = field(default_factory=trio.Event)
    decoded: dict[GroupKey, Decoded] = field(default_factory=dict)
    was_given_up: bool = False
    """Somebody's patience ended with it in the air."""
    departs: trio.Event = field(default_factory=trio.Event)
    runway: Runway | None = None
    """Where it departs; what takes no range takes no place either."""
    views: set[str] = field(default_factory=set)
    """The names of those that it flies for; it is called off (`scope`) when none of them is shown any more."""
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    @property
    def firsts(self) -> list[int]:
        """Its groups' first spans."""
        return [NO_SPANS] if self.batch is None else [group.spans.start for group in self.batch.groups]


class Runway:
    """Who may fetch over one route: `limit` at a time, in the order of their priorities.

    Beside reads, and where any of them is on its way, only so many others depart as keep it full (`filling`): a
    read shares it with whatever departed before. Without reads they have half of the places. What nobody is
    known to want departs alone.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._queues: dict[Priority, deque[Flight]] = {priority: deque() for priority in Priority}
        self._busy: dict[Priority, int] = dict.fromkeys(Priority, 0)
        self._filling = 1

    def __len__(self) -> int:
        """How many are on their way or wait for that."""
        return sum(self._busy.values()) + sum(map(len, self._queues.values()))

    def enter(self, flight: Flight, filling: int) -> None:
        """Queue up; `departs` is set when it is the flight's turn. So many keep the route full now."""
        self._filling = filling
        self._queues[flight.priority].append(flight)
        self._go()

    def promote(self, flight: Flight, priority: Priority) -> None:
        """Have a flight that entered, and did not leave, count as one of a higher priority."""
        before, flight.priority = flight.priority, priority
        if flight.departs.is_set():
            self._busy[before] -= 1
            self._busy[priority] += 1
        else:
            self._queues[before].remove(flight)
            self._queues[priority].append(flight)
        self._go()

    def leave(self, flight: Flight) -> None:
        """A flight needs its place no more, or does not wait for one."""
        if flight.departs.is_set():
            self._busy[flight.priority] -= 1
        else:
            self._queues[flight.priority].remove(flight)
        self._go()

    def _go(self) -> None:
        while (priority := self._next()) is not None:
            self._busy[priority] += 1
            self._queues[priority].popleft().departs.set()

    def _next(self) -> Priority | None:
        waiting = next((priority for priority, queue in self._queues.items() if queue), None)
        if waiting is None or sum(self._busy.values()) >= self._places(waiting):
            return None
        return waiting

    def _places(self, priority: Priority) -> int:
        """How many flights in all there may be for one more of this priority to depart."""
        match priority:
            case Priority.READ:
                return self._limit
            case Priority.BACKGROUND:
                return 1
        reads = self._busy[Priority.READ]
        return max(1, min(self._limit - 1, reads + self._filling if reads else max(self._filling, self._limit // 2)))


class Kept:
    """Decoded groups, the least recently used dropped first."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._size = 0
        self._groups: OrderedDict[GroupKey, Decoded] = OrderedDict()

    def get(self, key: GroupKey) -> Decoded | None:
        """A group, if it is still kept."""
        found = self._groups.get(key)
        if found is not None:
            self._groups.move_to_end(key)
        return found

    def put(self, key: GroupKey, decoded: Decoded) -> None:
        """Keep a group for a while."""
        self._drop(key)
        self._groups[key] = decoded
        self._size += _size_of(decoded)
        while self._size > self._limit:
            self._drop(next(iter(self._groups)))

    def forget(self, layer: str) -> None:
        """Drop what is kept of a layer, whoever had it fetched: owners stand behind the layer's key, and a space."""
        for key in [key for key in self._groups if f"{key[0]} ".startswith(f"{layer} ")]:
            self._drop(key)

    def _drop(self, key: GroupKey) -> None:
        if key in self._groups:
            self._size -= _size_of(self._groups.pop(key))


def _size_of(decoded: Decoded) -> int:
    return sum(len(data) for _, data in decoded.values())


@dataclass(frozen=True, slots=True)
class Failure:
    """What is known of a group that could not be had."""

    error: NsfsError
    attempts: int
    since: float
    due: float


class Failures:
    """The groups whose last attempt failed."""

    def __init__(self, config: FetchConfig, jitter: Callable[[], float]) -> None:
        self._config = config
        self._jitter = jitter
        self._failures: dict[GroupKey, Failure] = {}

    def get(self, key: GroupKey) -> Failure | None:
        """What is known of a group's trouble."""
        return self._failures.get(key)

    def __contains__(self, key: GroupKey) -> bool:
        """Whether a group's last attempt failed."""
        return key in self._failures

    def drop(self, key: GroupKey) -> None:
        """The trouble is over."""
        self._failures.pop(key, None)

    def why(self, keys: Iterable[GroupKey]) -> str:
        """For people."""
        return "; ".join(sorted({str(self._failures[key].error) for key in keys if key in self._failures}))

    def add(self, key: GroupKey, error: NsfsError, started: float, now: float) -> None:
        """An attempt that began at `started` failed now. One long after it was due begins a new trouble."""
        before = self._failures.pop(key, None)
        if before is not None and started - before.due > self._config.retry_most:
            before = None
        attempts = before.attempts + 1 if before else 1
        if len(self._failures) >= _KEPT_FAILURES:
            self._failures = {kept: failure for kept, failure in self._failures.items() if failure.due > now}
        delay = plan_delay(self._config, error, attempts, self._jitter())
        self._failures[key] = Failure(error, attempts, before.since if before else started, now + delay)


def plan_delay(config: FetchConfig, error: NsfsError, attempts: int, jitter: float) -> float:
    """Seconds until an attempt may follow number `attempts`, which failed with `error`."""
    if not error.transient:
        return config.retry_permanent
    doubled: float = min(config.retry_least * 2 ** min(attempts - 1, 30), config.retry_most)
    asked = error.retry_after or 0.0 if isinstance(error, UnreachableError) else 0.0
    return max(doubled * (0.5 + jitter / 2), min(asked, config.retry_after_most))
