"""A domain as its worker serves it: what the daemon may ask, and how the services answer together.

Owns nothing but the composition: images are resolved, layers indexed, maps made and views read by the services that it
was given.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import msgspec
import trio

from nsfs.core import worker_api
from nsfs.core.layers import PLAIN
from nsfs.core.starts import Starts, usage_of
from nsfs.core.tasks import run_all, running
from nsfs.errors import NsfsError
from nsfs.model.profile import ProfileUse
from nsfs.model.report import EntryReport, ImageReport, LayerReport, Note, Progress

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from msgspec import Struct

    from nsfs.core.blobs import Blobs
    from nsfs.core.images import Image, Images, Layer
    from nsfs.core.layers import Layers
    from nsfs.core.looking import Looking
    from nsfs.core.views import Views
    from nsfs.model.pool import LayerRecord, MapRecord

    Report: TypeAlias = Callable[[Struct], Awaitable[None]]

_PROGRESS_EVERY = 0.2


class Shown(Protocol):
    """What the domain's FUSE filesystem shows."""

    def show_views(self, names: Sequence[str]) -> None:
        """Show `maps/<view>` and `disks/<view>`."""

    def hide_views(self, names: Sequence[str]) -> None:
        """Take them away."""

    def show_tree(self, tree: worker_api.Tree) -> None:
        """Show `trees/<id>`."""

    def hide_tree(self, tree_id: str) -> None:
        """Take it away."""


class Health(NamedTuple):
    """What is wrong in a worker, beside what its readers wait for."""

    bugs: int
    """Errors so far."""
    unkept: str
    """Why what is fetched is not kept; empty where it is."""


class Domain:
    """The service."""

    def __init__(
        self,
        images: Images,
        layers: Layers,
        blobs: Blobs,
        views: Views,
        looking: Looking,
        shown: Shown,
        health: Callable[[], Health],
        starts: Starts,
    ) -> None:
        self._images = images
        self._layers = layers
        self._blobs = blobs
        self._views = views
        self._looking = looking
        self._shown = shown
        self._health = health
        self._starts = starts

    def methods(self) -> dict[str, tuple[type[Struct], Callable[[Any, Report], Awaitable[Struct | None]]]]:
        """What the daemon may call, by name."""
        return {
            "Prepare": (worker_api.Prepare, self._prepare),
            "Index": (worker_api.Name, self._index),
            "Inspect": (worker_api.Name, self._inspect),
            "List": (worker_api.PathName, self._list),
            "Tree": (worker_api.PathName, self._tree),
            "Stat": (worker_api.PathName, self._stat),
            "Read": (worker_api.PathName, self._read),
            "Usage": (worker_api.Usage, self._usage),
            "Status": (worker_api.StatusRequest, self._status),
            "ShowViews": (worker_api.Views, self._show_views),
            "HideViews": (worker_api.Views, self._hide_views),
            "ShowTree": (worker_api.Tree, self._show_tree),
            "HideTree": (worker_api.TreeGone, self._hide_tree),
        }

    async def _resolve(self, params: worker_api.Prepare | worker_api.Name, report: Report) -> Image:
        """The image that is meant; whoever asks hears where that is no news."""
        ahead = self._layers if isinstance(params, worker_api.Prepare) else None
        image = await self._images.resolve(params.reference, params.platform, params.owner, params.trust, ahead)
        if image.stale:
            await report(Note(text=f"{image.reference} is as it was known before: {image.stale}"))
        return image

    @asynccontextmanager
    async def _opened(self, params: worker_api.Prepare | worker_api.Name, report: Report) -> AsyncIterator[Image]:
        """The image that is meant; how far its layers are is reported while the block lasts."""
        image = await self._resolve(params, report)
        async with running(lambda: self._tell(image, report)):
            yield image

    async def _prepare(self, params: worker_api.Prepare, report: Report) -> worker_api.Prepared:
        async with self._opened(params, report) as image:
            resolved = trio.current_time()
            maps = await self._looking.all_maps(image, report)
        records = [self._record(layer) for layer in image.layers]
        keys, shown = [record.key for record in records], visible(maps)
        begun = await self._starts.begin(ProfileUse(params.profile), image, keys, shown)
        return worker_api.Prepared(
            reference=image.reference,
            digest=str(image.digest),
            platform=str(image.config.platform),
            files=sum(record.files for record in records),
            size=sum(record.content_bytes for record in records),
            maps=[self._info(each, image) for each in shown],
            config=image.config.config,
            recording=begun.recording,
            read_ahead=begun.read_ahead,
            warm=list(begun.warm),
            indexing=trio.current_time() - resolved,
        )

    def _info(self, record: MapRecord, image: Image) -> worker_api.MapInfo:
        reader = self._views.reader_of(record, image.access.owner)
        return worker_api.MapInfo(id=record.id, path=record.path, marks=record.marks, reader=reader)

    async def _tell(self, image: Image, report: Report) -> None:
        """Report how far the layers of `image` are."""
        ours = {layer.digest for layer in image.layers}
        while True:
            await trio.sleep(_PROGRESS_EVERY)
            for key, progress in list(self._layers.running.items()):
                if key.blob in ours:
                    await report(Progress(stage="index", what=key.blob.short, done=progress.done, total=progress.total))

    def _record(self, layer: Layer) -> LayerRecord:
        record = self._layers.record(layer)
        assert record is not None, "indexed layers have records"
        return record

    async def _index(self, params: worker_api.Name, report: Report) -> ImageReport:
        """Index what can be served; what cannot is no error, and not `indexed` in the report."""

        async def index(layer: Layer) -> None:
            try:
                await self._layers.index(image, layer)
            except NsfsError as error:
                await report(Note(text=f"layer {layer.digest.short} cannot be served: {error}"))

        async with self._opened(params, report) as image:
            layers = {layer.digest: layer for layer in image.layers}.values()
            await run_all(partial(index, layer) for layer in layers)
        return await self._image_report(image)

    async def _inspect(self, params: worker_api.Name, report: Report) -> ImageReport:
        return await self._image_report(await self._resolve(params, report))

    async def _image_report(self, image: Image) -> ImageReport:
        return ImageReport(
            reference=image.reference,
            digest=str(image.digest),
            platform=str(image.config.platform),
            size=image.size,
            domain="",
            layers=[self._layer_report(layer) for layer in image.layers],
            config=image.config.config,
            profile=await self._starts.known(image),
        )

    def _layer_report(self, layer: Layer) -> LayerReport:
        record = self._layers.record(layer)
        lazy, why = _laziness(layer, record)
        return LayerReport(
            digest=str(layer.digest),
            media_type=layer.descriptor.media_type,
            size=layer.descriptor.size,
            diff_id=str(layer.diff_id),
            format=layer.format.name,
            lazy=lazy,
            why=why,
            verified=_verified(layer, record),
            indexed=record is not None,
            stream_size=record.stream_size if record else 0,
            files=record.files if record else 0,
            local=self._views.local_bytes([record.key]) if record else 0,
        )

    async def _list(self, params: worker_api.PathName, report: Report) -> worker_api.Empty:
        async with self._opened(params, report) as image:
            await self._looking.list_names(image, params.path, report)
        return worker_api.Empty()

    async def _tree(self, params: worker_api.PathName, report: Report) -> worker_api.Empty:
        async with self._opened(params, report) as image:
            await self._looking.tree(image, params.path, report)
        return worker_api.Empty()

    async def _stat(self, params: worker_api.PathName, report: Report) -> EntryReport:
        async with self._opened(params, report) as image:
            return await self._looking.stat(image, params.path, report)

    async def _read(self, params: worker_api.PathName, report: Report) -> worker_api.Empty:
        async with self._opened(params, report) as image:
            await self._looking.read(image, params.path, params.offset, params.length, report)
        return worker_api.Empty()

    async def _usage(self, params: worker_api.Usage, _report: Report) -> worker_api.UsageReport:
        return usage_of(params.maps, self._views, self._starts)

    async def _status(self, params: worker_api.StatusRequest, _report: Report) -> worker_api.WorkerStatus:
        records, waits, health = self._layers.records(), self._views.waits(None), self._health()
        starts = await self._starts.report()
        return worker_api.WorkerStatus(
            layers=len(records),
            local=self._views.local_bytes([record.key for record in records]) if params.measured else 0,
            fetched=self._blobs.fetched.total(),
            state=self._views.state(None),
            bugs=health.bugs,
            unkept=health.unkept,
            profiles=starts.profiles,
            recorded=starts.recorded,
            prefetching=starts.prefetching,
            prefetched=starts.prefetched,
            **msgspec.structs.asdict(waits),
        )

    async def _show_views(self, params: worker_api.Views, _report: Report) -> worker_api.Empty:
        self._shown.show_views(params.names)
        self._views.open(params.names)
        return worker_api.Empty()

    async def _hide_views(self, params: worker_api.Views, _report: Report) -> worker_api.Empty:
        self._shown.hide_views(params.names)
        await self._starts.wait_kept()
        return worker_api.Empty()

    async def _show_tree(self, params: worker_api.Tree, _report: Report) -> worker_api.Empty:
        self._shown.show_tree(params)
        self._views.open(params.views())
        return worker_api.Empty()

    async def _hide_tree(self, params: worker_api.TreeGone, _report: Report) -> worker_api.Empty:
        self._shown.hide_tree(params.id)
        await self._starts.wait_kept()
        return worker_api.Empty()

    def front_methods(self) -> dict[str, tuple[type[Struct], Callable[[Any, Report], Awaitable[Struct | None]]]]:
        """What the fronts of a user's mounts may call, by name."""
        return {"Fetch": (worker_api.Fetch, self._fetch), "Usage": (worker_api.Usage, self._usage)}

    async def _fetch(self, params: worker_api.Fetch, _report: Report) -> worker_api.Empty:
        """Make blocks present for a front, which cannot."""
        await self._views.make_present(params.view, params.address, params.size)
        return worker_api.Empty()


def visible(maps: Sequence[MapRecord]) -> list[MapRecord]:
    """The maps (given lowest first) that a stack needs, top first: down to one whose root hides the rest."""
    shown: list[MapRecord] = []
    for record in reversed(maps):
        shown.append(record)
        if record.opaque:
            break
    return shown


def _laziness(layer: Layer, record: LayerRecord | None) -> tuple[bool, str]:
    """Whether the layer's content can come by ranges now, and why."""
    if layer.format.refused:
        return False, layer.format.refused
    if record is None and layer.format.toc is None and layer.claim is None:
        return False, "nobody has indexed it: its first use reads all of it once"
    if layer.format.toc is not None and (record is None or record.index != PLAIN):
        return True, "its manifest names the digest of its table of contents"
    if record is None or record.index != PLAIN:
        return True, "an artifact beside the image says how it is read"
    return _own_laziness(record)


def _own_laziness(record: LayerRecord) -> tuple[bool, str]:
    """The same of a layer that was read through here."""
    aside = f", since {record.no_toc}" if record.no_toc else ""
    if record.has_spans:
        return True, f"this domain has an index of its own{aside}"
    if record.whole:
        return False, f"it cannot be decompressed in parts: what is evicted comes back all at once{aside}"
    return False, f"its first use has read all of it; checkpoints are made once its start is over{aside}"


def _verified(layer: Layer, record: LayerRecord | None) -> str:
    if record is not None and record.diff_id not in {None, layer.diff_id}:
        return f"against nothing: the image claims diff ID {layer.diff_id}, and its content has {record.diff_id}"
    if record is not None and record.is_claimed:
        return "nothing: an artifact beside the image says what is in it; it is proved when the layer is complete"
    if record is not None and record.verified == "diff-id":
        return f"blob digest and diff ID, in one pass over all of it: {layer.diff_id}"
    if layer.format.toc:
        return f"table of contents {layer.format.toc}, each chunk by its digest there when it is read"
    return "nothing yet; blob digest and diff ID will be"
