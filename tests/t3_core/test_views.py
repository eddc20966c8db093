"""Views: from a name to the tables of its layers, which go with the last view that has them."""

import gc
import weakref
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from nsfs.core.fetcher import FetcherStatistics, Waiting
from nsfs.core.fetchview import View
from nsfs.core.recording import Recording
from nsfs.core.runway import Priority
from nsfs.core.views import Views, map_of
from nsfs.core.worker_api import Waits
from nsfs.errors import NotFoundError, NsfsError, UsageError
from nsfs.model.digest import Digest
from nsfs.model.pool import Access, LayerKey, LayerRecord, MapRecord
from nsfs.model.route import Route
from trio_tests import run

BLOCK = 4096


def key(number: int) -> LayerKey:
    return LayerKey(Digest(f"sha256:{number:064x}"), "plain")


def name(number: int) -> str:
    return f"{number:032x}"


class FakeStartups:
    def awaited(self, key: LayerKey, owner: str, start: int, end: int) -> None:
        return None


class FakeCatalog:
    """Maps and layers by number; map n is layer n's, and has addresses of the layers in `lowers`."""

    def __init__(self, lowers: dict[int, tuple[int, ...]] | None = None, *, needs_lower: bool = False) -> None:
        self.lowers = lowers or {}
        self.needs_lower = needs_lower

    def layer(self, wanted: LayerKey) -> LayerRecord | None:
        return LayerRecord(
            blob=wanted.blob,
            index=wanted.index,
            blob_size=1000,
            media_type="application/vnd.oci.image.layer.v1.tar",
            diff_id=None,
            verified="diff-id",
            stream_size=1,
            files=1,
            content_bytes=1,
            slabs=(),
        )

    def map(self, map_id: str) -> MapRecord | None:
        number = int(map_id, 16)
        if number > 1 << 20:
            return None
        lowers = tuple(key(lower) for lower in self.lowers.get(number, ()))
        blob = key(number).blob
        return MapRecord(
            id=map_id,
            blob=blob,
            index="plain",
            path="/map",
            needs_lower=self.needs_lower,
            marks=False,
            lowers=lowers,
        )


class FakeTable:
    """Two blocks of its own, and the block that all layers share."""

    def __init__(self, of: LayerKey) -> None:
        self.of = of

    def ranges(self) -> list[tuple[int, int]]:
        return [(BLOCK, BLOCK), (int(self.of.blob.hex, 16) * 100 * BLOCK, 2 * BLOCK)]


@dataclass
class FakePool:
    """Everything is there."""

    evicted: list[tuple[int, int]] = field(default_factory=list)

    def local_bytes(self, ranges: Iterable[tuple[int, int]]) -> int:
        return sum(size for _, size in ranges)

    def evict_all(self, ranges: Sequence[tuple[int, int]]) -> int:
        self.evicted += ranges
        return sum(size for _, size in ranges)


class FakeFetcher:
    def __init__(self) -> None:
        self.asked: list[tuple[View, int, int, float | None]] = []
        self.priorities: list[Priority] = []
        self.abandoned: list[str] = []
        self.forgotten: list[str] = []
        self.waiting: tuple[Waiting, ...] = ()

    async def read(self, view: View, address: int, size: int, *, patience: float | None) -> bytes:
        self.asked.append((view, address, size, patience))
        return bytes(size)

    async def make_present(
        self, view: View, address: int, size: int, *, patience: float | None, priority: Priority = Priority.READ
    ) -> None:
        self.asked.append((view, address, size, patience))
        self.priorities.append(priority)

    def abandon(self, names: Collection[str]) -> None:
        self.abandoned += names

    def forget(self, layer: str) -> None:
        self.forgotten.append(layer)

    def statistics(self) -> FetcherStatistics:
        return FetcherStatistics(0, 0, 0, 0, 0, {}, self.waiting)


@dataclass
class FakeBlob:
    digest: Digest
    size: int

    def route(self) -> Route:
        return Route(str(self.digest))


class FakeBlobs:
    def __init__(self) -> None:
        self.fetched = {key(number).blob: number for number in range(10)}

    def blob(self, digest: Digest, size: int, access: Access) -> FakeBlob:
        return FakeBlob(digest, size)


class FakeRecordings:
    """One, with the tag of eight ones, while it runs."""

    def __init__(self) -> None:
        self.only = Recording(key(1).blob, "", [key(1)], "", 10.0)

    def of(self, tag: str) -> Recording | None:
        return self.only if tag == "1" * 8 else None

    def end(self, views: Collection[str]) -> None:
        if any(view.endswith("1" * 8) for view in views):
            self.only.end()


class Site:
    def __init__(self, catalog: FakeCatalog | None = None) -> None:
        self.opened: list[LayerKey] = []
        pool: Any = FakePool()
        fetcher: Any = FakeFetcher()
        blobs: Any = FakeBlobs()
        spanning: Any = None
        self.pool, self.fetcher = pool, fetcher
        recordings: Any = FakeRecordings()
        self.recordings = recordings
        self.views = Views(
            catalog or FakeCatalog(), self.open_table, blobs, spanning, pool, fetcher, recordings, FakeStartups()
        )

    def open_table(self, of: LayerKey) -> Any:
        self.opened.append(of)
        return FakeTable(of)


def test_a_views_name_says_which_layers_and_how_long() -> None:
    async def body() -> None:
        site = Site(FakeCatalog({3: (2, 1)}))
        assert await site.views.read(name(3), 4096, 10) == bytes(10)
        await site.views.make_present(name(3) + "~60", 4096, 10)
        await site.views.look(name(3), "", 4096, 10)
        await site.views.peek(name(3), "", 4096, 10)
        assert [(view.name, patience) for view, _, _, patience in site.fetcher.asked] == [
            (name(3), None),
            (name(3) + "~60", 60),
            (f"look/{name(3)}", 0),
            (f"peek/{name(3)}", 0),
        ]
        assert [view.reads_on for view, *_ in site.fetcher.asked] == [True, True, True, False]
        for view, *_ in site.fetcher.asked:
            assert [source.key for source in view.sources] == [f"{key(n).blob}/plain" for n in (3, 2, 1)]
        assert [map_of(view.name) for view, *_ in site.fetcher.asked] == [name(3)] * 4

    run(body)


def test_what_a_view_reads_is_recorded_until_it_goes() -> None:
    async def body() -> None:
        site = Site()
        recorded = f"{name(3)}~60~r{'1' * 8}"
        for view in (name(3), f"{name(3)}~r{'2' * 8}", recorded):
            await site.views.read(view, 4096, 10)
        await site.views.read(recorded, 8192, 10)
        assert list(site.recordings.only.uses) == [(name(3), 4096, 10), (name(3), 8192, 10)]
        site.views.close([name(3)])
        assert not site.recordings.only.is_over
        site.views.close([recorded])
        assert site.recordings.only.is_over
        assert len(site.fetcher.asked) == 4

    run(body)


def test_views_of_one_layer_share_its_table() -> None:
    async def body() -> None:
        site = Site(FakeCatalog({2: (1,), 3: (1,)}))
        for number in (1, 2, 3, 3):
            await site.views.read(name(number), 4096, 1)
        assert site.opened == [key(1), key(2), key(3)]

    run(body)


@pytest.mark.parametrize(
    ("view", "kind"), [("f" * 32, NotFoundError), ("nonsense", UsageError), (name(1) + "~x", UsageError)]
)
def test_what_is_no_view_is_refused(view: str, kind: type[Exception]) -> None:
    async def body() -> None:
        with pytest.raises(kind):
            await Site().views.read(view, 0, 1)

    run(body)


def test_a_map_that_was_never_made_is_no_view() -> None:
    async def body() -> None:
        with pytest.raises(NotFoundError):
            await Site(FakeCatalog(needs_lower=True)).views.read(name(1), 0, 1)

    run(body)


def test_tables_go_with_the_last_view_that_has_them() -> None:
    async def body() -> None:
        site = Site(FakeCatalog({2: (1,)}))
        await site.views.read(name(1), 4096, 1)
        await site.views.read(name(2), 4096, 1)
        kept = [weakref.ref(source) for source in site.fetcher.asked[1][0].sources]
        site.fetcher.asked.clear()
        site.views.close([name(2)])
        gc.collect()
        assert [reference() is None for reference in kept] == [True, False]
        site.views.close([name(1)])
        gc.collect()
        assert [reference() is None for reference in kept] == [True, True]

    run(body)


def test_views_that_nobody_closes_make_room_for_others() -> None:
    async def body() -> None:
        site = Site()
        for number in range(1, 5001):
            await site.views.look(name(number), "", 4096, 1)
            site.fetcher.asked.clear()
        gc.collect()
        assert len(site.views._views) <= 4096
        assert len(site.views._sources) <= 4096
        await site.views.look(name(1), "", 4096, 1)
        assert site.opened.count(key(1)) == 2

    run(body)


def test_who_reads_what_nobody_shows_any_more_hears_so_until_it_is_shown_again() -> None:
    async def body() -> None:
        site = Site()
        await site.views.read(name(1), 4096, 1)
        site.views.close([name(1)])
        assert site.fetcher.abandoned == [name(1)]
        with pytest.raises(NsfsError, match="nobody shows"):
            await site.views.read(name(1), 4096, 1)
        await site.views.look(name(1), "", 4096, 1)
        site.views.reopen([name(1)])
        await site.views.read(name(1), 4096, 1)

    run(body)


def test_what_layers_share_counts_once() -> None:
    site = Site()
    assert site.views.local_bytes([key(1)]) == 3 * BLOCK
    assert site.views.local_bytes([key(1), key(2), key(1)]) == 5 * BLOCK
    assert site.opened == [key(1), key(2)]
    assert site.views.usage([name(1), name(2), "f" * 32]).local == 5 * BLOCK
    assert site.views.usage([name(1), name(2)]).fetched == 3


def test_eviction_drops_blocks_and_what_is_decoded() -> None:
    async def body() -> None:
        site = Site()
        assert await site.views.evict(key(4)) == 3 * BLOCK
        assert site.pool.evicted == FakeTable(key(4)).ranges()
        assert site.fetcher.forgotten == [f"{key(4).blob}/plain"]

    run(body)


def test_state_is_of_who_waits_longest_and_of_nobody_who_just_began() -> None:
    site = Site()
    assert site.views.state(None) == "ready"
    site.fetcher.waiting = (
        Waiting(name(1) + "~60", 0, 1, 0.5, "its turn"),
        Waiting(name(2), 0, 1, 5, "bytes 0 to 4 of a blob"),
        Waiting(f"look/{name(2)}", 0, 1, 7, "the pool"),
    )
    assert site.views.waits(None) == Waits(waiting=3, longest=7, reason="the pool")
    assert site.views.waits({name(1)}) == Waits(waiting=1, longest=0.5, reason="its turn")
    assert site.views.waits({name(3)}) == Waits()
    assert site.views.state({name(1)}) == "ready"
    assert site.views.state(None) == "2 reads wait, the longest for 7 s, for the pool"
    assert site.views.state({name(2), name(3)}) == site.views.state(None)


def test_completing_a_layer_gives_way_to_whoever_reads() -> None:
    async def test() -> None:
        site = Site()
        await site.views.complete(key(4), "")
        assert [ask[1:3] for ask in site.fetcher.asked] == [(BLOCK, BLOCK), (400 * BLOCK, 2 * BLOCK)]
        assert set(site.fetcher.priorities) == {Priority.BACKGROUND}

    run(test)
