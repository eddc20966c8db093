"""Prefetches: what a start of an image is known to read is fetched in that order, behind whoever reads already.

Owns which images are being prefetched: each once at a time for an owner. Refuses nothing: where a layer is read by
another stream than the one that was recorded, there is nothing to fetch of it; and the first failure ends a prefetch,
as reads try again by themselves. Without a profile it fetches what eStargz layers say of themselves: the part of the
blob that lies before the landmark which their builder set (containerd/stargz-snapshotter, docs/estargz.md).

Concurrency: tasks in the worker's nursery; of a profile two windows are under way, so that the route stays full.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

import trio

from nsfs.core.tasks import run_all
from nsfs.errors import NsfsError
from nsfs.model.profile import Profile, ProfiledLayer, Run, plan_windows, stream_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from nsfs.model.digest import Digest
    from nsfs.model.pool import LayerKey, LayerRecord

log = logging.getLogger(__name__)

_OUTSTANDING: Final = 2
"""Windows of a profile."""
_AT_A_TIME: Final = 2.0
"""Seconds between starts that are many at a time."""
_KEPT: Final = 16
"""Profiles of which it is remembered where what they have lies."""
_WARM: Final = 128 << 20
"""Bytes that are brought into memory for a start."""
_WARM_EXTENTS: Final = 1 << 13
_TOGETHER: Final = 4 << 20
"""Bytes of a profile of which what is near becomes one."""
_SOON: Final = 512 << 10
"""Bytes of a profile of which what adjoins becomes one where it is still to come: who reads it waits for all of it."""
_NEAR: Final = 64 << 10
"""What is read sooner in one piece, with what lies between, than in two."""


_Wanted: TypeAlias = "tuple[float, tuple[tuple[int, LayerKey], ...], int]"
"""What `Prefetches._locate` follows from: when the profile was recorded, its layers, what is near."""


class Catalog(Protocol):
    """The domain's records."""

    def layer(self, key: LayerKey) -> LayerRecord | None:
        """A layer whose index is complete."""


class Streams(Protocol):
    """Who fetches."""

    def are_local(self, keys: Collection[LayerKey]) -> bool:
        """Whether all of these layers' contents are in the pool."""

    def locate(self, parts: Iterable[tuple[LayerKey, range]]) -> Iterator[tuple[int, int]]:
        """Where these parts of layers' streams lie in the pool: address and size, in whole blocks."""

    def is_present(self, address: int, size: int) -> bool:
        """Whether these blocks are in the pool."""

    def leading(self, key: LayerKey, size: int) -> range:
        """The part of a layer's stream that so many bytes at the beginning of its blob are."""

    def begin_reading(self, extents: Iterable[tuple[int, int]]) -> None:
        """Have the disk begin to read them; may block."""

    async def prefetch(self, key: LayerKey, owner: str, parts: Sequence[range]) -> None:
        """Have parts of a layer's stream in the pool; raises NsfsError."""


@dataclass(eq=False, slots=True)
class Prefetch:
    """One that runs."""

    layers: frozenset[LayerKey]
    total: int
    """Bytes that a start is known to read."""
    done: int = 0
    """Bytes of them that are here."""
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


class Prefetches:
    """The service."""

    def __init__(self, catalog: Catalog, streams: Streams, nursery: trio.Nursery) -> None:
        self._catalog = catalog
        self._streams = streams
        self._nursery = nursery
        self._running: dict[tuple[Digest, str], Prefetch] = {}
        self._began: dict[frozenset[LayerKey], float] = {}
        """Since when the disk reads for starts from these layers, where that is not long ago."""
        self._found: dict[_Wanted, list[tuple[int, int]]] = {}
        self._locating = trio.Lock()
        self.fetched = 0
        """Bytes that were asked for ahead, by all of them."""

    def begin(self, image: Digest, owner: str, layers: Sequence[LayerKey], profile: Profile | None) -> bool:
        """Begin to fetch what the image's profile, or else a landmark, has of these layers; whether there is any."""
        profile = profile or self._landmarks(layers)
        if not profile.runs or self._streams.are_local(layers):
            return False
        if (image, owner) not in self._running:
            prefetch = self._running[image, owner] = Prefetch(frozenset(layers), profile.size)
            self._nursery.start_soon(self._run, image, owner, layers, profile, prefetch)
        return True

    def have_all(self, layers: Collection[LayerKey]) -> bool:
        """Whether nothing of these layers is absent."""
        return self._streams.are_local(layers)

    async def bring(self, layers: Sequence[LayerKey], profile: Profile) -> list[tuple[int, int]]:
        """Where what of the profile is in the pool lies there, in its order: address and size, in whole blocks.

        Of long profiles the beginning. The disk begins to read it.
        """
        found = await self._located(self._known(profile, layers), profile, near=_NEAR, together=_TOGETHER)
        extents = [extent for extent in found if self._streams.is_present(*extent)]
        self._begin_reading(frozenset(layers), extents)
        return extents

    def _begin_reading(self, layers: frozenset[LayerKey], extents: Sequence[tuple[int, int]]) -> None:
        """Once for many starts at a time, which share views."""
        now = trio.current_time()
        self._began = {key: since for key, since in self._began.items() if now - since < _AT_A_TIME}
        if layers not in self._began:
            self._began[layers] = now
            self._nursery.start_soon(trio.to_thread.run_sync, self._streams.begin_reading, extents)

    async def coming(self, layers: Sequence[LayerKey], profile: Profile) -> list[tuple[int, int]]:
        """Where what of the profile is there or is fetched by ranges lies, in its order, and nothing beside it."""
        return await self._located(self._served(profile, layers), profile, near=0, together=_SOON)

    async def _located(
        self, keys: Mapping[int, LayerKey], profile: Profile, *, near: int, together: int
    ) -> list[tuple[int, int]]:
        """As `_locate`, which takes 20 ms for a start of NumPy: remembered for those that were asked for last."""
        wanted = profile.recorded, tuple(keys.items()), near
        async with self._locating:
            if wanted not in self._found:
                locate = partial(self._locate, keys, profile, near=near, together=together)
                self._found[wanted] = await trio.to_thread.run_sync(locate)
            while len(self._found) > _KEPT:
                del self._found[next(each for each in self._found if each != wanted)]
            return self._found[wanted]

    def _locate(
        self, keys: Mapping[int, LayerKey], profile: Profile, *, near: int, together: int
    ) -> list[tuple[int, int]]:
        runs = (part for run in profile.runs if run.layer in keys for part in run.cut(together))
        parts = ((keys[run.layer], run.stream) for run in runs)
        try:
            return plan_extents(self._streams.locate(parts), near, together)
        except NsfsError as error:
            log.info("a profile is not of its layers: %s", error)
            return []

    def about(self, layers: Collection[LayerKey]) -> Prefetch | None:
        """The one of exactly these layers."""
        return next((each for each in self._running.values() if each.layers == set(layers)), None)

    def count(self) -> int:
        """How many there are."""
        return len(self._running)

    def end(self, layers: Collection[LayerKey]) -> None:
        """Fetch nothing more for images that have one of these layers, and whose views are gone."""
        self._began = {key: since for key, since in self._began.items() if key.isdisjoint(layers)}
        for prefetch in self._running.values():
            if not prefetch.layers.isdisjoint(layers):
                prefetch.scope.cancel()

    def _landmarks(self, layers: Sequence[LayerKey]) -> Profile:
        """What builders wanted to be fetched first."""
        parts = map(self._landmark, layers)
        runs = [Run(number, part.start, len(part)) for number, part in enumerate(parts) if part]
        return Profile(layers=[ProfiledLayer(str(key.blob), stream_of(key.index)) for key in layers], runs=runs)

    def _landmark(self, key: LayerKey) -> range:
        record = self._catalog.layer(key)
        size = record.prefetch_size if record else 0
        return self._streams.leading(key, size) if size else range(0)

    async def _run(
        self, image: Digest, owner: str, layers: Sequence[LayerKey], profile: Profile, prefetch: Prefetch
    ) -> None:
        try:
            with prefetch.scope:
                await self._fetch(profile, owner, layers, prefetch)
                log.info("prefetched what a start of %s reads: %d bytes", image, profile.size)
        except NsfsError as error:
            log.info("a prefetch of %s ends: %s", image, error)
        except Exception:
            log.exception("a bug: no prefetch of image %s", image)
        finally:
            del self._running[image, owner]

    async def _fetch(self, profile: Profile, owner: str, layers: Sequence[LayerKey], prefetch: Prefetch) -> None:
        keys = self._served(profile, layers)
        windows = plan_windows(run for run in profile.runs if run.layer in keys)

        async def fetch_each(windows: Iterator[dict[int, list[range]]]) -> None:
            for window in windows:
                await run_all(
                    partial(self._streams.prefetch, keys[layer], owner, parts) for layer, parts in window.items()
                )
                size = sum(len(part) for parts in window.values() for part in parts)
                prefetch.done += size
                self.fetched += size

        await run_all([partial(fetch_each, windows)] * _OUTSTANDING)

    def _served(self, profile: Profile, layers: Sequence[LayerKey]) -> dict[int, LayerKey]:
        """The profile's layers that can be fetched by ranges, by their numbers there."""
        return {number: key for number, key in self._known(profile, layers).items() if self._has_spans(key)}

    def _known(self, profile: Profile, layers: Sequence[LayerKey]) -> dict[int, LayerKey]:
        """The profile's layers that are read by the stream which was recorded, by their numbers there."""
        known = {(str(key.blob), stream_of(key.index)): key for key in layers}
        found = ((number, known.get((layer.blob, layer.stream))) for number, layer in enumerate(profile.layers))
        return {number: key for number, key in found if key is not None}

    def _has_spans(self, key: LayerKey) -> bool:
        record = self._catalog.layer(key)
        return record is not None and record.has_spans


def plan_extents(found: Iterable[tuple[int, int]], near: int, together: int) -> list[tuple[int, int]]:
    """What to bring into memory of extents, in whole blocks, that are read in this order.

    Those that are `near` to each other, and that no more than so many bytes are read `together` with, become one, with
    what lies between.
    """
    rest, extents = iter(found), []
    size = 0
    while size < _WARM and (taken := list(_take(rest, together))):
        extents += _join_near(taken, near)
        size += sum(length for _, length in taken)
    return extents[:_WARM_EXTENTS]


def _take(extents: Iterator[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    """The first of them, of so many bytes or a little more."""
    while size > 0 and (extent := next(extents, None)):
        size -= extent[1]
        yield extent


def _join_near(extents: list[tuple[int, int]], near: int) -> list[tuple[int, int]]:
    """In the order of what each has of the first."""
    joined: list[tuple[int, int, int]] = []
    for address, size, number in sorted((*extent, number) for number, extent in enumerate(extents)):
        end = address + size
        if joined and address - joined[-1][1] <= near:
            start, last, first = joined[-1]
            joined[-1] = start, max(last, end), min(first, number)
        else:
            joined.append((address, end, number))
    return [(start, end - start) for start, end, _ in sorted(joined, key=lambda each: each[2])]
