"""Layers: from a blob in a registry to an index, tables and a map in the domain's pool.

Owns which job is run for which layer, and that no layer is worked on twice at a time. The work itself is done by jobs
(`nsfs.layer_jobs`); this service feeds them bytes and remembers what they made. All layers of an image are indexed at
once; maps are made bottom-up only where a layer's tree depends on the layers below it.

Concurrency: whatever is begun runs in the worker's nursery and ends by itself; a caller who gives up cancels nobody. A
connection to a registry is thus never cancelled while it is being made.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import msgspec
import trio
from msgspec import Struct

from nsfs.core import spanning
from nsfs.core.claimed import LayerMade, MapMade, memory_file
from nsfs.core.flights import Flights
from nsfs.core.images import Layer
from nsfs.core.tasks import run_all
from nsfs.core.toc_image import fetch_toc
from nsfs.errors import CorruptError, NotFoundError, NsfsError, UnsupportedError
from nsfs.format import estargz
from nsfs.model import oci
from nsfs.model.digest import DiffId
from nsfs.model.pool import Access, LayerKey, LayerRecord, MapRecord

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence

    from nsfs.core.blobs import Blobs, OriginBlob
    from nsfs.core.claimed import ClaimedLayers
    from nsfs.core.images import Claim, Image, ListedLayer
    from nsfs.core.jobs import Jobs
    from nsfs.format.artifact import PromisedPack
    from nsfs.model.digest import Digest

log = logging.getLogger(__name__)

_PIPE = 1 << 20
_NICE = 5
"""Of first passes beside that of a larger layer, which would else be the last to end, on one processor."""
PLAIN: Final = "plain"
"""The index that a layer's one pass over all of it makes."""

T = TypeVar("T")


class Catalog(spanning.Catalog, Protocol):
    """The domain's records of layers and maps, durable. Writing may block: jobs write there, too."""

    def layers(self) -> list[LayerRecord]:
        """All of them."""

    def map(self, map_id: str) -> MapRecord | None:
        """A map that was made, or was found to need the layers below."""

    def put_map(self, record: MapRecord) -> None:
        """Remember one."""

    def update_layer(self, key: LayerKey, change: Callable[[LayerRecord], LayerRecord]) -> LayerRecord:
        """Replace a layer's record."""


class Files(spanning.Files, Protocol):
    """A layer's files."""

    def map(self, key: LayerKey, map_id: str = "") -> str:
        """An EROFS image."""


class PlainArgs(Struct, kw_only=True):
    """For `first_pass`. One more descriptor: a pipe or file with the blob's bytes from the spool's end."""

    domain: str
    blob: str
    origin: str
    blob_size: int
    media_type: str
    compression: str
    diff_id: str
    """As the image says; "" where its configuration is still to come."""
    nice: int
    """Of the process: what decides when an image can be shown goes first."""


class TocArgs(Struct, kw_only=True):
    """For `read_toc`. One more descriptor: the TOC's compressed bytes in a memfd."""

    domain: str
    blob: str
    origin: str
    blob_size: int
    media_type: str
    toc_digest: str
    toc_offset: int
    toc_size: int


class RenderArgs(Struct, kw_only=True):
    """For `render_layer`. Two more descriptors: memory files for the index and for the spans."""

    domain: str
    blob: str
    origin: str
    index: str


class MapArgs(Struct, kw_only=True):
    """For `build_map`: `lowers` are the maps below, top first; None means that they are not known."""

    domain: str
    blob: str
    origin: str
    index: str
    map_id: str
    lowers: list[str] | None


class Rendered(Struct, kw_only=True):
    """What an artifact says of a layer was written."""

    files: int


class LayerProgress:
    """How far one layer is, for whoever wants to show it."""

    def __init__(self, layer: ListedLayer) -> None:
        self.layer = layer
        self.done = 0
        self.total = layer.descriptor.size


class Layers:
    """The service."""

    def __init__(
        self,
        catalog: Catalog,
        files: Files,
        blobs: Blobs,
        jobs: Jobs,
        nursery: trio.Nursery,
        *,
        written: Callable[[Sequence[tuple[int, int]]], None],
        claimed: ClaimedLayers,
        spans: spanning.Spanning,
    ) -> None:
        self._catalog = catalog
        self._files = files
        self._blobs = blobs
        self._jobs = jobs
        self._nursery = nursery
        self._domain = files.path
        self._written = written
        self._claimed = claimed
        self._spanning = spans
        self._indexing: Flights[LayerKey] = Flights(nursery)
        self._mapping: Flights[MapRecord] = Flights(nursery)
        self._claims: dict[LayerKey, DiffId | None] = {}
        """What the image for which a plain layer is read says that its diff ID is; None where that is still to come."""
        self._begun: set[tuple[Digest, Access]] = set()
        """Images, by their manifests, and for whom."""
        self.running: dict[LayerKey, LayerProgress] = {}
        """Layers that are being indexed now."""

    def is_indexed(self, layer: Layer) -> bool:
        """Whether the layer's index is complete in this domain."""
        return self.record(layer) is not None

    def key_of(self, layer: Layer) -> LayerKey:
        """Under which the domain keeps the layer: the blob, and the index that it is read by.

        That is its table of contents where its manifest promises one, unless that was looked for in vain. An artifact
        that is believed says how to read what nobody has read through here.
        """
        if layer.format.toc is None:
            return self._plain_or_claimed(layer)
        promised, plain = replace(_plain(layer), index=f"estargz-{layer.format.toc.hex}"), _plain(layer)
        if self._catalog.layer(promised) is None:
            record = self._catalog.layer(plain)
            if record is not None and record.no_toc:
                return plain
        return promised

    def _plain_or_claimed(self, layer: Layer) -> LayerKey:
        plain = _plain(layer)
        if layer.claim is None or self._catalog.layer(plain) is not None:
            return plain
        return replace(plain, index=layer.claim.index)

    def record(self, layer: Layer) -> LayerRecord | None:
        """What is known of the layer, if its index is complete."""
        return self._catalog.layer(self.key_of(layer))

    def records(self) -> list[LayerRecord]:
        """What is known of all layers whose index is complete."""
        return self._catalog.layers()

    async def left_to_download(self, image: Image, layers: Sequence[Layer]) -> dict[Digest, int]:
        """Bytes that `index` will read of each plain layer in a registry; 0 where it needs no pass over all of it."""
        for access, some in groupby(layers, key=lambda layer: layer.access):
            await self._blobs.add([digest for layer in some for digest in _named(layer)], image.repository, access)
        return {layer.digest: await self._left_to_download(layer) for layer in layers}

    async def _left_to_download(self, layer: Layer) -> int:
        if layer.format.toc or layer.claim or self.is_indexed(layer):
            return 0
        if await self._blobs.is_local(layer.digest, layer.descriptor.size, layer.access):
            return 0
        return max(0, layer.descriptor.size - self._files.spool(_plain(layer)).size())

    def check(self, layer: Layer) -> None:
        """Raise UnsupportedError for a layer that cannot be shown."""
        if layer.format.refused:
            raise UnsupportedError(f"layer {layer.digest.short} cannot be shown: {layer.format.refused}")

    def begin(self, image: Image) -> None:
        """Index and map an image's layers in the background; whoever needs one asks for it, and hears how it went."""
        if (image.digest, image.access) not in self._begun:
            self._begun.add((image.digest, image.access))
            self._nursery.start_soon(self._prepare_quietly, image)

    async def _prepare_quietly(self, image: Image) -> None:
        layers = {layer.digest: layer for layer in image.layers if not layer.format.refused}
        try:
            await run_all(partial(self.index, image, layer) for layer in layers.values())
            if all(layer.digest in layers for layer in image.layers):
                await self.maps(image.layers)
        except NsfsError as error:
            self._begun.discard((image.digest, image.access))
            log.info("%s is not indexed ahead of its use: %s", image.reference, error)
        except Exception:
            log.exception("a bug: %s is not indexed ahead of its use", image.reference)

    def expect(self, layers: Iterable[ListedLayer], repository: str) -> None:
        """Begin to read the plain ones of a manifest's layers, whose image's configuration is still to come.

        Who indexes one then finds it under way, and hears how it went.
        """
        plain = [layer for layer in layers if not layer.format.toc and not layer.format.refused]
        unique = {layer.digest: layer for layer in plain if self._catalog.layer(_plain(layer)) is None}
        largest_first = sorted(unique.values(), key=lambda layer: layer.descriptor.size, reverse=True)
        if largest_first:
            self._nursery.start_soon(self._read_expected, largest_first, repository)

    def expect_pack(self, promised: PromisedPack, repository: str, access: Access) -> None:
        """Begin to have what an artifact may have of layers; nothing of it is believed before that is."""
        self._nursery.start_soon(self._jobs.make_ready)
        self._claimed.expect(promised, repository, access)

    async def _read_expected(self, layers: Sequence[ListedLayer], repository: str) -> None:
        """Of connections that are open the largest layer takes the first."""
        await self._blobs.add([layer.digest for layer in layers], repository, layers[0].access)
        for layer in layers:
            self._nursery.start_soon(self._read_quietly, layer)
            await trio.lowlevel.checkpoint()

    async def _read_quietly(self, layer: ListedLayer) -> None:
        key = _plain(layer)
        if self._catalog.layer(key) is not None:
            return
        self._claims.setdefault(key, None)
        try:
            await self._indexing.join(str(key), partial(self._read_plain, layer, key, None), layer.access.owner)
        except NsfsError as error:
            log.info("layer %s is not read ahead of its image: %s", layer.digest.short, error)
        except Exception:
            log.exception("a bug: layer %s is not read ahead of its image", layer.digest.short)

    async def index(self, image: Image, layer: Layer) -> LayerKey:
        """Make the layer's index complete: for eStargz its TOC, for a plain layer one pass over all of it.

        Or what an artifact says that is believed; where that cannot be had, the pass all the same.
        """
        self.check(layer)
        await self._blobs.add(_named(layer), image.repository, layer.access)
        record = self.record(layer)
        if record is not None:
            _check_claim(record, layer)
            return record.key
        key = self.key_of(layer)
        if key.index == PLAIN:
            return await self._index_plain(layer)
        if layer.claim is not None:
            return await self._index_claimed_or_plain(image, layer, layer.claim, key)
        work = partial(self._index_toc, image, layer, key)
        return await self._indexing.join(str(key), work, layer.access.owner)

    async def _index_claimed_or_plain(self, image: Image, layer: Layer, claim: Claim, key: LayerKey) -> LayerKey:
        work = partial(self._index_claimed, image, layer, claim, key)
        try:
            return await self._indexing.join(str(key), work, layer.access.owner)
        except (CorruptError, NotFoundError, UnsupportedError) as error:
            log.warning(
                "layer %s is read through, since what artifact %s says of it is not to be used: %s",
                layer.digest.short,
                claim.artifact,
                error,
            )
            return await self._index_plain(layer)

    async def _index_claimed(self, image: Image, layer: Layer, claim: Claim, key: LayerKey) -> LayerKey:
        await self._claimed.index(image, layer, claim, key)
        self._claimed.ready(key)
        return key

    async def _index_plain(self, layer: Layer) -> LayerKey:
        key = _plain(layer)
        while (found := self._catalog.layer(key)) is None:
            claim = self._claims.setdefault(key, layer.diff_id)
            work = partial(self._read_plain, layer.listed, key, layer.diff_id)
            try:
                await self._indexing.join(str(key), work, layer.access.owner)
            except CorruptError:
                if claim in {None, layer.diff_id}:
                    raise
                log.info("layer %s is read again: another image said something else of it", layer.digest.short)
        _check_claim(found, layer)
        return key

    async def _read_plain(self, layer: ListedLayer, key: LayerKey, claim: DiffId | None) -> LayerKey:
        blob = self._blobs.blob(layer.digest, layer.descriptor.size, layer.access)
        with self._shown(layer, key) as progress:
            self._claims[key] = claim
            made = await self._resumed(blob, key, lambda: self._read_all(layer, claim, blob, progress))
        self._written(made.ranges)
        self._spanning.begin([key], layer.access.owner)
        return key

    @contextmanager
    def _shown(self, layer: ListedLayer, key: LayerKey) -> Iterator[LayerProgress]:
        """Count the layer as running."""
        self.running[key] = LayerProgress(layer)
        try:
            with self._spanning.put_off():
                yield self.running[key]
        finally:
            self._claims.pop(key, None)
            del self.running[key]

    async def _index_toc(self, image: Image, layer: Layer, key: LayerKey) -> LayerKey:
        """By its table of contents; where that should be elsewhere and is not, as the plain layer that it also is."""
        blob = self._blobs.blob(layer.digest, layer.descriptor.size, layer.access)
        offset, length = estargz.plan_footer(blob.size)
        tail = await blob.fetch(offset, length)
        found = estargz.parse_footer(tail, blob.size)
        if found.is_external:
            try:
                toc = await self._fetch_external(image, layer)
            except NotFoundError as error:
                return await self._index_without_toc(layer, error)
        else:
            toc = found.cut(tail, offset) or await blob.fetch(*found)
        await self._read_toc(layer, found, toc)
        return key

    async def _fetch_external(self, image: Image, layer: Layer) -> bytes:
        source = await self._blobs.source(image.repository, layer.access.owner)
        return await fetch_toc(source, image.tag, layer.digest, image.config.platform)

    async def _index_without_toc(self, layer: Layer, error: NotFoundError) -> LayerKey:
        log.warning("layer %s is read as a plain one: %s", layer.digest.short, error)
        key = await self._index_plain(layer)

        def note(record: LayerRecord) -> LayerRecord:
            return msgspec.structs.replace(record, no_toc=error.message)

        await trio.to_thread.run_sync(self._catalog.update_layer, key, note)
        return key

    async def _resumed(self, blob: OriginBlob, key: LayerKey, work: Callable[[], Awaitable[T]]) -> T:
        """Do work that goes on from the spool; once more from nothing where what was spooled before was damaged."""
        return await (spanning.twice(blob, work) if self._files.spool(key).size() else work())

    def _is_largest(self, layer: ListedLayer) -> bool:
        """No layer that is being read now is larger."""
        return layer.descriptor.size >= max(each.layer.descriptor.size for each in self.running.values())

    async def _read_all(
        self, layer: ListedLayer, claim: DiffId | None, blob: OriginBlob, progress: LayerProgress
    ) -> LayerMade:
        args = PlainArgs(
            domain=self._domain,
            blob=str(layer.digest),
            origin=layer.access.origin,
            blob_size=layer.descriptor.size,
            media_type=layer.descriptor.media_type,
            compression=layer.format.compression.value,
            diff_id=str(claim or ""),
            nice=0 if self._is_largest(layer) else _NICE,
        )

        async def report(done: int) -> None:
            progress.done = done

        have = self._files.spool(_plain(layer)).size()
        result: list[LayerMade] = []

        async def work(fd: int) -> None:
            result.append(
                await self._jobs.run("nsfs.layer_jobs:first_pass", args, [fd], LayerMade, report, is_fed=True)
            )

        await _feed(blob, min(have, blob.size), work)
        return result[0]

    async def _read_toc(self, layer: Layer, found: estargz.TocLocation, toc: bytes) -> None:
        args = TocArgs(
            domain=self._domain,
            blob=str(layer.digest),
            origin=layer.access.origin,
            blob_size=layer.descriptor.size,
            media_type=layer.descriptor.media_type,
            toc_digest=str(layer.format.toc),
            toc_offset=found.offset,
            toc_size=found.size,
        )
        with memory_file(toc) as fd:
            await self._jobs.run("nsfs.layer_jobs:read_toc", args, [fd], LayerMade)

    async def maps(self, layers: Sequence[Layer]) -> list[MapRecord]:
        """The maps of indexed layers, lowest first as given; made where they are missing."""
        keys = [self.key_of(layer) for layer in layers]
        first: dict[LayerKey, MapRecord] = {}

        async def alone(key: LayerKey) -> None:
            first[key] = await self._map(key, None)

        await run_all(partial(alone, key) for key in dict.fromkeys(keys))
        made: list[MapRecord] = []
        for key in keys:
            record = first[key]
            made.append(await self._map(key, made) if record.needs_lower else record)
        return made

    async def map_alone(self, layer: Layer) -> MapRecord:
        """The map of an indexed layer; one that `needs_lower` has none without the layers below."""
        return await self._map(self.key_of(layer), None)

    async def _map(self, key: LayerKey, lowers: Sequence[MapRecord] | None) -> MapRecord:
        """The map of a layer over `lowers` (lowest first); without, it may only say that it needs them."""
        map_id = map_id_of(key, lowers)
        found = self._catalog.map(map_id)
        if found is not None and _is_there(found):
            return found
        return await self._mapping.join(map_id, lambda: self._build_map(key, map_id, lowers and lowers[::-1]))

    async def _build_map(self, key: LayerKey, map_id: str, lowers: Sequence[MapRecord] | None) -> MapRecord:
        """Make a map; `lowers` are top first."""
        args = MapArgs(
            domain=self._domain,
            blob=str(key.blob),
            origin=key.origin,
            index=key.index,
            map_id=map_id,
            lowers=None if lowers is None else [record.path for record in lowers],
        )
        made = await self._jobs.run("nsfs.layer_jobs:build_map", args, [], MapMade)
        record = map_record(key, map_id, self._files.map(key, map_id), made, lowers or ())
        await trio.to_thread.run_sync(self._catalog.put_map, record)
        return record

    @asynccontextmanager
    async def rendered(self, key: LayerKey) -> AsyncIterator[tuple[int, int]]:
        """What an artifact says of a layer, a descriptor to read each from: its index, and its spans."""
        args = RenderArgs(domain=self._domain, blob=str(key.blob), origin=key.origin, index=key.index)
        with memory_file(b"") as index, memory_file(b"") as spans:
            await self._jobs.run("nsfs.layer_jobs:render_layer", args, [index, spans], Rendered)
            for fd in (index, spans):
                os.lseek(fd, 0, os.SEEK_SET)
            yield index, spans

    async def read_through(self, record: LayerRecord, owner: str) -> None:
        """Read a layer that is only claimed as the plain layer that it is; raises as `index` does.

        What is wrong is read once more: it may have been the registry that sent something else.
        """
        assert record.promised is not None, "claimed layers are of an image"
        layer = Layer(
            oci.Descriptor(media_type=record.media_type, digest=record.blob, size=record.blob_size),
            DiffId(record.promised),
            oci.layer_format(record.media_type),
            Access(owner, record.origin),
        )
        try:
            key = await self._index_plain(layer)
        except CorruptError:
            key = await self._index_plain(layer)
        await self._spanning.ensure(key, owner)


def map_id_of(key: LayerKey, lowers: Sequence[MapRecord] | None = None) -> str:
    """A map's name: a function of the blob and its index and, where it depends on them, of the maps below."""
    names = [
        f"{key.blob}/{key.index}{key.origin}",
        *([] if lowers is None else ["over", *(lower.id for lower in lowers)]),
    ]
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:32]


def map_record(key: LayerKey, map_id: str, path: str, made: MapMade, lowers: Sequence[MapRecord] = ()) -> MapRecord:
    """What is kept of a map at `path` that was made over `lowers`, top first."""
    return MapRecord(
        id=map_id,
        blob=key.blob,
        index=key.index,
        origin=key.origin,
        path=path,
        needs_lower=made.needs_lower,
        marks=made.marks,
        opaque=made.opaque,
        lowers=tuple(_sources_of([lowers[number] for number in made.borrowed])),
    )


def _sources_of(maps: Sequence[MapRecord]) -> Iterable[LayerKey]:
    """The layers whose tables know the addresses in `maps`, each once."""
    return dict.fromkeys(key for record in maps for key in (record.key, *record.lowers))


def _named(layer: Layer) -> list[Digest]:
    """The blobs that are read of a layer."""
    return [layer.digest] if layer.claim is None else [layer.digest, layer.claim.layer.spans.digest]


def _plain(layer: Layer | ListedLayer) -> LayerKey:
    return LayerKey(layer.digest, PLAIN, layer.access.origin)


def _check_claim(record: LayerRecord, layer: Layer) -> None:
    """Refuse an image whose configuration says something else of a layer than what was found, and a false index."""
    if record.fenced:
        raise CorruptError(f"layer {layer.digest.short} cannot be read: {record.fenced}")
    if record.diff_id is not None and record.diff_id != layer.diff_id:
        raise CorruptError(
            f"layer {layer.digest.short} is not what the image's configuration says: "
            f"its diff ID is {record.diff_id}, not {layer.diff_id}"
        )


def _is_there(record: MapRecord) -> bool:
    """A map that somebody deleted is made anew."""
    return record.needs_lower or os.path.exists(record.path)


async def _feed(blob: OriginBlob, offset: int, work: Callable[[int], Awaitable[None]]) -> None:
    """Run `work` with a pipe that gives the blob's bytes from `offset` on.

    Where both fail, the registry's error is the cause and the one that leaves.
    """
    receive, send = os.pipe2(os.O_CLOEXEC)
    with suppress(OSError):  # a user's pipes together have a limit (pipe(7), pipe-user-pages-soft)
        fcntl.fcntl(send, fcntl.F_SETPIPE_SZ, _PIPE)
    failure: list[Exception] = []

    async def pump() -> None:
        async with trio.lowlevel.FdStream(send) as stream:
            try:
                async with blob.stream(offset) as pieces:
                    async for piece in pieces:
                        await stream.send_all(piece)
            except trio.BrokenResourceError:
                return
            except NsfsError as error:
                failure.append(error)

    async def consume() -> None:
        try:
            await work(receive)
        finally:
            os.close(receive)

    try:
        await run_all((pump, consume))
    except NsfsError as error:
        raise failure[0] if failure else error from None
