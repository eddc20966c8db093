"""Make absent blocks present: spans are fetched, decompressed, verified and stored, each once at a time.

Owns every fetch of a domain's reads. A *flight* is one range of one blob on its way into the pool; whoever needs one of
its spans waits for it. What lands fills not only the blocks that were asked for but every block that it completes.

Refuses to give bytes that were not verified, or fewer than were asked for. A pool that cannot take bytes costs speed,
never correctness: `read` gives what was decoded.

Concurrency: one trio event loop. Flights belong to the fetcher's nursery: a reader who is cancelled, or whose patience
ends, leaves; the flight lands, unless none of the views that it flies for is shown any more. Decompression,
verification and writing are one hop to a thread. State is only changed between awaits; what is decided together is in
functions that are not async.
"""

from __future__ import annotations

import logging
import random
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

import trio

from nsfs.core.fetchplan import (
    Batch,
    Group,
    Range,
    ReadPlan,
    Window,
    address_of,
    blocks_of,
    intersect,
    join_blocks,
    plan_absent,
    plan_ahead,
    plan_ranges,
    plan_read,
    render_blocks,
    subtract,
)
from nsfs.core.fetchview import FetchConfig, Head, LayerSource, View
from nsfs.core.landing import Decoded, Landing, Pool, Supply, store_supply, take_apart
from nsfs.core.ports import BLOCK
from nsfs.core.runway import NO_SPANS, Failures, Flight, GroupKey, Kept, Priority, Runway
from nsfs.core.tasks import open_tasks
from nsfs.errors import CorruptError, NsfsError, UnreachableError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Sequence


log = logging.getLogger(__name__)

T = TypeVar("T")

_STEP = 4 << 20
"""Bytes made present at a time."""

_EDGE = 2 * BLOCK
"""Of a neighbouring span: more than a block that straddles has there."""

_AWAITED = 10.0
"""Seconds that are waited for what comes otherwise."""

_random = random.SystemRandom()


class Waiting(NamedTuple):
    """A reader that waits now."""

    view: str
    address: int
    size: int
    seconds: float
    """For how long."""
    reason: str


@dataclass(frozen=True, slots=True)
class FetcherStatistics:
    """What a fetcher did since it was opened, and what it does now."""

    fetched: int
    """Bytes."""
    requests: int
    hits: int
    misses: int
    refused: int
    """Writes that the pool could not take."""
    fetched_by_layer: dict[str, int]
    waiting: tuple[Waiting, ...]


@dataclass(eq=False, slots=True)
class _Waiter:
    view: View
    address: int
    size: int
    since: float = field(default_factory=trio.current_time)
    priority: Priority = Priority.READ
    reason: str = "its turn"
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    gone: trio.Event = field(default_factory=trio.Event)


class _Wanted(NamedTuple):
    """A group that a reader needs; `group` is None for the spans of a layer that has none."""

    source: LayerSource
    group: Group | None

    @property
    def key(self) -> GroupKey:
        return self.source.key, NO_SPANS if self.group is None else self.group.spans.start


class RunInThread(Protocol):
    """How work leaves the event loop."""

    async def __call__(self, work: Callable[[], T], /) -> T:
        """The result of `work`, run elsewhere."""


def _threads(count: int) -> RunInThread:
    limiter = trio.CapacityLimiter(count)

    async def run(work: Callable[[], T], /) -> T:
        return await trio.to_thread.run_sync(work, limiter=limiter)

    return run


@asynccontextmanager
async def open_fetcher(
    pool: Pool,
    config: FetchConfig | None = None,
    *,
    run_in_thread: RunInThread | None = None,
    jitter: Callable[[], float] = _random.random,
) -> AsyncIterator[Fetcher]:
    """A fetcher into `pool`. Leaving ends all flights; readers must have left before.

    `jitter` gives numbers from 0 to 1.
    """
    config = config or FetchConfig()
    async with open_tasks() as nursery:
        yield Fetcher(pool, config, nursery, run_in_thread or _threads(config.decode_threads), jitter)


class Fetcher:
    """An open fetcher; see `open_fetcher`.

    Patience, in all calls, is how many seconds a reader waits for what cannot be had now: None for ever, whatever the
    error; 0 for one attempt. It is the span's as much as the reader's: where an attempt failed and the next is not yet
    due, a reader whose patience is no longer than the trouble is old is answered at once. An error that another attempt
    is not expected to mend is raised at once.
    """

    def __init__(
        self,
        pool: Pool,
        config: FetchConfig,
        nursery: trio.Nursery,
        run_in_thread: RunInThread,
        jitter: Callable[[], float],
    ) -> None:
        self._pool = pool
        self._config = config
        self._nursery = nursery
        self._run_in_thread = run_in_thread
        self._flights: dict[GroupKey, Flight] = {}
        self._failures = Failures(config, jitter)
        self._runways: dict[str, Runway] = {}
        """By the names of the routes that anything was fetched over."""
        self._prefetching = 0
        """How many parts of profiles are being fetched."""
        self._kept = Kept(config.kept_bytes)
        self._waiters: set[_Waiter] = set()
        self._last_read = self._last_wait = trio.current_time()
        """When somebody was last seen to read, and to wait."""
        self._requests = self._hits = self._misses = self._refused = 0
        self._is_refused = False
        """The pool could not take what came last; then nothing is fetched ahead."""
        self._fetched: dict[str, int] = {}

    def statistics(self) -> FetcherStatistics:
        """How it stands now."""
        now = trio.current_time()
        return FetcherStatistics(
            sum(self._fetched.values()),
            self._requests,
            self._hits,
            self._misses,
            self._refused,
            dict(self._fetched),
            tuple(Waiting(w.view.name, w.address, w.size, now - w.since, w.reason) for w in self._reading()),
        )

    def quiet_for(self) -> float:
        """Seconds since a reader last waited for absent bytes; 0 while one does."""
        return 0.0 if any(self._reading()) else trio.current_time() - self._last_wait

    def idle_for(self) -> float:
        """Seconds since a reader last asked for bytes, whether or not they were here, or waited for them."""
        return min(self.quiet_for(), trio.current_time() - self._last_read)

    def _reading(self) -> Iterator[_Waiter]:
        """Those that somebody waits behind; what nobody is known to want waits for itself."""
        return (waiter for waiter in self._waiters if waiter.priority is Priority.READ)

    # Readers

    def abandon(self, views: Collection[str]) -> None:
        """Fail every reader that waits for one of these views now, and call off what is under way for them alone."""
        for waiter in self._waiters:
            if waiter.view.name in views:
                waiter.scope.cancel()
        for flight in self._flights.values():
            flight.views.difference_update(views)
            if not flight.views:
                flight.scope.cancel()

    async def retire(self, sources: Collection[LayerSource]) -> None:
        """Return when nobody reads by these any more, and nothing that they bring is under way."""
        for source in sources:
            source.is_retired = True
            self.forget(source.key)
        while True:
            flights = [flight for flight in self._flights.values() if flight.source in sources]
            readers = [waiter for waiter in self._waiters if not set(sources).isdisjoint(waiter.view.sources)]
            if not flights and not readers:
                return
            for event in (*(flight.landed for flight in flights), *(waiter.gone for waiter in readers)):
                await event.wait()

    def forget(self, layer: str) -> None:
        """Keep nothing decoded of the layer with this key of a LayerSource: it was evicted."""
        self._kept.forget(layer)

    async def read(self, view: View, address: int, size: int, *, patience: float | None) -> bytes | memoryview:
        """Exactly `size` bytes at `address`: from the pool, or fetched and verified. A hit is no checkpoint.

        Raises UnreachableError when patience has ended, other NsfsErrors as the blob raises them.
        """
        data = self._read_local(address, size)
        if data is None:
            self._misses += 1
            return await self._read_absent(view, address, size, patience)
        self._hits += 1
        self._last_read = trio.current_time()
        if view.heads and (head := view.passed(address, size)) is not None:
            self._begin_read_ahead(view, head)
        return data

    async def make_present(
        self, view: View, address: int, size: int, *, patience: float | None, priority: Priority = Priority.READ
    ) -> None:
        """Return when the blocks of these addresses that belong to files of the view are in the pool.

        Raises as `read` does, and NoSpaceError where the pool cannot take them.
        """
        start, end = _whole_blocks(address, size)
        for step in range(start, end, _STEP):
            before = self._fetched_for(view)
            await self._make_present(view, step, min(_STEP, end - step), patience, priority)
            if priority is Priority.BACKGROUND and self._config.background_rate:
                await trio.sleep((self._fetched_for(view) - before) / self._config.background_rate)

    def _fetched_for(self, view: View) -> int:
        return sum(self._fetched.get(source.key, 0) for source in view.sources)

    async def _make_present(
        self, view: View, address: int, size: int, patience: float | None, priority: Priority
    ) -> None:
        while self._pool.missing(address, size):
            self._misses += 1
            supply = await self._supply(view, _Waiter(view, address, size, priority=priority), patience)
            if supply.refused is not None:
                raise supply.refused.with_traceback(None)
            if not intersect(self._pool.missing(address, size), supply.plan.covered):
                return

    async def _read_absent(self, view: View, address: int, size: int, patience: float | None) -> bytes:
        start, end = _whole_blocks(address, size)
        while True:
            supply = await self._supply(view, _Waiter(view, start, end - start), patience)
            data = self._put_together(supply, start, end - start)
            if data is not None:
                return bytes(memoryview(data)[address - start : address - start + size])

    def _put_together(self, supply: Supply, address: int, size: int) -> bytearray | None:
        """Blocks that were absent from what was decoded, others from the pool; None if one of these was evicted."""
        run = (address, size)
        out = render_blocks(run, supply.plan.pieces, supply.windows)
        for low, length in subtract([run], supply.plan.runs):
            data = self._read_local(low, length)
            if data is None:
                return None
            out[low - address : low - address + length] = data
        return out

    def _read_local(self, address: int, size: int) -> bytes | memoryview | None:
        try:
            return self._pool.read_present(address, size)
        except CorruptError as error:
            log.warning("blocks are given up and fetched again: %s", error)
            self._give_up(address, size)
            return None

    def _give_up(self, address: int, size: int) -> None:
        """Blocks that cannot be read are absent from now on, whether or not that can be written down."""
        try:
            self._pool.evict(address, size)
        except NsfsError as error:
            log.warning("it is not made durable that they are given up: %s", error)

    async def _supply(self, view: View, waiter: _Waiter, patience: float | None) -> Supply:
        """Have all that the absent blocks which somebody waits for are made of, and store it."""
        if any(source.is_retired for source in view.sources):
            raise UnreachableError(f"what the view reads by was replaced: {view.name}")
        self._waiters.add(waiter)
        try:
            with waiter.scope:
                return await self._supply_in_turn(view, waiter, patience)
        finally:
            self._waiters.discard(waiter)
            waiter.gone.set()
            if waiter.priority is Priority.READ:
                self._last_wait = trio.current_time()
        raise UnreachableError(f"given up, because nobody shows the view any more: {view.name}")

    async def _supply_in_turn(self, view: View, waiter: _Waiter, patience: float | None) -> Supply:
        with trio.move_on_at(_deadline(waiter, patience)) as scope:
            await view.limiter.acquire()
        if scope.cancelled_caught:
            raise _out_of_patience(waiter, patience or 0.0)
        try:
            return await self._supply_now(view, waiter, patience)
        finally:
            view.limiter.release()

    async def _supply_now(self, view: View, waiter: _Waiter, patience: float | None) -> Supply:
        plan = await self._ensure_plan(view, waiter, patience)
        self._notice(view, plan)
        wanted = [_Wanted(view.sources[group.layer], group) for group in plan.groups]
        got = await self._obtain(wanted, waiter, patience)
        supply = Supply(plan, [_window(number, wanted, got) for number in range(len(view.sources))])
        if any(self._pool.missing(*run) for run in plan.covered):
            waiter.reason = "the pool"
            supply.refused = await self._run_in_thread(lambda: store_supply(self._pool, supply))
            self._note_refusal(supply.refused)
        return supply

    async def _ensure_plan(self, view: View, waiter: _Waiter, patience: float | None) -> ReadPlan:
        """What the absent blocks need; layers that have no spans yet get them first, or all of their contents."""
        while True:
            runs = self._pool.missing(waiter.address, waiter.size)
            plan = plan_read([source.table for source in view.sources], runs)
            if await _came(view, plan, waiter, patience):
                continue
            layers = [view.sources[layer] for layer in sorted({piece.layer for piece in plan.pieces})]
            bare = [_Wanted(source, None) for source in layers if not source.table.has_spans]
            if not bare:
                return plan
            await self._obtain(bare, waiter, patience)

    async def _obtain(self, wanted: list[_Wanted], waiter: _Waiter, patience: float | None) -> dict[GroupKey, Decoded]:
        """Every wanted group, decoded; flights are joined or begun until all are there."""
        got: dict[GroupKey, Decoded] = {}
        deadline = _deadline(waiter, patience)
        while lacking := self._lacking(wanted, got):
            now = trio.current_time()
            due = {want.key: self._next_attempt(want.key, patience, deadline, now) for want in lacking}
            ready = [want for want in lacking if due[want.key] <= now]
            if not ready:
                waiter.reason = f"the next attempt: {self._failures.why(due)}"
                await trio.sleep_until(min(due.values()))
                continue
            flights = self._join(ready, waiter.view, waiter.priority)
            await self._wait(flights, waiter, patience, deadline)
            for flight in flights:
                got.update(flight.decoded)
        return got

    def _note_refusal(self, refused: NsfsError | None) -> None:
        if refused is not None and not self._is_refused:
            log.warning("the pool takes no bytes, reads are served from memory: %s", refused)
        self._is_refused = refused is not None
        self._refused += self._is_refused

    def _lacking(self, wanted: list[_Wanted], got: dict[GroupKey, Decoded]) -> list[_Wanted]:
        for want in wanted:
            if want.key not in got and (kept := self._kept.get(want.key)) is not None:
                got[want.key] = kept
        return [want for want in wanted if want.key not in got]

    def _next_attempt(self, key: GroupKey, patience: float | None, deadline: float, now: float) -> float:
        """When to try (again); raises the error of the last attempt for who will not wait so long."""
        failure = self._failures.get(key)
        if failure is None or failure.due <= now or key in self._flights:
            return now
        if patience is None:
            return failure.due
        give_up = min(deadline, failure.since + patience)
        if not failure.error.transient or now >= give_up or not patience:
            raise failure.error.with_traceback(None)
        return min(failure.due, give_up)

    async def _wait(self, flights: list[Flight], waiter: _Waiter, patience: float | None, deadline: float) -> None:
        for flight in flights:
            waiter.reason = _describe(flight)
            if patience and flight.was_given_up and not flight.landed.is_set():
                raise _out_of_patience(waiter, patience)
            with trio.move_on_at(deadline):
                await flight.landed.wait()
            if not flight.landed.is_set():
                flight.was_given_up = True
                raise _out_of_patience(waiter, patience or 0.0)

    # Read-ahead

    def _notice(self, view: View, plan: ReadPlan) -> None:
        """Let a miss begin the read-ahead behind it, which departs after what the miss itself needs."""
        if not plan.groups:
            return
        layer = plan.groups[0].layer
        start = min(piece.stream for piece in plan.pieces if piece.layer == layer)
        last = max(group.spans.stop for group in plan.groups if group.layer == layer) - 1
        end = view.sources[layer].table.stream_range(range(last, last + 1))[1]
        head = view.missed(layer, start, end, is_small=sum(size for _, size in plan.runs) <= BLOCK)
        if head is not None:
            self._begin_read_ahead(view, head)

    def _begin_read_ahead(self, view: View, head: Head) -> None:
        if self._is_refused or not self._config.read_ahead_most:
            return
        if self._prefetching:
            return  # a profile knows better what comes next
        stream = head.advance(self._config, view.sources[head.layer].route().under_way)
        self._nursery.start_soon(self._read_ahead, view, head, stream)

    async def _read_ahead(self, view: View, head: Head, stream: range) -> None:
        source, window = view.sources[head.layer], head.window

        def plan() -> tuple[list[Group], int]:
            table = source.table
            middle = address_of(table, stream.stop - window // 2)
            return plan_ahead(table, head.layer, stream, self._pool.missing), middle

        try:
            groups, head.mark = await self._run_in_thread(plan)
        except Exception:
            log.exception("a bug: no read-ahead in layer %s", source.key)
            return
        head.end = max([head.end, *(source.table.stream_range(group.spans)[1] for group in groups)])
        self._expect(view, groups, Priority.AHEAD)

    async def fetch_ahead(self, view: View, runs: Sequence[Range]) -> bool:
        """Begin to fetch what is absent of these addresses, which a start is known to read, behind whoever reads.

        False where nothing comes ahead.
        """

        def plan() -> list[Group]:
            absent = [found for run in join_blocks(runs) for found in self._pool.missing(*run)]
            return plan_read([source.table for source in view.sources], absent).groups

        if self._is_refused or not self._config.read_ahead_most:
            return False
        self._expect(view, await self._run_in_thread(plan), Priority.PROFILE)
        return True

    def _expect(self, view: View, groups: Iterable[Group], priority: Priority) -> None:
        wanted = [_Wanted(view.sources[group.layer], group) for group in groups]
        fresh = [want for want in wanted if not want.source.is_retired and self._is_worth_fetching(want.key)]
        self._join(fresh, view, priority)

    def _is_worth_fetching(self, key: GroupKey) -> bool:
        return key not in self._failures and self._kept.get(key) is None

    async def prefetch(self, view: View, parts: Sequence[range]) -> None:
        """Return when these parts of the stream of the view's one layer are in the pool, behind whoever reads.

        Raises at the first attempt that fails, NoSpaceError where the pool cannot take them.
        """
        (source,) = view.sources
        self._prefetching += 1
        try:
            await self._prefetch(view, source, parts)
        finally:
            self._prefetching -= 1

    async def _prefetch(self, view: View, source: LayerSource, parts: Sequence[range]) -> None:
        def plan() -> tuple[list[Range], list[Group]]:
            table = source.table
            blocks = blocks_of(table, parts)
            return blocks, plan_absent(table, blocks, self._pool.missing)

        blocks, groups = await self._run_in_thread(plan)
        wanted = [_Wanted(source, group) for group in groups if not source.is_retired]
        wanted = [want for want in wanted if self._is_worth_fetching(want.key)]
        for flight in self._join(wanted, view, Priority.PROFILE):
            await flight.landed.wait()
        for run in blocks:
            await self.make_present(view, *run, patience=0, priority=Priority.PROFILE)

    # Flights

    def _join(self, wanted: Iterable[_Wanted], view: View, priority: Priority) -> list[Flight]:
        """The flights that bring `wanted` to the view: those under way, and new ones for the rest."""
        flights: dict[int, Flight] = {}
        fresh: dict[str, list[_Wanted]] = {}
        for want in wanted:
            flight = self._flights.get(want.key)
            if flight is None:
                fresh.setdefault(want.source.key, []).append(want)
                continue
            if priority < flight.priority and flight.runway is not None:
                flight.runway.promote(flight, priority)
            flights[id(flight)] = flight
        flights |= {id(flight): flight for wants in fresh.values() for flight in self._begin(wants, priority)}
        for flight in flights.values():
            flight.views.add(view.name)
        return [*flights.values()]

    def _begin(self, wants: list[_Wanted], priority: Priority) -> Iterator[Flight]:
        source = wants[0].source
        route = source.route()
        limits = self._config.limits(route)
        groups = [want.group for want in wants if want.group is not None]
        batches: list[Batch | None] = [*plan_ranges(groups, limits)]
        if len(groups) < len(wants):
            batches.append(None)
        for batch in batches:
            flight = Flight(source, batch, priority, trio.current_time())
            self._flights.update({(source.key, first): flight for first in flight.firsts})
            if batch is None:
                flight.departs.set()
            else:
                flight.runway = self._runways.setdefault(route.name, Runway(self._config.places))
                flight.runway.enter(flight, limits.filling)
            self._nursery.start_soon(self._fly, flight)
            yield flight

    async def _fly(self, flight: Flight) -> None:
        landing = Landing({}, {})
        try:
            with flight.scope:
                await flight.departs.wait()
                landing = await (
                    self._make_spans(flight.source) if flight.batch is None else self._bring(flight, flight.batch)
                )
        except NsfsError as error:
            landing = Landing({}, dict.fromkeys(flight.firsts, error))
        except Exception as error:
            log.exception("a bug: a fetch of layer %s failed", flight.source.key)
            bug = NsfsError(f"a bug: {type(error).__name__}: {error}", hint="the log of the worker says more")
            landing = Landing({}, dict.fromkeys(flight.firsts, bug))
        finally:
            if flight.runway is not None:
                flight.runway.leave(flight)
        self._land(flight, landing)

    async def _make_spans(self, source: LayerSource) -> Landing:
        if source.make_spans is None:
            raise UnreachableError(f"the layer cannot be fetched by ranges yet: {source.key}")
        source.table = await source.make_spans()
        return Landing({NO_SPANS: {}}, {})

    async def _bring(self, flight: Flight, batch: Batch) -> Landing:
        """Fetch and take apart; what is not what it should be is fetched once more, group by group."""
        landing = await self._fetch(flight.source, batch)
        for group in batch.groups:
            if group.spans.start in landing.failed:
                landing = landing.amended(await self._fetch_again(flight.source, group))
        return landing

    async def _fetch_again(self, source: LayerSource, group: Group) -> Landing:
        try:
            return await self._fetch(source, Batch((group,), group.offset, group.length))
        except NsfsError as error:
            return Landing({}, {group.spans.start: error})

    async def _fetch(self, source: LayerSource, batch: Batch) -> Landing:
        self._requests += 1
        data = await source.blob.fetch(batch.offset, batch.length)
        self._fetched[source.key] = self._fetched.get(source.key, 0) + len(data)
        if len(data) != batch.length:
            raise UnreachableError(f"a blob gave {len(data)} bytes instead of {batch.length}: {source.blob.digest}")
        beside = self._beside(source, batch)
        return await self._run_in_thread(lambda: take_apart(self._pool, source.table, batch, data, beside))

    def _beside(self, source: LayerSource, batch: Batch) -> list[tuple[int, bytes]]:
        """The near ends of decoded neighbours, for blocks that straddle."""
        ends = []
        for group in batch.groups:
            if (before := self._kept_span(source, group.spans.start - 1)) is not None:
                start, data = before
                cut = max(0, len(data) - _EDGE)
                ends.append((start + cut, data[cut:]))
            if (behind := self._kept_span(source, group.spans.stop)) is not None:
                ends.append((behind[0], behind[1][:_EDGE]))
        return ends

    def _kept_span(self, source: LayerSource, number: int) -> tuple[int, bytes] | None:
        if not 0 <= number < len(source.table):
            return None
        kept = self._kept.get((source.key, source.table.group(number).start))
        return None if kept is None else kept[number]

    def _land(self, flight: Flight, landing: Landing) -> None:
        now = trio.current_time()
        for first in flight.firsts:
            key = (flight.source.key, first)
            del self._flights[key]
            if first in landing.failed:
                self._failures.add(key, landing.failed[first], flight.started, now)
            elif first in landing.decoded:
                self._failures.drop(key)
                flight.decoded[key] = landing.decoded[first]
                if landing.decoded[first]:
                    self._kept.put(key, landing.decoded[first])
        self._note_refusal(landing.refused)
        flight.landed.set()


async def _came(view: View, plan: ReadPlan, waiter: _Waiter, patience: float | None) -> bool:
    """Wait for what comes otherwise than by ranges, if any of a plan does; False where there is nothing to wait for."""
    for piece in plan.pieces:
        event = view.sources[piece.layer].awaited(piece.stream, piece.stream + piece.length)
        if event is not None:
            waiter.reason = "the start-up pack"
            with trio.move_on_at(min(_deadline(waiter, patience), trio.current_time() + _AWAITED)):
                await event.wait()
                return True
    return False


def _whole_blocks(address: int, size: int) -> Range:
    """(start, end)."""
    return address // BLOCK * BLOCK, -(-(address + size) // BLOCK) * BLOCK


def _describe(flight: Flight) -> str:
    if flight.batch is None:
        return f"checkpoints of layer {flight.source.key}"
    return f"bytes {flight.batch.offset} to {flight.batch.offset + flight.batch.length} of {flight.source.blob.digest}"


def _out_of_patience(waiter: _Waiter, patience: float) -> UnreachableError:
    return UnreachableError(f"no answer within {patience:g} s, waiting for: {waiter.reason}")


def _deadline(waiter: _Waiter, patience: float | None) -> float:
    """When a reader gives up on what has not failed yet."""
    return waiter.since + patience if patience else inf


def _window(layer: int, wanted: list[_Wanted], got: dict[GroupKey, Decoded]) -> Window:
    keys = [want.key for want in wanted if want.group is not None and want.group.layer == layer]
    return Window(part for key in keys for part in got[key].values())
