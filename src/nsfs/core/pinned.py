"""Layers for snapshots, as a worker serves them: named by manifest, blob and chain ID, indexed, and mapped in stacks.

Owns the check that an image has the layer that a caller says it has. A chain ID is a claim of whoever wrote the image's
configuration; here it selects among the layers of that same image and nothing else. Refuses a layer that cannot be
shown without the layers below where one of those is not ours.

Concurrency: what is begun goes on in the worker's nursery; a caller who gives up cancels nobody.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import trio

from nsfs.core import worker_api
from nsfs.core.starts import Begun
from nsfs.errors import CorruptError, NotFoundError, UnsupportedError
from nsfs.model.digest import chain_ids
from nsfs.model.profile import ProfileUse

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

    from msgspec import Struct

    from nsfs.core.images import Image, Images, Layer
    from nsfs.core.layers import Layers
    from nsfs.core.maps import Maps
    from nsfs.core.starts import Starts
    from nsfs.model.digest import ChainId
    from nsfs.model.pool import LayerKey, LayerRecord, MapRecord

    Report = Callable[[Struct], Awaitable[None]]


class Catalog(Protocol):
    """The domain's records."""

    def layer(self, key: LayerKey) -> LayerRecord | None:
        """A layer whose index is complete."""


class Readers(Protocol):
    """As whom views ask for what is absent."""

    def reader_of(self, record: MapRecord, owner: str) -> str:
        """The owner, or "" where nothing is absent, or nobody shares."""


class Pinned:
    """The service."""

    def __init__(
        self, images: Images, layers: Layers, maps: Maps, catalog: Catalog, readers: Readers, starts: Starts
    ) -> None:
        self._images = images
        self._layers = layers
        self._maps = maps
        self._catalog = catalog
        self._readers = readers
        self._starts = starts

    def methods(self) -> dict[str, tuple[type[Struct], Callable[[Any, Report], Awaitable[Struct | None]]]]:
        """What the daemon may call, by name."""
        return {
            "Check": (worker_api.Name, self._check),
            "Offer": (worker_api.LayerName, self._offer),
            "Await": (worker_api.LayerName, self._await),
            "Stack": (worker_api.Stack, self._stack),
        }

    async def _check(self, params: worker_api.Name, _report: Report) -> worker_api.Checked:
        image = await self._images.pinned(params.reference, params.owner, params.trust)
        for layer in image.layers:
            self._layers.check(layer)
        names = [
            worker_api.LayerName(reference=params.reference, blob=str(layer.digest), chain=str(chain))
            for layer, chain in _with_chains(image)
        ]
        return worker_api.Checked(layers=names)

    async def _offer(self, params: worker_api.LayerName, _report: Report) -> worker_api.Empty:
        image = await self._images.pinned(params.reference, params.owner, params.trust)
        self._layers.check(_find(image, params))
        self._layers.begin(image)
        return worker_api.Empty()

    async def _await(self, params: worker_api.LayerName, _report: Report) -> worker_api.Indexed:
        image = await self._images.pinned(params.reference, params.owner, params.trust)
        layer = _find(image, params)
        record = await self._index(image, layer)
        alone = await self._layers.map_alone(layer)
        return worker_api.Indexed(verified=record.verified, needs_lower=alone.needs_lower)

    async def _index(self, image: Image, layer: Layer) -> LayerRecord:
        record = self._catalog.layer(await self._layers.index(image, layer))
        assert record is not None, "indexed layers have records"
        return record

    async def _stack(self, params: worker_api.Stack, _report: Report) -> worker_api.Stacked:
        named = {name.reference: name for name in params.layers if name is not None}
        images = {
            each.reference: await self._images.pinned(each.reference, each.owner, each.trust) for each in named.values()
        }
        found = [None if name is None else (images[name.reference], name) for name in params.layers]
        layers = [None if each is None else _find(*each) for each in found]
        for image in images.values():
            self._layers.begin(image)
        for each, layer in zip(found, layers, strict=True):
            if each is not None and layer is not None:
                await self._prove(each[0], layer)
        await self._check_lowers(layers)
        maps = await self._layers.maps([layer for layer in layers if layer is not None])
        owner = next((name.owner for name in params.layers if name is not None), "")
        readers = [self._readers.reader_of(record, owner) for record in maps]
        infos = await trio.to_thread.run_sync(lambda: list(map(self._info, maps, readers)))
        begun = await self._begin_start(params, images, layers, maps[::-1])
        return worker_api.Stacked(
            maps=infos, recording=begun.recording, read_ahead=begun.read_ahead, warm=list(begun.warm)
        )

    async def _begin_start(
        self,
        params: worker_api.Stack,
        images: Mapping[str, Image],
        layers: Sequence[Layer | None],
        maps: Sequence[MapRecord],
    ) -> Begun:
        """What `Starts.begin` gives for the image that the whole stack is, if it is one."""
        top = params.layers[-1] if params.layers else None
        image = None if top is None else images[top.reference]
        if top is None or image is None or _top_of(image) != top.chain:
            return Begun()
        keys = [self._layers.key_of(layer) for layer in layers if layer is not None]
        same = [layer and layer.digest for layer in layers] == [layer.digest for layer in image.layers]
        flaw = "" if same else "not every layer was read as the image has it"
        return await self._starts.begin(ProfileUse(params.profile), image, keys, maps, flaw, params.starter)

    def _info(self, record: MapRecord, reader: str) -> worker_api.MapInfo:
        with self._maps.opened(record.path) as image:
            root = image.inode(image.root)
        return worker_api.MapInfo(
            id=record.id,
            path=record.path,
            marks=record.marks,
            opaque=record.opaque,
            owner=(root.uid, root.gid),
            reader=reader,
        )

    async def _prove(self, image: Image, layer: Layer) -> None:
        """Index it; an error says which layer of which image it is about, to who asked for a container."""
        try:
            await self._index(image, layer)
        except CorruptError as error:
            raise CorruptError(f"layer {layer.digest} of {image.reference}: {error.message}") from error

    async def _check_lowers(self, layers: Sequence[Layer | None]) -> None:
        """Raise UnsupportedError for a layer that depends on one that is not ours."""
        foreign = False
        for layer in layers:
            foreign = foreign or layer is None
            if foreign and layer is not None and (await self._layers.map_alone(layer)).needs_lower:
                raise UnsupportedError(
                    f"layer {layer.digest.short} cannot be shown without a layer below that containerd unpacked",
                    hint="pull the image again, without lazy layers",
                )


def _find(image: Image, name: worker_api.LayerName) -> Layer:
    """The layer of `image` that has this blob at this place of the chain; raises NotFoundError."""
    for layer, chain in _with_chains(image):
        if layer.digest == name.blob and chain == name.chain:
            return layer
    raise NotFoundError(f"the image has no layer {name.blob} that makes {name.chain}: {image.reference}")


def _top_of(image: Image) -> ChainId:
    return chain_ids([layer.diff_id for layer in image.layers])[-1]


def _with_chains(image: Image) -> Iterable[tuple[Layer, ChainId]]:
    return zip(image.layers, chain_ids([layer.diff_id for layer in image.layers]), strict=True)
