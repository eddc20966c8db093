"""Start-up packs: pieces go to the layers that their artifact reads, in order, and reads wait for what is soon here."""

from __future__ import annotations

import random
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import trio
import trio.testing

from core_sources import FakeBlob, FakeMemory, FakeSource, FakeSources, digest_of
from nsfs.core.blobs import NOBODY, Blobs
from nsfs.core.fetchplan import join_blocks
from nsfs.core.images import Claim, Image, Layer
from nsfs.core.startup import SOON, Startup, Startups
from nsfs.core.tasks import open_tasks
from nsfs.errors import NoSpaceError
from nsfs.format.artifact import PromisedPack, StartupPack
from nsfs.format.pack import PackPiece, PackTable, PackWriter, render_table
from nsfs.model.digest import DiffId, Digest
from nsfs.model.oci import Descriptor, ImageConfig, Platform, Runtime, layer_format
from nsfs.model.pool import LayerKey
from nsfs.model.profile import Run
from trio_tests import run

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    import pytest

BLOCK = 4096
MIB = 1 << 20
TAR = "application/vnd.oci.image.layer.v1.tar"
BLOBS = [digest_of(b"low"), digest_of(b"high"), digest_of(b"elsewhere")]
DATA = random.Random(1).randbytes(4 << 20)
KEYS = [LayerKey(blob, "artifact-" + "a" * 64) for blob in BLOBS[:2]]


class FakeTable:
    """One file of the whole stream, at 1 GiB for the first layer, 2 GiB for the second."""

    def __init__(self, key: LayerKey) -> None:
        self.at = (KEYS.index(key) + 1) << 30

    def segments(self, address: int, size: int) -> list[tuple[int, int, int]]:
        return [(self.at, len(DATA), 0)]

    def segments_in_stream(self, start: int, end: int) -> list[tuple[int, int, int]]:
        return [(self.at, len(DATA), 0)]

    def ranges_in(self, address: int, size: int) -> list[tuple[int, int]]:
        return [(address, size)]


class FakePool:
    def __init__(self) -> None:
        self.blocks: dict[int, bytes] = {}
        self.is_full = False

    def missing(self, address: int, size: int) -> list[tuple[int, int]]:
        return [(at, BLOCK) for at in range(address, address + size, BLOCK) if at not in self.blocks]

    def write(self, address: int, data: bytes) -> None:
        if self.is_full:
            raise NoSpaceError("no room")
        for at in range(0, len(data), BLOCK):
            self.blocks[address + at] = bytes(data[at : at + BLOCK])


class Slow(FakeBlob):
    """Gives half of the pack, and the rest when it is let."""

    let = trio.Event()

    @asynccontextmanager
    async def stream(self, offset: int = 0) -> AsyncIterator[AsyncIterator[bytes]]:
        async def pieces() -> AsyncGenerator[bytes, None]:
            data = self._data()
            yield data[: len(data) // 2]
            await Slow.let.wait()
            yield data[len(data) // 2 :]

        async with aclosing(pieces()) as given:
            yield given


def descriptor(data: bytes) -> Descriptor:
    return Descriptor(media_type=TAR, digest=digest_of(data), size=len(data))


CLAIMED: Any = None
CLAIM = Claim(Digest("sha256:" + "a" * 64), CLAIMED)
LAYERS = tuple(
    Layer(descriptor(blob), DiffId(digest_of(blob)), layer_format(TAR), claim=CLAIM) for blob in (b"low", b"high")
)
CONFIG = ImageConfig(Platform("amd64", "linux"), (), Runtime(), {})
IMAGE = Image("r:latest", "r", "latest", digest_of(b""), CONFIG, LAYERS)


class Site:
    """An image of two layers, the artifact of which has a pack of these runs."""

    def __init__(
        self, nursery: trio.Nursery, runs: list[Run], kind: type[FakeBlob] = FakeBlob, *, damaged: bool = False
    ) -> None:
        Slow.let = trio.Event()
        self.source = FakeSource("r", kind)
        pool: Any = FakePool()
        self.pool = pool
        self.known = set(KEYS)
        writer = PackWriter([str(blob) for blob in BLOBS])
        pack = b"".join(writer.add(run, DATA[run.start : run.start + run.length]) for run in runs)
        rest, table = writer.finish()
        head = tuple(self.named(blob) for blob in (b"an index", render_table(table)))
        whole = b"".join(self.source.blobs[each.digest] for each in head) + pack + rest
        named = self.named(whole)
        if damaged:
            self.source.blobs[named.digest] = whole[: len(whole) - len(pack + rest)] + bytes(len(pack + rest))
        tables: Any = FakeTable
        blobs = Blobs(FakeSources(self.source), FakeMemory())
        self.startups = Startups(tables, self.pool, blobs, nursery, lambda key: key in self.known)
        self.image = replace(IMAGE, pack=StartupPack(head, named))

    def promised(self) -> PromisedPack:
        """What a list says of the pack."""
        assert self.image.pack is not None
        return PromisedPack(self.image.pack.pack, sum(each.size for each in self.image.pack.head))

    def named(self, data: bytes) -> Descriptor:
        self.source.blobs[digest_of(data)] = data
        return descriptor(data)

    def has(self, layer: int, start: int, length: int) -> bool:
        """Whether the pool has these bytes of a layer, as they are."""
        at = (layer + 1) << 30
        blocks = range(start, start + length, BLOCK)
        return all(self.pool.blocks.get(at + block) == DATA[block : block + BLOCK] for block in blocks)

    def awaited(self, layer: int, start: int) -> trio.Event | None:
        return self.startups.awaited(KEYS[layer], "", start, start + BLOCK)


RUNS = [Run(1, 1 << 20, 1 << 20), Run(2, 0, 1 << 20), Run(0, 0, 2 << 20), Run(1, 0, 1 << 20)]


def test_what_a_start_reads_goes_to_the_layers_that_the_artifact_reads() -> None:
    async def body() -> None:
        async with open_tasks() as nursery:
            site = Site(nursery, RUNS)
            for _ in range(2):
                site.startups.begin(site.image)
            await trio.testing.wait_all_tasks_blocked()
            assert all(site.has(run.layer, run.start, run.length) for run in RUNS if run.layer < 2)
            assert len(site.pool.blocks) * BLOCK == 4 << 20
            assert site.awaited(0, 0) is None

    run(body)


def test_what_a_pack_begins_with_need_not_be_asked_for() -> None:
    async def body() -> None:
        async with open_tasks() as nursery:
            site = Site(nursery, RUNS, Slow)
            assert await site.startups.take_head(site.image, digest_of(b"an index")) is None, "nothing is under way"
            site.startups.begin(site.image)
            assert await site.startups.take_head(site.image, digest_of(b"an index")) == b"an index"
            assert await site.startups.take_head(site.image, digest_of(b"another")) is None
            Slow.let.set()
            await trio.sleep(1)
            assert await site.startups.take_head(site.image, digest_of(b"an index")) is None, "it came earlier"

    run(body)


def test_a_pack_that_begins_with_something_else_ends(caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        caplog.set_level("INFO")
        async with open_tasks() as nursery:
            site = Site(nursery, RUNS, Slow)
            assert site.image.pack is not None
            site.source.blobs[site.image.pack.pack.digest] = bytes(site.image.pack.pack.size)
            site.startups.begin(site.image)
            assert await site.startups.take_head(site.image, digest_of(b"an index")) is None
            assert site.awaited(0, 0) is None
            assert "begins with something else than it should" in caplog.text

    run(body)


def test_what_a_pack_begins_with_is_held_until_its_artifact_is_believed() -> None:
    async def body() -> None:
        async with open_tasks() as nursery:
            site = Site(nursery, RUNS)
            promised = site.promised()
            site.startups.expect(promised, "r", NOBODY)
            await trio.sleep(1)
            assert site.source.asked == [(0, promised.head)]
            assert site.awaited(0, 0) is None, "nobody has reason to wait for it"
            assert await site.startups.take_head(site.image, digest_of(b"an index")) is None
            for _ in range(2):
                site.startups.begin(site.image)
            assert await site.startups.take_head(site.image, digest_of(b"an index")) == b"an index"
            await trio.sleep(1)
            assert site.source.asked == [(0, promised.head), (promised.head, -1)]
            assert site.has(0, 0, 2 << 20)
            assert site.has(1, 0, 2 << 20)

    run(body)


def test_what_nobody_comes_to_believe_is_let_go(caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        caplog.set_level("INFO")
        async with open_tasks() as nursery:
            site = Site(nursery, RUNS)
            site.startups.expect(site.promised(), "r", NOBODY)
            await trio.sleep(60)
            assert "a start-up pack of r ends: no artifact that is believed has it" in caplog.text
            assert len(site.source.asked) == 1
            assert not site.pool.blocks
            site.startups.begin(site.image)
            await trio.sleep(1)
            assert site.has(0, 0, 2 << 20), "it is asked for anew"

    run(body)


def test_a_false_promise_of_what_it_begins_with_costs_nothing() -> None:
    async def body() -> None:
        async with open_tasks() as nursery:
            site = Site(nursery, RUNS)
            site.startups.expect(site.promised()._replace(head=5), "r", NOBODY)
            site.startups.begin(site.image)
            assert await site.startups.take_head(site.image, digest_of(b"an index")) == b"an index"
            await trio.sleep(1)
            assert site.has(0, 0, 2 << 20)

    run(body)


def test_the_largest_layer_goes_first() -> None:
    async def body() -> None:
        async with open_tasks() as nursery:
            site = Site(nursery, RUNS)
            assert site.image.pack is not None
            order: list[Digest] = []

            async def take(blob: Descriptor) -> None:
                await site.startups.take_head(site.image, blob.digest)
                order.append(blob.digest)

            site.startups.begin(site.image)
            for blob in site.image.pack.head:
                nursery.start_soon(take, blob)
            await trio.sleep(1)
            sizes = {blob.digest: blob.size for blob in site.image.pack.head}
            assert [sizes[each] for each in order] == sorted(sizes.values(), reverse=True)

    run(body)


def test_a_layer_gets_its_part_when_its_index_is_complete() -> None:
    async def body() -> None:
        async with open_tasks() as nursery:
            site = Site(nursery, RUNS)
            site.known.clear()
            site.startups.begin(site.image)
            await trio.sleep(1)
            assert not site.pool.blocks
            for key in KEYS:
                site.known.add(key)
                site.startups.ready(key)
            await trio.sleep(1)
            assert site.has(0, 0, 2 << 20)
            assert site.has(1, 0, 2 << 20)

    run(body)


def test_reads_wait_for_what_comes_soon_and_for_nothing_else() -> None:
    async def body() -> None:
        async with open_tasks() as nursery:
            site = Site(nursery, RUNS, Slow)
            site.startups.begin(site.image)
            await trio.sleep(1)
            assert site.awaited(1, 1 << 20) is None, "it is here"
            assert site.awaited(0, 8 << 20) is None, "it does not come"
            assert site.startups.awaited(KEYS[1], "another", 0, BLOCK) is None, "it comes for somebody else"
            last = site.awaited(1, 0)
            assert last is not None
            Slow.let.set()
            await last.wait()
            assert site.has(1, 0, 512 << 10)

    run(body)


def test_until_it_is_known_what_comes_reads_of_its_layers_wait() -> None:
    async def body() -> None:
        async with open_tasks() as nursery:
            site = Site(nursery, RUNS)
            assert not site.startups.is_fresh(site.image)
            site.startups.begin(site.image)
            asked = site.awaited(0, 8 << 20)
            assert asked is not None
            assert site.startups.awaited(LayerKey(BLOBS[2], KEYS[0].index), "", 0, BLOCK) is None
            assert site.startups.is_fresh(site.image)
            await asked.wait()
            assert site.awaited(0, 8 << 20) is None
            await trio.sleep(1)
            assert site.startups.is_fresh(site.image), "it came a moment ago"
            await trio.sleep(60)
            assert not site.startups.is_fresh(site.image)

    run(body)


def test_where_it_lies_is_known_before_it_comes_and_a_moment_after() -> None:
    """By piece, and in each by address; of layers that can take bytes."""

    async def body() -> None:
        async with open_tasks() as nursery:
            runs = [Run(1, 8 * BLOCK, BLOCK), Run(0, 0, 100), Run(1, 9 * BLOCK, BLOCK), Run(0, 2 * BLOCK, MIB)]
            site = Site(nursery, runs, Slow)
            assert site.startups.extents(site.image) == []
            site.startups.begin(site.image)
            assert site.startups.extents(site.image) == []
            await trio.sleep(1)
            low, high, rest = (1 << 30, BLOCK), ((2 << 30) + 8 * BLOCK, 2 * BLOCK), 512 * 1024 // BLOCK - 3
            first, second = ((1 << 30) + 2 * BLOCK, rest * BLOCK), ((1 << 30) + (2 + rest) * BLOCK, MIB - rest * BLOCK)
            assert site.startups.extents(site.image)[:3] == [low, first, high]
            site.known.remove(KEYS[1])
            assert high not in site.startups.extents(site.image)
            site.known.add(KEYS[1])
            Slow.let.set()
            await trio.sleep(1)
            found = site.startups.extents(site.image)
            assert found[:3] == [low, first, high]
            assert join_blocks(found[3:]) == [second]
            assert site.startups.extents(IMAGE) == []

    run(body)


def test_what_is_far_ahead_is_not_waited_for() -> None:
    table = PackTable([str(BLOBS[0])], [PackPiece(MIB, MIB, bytes(32), [Run(0, at * MIB, MIB)]) for at in range(32)])
    startup = Startup.plan(IMAGE, table)
    assert startup.awaited(KEYS[0], SOON, SOON + 1) is not None
    assert startup.awaited(KEYS[0], SOON + MIB, SOON + MIB + 1) is None
    startup.received = MIB
    assert startup.awaited(KEYS[0], SOON + MIB, SOON + MIB + 1) is not None


def test_a_pack_that_lies_ends_and_nobody_waits_for_it(caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        caplog.set_level("INFO")
        async with open_tasks() as nursery:
            site = Site(nursery, RUNS, damaged=True)
            site.startups.begin(site.image)
            await trio.sleep(1)
            assert not site.pool.blocks
            assert site.awaited(0, 0) is None
            assert "a start-up pack of r ends: a piece of a pack does not have the digest" in caplog.text

    run(body)


def test_a_full_pool_ends_it(caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        caplog.set_level("INFO")
        async with open_tasks() as nursery:
            site = Site(nursery, RUNS, Slow)
            site.pool.is_full = True
            site.startups.begin(site.image)
            await trio.sleep(1)
            assert site.awaited(0, 0) is None
            assert "ends: no room" in caplog.text

    run(body)
