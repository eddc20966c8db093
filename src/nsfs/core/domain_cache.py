"""What a domain's pool keeps, as its worker serves it: what is held, what goes, what is pinned and completed.

Owns when a layer was used last, and pins: a pinned image's contents never go, and what of them is absent is fetched
(`core.completing`). Which layers go is the daemon's decision, over all domains; what goes here spares whatever a pinned
or, of an idle layer, a mounted layer shares with it.

Concurrency: all state is the domain's index and what is shown; pins survive a worker, and are taken up at its start.
"""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import trio

from nsfs.core import domain, worker_api
from nsfs.core.completing import InUse, blobs_of
from nsfs.errors import BusyError, NotFoundError, NsfsError
from nsfs.model.cache import HeldImage, HeldLayer
from nsfs.model.digest import Digest
from nsfs.model.policy import parse_view_name
from nsfs.model.pool import LayerKey
from nsfs.model.report import Progress, render_size

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence

    from msgspec import Struct

    from nsfs.core.completing import Completing
    from nsfs.core.images import Image, Images
    from nsfs.core.layers import Layers
    from nsfs.core.looking import Looking
    from nsfs.core.prefetch import Prefetches
    from nsfs.core.spanning import Spanning
    from nsfs.core.views import Views
    from nsfs.model.pool import ImageRecord, LayerRecord, MapRecord

    Report = Callable[[Struct], Awaitable[None]]

log = logging.getLogger(__name__)


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

    def views(self) -> set[str]:
        """Names of the views that anything shows."""


class NotedUse:
    """`shown`, as core.domain.Shown, that says of which maps a view begins or ends to be shown."""

    def __init__(self, shown: Shown, note_use: Callable[[set[str]], None]) -> None:
        self._shown = shown
        self._note_use = note_use

    @contextmanager
    def _noted(self) -> Iterator[None]:
        before = self._shown.views()
        yield
        self._note_use({parse_view_name(name).map_id for name in before ^ self._shown.views()})

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


class Uses:
    """What is in use now, and since when it is not; `completing` follows it, and `prefetches` end with it."""

    def __init__(
        self, catalog: Catalog, shown: Shown, completing: Completing, prefetches: Prefetches, nursery: trio.Nursery
    ) -> None:
        self._catalog = catalog
        self._shown = shown
        self._completing = completing
        self._prefetches = prefetches
        self._nursery = nursery

    def note(self, maps: set[str]) -> None:
        """Somebody begins or ends to use these maps."""
        if maps:
            self._nursery.start_soon(self._touch, self._keys_of(maps), time.time())
            self._prefetches.end(self._keys_of(maps) - self.mounted())
            self.follow()

    def give_up(self, keys: Collection[LayerKey]) -> None:
        """Fetch nothing more of these ahead of their readers: their contents are to go."""
        self._completing.give_up(keys)
        self._prefetches.end(keys)

    def follow(self) -> None:
        """Have what is in use completed."""
        views = [parse_view_name(name) for name in sorted(self._shown.views())]
        self._completing.follow(
            [InUse(key, view.reader) for view in views for key in sorted(self._keys_of([view.map_id]), key=str)]
        )

    def mounted(self) -> set[LayerKey]:
        """The layers of all that is shown."""
        return self._keys_of(self._shown.maps())

    async def _touch(self, keys: Collection[LayerKey], used: float) -> None:
        try:
            await trio.to_thread.run_sync(self._catalog.touch, keys, used)
        except NsfsError as error:
            log.warning("it is not noted which layers were used: %s", error)

    def _keys_of(self, maps: Iterable[str]) -> set[LayerKey]:
        records = [record for map_id in maps if (record := self._catalog.map(map_id))]
        return {key for record in records for key in (record.key, *record.lowers)}


class DomainCache:
    """The service."""

    def __init__(
        self,
        catalog: Catalog,
        images: Images,
        layers: Layers,
        spanning: Spanning,
        views: Views,
        looking: Looking,
        uses: Uses,
        completing: Completing,
    ) -> None:
        self._catalog = catalog
        self._images = images
        self._layers = layers
        self._spanning = spanning
        self._views = views
        self._looking = looking
        self._uses = uses
        self._completing = completing

    def methods(self) -> dict[str, tuple[type[Struct], Callable[[Any, Report], Awaitable[Struct | None]]]]:
        """What the daemon may call, by name."""
        return {
            "Evict": (worker_api.Name, self._evict),
            "Held": (worker_api.Empty, self._held),
            "Settle": (worker_api.Empty, self._settle),
            "Drop": (worker_api.Drop, self._drop),
            "Pin": (worker_api.Name, self._pin),
            "Unpin": (worker_api.Name, self._unpin),
            "Offline": (worker_api.Name, self._offline),
        }

    def resume(self) -> None:
        """Go on completing what is pinned, and what is in use."""
        for record in self._catalog.images():
            if record.pinned:
                self._completing.begin(record)
        self._uses.follow()

    async def _held(self, _params: worker_api.Empty, _report: Report) -> worker_api.Held:
        mounted, pinned = self._uses.mounted(), self._pinned()
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
                returns=_comes_by_ranges(record) or self._spanning.is_spooled(record),
            )
            for record in self._catalog.layers()
        ]
        images = {record.manifest_digest: record for record in sorted(self._catalog.images(), key=_is_pinned)}
        return worker_api.Held(layers=layers, images=[_held_image(each) for each in images.values()])

    def _pinned(self) -> set[Digest]:
        """Blobs of pinned images."""
        return {blob for record in self._catalog.images() if record.pinned for blob in blobs_of(record)}

    async def _settle(self, _params: worker_api.Empty, _report: Report) -> worker_api.Evicted:
        """Make now what checkpoints wait for a lull: that takes no content from anybody, and spools go."""
        freed = settled = 0
        for record in self._catalog.layers():
            if _comes_by_ranges(record) or not self._spanning.is_spooled(record):
                continue
            try:
                await self._spanning.ensure(record.key)
            except NsfsError as error:
                log.warning("layer %s stays, as it could not be fetched again: %s", record.blob.short, error)
                continue
            freed += record.blob_size
            settled += 1
        return worker_api.Evicted(layers=settled, freed=freed)

    async def _drop(self, params: worker_api.Drop, _report: Report) -> worker_api.Evicted:
        """Give up what the daemon chose, if that is still idle where it was, and can come back."""
        records = {record.key: record for record in self._catalog.layers()}
        pinned, mounted = self._pinned(), self._uses.mounted()
        freed = dropped = 0
        for named in params.layers:
            key = LayerKey(Digest(named.blob), named.index, named.origin)
            record = records.get(key)
            if record is None or not _comes_by_ranges(record):
                continue
            if record.blob in pinned or (key in mounted and not named.mounted):
                continue
            self._completing.give_up([key])
            spared = [each for each in records if each.blob in pinned or (each in mounted and not named.mounted)]
            freed += await self._views.evict(key, spared)
            dropped += 1
        return worker_api.Evicted(layers=dropped, freed=freed)

    async def _evict(self, params: worker_api.Name, report: Report) -> worker_api.Evicted:
        """Give up all contents of an image, whoever uses it; raises BusyError where a layer of it is pinned."""
        image = await self._images.resolve(params.reference, params.platform, params.owner, params.trust)
        self._refuse_pinned(image)
        keys = dict.fromkeys(record.key for layer in image.layers if (record := self._layers.record(layer)))
        self._uses.give_up(keys)
        freed = 0
        for key in keys:
            await report(Progress(stage="evict", what=key.blob.short))
            await self._spanning.ensure(key, params.owner)
            freed += await self._views.evict(key)
        return worker_api.Evicted(layers=len(keys), freed=freed)

    def _refuse_pinned(self, image: Image) -> None:
        if not self._pinned().isdisjoint(layer.digest for layer in image.layers):
            raise BusyError(
                f"layers of it are pinned: {image.reference}", hint=f"nsfs unpin {image.reference}, or what shares them"
            )

    async def _pin(self, params: worker_api.Name, report: Report) -> worker_api.Pinned:
        image = await self._images.resolve(params.reference, params.platform, params.owner, params.trust)
        await self._looking.all_maps(image, report)
        _, record = await self._images.remembered(params.reference, params.platform, params.owner)
        record = msgspec.structs.replace(record, pinned=True, owner=params.owner)
        await trio.to_thread.run_sync(self._catalog.put_image, _pin_key(record), record)
        absent = self._absent(image)
        self._completing.begin(record)
        return worker_api.Pinned(reference=image.reference, digest=str(image.digest), absent=absent)

    async def _unpin(self, params: worker_api.Name, _report: Report) -> worker_api.Pinned:
        pins = [each for each in self._catalog.images() if each.pinned and each.owner == params.owner]
        image = await self._known(params)
        named = image.digest if image else None
        found = [record for record in pins if record.manifest_digest == named or record.reference == params.reference]
        if not found:
            raise NotFoundError(f"not pinned in this domain: {params.reference}", hint="nsfs cache ls shows what is")
        for record in found:
            self._completing.end(record)
            await trio.to_thread.run_sync(self._catalog.drop_image, _pin_key(record))
        return worker_api.Pinned(reference=found[0].reference, digest=str(found[0].manifest_digest), absent=0)

    async def _known(self, params: worker_api.Name) -> Image | None:
        try:
            image, _ = await self._images.remembered(params.reference, params.platform, params.owner)
        except NotFoundError:
            return None
        return image

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
                yield f"layer {layer.digest.short} was never read here: {render_size(layer.descriptor.size)}"
                continue
            if absent := self._absent_of(record.key):
                yield f"layer {layer.digest.short} is not complete: {render_size(absent)} of its contents"


def _comes_by_ranges(record: LayerRecord) -> bool:
    """Whether what goes of a layer can be fetched again, or all of it at once."""
    return record.has_spans or record.whole or bool(record.spans_blob)


def _is_pinned(record: ImageRecord) -> bool:
    return record.pinned


def _held_image(record: ImageRecord) -> HeldImage:
    return HeldImage(
        reference=record.reference or record.repository,
        digest=str(record.manifest_digest),
        blobs=list(map(str, blobs_of(record))),
        pinned=record.pinned,
    )


def _pin_key(record: ImageRecord) -> str:
    """Under which the domain remembers a pin: no reference has a space in it."""
    return f"pin {record.owner} {record.manifest_digest}"
