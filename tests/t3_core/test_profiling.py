"""Recordings and prefetches: what was read first comes first, when a start is over, and what ends either."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import trio

from nsfs.core.prefetch import Prefetches
from nsfs.core.recording import Recordings
from nsfs.core.starts import CLOSE_KB, EXACT_KB, FAR_KB, NEAR_KB, Begun, Starts, StartsReport
from nsfs.core.tasks import open_tasks, run_all
from nsfs.core.worker_api import StartReport
from nsfs.errors import CorruptError, NoSpaceError, UnreachableError
from nsfs.model.digest import Digest
from nsfs.model.oci import ImageConfig, Platform, Runtime
from nsfs.model.policy import view_name
from nsfs.model.pool import Access, LayerKey
from nsfs.model.profile import WINDOW_LEAST, Profile, ProfiledLayer, ProfileUse, Run
from trio_tests import run

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Sequence

    import pytest

BLOCK = 4096
IMAGE = Digest("sha256:" + "1" * 64)
LOW, HIGH = (LayerKey(Digest("sha256:" + digit * 64), index) for digit, index in (("a", "plain"), ("b", "plain")))
LAYERS = [ProfiledLayer(str(LOW.blob)), ProfiledLayer(str(HIGH.blob))]
MAP = "0" * 32
MAPS: list[Any] = [MAP]


@dataclass
class Row:
    """As a map's record and a layer's, as far as these are asked here."""

    key: LayerKey = HIGH
    lowers: tuple[LayerKey, ...] = (LOW,)
    has_spans: bool = True
    prefetch_size: int = 0


class FakeCatalog:
    """The one map is HIGH's and has addresses of LOW's; `bare` layers have no spans, the `marked` one a landmark."""

    def __init__(self, bare: Sequence[LayerKey] = (), marked: LayerKey | None = None) -> None:
        self.bare = bare
        self.marked = marked

    def map(self, map_id: str) -> Any:
        return Row() if map_id == MAP else None

    def layer(self, key: LayerKey) -> Any:
        return Row(has_spans=key not in self.bare, prefetch_size=1000 if key == self.marked else 0)


class FakeTable:
    """One file of sixteen blocks: LOW's begins at block 16, HIGH's at block 32; streams begin 512 bytes in."""

    def __init__(self, key: LayerKey) -> None:
        self.start = BLOCK * (16 if key == LOW else 32)
        self.has_spans = False

    def ranges_in(self, address: int, size: int) -> list[tuple[int, int]]:
        start, end = max(address, self.start), min(address + size, self.start + 16 * BLOCK)
        return [(start, end - start)] if start < end else []

    def segments(self, _address: int, _size: int) -> list[tuple[int, int, int]]:
        return [(self.start, 16 * BLOCK, 512)]


@dataclass
class FakeStore:
    profiles: list[Profile] = field(default_factory=list)
    is_full: bool = False

    def put(self, image: Digest, owner: str, profile: Profile) -> None:
        assert (image, owner) == (IMAGE, "team")
        if self.is_full:
            raise NoSpaceError("no room")
        self.profiles.append(profile)

    def get(self, image: Digest, owner: str) -> Profile | None:
        return self.profiles[-1] if self.profiles and (image, owner) == (IMAGE, "team") else None

    def count(self) -> int:
        return len(self.profiles)


@asynccontextmanager
async def recordings(store: FakeStore) -> AsyncIterator[Recordings]:
    table: Any = FakeTable
    async with open_tasks() as nursery:
        yield Recordings(FakeCatalog(), table, store, nursery)


async def read(service: Recordings, tag: str, block: int, blocks: int = 1, seconds: float = 0.5) -> None:
    recording = service.of(tag)
    assert recording is not None
    with recording.reading(MAP, block * BLOCK, blocks * BLOCK):
        await trio.sleep(seconds)


def test_reads_are_kept_as_pieces_of_streams_in_the_order_of_first_use() -> None:
    async def body() -> None:
        store = FakeStore()
        async with recordings(store) as service:
            tag = service.begin(IMAGE, "team", [LOW, HIGH])
            await trio.sleep(60)
            for block, blocks in ((40, 1), (41, 2), (16, 1), (40, 2), (1, 1), (31, 2)):
                await read(service, tag, block, blocks)
            service.end([view_name(MAP, "~60", "", tag)])
            await service.wait_kept()
            (profile,) = store.profiles
            assert profile.layers == LAYERS
            assert profile.is_complete
            assert profile.seconds == 3
            assert profile.runs == [
                Run(1, 8 * BLOCK + 512, 3 * BLOCK),
                Run(0, 512, BLOCK),
                Run(1, 512, BLOCK),
                Run(0, 15 * BLOCK + 512, BLOCK),
            ]
            assert service.of(tag) is None

    run(body)


def test_a_start_is_over_when_nothing_new_is_read_for_a_while() -> None:
    async def body() -> None:
        store = FakeStore()
        async with recordings(store) as service:
            tag = service.begin(IMAGE, "team", [LOW, HIGH])
            await read(service, tag, 32)
            await read(service, tag, 33, seconds=25)
            await trio.sleep(9)
            await read(service, tag, 34)
            for _ in range(9):
                await trio.sleep(1)
                await read(service, tag, 34, seconds=0)
            assert service.of(tag) is not None
            await trio.sleep(2)
            assert service.of(tag) is None
            assert store.profiles[0].runs == [Run(1, 512, 3 * BLOCK)]

    run(body)


def test_a_recording_that_lasts_too_long_says_that_it_may_lack_something() -> None:
    async def body() -> None:
        store = FakeStore()
        async with recordings(store) as service:
            tag = service.begin(IMAGE, "team", [LOW, HIGH])
            for number in range(16):
                await read(service, tag, 32 + number, seconds=23) if service.of(tag) else None
            assert service.of(tag) is None
            assert store.profiles[0].flaw == "it was ended after 300 s"
            assert store.profiles[0].size == 14 * BLOCK

    run(body)


def test_a_recording_lasts_from_its_first_read() -> None:
    async def body() -> None:
        store = FakeStore()
        async with recordings(store) as service:
            tag, idle = (service.begin(IMAGE, "team", layers) for layers in ([LOW, HIGH], [LOW]))
            await trio.sleep(250)
            for number in range(10):
                await read(service, tag, 32 + number, seconds=9)
            await trio.sleep(11)
            assert service.of(tag) is service.of(idle) is None
            assert store.profiles[0].is_complete
            assert store.profiles[0].size == 10 * BLOCK

    run(body)


def test_nothing_is_kept_of_nothing_and_what_cannot_be_kept_stops_nobody(caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        store = FakeStore(is_full=True)
        async with recordings(store) as service:
            idle, other = (service.begin(IMAGE, "team", [LOW, HIGH]) for _ in range(2))
            assert idle != other
            await read(service, other, 32)
            service.end([view_name(MAP, "", "", idle), view_name(MAP, "", "", other), view_name(MAP, "")])
            await service.wait_kept()
            assert service.of(idle) is service.of(other) is None
        assert caplog.text.count("a profile is not kept") == 1

    run(body)


@dataclass
class FakeStreams:
    """Each window takes a second; those of `dead` layers fail."""

    dead: Sequence[LayerKey] = ()
    is_whole: bool = False
    is_of_others: bool = False
    present_from: int = 0
    asked: list[tuple[LayerKey, list[range]]] = field(default_factory=list)
    begun: list[tuple[int, int]] = field(default_factory=list)
    located: int = 0
    at_once: int = 0
    most_at_once: int = 0

    def are_local(self, keys: Collection[LayerKey]) -> bool:
        return self.is_whole

    def leading(self, key: LayerKey, size: int) -> range:
        return range(3 * size)

    def locate(self, parts: Iterable[tuple[LayerKey, range]]) -> Iterator[tuple[int, int]]:
        self.located += 1
        for key, part in parts:
            start = (16 if key == LOW else 32 + 512) * BLOCK + (part.start - 512) // BLOCK * BLOCK
            yield start, -(-len(part) // BLOCK) * BLOCK
        if self.is_of_others:
            raise CorruptError("a part of the stream is in no file")

    def is_present(self, address: int, size: int) -> bool:
        return self.is_whole and address >= self.present_from

    def begin_reading(self, extents: Iterable[tuple[int, int]]) -> None:
        self.begun += extents

    async def prefetch(self, key: LayerKey, owner: str, parts: Sequence[range]) -> None:
        assert owner == "team"
        self.asked.append((key, list(parts)))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await trio.sleep(1)
        self.at_once -= 1
        if key in self.dead:
            raise UnreachableError("away")


async def prefetched(runs: list[Run], streams: FakeStreams, bare: Sequence[LayerKey] = ()) -> None:
    """Have a profile of `runs` prefetched, twice at once."""
    async with open_tasks() as nursery:
        service = Prefetches(FakeCatalog(bare), streams, nursery)
        for _ in range(2):
            service.begin(IMAGE, "team", [LOW, HIGH], Profile(layers=LAYERS, runs=runs))
        await trio.sleep(100)


RUNS = [Run(1, 100, 50), Run(0, 0, WINDOW_LEAST), Run(1, 0, 8 * WINDOW_LEAST)]


def test_a_profile_is_fetched_in_its_order_two_windows_at_a_time() -> None:
    async def body() -> None:
        streams = FakeStreams()
        await prefetched(RUNS, streams)
        cut = WINDOW_LEAST - 50
        second = 2 * WINDOW_LEAST - 50
        assert {(key, parts[0].start, parts[0].stop) for key, parts in streams.asked[:4]} == {
            (HIGH, 100, 150),
            (LOW, 0, cut),
            (LOW, cut, WINDOW_LEAST),
            (HIGH, 0, second),
        }
        later = [part for _, parts in streams.asked[4:] for part in parts]
        assert sum(map(len, later)) == 8 * WINDOW_LEAST - second
        assert min(part.start for part in later) == second
        assert streams.most_at_once == 4

    run(body)


def test_what_no_range_can_bring_is_left_to_reads() -> None:
    async def body() -> None:
        streams = FakeStreams()
        await prefetched(RUNS, streams, bare=[HIGH])
        assert streams.asked == [(LOW, [range(WINDOW_LEAST)])]

    run(body)


def test_a_failure_ends_a_prefetch() -> None:
    async def body() -> None:
        streams = FakeStreams(dead=[HIGH])
        await prefetched([Run(1, 0, 100 * WINDOW_LEAST)], streams)
        assert len(streams.asked) == 2

    run(body)


def test_a_prefetch_ends_with_the_use_of_a_layer_and_may_begin_again() -> None:
    async def body() -> None:
        streams, profile = FakeStreams(), Profile(layers=LAYERS, runs=[Run(1, 0, 100 * WINDOW_LEAST)])
        async with open_tasks() as nursery:
            service = Prefetches(FakeCatalog(), streams, nursery)
            service.begin(IMAGE, "team", [LOW, HIGH], profile)
            await trio.sleep(0.5)
            service.end([LayerKey(IMAGE, "plain")])
            await trio.sleep(1)
            assert len(streams.asked) == 4
            service.end([LOW])
            await trio.sleep(5)
            assert len(streams.asked) == 4
            service.begin(IMAGE, "team", [LOW, HIGH], profile)
            await trio.sleep(0.5)
            assert len(streams.asked) == 6

    run(body)


RUNTIME = Runtime(cmd=["tool"])
UNKNOWN = Begun("", NEAR_KB)
"""A start of which nothing is known."""


@dataclass
class FakeImage:
    """As far as a start asks."""

    digest: Digest = IMAGE

    @property
    def access(self) -> Access:
        return Access("team", "")

    @property
    def config(self) -> ImageConfig:
        return ImageConfig(Platform("linux", "amd64"), (), RUNTIME, {})


@dataclass
class FakePacks:
    """All of them or none."""

    are_fresh: bool = False

    def is_fresh(self, image: Any) -> bool:
        return self.are_fresh

    def progress(self, layers: Collection[LayerKey]) -> tuple[int, int] | None:
        return (100, 1000) if self.are_fresh else None

    def extents(self, image: Any) -> list[tuple[int, int]]:
        return [(BLOCK, BLOCK)]


class FakeLibraries:
    """Notes whose programs are looked after."""

    def __init__(self) -> None:
        self.followed: list[tuple[list[Any], str, Runtime]] = []

    def follow(self, maps: Sequence[Any], owner: str, runtime: Runtime) -> None:
        self.followed.append((list(maps), owner, runtime))


@asynccontextmanager
async def starts(
    store: FakeStore,
    streams: FakeStreams,
    catalog: FakeCatalog,
    *,
    packed: bool = False,
    libraries: FakeLibraries | None = None,
) -> AsyncIterator[tuple[Starts, Recordings]]:
    table: Any = FakeTable
    async with open_tasks() as nursery:
        recordings = Recordings(catalog, table, store, nursery)
        prefetches, libraries = Prefetches(catalog, streams, nursery), libraries or FakeLibraries()
        yield Starts(store, recordings, prefetches, FakePacks(packed), libraries), recordings


async def start(service: Starts, use: ProfileUse, starter: str = "") -> Begun:
    image: Any = FakeImage()
    return await service.begin(use, image, [LOW, HIGH], MAPS, "", starter)


def test_programs_are_looked_after_where_nothing_is_known_to_come() -> None:
    async def body() -> None:
        store, streams, libraries = FakeStore(), FakeStreams(), FakeLibraries()
        async with starts(store, streams, FakeCatalog(), libraries=libraries) as (service, recordings):
            for use in (ProfileUse.OFF, ProfileUse.USE, ProfileUse.RECORD):
                await start(service, use)
            assert libraries.followed == [(MAPS, FakeImage().access.owner, RUNTIME)] * 3
            tag, *_ = await start(service, ProfileUse.FIRST)
            assert len(libraries.followed) == 4
            await read(recordings, tag, 32)
            recordings.end([view_name(MAP, "", "", tag)])
            await service.wait_kept()
            await start(service, ProfileUse.USE)
            assert len(libraries.followed) == 4
        async with starts(FakeStore(), streams, FakeCatalog(), packed=True, libraries=libraries) as (service, _):
            await start(service, ProfileUse.USE)
        assert len(libraries.followed) == 4

    run(body)


def test_the_first_start_is_recorded_and_the_next_is_fetched_ahead() -> None:
    """Also where containerd asks twice for the mounts of one start, and a second one begins beside the first."""

    async def body() -> None:
        store, streams = FakeStore(), FakeStreams()
        async with starts(store, streams, FakeCatalog()) as (service, recordings):
            assert await start(service, ProfileUse.OFF) == await start(service, ProfileUse.USE) == UNKNOWN
            tag, read_ahead, _ = await start(service, ProfileUse.FIRST, "a")
            assert tag
            assert read_ahead == CLOSE_KB
            assert await start(service, ProfileUse.FIRST, "a") == Begun(tag, CLOSE_KB)
            assert await start(service, ProfileUse.FIRST, "b") == UNKNOWN
            await read(recordings, tag, 32)
            recordings.end([view_name(MAP, "", "", tag)])
            await service.wait_kept()
            assert not streams.asked
            assert await start(service, ProfileUse.FIRST, "c") == Begun("", EXACT_KB, [(544 * BLOCK, BLOCK)])
            await trio.sleep(1)
            assert streams.asked == [(HIGH, [range(512, 512 + BLOCK)])]
            streams.is_whole = True
            assert not streams.begun
            assert await start(service, ProfileUse.USE) == Begun(warm=[(544 * BLOCK, BLOCK)])
            await begun(streams, [(544 * BLOCK, BLOCK)])
            tag, read_ahead, _ = await start(service, ProfileUse.RECORD)
            assert tag
            assert read_ahead == EXACT_KB

    run(body)


def test_of_what_is_local_and_was_never_recorded_more_is_read_around_what_a_start_wants() -> None:
    async def body() -> None:
        async with starts(FakeStore(), FakeStreams(is_whole=True), FakeCatalog()) as (service, _):
            assert await start(service, ProfileUse.USE) == Begun(read_ahead=FAR_KB)
            assert await start(service, ProfileUse.OFF) == Begun()

    run(body)


def test_what_was_prepared_and_not_started_keeps_nobody_from_being_recorded() -> None:
    async def body() -> None:
        store, streams = FakeStore(), FakeStreams()
        async with starts(store, streams, FakeCatalog()) as (service, recordings):
            never, *_ = await start(service, ProfileUse.FIRST, "a")
            assert recordings.are_running()
            assert await start(service, ProfileUse.FIRST, "b") == UNKNOWN
            await trio.sleep(11)
            assert not recordings.are_running()
            tag, *_ = await start(service, ProfileUse.FIRST, "b")
            assert tag not in {"", never}
            await trio.sleep(1)
            assert recordings.of(never) is None
            await read(recordings, tag, 32)
            await trio.sleep(30)
            assert len(store.profiles) == 1

    run(body)


def test_what_is_done_for_a_start_is_said() -> None:
    async def body() -> None:
        store, streams, layers = FakeStore(), FakeStreams(), [HIGH, LOW]
        image: Any = FakeImage()
        async with starts(store, streams, FakeCatalog()) as (service, recordings):
            assert service.under_way(layers) is None
            assert await service.known(image) is None
            tag, *_ = await start(service, ProfileUse.FIRST)
            await read(recordings, tag, 32, blocks=2)
            assert service.under_way([HIGH]) is None
            assert service.under_way(layers) == StartReport(how="recorded", done=2 * BLOCK)
            assert (await service.report()).recorded == 1
            await trio.sleep(20)
            known = await service.known(image)
            assert known is not None
            assert (known.runs, known.size, known.flaw) == (1, 2 * BLOCK, "")
            await start(service, ProfileUse.FIRST)
            assert service.under_way(layers) == StartReport(how="prefetched", done=0, total=2 * BLOCK)
            await trio.sleep(2)
            assert service.under_way(layers) is None
            assert await service.report() == StartsReport(1, 0, 0, 2 * BLOCK)
        async with starts(store, streams, FakeCatalog(), packed=True) as (service, _):
            assert service.under_way(layers) == StartReport(how="pack", done=100, total=1000)

    run(body)


def test_without_a_profile_the_landmark_of_a_layer_is_one() -> None:
    """The start is recorded all the same: what it reads is nearer to what the next one will."""

    async def body() -> None:
        store, streams = FakeStore(), FakeStreams()
        async with starts(store, streams, FakeCatalog(marked=HIGH)) as (service, _):
            assert (await start(service, ProfileUse.FIRST)).recording
            await trio.sleep(1)
            assert streams.asked == [(HIGH, [range(3000)])]

    run(body)


def test_beside_a_pack_no_more_is_read_than_was_recorded_and_that_in_its_order() -> None:
    async def body() -> None:
        async with starts(FakeStore(), FakeStreams(), FakeCatalog(marked=HIGH), packed=True) as (service, _):
            assert await start(service, ProfileUse.USE) == Begun("", EXACT_KB, [(BLOCK, BLOCK)])
            assert await start(service, ProfileUse.OFF) == UNKNOWN

    run(body)


def local(runs: list[Run], streams: FakeStreams) -> list[tuple[int, int]]:
    """What a start with a profile of `runs` is to have in memory, where all is local, in blocks."""

    async def body() -> None:
        async with open_tasks() as nursery:
            service = Prefetches(FakeCatalog(), streams, nursery)
            profile = Profile(layers=LAYERS, runs=runs)
            extents = await service.bring([LOW, HIGH], profile)
            found.extend((address // BLOCK, size // BLOCK) for address, size in extents)

    found: list[tuple[int, int]] = []
    run(body)
    return found


def at(layer: int, block: int, blocks: int = 1) -> Run:
    return Run(layer, 512 + block * BLOCK, blocks * BLOCK)


def test_what_is_near_to_what_is_read_first_comes_into_memory_with_it() -> None:
    whole = FakeStreams(is_whole=True)
    assert local([at(1, 100), at(0, 3), at(1, 90, 2), at(1, 100)], whole) == [(634, 11), (19, 1)]
    assert local([at(1, 100), at(1, 83), at(1, 117)], whole) == [(627, 35)]
    assert local([at(1, 100), at(1, 82), at(1, 118)], whole) == [(644, 1), (626, 1), (662, 1)]
    assert local([at(0, 0, 1024), at(0, 2000, 3), at(0, 1025)], whole) == [(16, 1024), (2016, 3), (1041, 1)]


def test_what_is_to_come_comes_into_memory_with_nothing_beside_it() -> None:
    """But for what no range can bring."""

    async def body() -> None:
        async with open_tasks() as nursery:
            for bare, expected in [((), [(644, 3), (19, 1)]), ((LOW,), [(644, 3)])]:
                service = Prefetches(FakeCatalog(bare), FakeStreams(), nursery)
                profile = Profile(layers=LAYERS, runs=[at(1, 100), at(0, 3), at(1, 102), at(1, 101)])
                found = await service.coming([LOW, HIGH], profile)
                assert [(address // BLOCK, size // BLOCK) for address, size in found] == expected

    run(body)


def test_what_is_not_local_or_of_no_file_is_not_brought_into_memory() -> None:
    assert local([at(1, 0), at(0, 3)], FakeStreams(is_whole=True, present_from=100 * BLOCK)) == [(544, 1)]
    assert local([at(1, 0), at(0, 3)], FakeStreams(is_whole=True, is_of_others=True)) == []


def test_the_disk_is_asked_once_for_starts_that_begin_together() -> None:
    async def body() -> None:
        streams, extents = FakeStreams(is_whole=True), [(544 * BLOCK, BLOCK)]
        async with open_tasks() as nursery:
            service = Prefetches(FakeCatalog(), streams, nursery)

            async def begin() -> None:
                assert await service.bring([LOW, HIGH], Profile(layers=LAYERS, runs=[at(1, 0)])) == extents

            await run_all([begin] * 3)
            await begin()
            await begun(streams, extents)
            service.end([LOW])
            await begin()
            await begun(streams, extents * 2)
            await trio.sleep(3)
            await begin()
            await begun(streams, extents * 3)
        assert streams.located == 1, "where that is remembered"

    run(body)


def test_where_what_lies_is_remembered_of_some_profiles_and_not_of_an_earlier_one_of_an_image() -> None:
    async def body() -> None:
        streams = FakeStreams(is_whole=True)
        async with open_tasks() as nursery:
            service = Prefetches(FakeCatalog(), streams, nursery)
            for recorded in [*range(40), 39, 38, 0]:
                profile = Profile(layers=LAYERS, runs=[at(1, recorded)], recorded=recorded)
                assert await service.bring([LOW, HIGH], profile) == [((544 + recorded) * BLOCK, BLOCK)]
        assert streams.located == 41

    run(body)


async def begun(streams: FakeStreams, extents: list[tuple[int, int]]) -> None:
    """Return when the disk was asked for these, by a task that nobody waits for."""
    while len(streams.begun) < len(extents):
        await trio.lowlevel.checkpoint()
    assert streams.begun == extents


def test_no_more_than_so_much_is_brought_into_memory() -> None:
    assert len(local([at(0, 100 * number) for number in range(9000)], FakeStreams(is_whole=True))) == 1 << 13
    assert sum(size for _, size in local([at(0, 0, 1 << 20)], FakeStreams(is_whole=True))) == 1 << 15


def test_a_start_that_reads_what_is_not_the_images_says_so() -> None:
    async def body() -> None:
        store, image = FakeStore(), FakeImage()
        async with starts(store, FakeStreams(), FakeCatalog()) as (service, recordings):
            tag, *_ = await service.begin(ProfileUse.FIRST, cast("Any", image), [LOW, HIGH], MAPS, "another's layer")
            await read(recordings, tag, 32)
            recordings.end([view_name(MAP, "", "", tag)])
            await service.wait_kept()
            assert (store.profiles[0].flaw, store.profiles[0].is_complete) == ("another's layer", False)

    run(body)
