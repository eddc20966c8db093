"""Exports: what a domain knows of an image that may lie beside it in its registry, made for whoever will put it there.

Owns which of it that is: the plain layers' indexes and spans, as this domain found them in its own passes over whole
blobs, and the bytes of a profile, where one was recorded from nothing, with what lies close between them. What another
table of contents claims is left out, and so is a profile that may lack something. Nothing is written anywhere: the
parts go to the caller as they are made, one behind the other.

Concurrency: one call at a time makes one part at a time; what is taken apart is a job's work, what is packed a
thread's.
"""

from __future__ import annotations

import os
from collections import deque
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

import trio

from nsfs.core import worker_api
from nsfs.core.tasks import run_all
from nsfs.errors import CorruptError
from nsfs.format.artifact import INDEX_TYPE, PACK_TYPE, SPANS_TYPE, TABLE_TYPE
from nsfs.format.pack import PackWriter, render_table
from nsfs.model.profile import TAR, fill_gaps, gather_runs
from nsfs.model.report import Data, Note, Part, Progress

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence

    from msgspec import Struct

    from nsfs.core.images import Image, Images, Layer
    from nsfs.core.layers import Layers
    from nsfs.core.looking import Looking
    from nsfs.core.spanning import Spanning
    from nsfs.model.digest import Digest
    from nsfs.model.pool import LayerKey
    from nsfs.model.profile import Profile, Run

    Report = Callable[[Struct], Awaitable[None]]

_PIECE: Final = 1 << 20
_RUN: Final = 4 << 20
"""Bytes of a run that are held at a time."""
_GAP: Final = 12 << 10
"""Of what lies between pages that a start read: tables are read here and there, each time elsewhere. What starts of
Node.js and of Java lacked of their packs, and waited 0.1 s for, lay in gaps of up to three pages."""
_TOGETHER: Final = 128 << 10
"""Bytes of a stream of which everything comes with what is used first: a pack of Node.js is 6 % smaller so, and is read
into memory in 800 pieces instead of 2,800."""


class Profiles(Protocol):
    """Where profiles are kept. Calls block."""

    def get(self, image: Digest, owner: str) -> Profile | None:
        """The one of an image, if there is one."""


class Streams(Protocol):
    """Who reads layers' contents."""

    async def read_stream(self, key: LayerKey, owner: str, start: int, size: int) -> bytes:
        """Bytes of a layer's stream that belong to files; raises NsfsError."""

    def locate(self, parts: Iterable[tuple[LayerKey, range]]) -> Iterator[tuple[int, int]]:
        """Where parts of layers' streams lie; raises CorruptError for what belongs to no file. Any thread."""


class Exports:
    """The service."""

    def __init__(
        self, images: Images, layers: Layers, spanning: Spanning, looking: Looking, profiles: Profiles, streams: Streams
    ) -> None:
        self._images = images
        self._layers = layers
        self._spanning = spanning
        self._looking = looking
        self._profiles = profiles
        self._streams = streams
        self._turn = trio.Lock()

    def methods(self) -> dict[str, tuple[type[Struct], Callable[[Any, Report], Awaitable[Struct | None]]]]:
        """What the daemon may call, by name."""
        return {"Export": (worker_api.Name, self._export)}

    async def _export(self, params: worker_api.Name, report: Report) -> worker_api.Exported:
        image = await self._images.resolve(params.reference, params.platform, params.owner)
        async with self._turn:
            layers = await self._indexed(image, report)
            for digest, key in layers.items():
                await report(Progress(stage="export", what=digest.short))
                await self._send_layer(key, report)
            if layers:
                await self._send_pack(image, layers, report)
        return worker_api.Exported(reference=image.reference, digest=str(image.digest))

    async def _indexed(self, image: Image, report: Report) -> dict[Digest, LayerKey]:
        """The plain layers that can be had by ranges, each once; all of them are read through if need be."""
        layers = {layer.digest: layer for layer in image.layers if layer.format.toc is None}
        if len(layers) < len({layer.digest for layer in image.layers}):
            await report(Note(text="layers with tables of contents of their own are left out"))
        await self._looking.announce(image, list(layers.values()), report)
        found: dict[Digest, LayerKey] = {}

        async def index(layer: Layer) -> None:
            key = await self._layers.index(image, layer)
            record = await self._spanning.ensure(key, image.access.owner)
            if record.has_spans:
                found[layer.digest] = key
            else:
                await report(Note(text=f"layer {layer.digest.short} is left out: it cannot be decompressed in parts"))

        await run_all(partial(index, layer) for layer in layers.values())
        return {digest: found[digest] for digest in layers if digest in found}

    async def _send_layer(self, key: LayerKey, report: Report) -> None:
        async with self._layers.rendered(key) as files:
            for media_type, fd in zip((INDEX_TYPE, SPANS_TYPE), files, strict=True):
                await report(Part(media_type=media_type, layer=str(key.blob)))
                while piece := os.read(fd, _PIECE):
                    await report(Data(piece))

    async def _send_pack(self, image: Image, layers: Mapping[Digest, LayerKey], report: Report) -> None:
        profile = await trio.to_thread.run_sync(self._profiles.get, image.digest, image.access.owner)
        if profile is None:
            await report(Note(text="no start-up pack: no start was recorded, see nsfs mount --profile record"))
        elif not profile.is_complete:
            await report(Note(text=f"no start-up pack: the profile may lack something: {profile.flaw}"))
        else:
            keys = _keys_of(profile, layers)
            try:
                runs = await trio.to_thread.run_sync(self._plan_runs, profile, keys)
            except CorruptError as error:
                await report(Note(text=f"no start-up pack: the profile is not of these layers: {error.message}"))
            else:
                await self._send_runs(profile, runs, keys, image.access.owner, report)

    def _plan_runs(self, profile: Profile, keys: Mapping[int, LayerKey]) -> list[Run]:
        """What of the profile's layers is packed.

        Raises CorruptError for what is in no file: a start was recorded by an artifact's word for where files are.
        """
        runs = [run for run in profile.runs if run.layer in keys]
        deque(self._streams.locate((keys[run.layer], run.stream) for run in runs), 0)

        def is_whole(run: Run) -> bool:
            with suppress(CorruptError):
                deque(self._streams.locate([(keys[run.layer], run.stream)]), 0)
                return True
            return False

        return gather_runs(fill_gaps(runs, _GAP, is_whole), _TOGETHER)

    async def _send_runs(
        self, profile: Profile, runs: Sequence[Run], keys: Mapping[int, LayerKey], owner: str, report: Report
    ) -> None:
        writer = PackWriter([layer.blob for layer in profile.layers], profile.size)
        await report(Part(media_type=PACK_TYPE))
        for part in (part for run in runs for part in run.cut(_RUN)):
            data = await self._streams.read_stream(keys[part.layer], owner, part.start, part.length)
            await _send(await trio.to_thread.run_sync(writer.add, part, data), report)
        rest, table = await trio.to_thread.run_sync(writer.finish)
        await _send(rest, report)
        await report(Part(media_type=TABLE_TYPE))
        await _send(await trio.to_thread.run_sync(render_table, table), report)


def _keys_of(profile: Profile, layers: Mapping[Digest, LayerKey]) -> dict[int, LayerKey]:
    """The profile's layers that are exported, by their numbers there."""
    known = {str(digest): key for digest, key in layers.items()}
    named = {number: layer.blob for number, layer in enumerate(profile.layers) if layer.stream == TAR}
    return {number: known[blob] for number, blob in named.items() if blob in known}


async def _send(data: bytes, report: Report) -> None:
    for start in range(0, len(data), _PIECE):
        await report(Data(data[start : start + _PIECE]))
