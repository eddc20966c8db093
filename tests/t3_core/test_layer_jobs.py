"""Layers: one job for each, fed with the blob's bytes; whoever leaves, fails or lies."""

import fcntl
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from core_sources import LAYER, FakeBlob, FakeMemory, FakeSource, FakeSources, digest_of
from nsfs.core.blobs import Blobs
from nsfs.core.claimed import ClaimedLayers, LayerMade, MapMade
from nsfs.core.images import Image, Layer, ListedLayer
from nsfs.core.layers import Layers, MapArgs, PlainArgs, map_id_of
from nsfs.core.lulls import Lulls
from nsfs.core.recording import QUIET
from nsfs.core.spanning import SpanArgs, Spanning
from nsfs.core.tasks import open_tasks
from nsfs.errors import CorruptError, NoSpaceError, NotFoundError, UnreachableError, UnsupportedError
from nsfs.format.artifact import PromisedPack
from nsfs.model.digest import DiffId, Digest
from nsfs.model.oci import Descriptor, ImageConfig, Platform, Runtime, layer_format
from nsfs.model.pool import Access, LayerKey, LayerRecord, MapRecord
from nsfs.store.spool import Spool
from trio_tests import run

DATA = [bytes([number]) * 300_000 for number in range(4)]


class FakeCatalog:
    def __init__(self) -> None:
        self.known: dict[LayerKey, LayerRecord] = {}
        self.maps: dict[str, MapRecord] = {}

    def layer(self, key: LayerKey) -> LayerRecord | None:
        return self.known.get(key)

    def layers(self) -> list[LayerRecord]:
        return list(self.known.values())

    def map(self, map_id: str) -> MapRecord | None:
        return self.maps.get(map_id)

    def put_map(self, record: MapRecord) -> None:
        self.maps[record.id] = record

    def update_layer(self, key: LayerKey, change: Callable[[LayerRecord], LayerRecord]) -> LayerRecord:
        self.known[key] = change(self.known[key])
        return self.known[key]


class FakeFiles:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = str(directory)

    def spool(self, key: LayerKey) -> Spool:
        return Spool(self.spool_path(key), None)

    def spool_path(self, key: LayerKey) -> str:
        return f"{self.path}/{key.blob.hex[:8]}"

    def map(self, key: LayerKey, map_id: str = "") -> str:
        return f"{self.path}/map-{map_id}"


class FakeJobs:
    """Does what jobs do, as far as their worker sees it. `hooks` come before, by the job's name."""

    def __init__(self, site: "Site") -> None:
        self.site = site
        self.ran: list[str] = []
        self.fed: list[bytes] = []
        self.hooks: dict[str, Callable[[], Awaitable[None]]] = {}
        self.needs_lower: set[Digest] = set()

    async def run(
        self, entry: str, args: Any, fds: Sequence[int], result: Any, report: Any = None, *, is_fed: bool = False
    ) -> Any:
        name = entry.partition(":")[2]
        self.ran.append(name)
        assert is_fed == (name == "first_pass")
        if name in self.hooks:
            await self.hooks[name]()
        return await getattr(self, name)(args, fds, report)

    async def first_pass(self, args: PlainArgs, fds: Sequence[int], report: Any) -> LayerMade:
        spool = Path(self.site.files.spool_path(LayerKey(Digest(args.blob), "plain")))
        await report(1)
        fed = await _read_all(fds[0])
        self.fed.append(fed)
        with spool.open("ab") as file:
            file.write(fed)
        if len(spool.read_bytes()) < args.blob_size:
            raise UnreachableError("the blob ended early")
        if digest_of(spool.read_bytes()) != args.blob:
            spool.unlink()
            raise CorruptError("the blob is not what it is said to be")
        if args.diff_id not in ("", diff_id_of(Digest(args.blob))):
            spool.unlink()
            raise CorruptError("the diff ID is not what it is said to be")
        self.site.commit(Digest(args.blob), args.blob_size)
        return LayerMade(ranges=[(1 << 30, 4096)])

    async def make_checkpoints(self, args: SpanArgs, _fds: Sequence[int], _report: Any) -> LayerMade:
        spool = Path(self.site.files.spool_path(LayerKey(Digest(args.blob), "plain")))
        assert digest_of(spool.read_bytes()) == args.blob
        spool.unlink()
        key = LayerKey(Digest(args.blob), args.index)
        self.site.catalog.update_layer(key, lambda record: msgspec.structs.replace(record, has_spans=True))
        return LayerMade()

    async def build_map(self, args: MapArgs, _fds: Sequence[int], _report: Any) -> MapMade:
        needs = Digest(args.blob) in self.needs_lower
        if needs and args.lowers is None:
            return MapMade(needs_lower=True)
        (self.site.files.directory / f"map-{args.map_id}").write_text(" ".join(args.lowers or []))
        return MapMade(needs_lower=False, borrowed=[0] if needs and args.lowers else [])


async def _read_all(fd: int) -> bytes:
    if os.path.isfile(f"/proc/self/fd/{fd}"):
        with open(fd, "rb", closefd=False) as file:
            return file.read()
    async with trio.lowlevel.FdStream(os.dup(fd)) as stream:
        return b"".join([bytes(piece) async for piece in stream])


def diff_id_of(blob: Digest) -> DiffId:
    return DiffId(digest_of(b"stream of " + blob.encode()))


class FakeStartups:
    def __init__(self) -> None:
        self.begun: list[str] = []
        self.known: list[LayerKey] = []

    def expect(self, promised: PromisedPack, repository: str, access: Access) -> None:
        raise AssertionError("nobody has told of a pack")

    def begin(self, image: Image) -> None:
        self.begun.append(image.reference)

    async def take_head(self, image: Image, blob: Digest) -> bytes | None:
        return None

    def ready(self, key: LayerKey) -> None:
        self.known.append(key)


class Site:
    def __init__(self, path: Path, nursery: trio.Nursery, kind: type[FakeBlob] = FakeBlob) -> None:
        self.files = FakeFiles(path)
        self.catalog = FakeCatalog()
        self.source = FakeSource("r", kind)
        for data in DATA:
            self.source.add_blob(data)
        self.blobs = Blobs(FakeSources(self.source), FakeMemory())
        self.startups = FakeStartups()
        jobs: Any = FakeJobs(self)
        self.jobs = jobs
        self.written: list[tuple[int, int]] = []
        services = self.catalog, self.files, self.blobs, jobs, nursery
        claimed = ClaimedLayers(self.files.path, self.blobs, jobs, self.startups)
        lulls = Lulls(lambda: inf, lambda: False)
        self.spanning = Spanning(*services, claimed=claimed, lulls=lulls)
        self.layers = Layers(*services, written=self.written.extend, claimed=claimed, spans=self.spanning)
        self.image = Image("r:latest", "r", "latest", digest_of(b""), CONFIG, tuple(map(layer, range(len(DATA)))))

    def commit(self, blob: Digest, size: int) -> None:
        self.catalog.known[LayerKey(blob, "plain")] = LayerRecord(
            blob=blob,
            index="plain",
            blob_size=size,
            media_type=LAYER,
            diff_id=diff_id_of(blob),
            verified="diff-id",
            stream_size=size,
            files=1,
            content_bytes=1,
            slabs=(),
        )

    async def index(self, number: int) -> LayerKey:
        return await self.layers.index(self.image, layer(number))

    async def left(self) -> int:
        """To download of the first layer."""
        return (await self.layers.left_to_download(self.image, [layer(0)]))[layer(0).digest]


CONFIG = ImageConfig(Platform("amd64", "linux"), (), Runtime(), {})


def layer(number: int, diff_id: DiffId | None = None) -> Layer:
    blob = digest_of(DATA[number])
    descriptor = Descriptor(media_type=LAYER, digest=blob, size=len(DATA[number]))
    return Layer(descriptor, diff_id or diff_id_of(blob), layer_format(LAYER))


@contextmanager
def no_descriptor_is_left() -> Iterator[None]:
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == len(before)


def with_site(path: Path, test: Callable[[Site], Awaitable[object]], kind: type[FakeBlob] = FakeBlob) -> None:
    async def body() -> None:
        async with open_tasks() as nursery:
            await test(Site(path, nursery, kind))

    with no_descriptor_is_left():
        run(body)


def test_a_layer_is_read_once_for_all_who_want_it(tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        async with trio.open_nursery() as readers:
            for _ in range(5):
                readers.start_soon(site.index, 0)
        await site.index(0)
        assert site.jobs.fed == [DATA[0]]
        assert site.written == [(1 << 30, 4096)]
        assert site.layers.is_indexed(layer(0))
        await trio.sleep(2 * QUIET)
        assert site.jobs.ran == ["first_pass", "make_checkpoints"]

    with_site(tmp_path, test)


def test_who_leaves_takes_nothing_with_him(tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        may_go = trio.Event()
        site.jobs.hooks["first_pass"] = may_go.wait
        with trio.move_on_after(1):
            await site.index(0)
        assert list(site.layers.running) == [LayerKey(digest_of(DATA[0]), "plain")]
        may_go.set()
        await site.index(0)
        assert site.jobs.ran.count("first_pass") == 1
        assert site.layers.running == {}

    with_site(tmp_path, test)


def test_what_is_spooled_is_not_fetched_again(tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        Path(site.files.spool_path(LayerKey(digest_of(DATA[0]), "plain"))).write_bytes(DATA[0][:100_000])
        assert await site.left() == 200_000
        await site.index(0)
        assert site.jobs.fed == [DATA[0][100_000:]]
        assert await site.left() == 0

    with_site(tmp_path, test)


def test_a_damaged_spool_costs_one_more_read(tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        Path(site.files.spool_path(LayerKey(digest_of(DATA[0]), "plain"))).write_bytes(b"x" * 100_000)
        await site.index(0)
        assert [len(fed) for fed in site.jobs.fed] == [200_000, 300_000]

    with_site(tmp_path, test)


def test_the_registrys_error_is_the_one_that_is_told(tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        site.source.error, site.source.gives = UnreachableError("connection reset by registry"), 100_000
        with pytest.raises(UnreachableError, match="reset by registry"):
            await site.index(0)
        site.source.error = None
        await site.index(0)
        assert [len(fed) for fed in site.jobs.fed] == [100_000, 200_000]

    with_site(tmp_path, test)


def test_a_job_that_fails_ends_its_download(tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        async def fail() -> None:
            raise NoSpaceError("disk full")

        site.jobs.hooks["first_pass"] = fail
        with pytest.raises(NoSpaceError):
            await site.index(0)
        assert trio.current_time() < 1

    with_site(tmp_path, test)


def test_a_layouts_blob_is_nothing_to_download(tmp_path: Path) -> None:
    class FileBlob(FakeBlob):
        directory = "/layout"

    async def test(site: Site) -> None:
        Path(site.files.spool_path(LayerKey(digest_of(DATA[0]), "plain"))).write_bytes(DATA[0][:100_000])
        assert await site.left() == 0
        await site.index(0)
        assert site.jobs.fed == [DATA[0][100_000:]]

    with_site(tmp_path, test, FileBlob)


def test_a_user_whose_pipes_may_not_grow_reads_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with_site(tmp_path, lambda site: site.index(0))


def test_a_layer_that_is_refused_is_not_begun(tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        encrypted = Layer(layer(0).descriptor, layer(0).diff_id, layer_format(LAYER + "+encrypted"))
        with pytest.raises(UnsupportedError):
            await site.layers.index(site.image, encrypted)
        assert site.jobs.ran == []

    with_site(tmp_path, test)


WRONG = DiffId(digest_of(b"something else"))


def test_an_image_that_lies_of_a_layer_hears_so_and_nobody_else_does(tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        told: list[str] = []

        async def index(claim: Layer) -> None:
            try:
                await site.layers.index(site.image, claim)
                told.append("indexed")
            except CorruptError:
                told.append("corrupt")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(index, layer(0, WRONG))
            await trio.testing.wait_all_tasks_blocked()
            for claim in (layer(0), layer(0), layer(0, WRONG)):
                nursery.start_soon(index, claim)
        assert sorted(told) == ["corrupt", "corrupt", "indexed", "indexed"]
        await index(layer(0, WRONG))
        assert told[-1] == "corrupt"

    with_site(tmp_path, test)


def test_layers_of_a_manifest_are_read_while_its_configuration_is_to_come(tmp_path: Path) -> None:
    """Nobody says meanwhile what their diff IDs are: whoever lies of one hears so then."""

    async def test(site: Site) -> None:
        toc = layer_format(LAYER, {"containerd.io/snapshot/stargz/toc.digest": digest_of(b"toc")})
        odd = [ListedLayer(layer(2).descriptor, toc), ListedLayer(layer(3).descriptor, layer_format("text/html"))]
        await site.index(1)
        site.layers.expect([*(layer(number).listed for number in (0, 1, 0)), *odd], "r")
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(CorruptError, match="not what the image's configuration says"):
            await site.layers.index(site.image, layer(0, WRONG))
        await site.index(0)
        assert site.jobs.fed == [DATA[1], DATA[0]]

    with_site(tmp_path, test)


def test_what_could_not_be_read_ahead_of_its_image_is_read_for_it(tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        site.source.error = UnreachableError("down")
        site.layers.expect([layer(0).listed], "r")
        await trio.sleep(60)
        site.source.error = None
        await site.index(0)
        assert site.jobs.fed[-1] == DATA[0]

    with_site(tmp_path, test)


def test_checkpoints_wait_for_first_passes_and_come_one_at_a_time(tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        at_work = [0, 0]

        async def count() -> None:
            assert not site.layers.running
            at_work[0] += 1
            at_work[1] = max(at_work)
            await trio.sleep(1)
            at_work[0] -= 1

        site.jobs.hooks["make_checkpoints"] = count
        async with trio.open_nursery() as readers:
            for number in range(4):
                readers.start_soon(site.index, number)
        await trio.sleep(2 * QUIET)
        assert at_work == [0, 1]
        assert site.jobs.ran == ["first_pass"] * 4 + ["make_checkpoints"] * 4
        assert all(record.has_spans for record in site.catalog.layers())
        assert not any(os.path.exists(site.files.spool_path(LayerKey(digest_of(data), "plain"))) for data in DATA)

    with_site(tmp_path, test)


def test_checkpoints_that_fail_are_a_warning_and_are_made_when_they_are_wanted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(site: Site) -> None:
        async def fail() -> None:
            raise NoSpaceError("disk full")

        site.jobs.hooks["make_checkpoints"] = fail
        key = await site.index(0)
        await trio.sleep(2 * QUIET)
        assert "disk full" in caplog.text
        os.unlink(site.files.spool_path(key))
        site.jobs.hooks.clear()
        assert (await site.spanning.ensure(key)).has_spans
        await site.spanning.ensure(key)
        assert site.jobs.ran.count("make_checkpoints") == 2
        with pytest.raises(NotFoundError):
            await site.spanning.ensure(LayerKey(digest_of(b"unknown"), "plain"))

    with_site(tmp_path, test)


def test_maps_are_made_once_and_again_where_they_were_deleted(tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        for number in range(4):
            await site.index(number)
        layers = [layer(number) for number in (0, 1, 1, 0)]
        first = await site.layers.maps(layers)
        assert [record.blob for record in first] == [each.digest for each in layers]
        assert await site.layers.maps(layers) == first
        assert site.jobs.ran.count("build_map") == 2
        os.unlink(first[0].path)
        assert await site.layers.maps(layers) == first
        assert site.jobs.ran.count("build_map") == 3

    with_site(tmp_path, test)


def test_a_map_that_depends_on_those_below_is_another_one_over_others(tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        for number in range(4):
            await site.index(number)
        site.jobs.needs_lower = {digest_of(DATA[2]), digest_of(DATA[3])}
        over_both = await site.layers.maps([layer(number) for number in (0, 1, 2, 3)])
        over_one = await site.layers.maps([layer(number) for number in (1, 2)])
        alone = await site.layers.maps([layer(2)])
        ids = {record.id for record in (over_both[2], over_one[1], alone[0])}
        assert len(ids) == 3
        assert (await site.layers.map_alone(layer(2))).needs_lower
        assert Path(over_both[3].path).read_text().split() == [over_both[n].path for n in (2, 1, 0)], "top first"
        assert over_both[2].lowers == (over_both[1].key,)
        assert over_both[3].lowers == (over_both[2].key, over_both[1].key), "what a lower map borrowed, too"
        assert over_both[2].id == map_id_of(over_both[2].key, over_both[:2])
        assert await site.layers.maps([layer(number) for number in (0, 1, 2, 3)]) == over_both

    with_site(tmp_path, test)
