"""Prefetches: what a start of an image is known to read is fetched in that order, behind whoever reads already.

Owns which images are being prefetched: each once at a time for an owner. Refuses nothing: where there is no profile, or
a layer is read by another stream than the one that was recorded, there is nothing to fetch; and the first failure ends
a prefetch, as reads try again by themselves.

Concurrency: tasks in the worker's nursery; of a profile two windows are under way, so that the route stays full.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

import trio

from nsfs.core.tasks import run_all
from nsfs.errors import NsfsError
from nsfs.model.profile import plan_windows, stream_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from nsfs.model.digest import Digest
    from nsfs.model.pool import LayerKey, LayerRecord
    from nsfs.model.profile import Profile

log = logging.getLogger(__name__)

_OUTSTANDING: Final = 2
"""Windows of a profile."""


class Catalog(Protocol):
    """The domain's records."""

    def layer(self, key: LayerKey) -> LayerRecord | None:
        """A layer whose index is complete."""


class Store(Protocol):
    """Where profiles are kept. Calls block."""

    def get(self, image: Digest, owner: str) -> Profile | None:
        """The one of an image, if there is one."""


class Streams(Protocol):
    """Who fetches."""

    async def prefetch(self, key: LayerKey, owner: str, parts: Sequence[range]) -> None:
        """Have parts of a layer's stream in the pool; raises NsfsError."""


class Prefetches:
    """The service."""

    def __init__(self, catalog: Catalog, store: Store, streams: Streams, nursery: trio.Nursery) -> None:
        self._catalog = catalog
        self._store = store
        self._streams = streams
        self._nursery = nursery
        self._running: set[tuple[Digest, str]] = set()

    def begin(self, image: Digest, owner: str, layers: Sequence[LayerKey]) -> None:
        """Begin to fetch what the image's profile has of these layers, if there is one."""
        if (image, owner) not in self._running:
            self._running.add((image, owner))
            self._nursery.start_soon(self._run, image, owner, layers)

    async def _run(self, image: Digest, owner: str, layers: Sequence[LayerKey]) -> None:
        try:
            profile = await trio.to_thread.run_sync(self._store.get, image, owner)
            if profile is not None:
                await self._fetch(profile, owner, layers)
                log.info("prefetched what a start of %s reads: %d bytes", image, profile.size)
        except NsfsError as error:
            log.info("a prefetch of %s ends: %s", image, error)
        except Exception:
            log.exception("a bug: no prefetch of image %s", image)
        finally:
            self._running.discard((image, owner))

    async def _fetch(self, profile: Profile, owner: str, layers: Sequence[LayerKey]) -> None:
        keys = self._served(profile, layers)
        windows = plan_windows(run for run in profile.runs if run.layer in keys)

        async def fetch_each(windows: Iterator[dict[int, list[range]]]) -> None:
            for window in windows:
                await run_all(
                    partial(self._streams.prefetch, keys[layer], owner, parts) for layer, parts in window.items()
                )

        await run_all([partial(fetch_each, windows)] * _OUTSTANDING)

    def _served(self, profile: Profile, layers: Sequence[LayerKey]) -> dict[int, LayerKey]:
        """The profile's layers that can be fetched by ranges, by their numbers there."""
        known = {(str(key.blob), stream_of(key.index)): key for key in layers}
        found = {number: known.get((layer.blob, layer.stream)) for number, layer in enumerate(profile.layers)}
        return {number: key for number, key in found.items() if key is not None and self._has_spans(key)}

    def _has_spans(self, key: LayerKey) -> bool:
        record = self._catalog.layer(key)
        return record is not None and record.has_spans
