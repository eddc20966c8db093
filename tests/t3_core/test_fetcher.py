from __future__ import annotations

import os
import tempfile
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

import once
from layouts import BASE, Layout, ScriptedBlob, lay_out, layouts
from nsfs.core.fetcher import Fetcher, open_fetcher
from nsfs.core.fetchview import FetchConfig, LayerSource, View
from nsfs.core.runway import Priority, plan_delay
from nsfs.errors import CorruptError, DeniedError, NoSpaceError, UnreachableError
from nsfs.model.layer import Codec
from nsfs.store.layout import Layout as Paths
from nsfs.store.poolfiles import create_bitmap

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from nsfs.store.layers import LayerTable
    from nsfs.store.pool import Pool

T = TypeVar("T")

MIB = 1 << 20


async def inline(work: Callable[[], T], /) -> T:
    """A thread would let the mock clock jump."""
    await trio.lowlevel.checkpoint()
    return work()


def run(test: Callable[[], Awaitable[None]]) -> None:
    trio.run(test, clock=trio.testing.MockClock(autojump_threshold=0))


@contextmanager
def pool_at(path: str) -> Iterator[Pool]:
    domain = Paths(path, path).domain("d", once.KEY)
    bitmap = create_bitmap(domain)
    pool = once.open_watched(domain, bitmap)
    os.close(bitmap)
    try:
        yield pool
    finally:
        pool.close()


class FullPool:
    """A pool that takes nothing."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def write(self, *_: object) -> None:
        raise NoSpaceError("full")

    def write_zeros(self, *_: object) -> None:
        raise NoSpaceError("full")


class World:
    """A pool, a layer, a view of it, and a fetcher."""

    def __init__(self, pool: Pool, layout: Layout, table: LayerTable, fetcher: Fetcher, script: str) -> None:
        self.pool = pool
        self.layout = layout
        self.blob = ScriptedBlob(layout.blob, script)
        self.table = table
        self.source = LayerSource("layer", table, self.blob)
        self.view = View("view", [self.source])
        self.fetcher = fetcher

    async def read(self, offset: int, size: int, patience: float | None = 60.0) -> bytes:
        return bytes(await self.fetcher.read(self.view, BASE + offset, size, patience=patience))


NO_AHEAD = FetchConfig(read_ahead_least=0, read_ahead_most=0)
BIG = [[(0, 16 * MIB, 0)]]


@asynccontextmanager
async def world(
    layout: Layout | None = None,
    script: str = "",
    *,
    config: FetchConfig = NO_AHEAD,
    full: bool = False,
    spans: bool = True,
) -> AsyncIterator[World]:
    layout = layout or lay_out([[(0, 200_000, 0)]], [50_000])
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path, pool_at(path) as pool:
        table = layout.table(path, with_spans=spans)
        used: Any = FullPool(pool) if full else pool
        async with open_fetcher(used, config, run_in_thread=inline, jitter=lambda: 1.0) as fetcher:
            yield World(pool, layout, table, fetcher, script)


@settings(max_examples=150)
@given(st.data())
def test_a_read_is_a_slice_of_the_original(data: st.DataObject) -> None:
    layout = data.draw(layouts())
    end = len(layout.disk)
    config = FetchConfig(
        read_ahead_least=data.draw(st.sampled_from([0, 4096])),
        read_ahead_most=20_000,
        kept_bytes=data.draw(st.sampled_from([0, 6000, 1 << 20])),
        range_limit=data.draw(st.sampled_from([1, 10_000])),
        retry_least=0.01,
    )

    async def test() -> None:
        script = data.draw(st.text("....ECS", max_size=12))
        async with world(layout, script, config=config, full=data.draw(st.booleans())) as w:
            for _ in range(data.draw(st.integers(1, 8))):
                start = data.draw(st.integers(0, end))
                size = data.draw(st.integers(1, 12_000))
                expected = bytes(layout.disk[start : start + size]).ljust(size, b"\0")
                assert await w.read(start, size, None) == expected
                if data.draw(st.booleans()):
                    low = data.draw(st.integers(0, end - 1)) // 4096 * 4096
                    w.pool.evict(BASE + low, data.draw(st.integers(1, 20_000)))

    run(test)


@settings(max_examples=60)
@given(layouts(), st.data())
def test_what_was_made_present_is_what_the_pool_has(layout: Layout, data: st.DataObject) -> None:
    async def test() -> None:
        async with world(layout) as w:
            start = data.draw(st.integers(0, len(layout.disk) - 1))
            size = data.draw(st.integers(1, len(layout.disk)))
            await w.fetcher.make_present(w.view, BASE + start, size, patience=5)
            for address, length in w.table.ranges_in(BASE + start, size):
                assert (w.pool.read_present(address, length) or b"") == bytes(
                    layout.disk[address - BASE : address - BASE + length]
                )
            outside = w.pool.local_bytes([(BASE, 1 << 26)])
            assert outside <= w.pool.local_bytes(w.table.ranges()), "nobody's blocks are not to be stored"

    run(test)


def test_a_flight_fills_every_block_that_it_completes_and_no_other() -> None:
    layout = lay_out([[(0, 5000, 512)] for _ in range(20)], [30_000])

    async def test() -> None:
        async with world(layout) as w:
            assert await w.read(8192, 10) == layout.disk[8192:8202]
            whole = [row for row in layout.rows if row[2] + row[1] <= 30_000]
            assert w.pool.missing(BASE, len(whole) * 8192) == []
            assert w.pool.missing(BASE + 6 * 8192, 4096) != [], "a file of the next span"
            assert len(w.blob.asked) == 1

    run(test)


def test_readers_of_one_span_share_one_fetch() -> None:
    async def test() -> None:
        async with world() as w:
            w.blob.delay = 1.0
            async with trio.open_nursery() as nursery:
                for number in range(30):
                    nursery.start_soon(w.read, number * 1000, 1000)
            assert len(w.blob.asked) == 1
            assert w.fetcher.statistics().misses == 30

    run(test)


def test_neighbouring_spans_are_one_range_up_to_the_limit() -> None:
    async def test() -> None:
        layout = lay_out(BIG, [MIB])
        async with world(layout) as w:
            assert await w.read(0, 6 * MIB) == layout.disk[: 6 * MIB]
            assert sorted(w.blob.asked) == [(0, 4 * MIB), (4 * MIB, 2 * MIB)]

    run(test)


def test_a_reader_who_leaves_cancels_no_flight() -> None:
    async def test() -> None:
        async with world() as w:
            w.blob.delay = 5.0
            with trio.move_on_after(1):
                await w.read(0, 4096)
            assert w.fetcher.statistics().waiting == ()
            await trio.sleep(10)
            assert w.pool.is_present(BASE, 40_960)
            await w.read(0, 4096)
            assert len(w.blob.asked) == 1

    run(test)


def test_what_is_under_way_for_views_that_are_gone_is_called_off() -> None:
    """One range in the air, and one that waits for its place: neither holds up what another view needs then."""
    config = replace(NO_AHEAD, places=1, range_limit=1)

    async def test() -> None:
        async with world(script="T", config=config) as w:
            other = View("other", [w.source])

            async def fail(offset: int) -> None:
                with pytest.raises(UnreachableError, match="nobody shows the view any more"):
                    await w.read(offset, 10, None)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(fail, 0)
                nursery.start_soon(fail, 60_000)
                await trio.testing.wait_all_tasks_blocked()
                w.fetcher.abandon(["view"])
            await trio.testing.wait_all_tasks_blocked()
            assert w.blob.at_once == 0
            for offset in (0, 60_000):
                read = await w.fetcher.read(other, BASE + offset, 10, patience=0)
                assert bytes(read) == bytes(w.layout.disk[offset : offset + 10])
            assert len(w.blob.asked) == 3

    run(test)


def test_what_another_view_waits_for_too_is_not_called_off() -> None:
    async def test() -> None:
        async with world(script="T") as w:

            async def read() -> None:
                got = await w.fetcher.read(View("other", [w.source]), BASE, 10, patience=None)
                assert bytes(got) == bytes(w.layout.disk[:10])

            async def fail() -> None:
                with pytest.raises(UnreachableError, match="nobody shows the view any more"):
                    await w.read(0, 10)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(fail)
                nursery.start_soon(read)
                await trio.testing.wait_all_tasks_blocked()
                w.fetcher.abandon(["view"])
                await trio.testing.wait_all_tasks_blocked()
                w.blob.go_on.set()
            assert len(w.blob.asked) == 1

    run(test)


def test_transient_trouble_is_retried_with_growing_pauses() -> None:
    async def test() -> None:
        async with world(script="EEE") as w:
            start = trio.current_time()
            assert await w.read(0, 4096) == w.layout.disk[:4096]
            assert trio.current_time() - start == pytest.approx(0.1 + 0.2 + 0.4)

    run(test)


def test_delays_double_up_to_a_bound_and_obey_the_registry() -> None:
    config = FetchConfig()
    down = UnreachableError("down")
    assert [plan_delay(config, down, n, 1.0) for n in (1, 2, 3, 20)] == [0.1, 0.2, 0.4, 10.0]
    assert plan_delay(config, down, 1, 0.0) == 0.05
    assert plan_delay(config, UnreachableError("busy", retry_after=7.0), 1, 1.0) == 7.0
    assert plan_delay(config, DeniedError("no"), 1, 1.0) == 60.0


def test_patience_ends_with_the_reason_and_the_next_reader_hears_it_at_once() -> None:
    async def test() -> None:
        async with world(script="E" * 99) as w:
            with pytest.raises(UnreachableError, match="down"):
                await w.read(0, 4096, patience=30)
            assert trio.current_time() == pytest.approx(30, abs=1)
            before, asked = trio.current_time(), len(w.blob.asked)
            with pytest.raises(UnreachableError, match="down"):
                await w.read(0, 4096, patience=30)
            assert trio.current_time() == before
            assert len(w.blob.asked) == asked
            await trio.sleep(11)
            with pytest.raises(UnreachableError):
                await w.read(0, 4096, patience=30)
            assert len(w.blob.asked) == asked + 1, "its attempt was due"

    run(test)


def test_no_patience_is_one_attempt() -> None:
    async def test() -> None:
        async with world(script="E") as w:
            w.blob.delay = 3.0
            with pytest.raises(UnreachableError):
                await w.read(0, 4096, patience=0)
            assert (trio.current_time(), len(w.blob.asked)) == (3.0, 1)

    run(test)


def test_a_stalled_fetch_ends_patience_and_lands_later() -> None:
    async def test() -> None:
        async with world(script="T") as w:
            with pytest.raises(UnreachableError, match="no answer within 5 s"):
                await w.read(0, 4096, patience=5)
            with pytest.raises(UnreachableError):
                await w.read(0, 4096, patience=5)
            assert trio.current_time() == 5, "the second is not kept waiting for what did not come"
            w.blob.go_on.set()
            assert await w.read(0, 4096, patience=None) == w.layout.disk[:4096]

    run(test)


def test_who_waits_for_ever_outlasts_a_refusal() -> None:
    async def test() -> None:
        async with world(script="DD") as w:
            with pytest.raises(DeniedError):
                await w.read(0, 4096, patience=60)
            assert await w.read(0, 4096, patience=None) == w.layout.disk[:4096]
            assert trio.current_time() == 120

    run(test)


def test_corrupt_bytes_are_fetched_once_more_and_never_shown() -> None:
    async def test() -> None:
        async with world(script="C") as w:
            assert await w.read(0, 4096) == w.layout.disk[:4096]
            assert len(w.blob.asked) == 2
        async with world(script="CC") as w:
            with pytest.raises(CorruptError, match="digest"):
                await w.read(0, 4096)
            assert w.pool.local_bytes([(BASE, MIB)]) == 0

    run(test)


def test_one_corrupt_span_spoils_no_neighbour() -> None:
    async def test() -> None:
        async with world(script="CC") as w:
            with pytest.raises(CorruptError):
                await w.read(0, 200_000)
            assert w.blob.asked == [(0, 200_000), (0, 50_000)]
            assert await w.read(53_248, 100_000) == w.layout.disk[53_248:153_248]
            assert len(w.blob.asked) == 2

    run(test)


def test_a_block_that_straddles_is_composed_from_both_spans() -> None:
    async def test() -> None:
        async with world() as w:
            await w.read(0, 10)
            assert not w.pool.is_present(BASE + 49_152, 1)
            await w.read(60_000, 10)
            assert w.pool.is_present(BASE + 49_152, 4096), "the first span was still at hand"
            assert len(w.blob.asked) == 2

    run(test)


def test_a_full_pool_costs_no_byte() -> None:
    async def test() -> None:
        async with world(full=True) as w:
            assert await w.read(0, 200_000) == w.layout.disk[:200_000]
            assert await w.read(100, 5000) == w.layout.disk[100:5100]
            assert len(w.blob.asked) == 1, "decoded spans are kept"
            assert w.fetcher.statistics().refused > 0
            with pytest.raises(NoSpaceError):
                await w.fetcher.make_present(w.view, BASE, 10, patience=5)

    run(test)


def test_ranges_on_a_line_are_bounded_and_reads_go_first() -> None:
    layout = lay_out([[(0, 400_000, 0)]], [10_000])
    config = replace(NO_AHEAD, places=2, range_limit=1)

    async def test() -> None:
        async with world(layout, config=config) as w:
            w.blob.delay = 1.0
            await w.read(0, 20_000)
            await w.read(20_480, 4096)
            await trio.testing.wait_all_tasks_blocked()
            before = len(w.blob.asked)
            await w.read(200_000, 100)
            assert w.blob.most_at_once == 2
            assert (200_000, 10_000) in w.blob.asked[before : before + 2]

    run(test)


def test_what_lies_around_a_miss_is_fetched_and_sequences_are_fetched_ahead() -> None:
    layout = lay_out(BIG, [MIB // 2])

    async def test() -> None:
        async with world(layout, config=FetchConfig()) as w:
            for offset in (0, 9, 4, 12):
                await w.read(offset * MIB, 8192)
                await trio.sleep(1)
            assert [length for _, length in w.blob.asked] == [MIB // 2] * 11, "before the first one lies nothing"
        async with world(layout, config=FetchConfig()) as w:
            for offset in range(0, 16 * MIB, MIB // 8):
                assert await w.read(offset, MIB // 8) == layout.disk[offset : offset + MIB // 8]
                await trio.sleep(0.1)
            assert w.fetcher.statistics().misses <= 4
            assert w.fetcher.statistics().fetched == 16 * MIB, "nothing was fetched twice"
            assert max(length for _, length in w.blob.asked) == 4 * MIB

    run(test)


def test_misses_beyond_the_views_share_queue_and_hits_pass_them() -> None:
    async def test() -> None:
        async with world(script="T" * 9, config=replace(NO_AHEAD, range_limit=1, places=99)) as w:
            w.view = View("busy", [w.source], waiting=2)
            w.pool.write(BASE + 196_608, bytes(w.layout.disk[196_608:200_704]))
            async with trio.open_nursery() as nursery:
                for offset in (0, 57_344, 106_496, 155_648):
                    nursery.start_soon(w.read, offset, 100)
                await trio.testing.wait_all_tasks_blocked()
                assert len(w.blob.asked) == 2
                waiting = w.fetcher.statistics().waiting
                assert sorted(entry.reason[:5] for entry in waiting) == ["bytes", "bytes", "its t", "its t"]
                with trio.fail_after(0):
                    assert await w.read(196_608, 100) == w.layout.disk[196_608:196_708]
                w.blob.go_on.set()

    run(test)


def test_addresses_of_lower_layers_come_from_their_blobs() -> None:
    upper, lower = lay_out([[(0, 10_000, 0)]], [4000]), lay_out([[(0, 10_000, 0)], [(0, 50_000, 0)]], [7000])

    async def test() -> None:
        async with world(lower) as w:
            with tempfile.TemporaryDirectory() as path:
                other = ScriptedBlob(upper.blob)
                view = View("linked", [LayerSource("upper", upper.table(path), other), w.source])
                data = bytes(await w.fetcher.read(view, BASE, 60_000, patience=5))
                assert data[:10_000] == upper.disk[:10_000]
                assert data[12_288:] == lower.disk[12_288:60_000]
                assert other.asked == [(0, 10_000)]
                assert all(offset > 0 for offset, _ in w.blob.asked), "the first layer that has an address decides"

    run(test)


def test_a_layer_without_spans_gets_them_on_the_first_miss() -> None:
    made = 0

    async def test() -> None:
        async with world(spans=False) as w:
            with pytest.raises(UnreachableError, match="by ranges yet"):
                await w.read(0, 10, patience=0)
            await trio.sleep(60)

            async def make_spans() -> LayerTable:
                nonlocal made
                made += 1
                await trio.sleep(2)
                with tempfile.TemporaryDirectory() as path:
                    return w.layout.table(path)

            w.source.make_spans = make_spans
            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(w.read, 0, 10)
            assert made == 1
            assert w.pool.is_present(BASE, 10)

    run(test)


def test_holes_are_present_without_a_block_of_disk() -> None:
    layout = lay_out([[(8 * MIB, 100, 0)]], [100])

    async def test() -> None:
        async with world(layout) as w:
            await w.fetcher.make_present(w.view, BASE, 8 * MIB, patience=5)
            assert w.pool.read_present(BASE, 8 * MIB) == bytes(8 * MIB)
            assert w.blob.asked == []

    run(test)


def test_the_real_threads_give_the_same() -> None:
    layout = lay_out([[(0, 3 * MIB, 0)]], [300_000], codec=Codec.GZIP_MEMBER)

    async def test() -> None:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as path, pool_at(path) as pool:
            blob = ScriptedBlob(layout.blob)
            view = View("view", [LayerSource("layer", layout.table(path), blob)])
            async with open_fetcher(pool) as fetcher:

                async def check(offset: int) -> None:
                    data = bytes(await fetcher.read(view, BASE + offset, 131_072, patience=10))
                    assert data == layout.disk[offset : offset + 131_072].ljust(131_072, b"\0")

                async with trio.open_nursery() as nursery:
                    for offset in range(0, 3 * MIB, 131_072):
                        nursery.start_soon(check, offset)
            assert sum(length for _, length in blob.asked) == len(layout.blob)

    trio.run(test)


def test_what_is_prefetched_is_read_without_a_miss() -> None:
    """Parts come as few ranges; blocks that straddle two spans, or two parts' groups, are whole."""

    async def test() -> None:
        async with world(lay_out(BIG, [100_000])) as w:
            parts = [range(at, at + 70_000) for at in range(0, 3 * MIB, 300_000)]
            await w.fetcher.prefetch(w.view, parts)
            before = w.fetcher.statistics()
            for part in parts:
                assert await w.read(part.start, len(part)) == w.layout.disk[part.start : part.stop]
            assert w.fetcher.statistics().misses == before.misses
            assert w.fetcher.statistics().fetched < 4 * MIB
            await w.fetcher.prefetch(w.view, parts)
            assert w.fetcher.statistics().requests == before.requests

    run(test)


@pytest.mark.parametrize(("script", "full", "kind"), [("E", False, UnreachableError), ("", True, NoSpaceError)])
def test_a_prefetch_fails_at_its_first_failure(script: str, full: bool, kind: type[Exception]) -> None:
    async def test() -> None:
        async with world(lay_out(BIG, [100_000]), script, full=full) as w:
            with pytest.raises(kind):
                await w.fetcher.prefetch(w.view, [range(MIB)])
            assert await w.read(0, MIB) == w.layout.disk[:MIB]

    run(test)


def test_the_background_keeps_to_its_rate_and_no_reader_waits_for_that() -> None:
    rate = 1000

    async def test() -> None:
        config = replace(NO_AHEAD, background_rate=rate)
        async with world(lay_out(BIG, [MIB] * 16), config=config) as w:
            await trio.sleep(7)
            begun = trio.current_time()
            complete = partial(w.fetcher.make_present, patience=60.0, priority=Priority.BACKGROUND)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(complete, w.view, BASE, 16 * MIB)
                await trio.testing.wait_all_tasks_blocked()
                assert (w.fetcher.quiet_for(), w.fetcher.statistics().waiting) == (7, ())
                await w.read(15 * MIB, 4096)
                assert (trio.current_time(), w.fetcher.quiet_for()) == (begun, 0)
                by_reader = w.blob.asked[-1][1]
            seconds = (w.fetcher.statistics().fetched - by_reader) / rate
            assert not w.pool.missing(BASE, 16 * MIB)
            assert seconds <= trio.current_time() - begun <= seconds + by_reader / rate

    run(test)


def test_a_read_waits_for_what_comes_otherwise_and_not_for_ever() -> None:
    async def test() -> None:
        async with world() as w:
            came, begun = trio.Event(), trio.current_time()
            w.source.awaited = lambda _start, _end: None if came.is_set() else came
            async with trio.open_nursery() as nursery:
                nursery.start_soon(w.read, 0, 10)
                await trio.sleep(2)
                assert w.fetcher.statistics().requests == 0
                assert [each.reason for each in w.fetcher.statistics().waiting] == ["the start-up pack"]
                came.set()
            assert trio.current_time() - begun == 2
            came = trio.Event()
            assert await w.read(100_000, 10) == bytes(w.layout.disk[100_000:100_010])
            assert trio.current_time() - begun == 12

    run(test)


def test_what_is_retired_ends_with_who_reads_by_it_now() -> None:
    async def test() -> None:
        async with world(script="E") as w:
            ended: list[str] = []

            async def retire() -> None:
                await w.fetcher.retire([w.source])
                ended.append("retired")

            async def read() -> None:
                assert await w.read(0, 10) == bytes(w.layout.disk[:10])
                ended.append("read")

            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                await trio.sleep(0.01)
                nursery.start_soon(retire)
            assert ended == ["read", "retired"]
            assert await w.read(0, 10) == bytes(w.layout.disk[:10]), "what is here is not fetched"
            with pytest.raises(UnreachableError, match="was replaced"):
                await w.read(100_000, 10)
            await w.fetcher.retire([w.source])

    run(test)


@pytest.mark.parametrize(("config", "comes"), [(FetchConfig(), True), (NO_AHEAD, False)])
def test_what_is_known_to_be_read_comes_where_anything_comes_ahead(config: FetchConfig, comes: bool) -> None:
    async def test() -> None:
        async with world(config=config) as w:
            assert await w.fetcher.fetch_ahead(w.view, [(BASE, 4096), (BASE + 8192, 4096)]) is comes
            await trio.sleep(1)
            assert w.pool.is_present(BASE + 8192, 4096) is comes
            assert not w.pool.is_present(BASE + 100_000, 4096), "what lies behind its span"

    run(test)
