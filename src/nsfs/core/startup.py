"""Start-up packs: what a start of an image reads comes as one stream, in the order of first use, into its layers.

Owns the packs that are under way: each comes once at a time for an owner, is verified piece by piece, and goes to those
layers only that are read by the index of the artifact which has the pack. A read of what is soon to come waits for it.
What a pack begins with may be asked for before anybody believes that artifact: it is held until then, and goes nowhere
without.
Refuses nothing: whatever goes wrong ends the pack, and reads fetch by ranges what it did not bring.

Concurrency: tasks in the worker's nursery. One receives, at most `_AHEAD` parts ahead of the one that stores, which
waits for the table, and for each layer until it can take bytes; pieces are taken apart in threads.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
from bisect import bisect_right
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from nsfs.core.fetchplan import Window, blocks_of, join_blocks
from nsfs.core.landing import store_window
from nsfs.core.tasks import run_all
from nsfs.errors import CorruptError, NotFoundError, NsfsError
from nsfs.format.pack import open_piece, parse_table
from nsfs.model.pool import LayerKey

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from nsfs.core.blobs import Blobs
    from nsfs.core.fetchplan import Table
    from nsfs.core.images import Image
    from nsfs.core.landing import Pool
    from nsfs.core.ports import Blob
    from nsfs.format.artifact import PromisedPack, StartupPack
    from nsfs.format.pack import PackPiece, PackTable
    from nsfs.model.digest import Digest
    from nsfs.model.oci import Descriptor
    from nsfs.model.pool import Access

log = logging.getLogger(__name__)

SOON: Final = 8 << 20
"""Bytes of the pack: what lies no further ahead of what came last is waited for."""
_AHEAD: Final = 128
"""Parts of the stream, of 64 KiB at most over a network, that are received and not taken apart yet."""
_FRESH: Final = 30.0
"""Seconds for which a start that a pack was for may go on."""
_BELIEVED: Final = 10.0
"""Seconds for which the beginning of a pack is held that nobody believes."""
_READY: Final = 30.0
"""Seconds that a piece waits for its layer."""
_EXTENTS: Final = 1 << 13
"""What is said of where a pack lies; of larger ones the beginning."""


@dataclass(eq=False, slots=True)
class _Coming:
    """What of one layer is still to come: runs by where they begin in the stream, without overlap."""

    starts: list[int]
    ends: list[int]
    pieces: list[int]
    """The number of each run's piece."""


@dataclass(eq=False, slots=True)
class _Asked:
    """A pack whose table is asked for."""

    ahead: int = 0
    """Bytes that are asked for before anybody believes its artifact."""
    image: Image | None = None
    """That is to have it; None until then."""
    keys: frozenset[LayerKey] = frozenset()
    """The layers that may be to have it."""
    is_believed: trio.Event = field(default_factory=trio.Event)
    is_here: trio.Event = field(default_factory=trio.Event)
    """The table, or nothing comes."""

    def believe(self, image: Image) -> None:
        """The image's artifact is believed, and has the pack."""
        self.image = image
        self.keys = frozenset(_claimed(image))
        self.is_believed.set()

    async def wait_believed(self) -> tuple[Image, StartupPack]:
        """The image, and its pack; raises NotFoundError where nobody comes to have that."""
        with trio.move_on_after(_BELIEVED):
            await self.is_believed.wait()
        if self.image is None or self.image.pack is None:
            raise NotFoundError("no artifact that is believed has it")
        return self.image, self.image.pack

    async def receive(self, blob: Blob, send: trio.MemorySendChannel[bytes]) -> None:
        """Give all of a blob as it comes; but for its beginning, it is asked for once it is believed."""
        async with send:
            if self.ahead:
                await send.send(await blob.fetch(0, self.ahead))
                await self.is_believed.wait()
            async with blob.stream(self.ahead) as stream:
                async for data in stream:
                    await send.send(data)

    def awaited(self, key: LayerKey, _start: int, _end: int) -> trio.Event | None:
        """See Startup."""
        return self.is_here if key in self.keys else None


@dataclass(eq=False, slots=True)
class Startup:
    """One pack that is under way."""

    keys: Mapping[int, LayerKey]
    """The layers that are to have it, by their numbers in the table."""
    table: PackTable
    """Of the pieces, which follow the pack's head."""
    coming: dict[LayerKey, _Coming]
    offsets: list[int]
    """Where each piece begins behind the head."""
    stored: list[trio.Event]
    """By piece: it is in the pool, or will not be."""
    received: int = 0
    """Bytes of the pieces that were taken from the stream so far."""

    @classmethod
    def plan(cls, image: Image, table: PackTable) -> Startup:
        """What the layers that this image's artifact reads are to have of its pack."""
        claimed = {str(key.blob): key for key in _claimed(image)}
        keys = {number: claimed[blob] for number, blob in enumerate(table.layers) if blob in claimed}
        coming = {key: _coming(table, number) for number, key in keys.items()}
        offsets = [0, *itertools.accumulate(piece.length for piece in table.pieces)]
        return cls(keys, table, coming, offsets, [trio.Event() for _ in table.pieces])

    def awaited(self, key: LayerKey, start: int, end: int) -> trio.Event | None:
        """What to wait for before these bytes of a layer's stream are fetched otherwise; None for nothing."""
        found = self.coming.get(key)
        if found is None:
            return None
        number = bisect_right(found.ends, start)
        while number < len(found.starts) and found.starts[number] < end:
            piece = found.pieces[number]
            if not self.stored[piece].is_set() and self.offsets[piece] - self.received <= SOON:
                return self.stored[piece]
            number += 1
        return None


class _Head:
    """The blobs that a pack begins with, as they come."""

    def __init__(self, blobs: Iterable[Descriptor]) -> None:
        self._came = {blob.digest: trio.Event() for blob in blobs}
        self._data: dict[Digest, bytes] = {}

    def put(self, blob: Digest, data: bytes) -> None:
        """One of them; raises CorruptError."""
        if hashlib.new(blob.algorithm, data).hexdigest() != blob.hex:
            raise CorruptError(f"a start-up pack begins with something else than it should: {blob}")
        self._data[blob] = data
        self._came[blob].set()

    def end(self) -> None:
        """No more of them come."""
        for event in self._came.values():
            event.set()

    async def take(self, blob: Digest) -> bytes | None:
        """One of them, once it is here; None where it does not come."""
        if blob in self._came:
            await self._came[blob].wait()
        return self._data.get(blob)


class _Parts:
    """Cuts a stream."""

    def __init__(self, stream: trio.MemoryReceiveChannel[bytes]) -> None:
        self._stream = stream
        self._buffer = bytearray()

    async def take(self, size: int) -> bytes:
        """The next `size` bytes; raises CorruptError where there are fewer."""
        while len(self._buffer) < size:
            data = await anext(self._stream, b"")
            if not data:
                raise CorruptError("a start-up pack ends early")
            self._buffer += data
        taken = bytes(memoryview(self._buffer)[:size])
        del self._buffer[:size]
        return taken


class Startups:
    """The service."""

    def __init__(
        self,
        open_table: Callable[[LayerKey], Table],
        pool: Pool,
        blobs: Blobs,
        nursery: trio.Nursery,
        is_known: Callable[[LayerKey], bool],
    ) -> None:
        self._open_table = open_table
        self._pool = pool
        self._blobs = blobs
        self._nursery = nursery
        self._is_known = is_known
        """Whether a layer can take bytes."""
        self._running: dict[tuple[str, str], Startup | _Asked] = {}
        """By digest of the pack, and owner."""
        self._heads: dict[tuple[str, str], _Head] = {}
        """What those begin with."""
        self._came: dict[tuple[str, str], tuple[float, Startup]] = {}
        """Others that ended a moment ago, and when, by trio's clock."""
        self._became_ready = trio.Event()

    def expect(self, promised: PromisedPack, repository: str, access: Access) -> None:
        """Ask for what a pack begins with that an image may turn out to have; for a while it is held for `begin`."""
        self._ask(promised.pack, repository, access.owner, promised.head)

    def _ask(self, pack: Descriptor, repository: str, owner: str, ahead: int = 0) -> tuple[str, str]:
        """Have it under way; gives its name."""
        name = _name(pack, owner)
        if name not in self._running:
            self._running[name] = asked = _Asked(ahead)
            self._nursery.start_soon(self._run, name, pack, repository, asked)
        return name

    def begin(self, image: Image) -> None:
        """Begin to have what a start of the image reads, if its artifact has that and nobody did."""
        if image.pack is None:
            return
        name = self._ask(image.pack.pack, image.repository, image.access.owner)
        asked = self._running[name]
        if isinstance(asked, _Asked) and asked.image is None:
            self._heads[name] = _Head(image.pack.head)
            asked.believe(image)

    async def take_head(self, image: Image, blob: Digest) -> bytes | None:
        """A blob that the pack begins with, verified; None where that does not come, or came earlier."""
        head = self._heads.get(_name(image.pack.pack, image.access.owner)) if image.pack is not None else None
        return None if head is None else await head.take(blob)

    def is_fresh(self, image: Image) -> bool:
        """Whether the image's pack is under way, or came a moment ago: its start has that, and little else."""
        if image.pack is None:
            return False
        name = _name(image.pack.pack, image.access.owner)
        when, _ = self._came.get(name, (-math.inf, None))
        return name in self._running or trio.current_time() - when < _FRESH

    def extents(self, image: Image) -> list[tuple[int, int]]:
        """Where what the image's fresh pack brings is in the pool, or will be: address and size, in whole blocks.

        In the order of its pieces. Looks at memory maps alone; any thread.
        """
        startup = None if image.pack is None else self._fresh(_name(image.pack.pack, image.access.owner))
        if startup is None:
            return []
        tables = {layer: self._open_table(key) for layer, key in startup.keys.items() if self._is_known(key)}
        extents = (extent for piece in startup.table.pieces for extent in _extents(tables, piece))
        return list(itertools.islice(extents, _EXTENTS))

    def _fresh(self, name: tuple[str, str]) -> Startup | None:
        """One that is under way, or came a moment ago."""
        running = self._running.get(name)
        if running is None and name in self._came:
            return self._came[name][1]
        return running if isinstance(running, Startup) else None

    def progress(self, layers: Collection[LayerKey]) -> tuple[int, int] | None:
        """Bytes that came, and that are to come, of a pack for one of these layers; None where none is under way."""
        for startup in self._running.values():
            if isinstance(startup, Startup) and not startup.coming.keys().isdisjoint(layers):
                return startup.received, startup.offsets[-1]
        return None

    def ready(self, key: LayerKey) -> None:
        """The layer can take bytes."""
        del key
        self._became_ready.set()
        self._became_ready = trio.Event()

    def awaited(self, key: LayerKey, owner: str, start: int, end: int) -> trio.Event | None:
        """What to wait for before these bytes of a layer's stream are fetched otherwise; None for nothing."""
        for (_, whose), startup in self._running.items():
            if whose == owner and (event := startup.awaited(key, start, end)) is not None:
                return event
        return None

    async def wait_over(self, key: LayerKey) -> None:
        """Return when no pack that is under way has anything of this layer."""
        for asked in [each for each in self._running.values() if isinstance(each, _Asked) and key in each.keys]:
            await asked.is_here.wait()
        for startup in [each for each in self._running.values() if isinstance(each, Startup) and key in each.coming]:
            for event in startup.stored:
                await event.wait()

    async def _run(self, name: tuple[str, str], pack: Descriptor, repository: str, asked: _Asked) -> None:
        try:
            source = await self._blobs.source(repository, name[1])
            send, receive = trio.open_memory_channel[bytes](_AHEAD)
            await run_all((partial(asked.receive, source.blob(pack), send), partial(self._take, name, asked, receive)))
        except NsfsError as error:
            log.info("a start-up pack of %s ends: %s", repository, error)
        except Exception:
            log.exception("a bug: no start-up pack of %s", repository)
        finally:
            self._heads.pop(name, _Head(())).end()
            ended = self._running.pop(name)
            now = trio.current_time()
            self._came = {each: came for each, came in self._came.items() if now - came[0] < _FRESH}
            if isinstance(ended, Startup):
                self._came[name] = now, ended
            for event in ended.stored if isinstance(ended, Startup) else [asked.is_here]:
                event.set()

    async def _take(self, name: tuple[str, str], asked: _Asked, stream: trio.MemoryReceiveChannel[bytes]) -> None:
        """Give out the head of a pack that is believed, and store its pieces."""
        (image, pack), parts = await asked.wait_believed(), _Parts(stream)
        head = [(blob.digest, await parts.take(blob.size)) for blob in pack.head]
        for digest, data in sorted(head, key=lambda each: len(each[1]), reverse=True):
            self._heads[name].put(digest, data)
            await trio.lowlevel.checkpoint()  # who waits for the largest goes on first
        table = parse_table(await self._heads[name].take(pack.table.digest) or b"", pack.size)
        startup = await trio.to_thread.run_sync(Startup.plan, image, table)
        self._running[name] = startup
        asked.is_here.set()
        for number, piece in enumerate(table.pieces):
            packed = await parts.take(piece.length)
            startup.received += piece.length
            await self._store(startup, number, packed)
            startup.stored[number].set()
        log.info("a start of %s has what it reads: %d bytes", image.reference, startup.table.size)

    async def _store(self, startup: Startup, number: int, packed: bytes) -> None:
        """Store what a piece has of layers that are read by this artifact."""
        piece = startup.table.pieces[number]
        keys = {run.layer: startup.keys[run.layer] for run in piece.runs if run.layer in startup.keys}
        first = next(iter(keys.values()), None)
        if first is not None:
            self._blobs.fetched[first.blob] += len(packed)
        with trio.move_on_after(_READY):
            for key in keys.values():
                while not self._is_known(key):
                    await self._became_ready.wait()
        known = {layer: self._open_table(key) for layer, key in keys.items() if self._is_known(key)}
        await trio.to_thread.run_sync(self._write, piece, packed, known)

    def _write(self, piece: PackPiece, packed: bytes, tables: Mapping[int, Table]) -> None:
        runs = open_piece(piece, packed)
        for layer, table in tables.items():
            window = Window((run.start, data) for run, data in runs if run.layer == layer)
            if (refused := store_window(self._pool, table, window)) is not None:
                raise refused


def _name(pack: Descriptor, owner: str) -> tuple[str, str]:
    return str(pack.digest), owner


def _claimed(image: Image) -> list[LayerKey]:
    """The layers that the image's artifact says how to read."""
    return [
        LayerKey(layer.digest, layer.claim.index, layer.access.origin)
        for layer in image.layers
        if layer.claim is not None
    ]


def _extents(tables: Mapping[int, Table], piece: PackPiece) -> list[tuple[int, int]]:
    """Of one piece, by address."""
    parts = {layer: [run.stream for run in piece.runs if run.layer == layer] for layer in tables}
    return join_blocks(found for layer, table in tables.items() for found in blocks_of(table, parts[layer]))


def _coming(table: PackTable, layer: int) -> _Coming:
    runs = sorted(
        (run.start, run.start + run.length, number)
        for number, piece in enumerate(table.pieces)
        for run in piece.runs
        if run.layer == layer
    )
    return _Coming([run[0] for run in runs], [run[1] for run in runs], [run[2] for run in runs])
