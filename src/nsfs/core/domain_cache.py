"""What a domain's pool keeps, as its worker serves it: what is held, what goes, what is pinned and completed.

Owns when a layer was used last, and pins: a pinned image's contents never go, and what of them is absent is fetched in
the background, one layer at a time. Which layers go is the daemon's decision, over all domains; what goes here spares
whatever a pinned or, of an idle layer, a mounted layer shares with it.

Concurrency: completing runs in the worker's nursery, tries again while a registry is away, and survives a worker: pins
are in the domain's index, and are taken up at its start.
"""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import trio

from nsfs.core import domain, worker_api
from nsfs.core.layers import short
from nsfs.errors import BusyError, NotFoundError, NsfsError
from nsfs.model import oci
from nsfs.model.cache import HeldImage, HeldLayer
from nsfs.model.digest import Digest
from nsfs.model.pool import LayerKey
from nsfs.model.report import Progress

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence

    from msgspec import Struct

    from nsfs.core.images import Image, Images
    from nsfs.core.keeping import KeptPool
    from nsfs.core.layers import Layers
    from nsfs.core.looking import Looking
    from nsfs.core.views import Views
    from nsfs.model.pool import ImageRecord, LayerRecord, MapRecord

    Report = Callable[[Struct], Awaitable[None]]

log = logging.getLogger(__name__)

_PAUSE_LEAST, _PAUSE_MOST = 1.0, 60.0
"""Seconds until what could not be completed is tried again."""


class Catalog(Protocol):
    """The domain's records. Writing may block."""

    def layers(self) -> list[LayerRecord]:
        """All layers."""

    def map(self, map_id: str) -> MapRecord | None:
        """A map."""

    def images(self) -> list[ImageRecord]:
        """All images."""

    def put_image(self, key: str, record: ImageRecord) -> None:
        """Remember one."""

    def drop_image(self, key: str) -> None:
        """Forget one, if it is known."""

    def touch(self, keys: Collection[LayerKey], used: float) -> None:
        """Note when layers were used last."""


class Shown(domain.Shown, Protocol):
    """What the domain's FUSE filesystem shows."""

    def maps(self) -> set[str]:
        """IDs of the maps that anything shows."""


class NotedUse:
    """`shown`, as core.domain.Shown, that says which maps begin or end to be shown."""

    def __init__(self, shown: Shown, note_use: Callable[[set[str]], None]) -> None:
        self._shown = shown
        self._note_use = note_use

    @contextmanager
    def _noted(self) -> Iterator[None]:
        before = self._shown.maps()
        yield
        self._note_use(before ^ self._shown.maps())

    def show_views(self, names: Sequence[str]) -> None:
        """See core.domain.Shown."""
        with self._noted():
            self._shown.show_views(names)

    def hide_views(self, names: Sequence[str]) -> None:
        """See core.domain.Shown."""
        with self._noted():
            self._shown.hide_views(names)

    def show_tree(self, tree: worker_api.Tree) -> None:
        """See core.domain.Shown."""
        with self._noted():
            self._shown.show_tree(tree)

    def hide_tree(self, tree_id: str) -> None:
        """See core.domain.Shown."""
        with self._noted():
            self._shown.hide_tree(tree_id)


class DomainCache:
    """The service."""

    def __init__(
        self,
        catalog: Catalog,
        images: Images,
        layers: Layers,
        views: Views,
        looking: Looking,
        shown: Shown,
        pool: KeptPool,
        nursery: trio.Nursery,
    ) -> None:
        self._catalog = catalog
        self._images = images
        self._layers = layers
        self._views = views
        self._looking = looking
        self._shown = shown
        self._pool = pool
        self._nursery = nursery
        self._completing = trio.CapacityLimiter(1)
        self._awaited: dict[str, trio.CancelScope] = {}
        """Pins whose images are being completed, by key."""

    def methods(self) -> dict[str, tuple[type[Struct], Callable[[Any, Report], Awaitable[Struct | None]]]]:
        """What the daemon may call, by name."""
        return {
            "Evict": (worker_api.Name, self._evict),
            "Held": (worker_api.Empty, self._held),
            "Drop": (worker_api.Drop, self._drop),
            "Keep": (worker_api.Keep, self._keep),
            "Pin": (worker_api.Name, self._pin),
            "Unpin": (worker_api.Name, self._unpin),
            "Offline": (worker_api.Name, self._offline),
        }

    def resume(self) -> None:
        """Go on completing what is pinned."""
        for record in self._catalog.images():
            if record.pinned:
                self._begin(record)

    def note_use(self, maps: set[str]) -> None:
        """Somebody begins or ends to use these maps."""
        if maps:
            self._nursery.start_soon(self._touch, self._keys_of(maps), time.time())

    async def _touch(self, keys: Collection[LayerKey], used: float) -> None:
        try:
            await trio.to_thread.run_sync(self._catalog.touch, keys, used)
        except NsfsError as error:
            log.warning("it is not noted which layers were used: %s", error)

    def _keys_of(self, maps: Iterable[str]) -> set[LayerKey]:
        records = [record for map_id in maps if (record := self._catalog.map(map_id))]
        return {key for record in records for key in (record.key, *record.lowers)}

    async def _held(self, _params: worker_api.Empty, _report: Report) -> worker_api.Held:
        mounted, pinned = self._keys_of(self._shown.maps()), self._pinned()
        layers = [
            HeldLayer(
                blob=str(record.blob),
                index=record.index,
                origin=record.origin,
                local=self._views.local_bytes([record.key]),
                size=self._views.size_of(record.key),
                used=record.last_used,
                mounted=record.key in mounted,
                pinned=record.blob in pinned,
                returns=record.has_spans or record.whole,
            )
            for record in self._catalog.layers()
        ]
        images = {record.manifest_digest: record for record in sorted(self._catalog.images(), key=_is_pinned)}
        return worker_api.Held(layers=layers, images=[_held_image(each) for each in images.values()])

    def _pinned(self) -> set[Digest]:
        """Blobs of pinned images."""
        return {blob for record in self._catalog.images() if record.pinned for blob in _blobs_of(record)}

    async def _keep(self, params: worker_api.Keep, _report: Report) -> worker_api.Empty:
        self._pool.refuse(params.unless)
        return worker_api.Empty()

    async def _drop(self, params: worker_api.Drop, _report: Report) -> worker_api.Evicted:
        """Give up what the daemon chose, if that is still idle where it was."""
        records = {record.key: record for record in self._catalog.layers()}
        pinned, mounted = self._pinned(), self._keys_of(self._shown.maps())
        freed = dropped = 0
        for named in params.layers:
            key = LayerKey(Digest(named.blob), named.index, named.origin)
            record = records.get(key)
            if record is None or record.blob in pinned or (key in mounted and not named.mounted):
                continue
            spared = [each for each in records if each.blob in pinned or (each in mounted and not named.mounted)]
            freed += await self._views.evict(key, spared)
            dropped += 1
        return worker_api.Evicted(layers=dropped, freed=freed)

    async def _evict(self, params: worker_api.Name, report: Report) -> worker_api.Evicted:
        """Give up all contents of an image, whoever uses it; raises BusyError where a layer of it is pinned."""
        image = await self._images.resolve(params.reference, params.platform, params.owner)
        self._refuse_pinned(image)
        keys = dict.fromkeys(record.key for layer in image.layers if (record := self._layers.record(layer)))
        freed = 0
        for key in keys:
            await report(Progress(stage="evict", what=short(key.blob)))
            await self._layers.ensure_spans(key, params.owner)
            freed += await self._views.evict(key)
        return worker_api.Evicted(layers=len(keys), freed=freed)

    def _refuse_pinned(self, image: Image) -> None:
        if not self._pinned().isdisjoint(layer.digest for layer in image.layers):
            raise BusyError(
                f"layers of it are pinned: {image.reference}", hint=f"nsfs unpin {image.reference}, or what shares them"
            )

    async def _pin(self, params: worker_api.Name, report: Report) -> worker_api.Pinned:
        image = await self._images.resolve(params.reference, params.platform, params.owner)
        await self._looking.all_maps(image, report)
        _, record = await self._images.remembered(params.reference, params.platform, params.owner)
        record = msgspec.structs.replace(record, pinned=True, owner=params.owner)
        await trio.to_thread.run_sync(self._catalog.put_image, _pin_key(record), record)
        absent = self._absent(image)
        self._begin(record)
        return worker_api.Pinned(reference=image.reference, digest=str(image.digest), absent=absent)

    async def _unpin(self, params: worker_api.Name, _report: Report) -> worker_api.Pinned:
        pins = [each for each in self._catalog.images() if each.pinned and each.owner == params.owner]
        image = await self._known(params)
        named = image.digest if image else None
        found = [record for record in pins if record.manifest_digest == named or record.reference == params.reference]
        if not found:
            raise NotFoundError(f"not pinned in this domain: {params.reference}", hint="nsfs cache ls shows what is")
        for record in found:
            if scope := self._awaited.pop(_pin_key(record), None):
                scope.cancel()
            await trio.to_thread.run_sync(self._catalog.drop_image, _pin_key(record))
        return worker_api.Pinned(reference=found[0].reference, digest=str(found[0].manifest_digest), absent=0)

    async def _known(self, params: worker_api.Name) -> Image | None:
        try:
            image, _ = await self._images.remembered(params.reference, params.platform, params.owner)
        except NotFoundError:
            return None
        return image

    def _begin(self, pin: ImageRecord) -> None:
        key = _pin_key(pin)
        if key not in self._awaited:
            scope = self._awaited[key] = trio.CancelScope()
            self._nursery.start_soon(self._complete, pin, scope)

    async def _complete(self, record: ImageRecord, scope: trio.CancelScope) -> None:
        """Fetch what is absent of a pinned image, for as long as that takes."""
        pause = _PAUSE_LEAST
        with scope:
            while True:
                try:
                    async with self._completing:
                        await self._complete_once(record)
                    break
                except NsfsError as error:
                    log.warning("%s is pinned, and not complete yet: %s", record.reference, error)
                await trio.sleep(pause)
                pause = min(2 * pause, _PAUSE_MOST)
            log.info("complete, and needs no registry: %s", record.reference)
        if self._awaited.get(_pin_key(record)) is scope:
            del self._awaited[_pin_key(record)]

    async def _complete_once(self, pin: ImageRecord) -> None:
        blobs = _blobs_of(pin)
        for record in self._catalog.layers():
            if record.blob in blobs:
                await self._views.complete(record.key, pin.owner)

    def _absent(self, image: Image) -> int:
        keys = {record.key for layer in image.layers if (record := self._layers.record(layer))}
        return sum(map(self._absent_of, keys))

    def _absent_of(self, key: LayerKey) -> int:
        """Bytes of a layer's contents."""
        return self._views.size_of(key) - self._views.local_bytes([key])

    async def _offline(self, params: worker_api.Name, _report: Report) -> worker_api.Offline:
        try:
            image, _ = await self._images.remembered(params.reference, params.platform, params.owner)
        except NotFoundError as error:
            return worker_api.Offline(reference=params.reference, missing=[error.message], absent=0)
        return worker_api.Offline(
            reference=image.reference, missing=list(self._missing(image)), absent=self._absent(image)
        )

    def _missing(self, image: Image) -> Iterable[str]:
        """What a start without a registry would want, a sentence each."""
        for layer in image.layers:
            record = self._layers.record(layer)
            if record is None:
                yield f"layer {short(layer.digest)} was never read here: {layer.descriptor.size} bytes"
                continue
            if absent := self._absent_of(record.key):
                yield f"layer {short(layer.digest)} is not complete: {absent} bytes of its contents"


def _is_pinned(record: ImageRecord) -> bool:
    return record.pinned


def _held_image(record: ImageRecord) -> HeldImage:
    return HeldImage(
        reference=record.reference or record.repository,
        digest=str(record.manifest_digest),
        blobs=list(map(str, _blobs_of(record))),
        pinned=record.pinned,
    )


def _blobs_of(record: ImageRecord) -> list[Digest]:
    document = oci.Document(record.manifest, record.media_type, record.manifest_digest)
    return [layer.digest for layer in oci.parse_manifest(document).layers]


def _pin_key(record: ImageRecord) -> str:
    """Under which the domain remembers a pin: no reference has a space in it."""
    return f"pin {record.owner} {record.manifest_digest}"
