"""Views: from the name under which a disk was opened to the bytes that its reader gets.

Owns the table and the blob of each layer that somebody reads, opened when first wanted, and what of a layer is local. A
view's name says which map asks and how long its readers wait; nothing has to be registered, so a worker that takes over
from one that was killed serves every view at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

import trio

from nsfs.core import landing
from nsfs.core.fetchplan import Table
from nsfs.core.fetchview import LayerSource, View
from nsfs.core.refill import refill
from nsfs.errors import NotFoundError
from nsfs.model.policy import Patience, parse_view_name

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from nsfs.core.blobs import Blobs
    from nsfs.core.fetcher import Fetcher
    from nsfs.core.layers import Layers
    from nsfs.model.pool import LayerKey, LayerRecord, MapRecord


_LOOKING: Final = Patience(0)
"""One attempt, however long its bytes take: somebody sits in front of it."""


class Catalog(Protocol):
    """The domain's records."""

    def layer(self, key: LayerKey) -> LayerRecord | None:
        """A layer whose index is complete."""

    def map(self, map_id: str) -> MapRecord | None:
        """A map."""


class LayerTable(Table, Protocol):
    """A layer's tables, for more than reading."""

    def ranges(self) -> list[tuple[int, int]]:
        """Addresses of all its files, in whole blocks."""


class Pool(landing.Pool, Protocol):
    """What of the pool is asked here."""

    def local_bytes(self, ranges: Iterable[tuple[int, int]]) -> int:
        """How many bytes of `ranges` are there."""


class Views:
    """The service."""

    def __init__(
        self,
        catalog: Catalog,
        open_table: Callable[[LayerKey], LayerTable],
        blobs: Blobs,
        layers: Layers,
        pool: Pool,
        fetcher: Fetcher,
    ) -> None:
        self._catalog = catalog
        self._open_table = open_table
        self._blobs = blobs
        self._layers = layers
        self._pool = pool
        self._fetcher = fetcher
        self._views: dict[str, tuple[View, float | None]] = {}
        self._closed: set[str] = set()
        self._sources: dict[LayerKey, LayerSource] = {}

    async def read(self, name: str, address: int, size: int) -> bytes:
        """Exactly these bytes of the disk as the view sees it; raises as its mount's patience says."""
        view, patience = self._view(name)
        return await self._fetcher.read(view, address, size, patience=patience)

    async def look(self, map_id: str, address: int, size: int) -> bytes:
        """As `read`, for who has no mount, whose taking away would end it."""
        name = f"look/{map_id}"
        view, patience = self._views.get(name) or self._open(name, map_id, _LOOKING)
        return await self._fetcher.read(view, address, size, patience=patience)

    def close(self, names: Collection[str]) -> None:
        """Fail who waits for these views, and who asks for them until they are opened again."""
        self._closed.update(names)
        for name in names:
            self._views.pop(name, None)
        self._fetcher.abandon(names)

    def reopen(self, names: Iterable[str]) -> None:
        """Serve views that may have been closed."""
        self._closed.difference_update(names)

    async def make_present(self, name: str, address: int, size: int) -> None:
        """Have these blocks in the pool."""
        view, patience = self._view(name)
        await self._fetcher.make_present(view, address, size, patience=patience)

    async def evict(self, key: LayerKey) -> int:
        """Drop a layer's contents, which can come back by ranges; gives the bytes freed."""
        self._fetcher.forget(_name_of(key))
        ranges = self._table(key).ranges()
        return await trio.to_thread.run_sync(lambda: sum(self._pool.evict(*each) for each in ranges))

    def local_bytes(self, keys: Iterable[LayerKey]) -> int:
        """Bytes of these layers' contents that are in the pool; what two of them share counts once."""
        return self._pool.local_bytes({each for key in set(keys) for each in self._table(key).ranges()})

    def waiting(self) -> int:
        """Readers that wait for the network now."""
        return len(self._fetcher.statistics().waiting)

    def state(self, maps: Collection[str] | None) -> str:
        """What readers of these maps (None: of any) wait for longest; "ready" where nobody waits for a second."""
        waiting = [
            each
            for each in self._fetcher.statistics().waiting
            if each.seconds > 1 and (maps is None or map_of(each.view) in maps)
        ]
        if not waiting:
            return "ready"
        longest = max(waiting, key=lambda each: each.seconds)
        return f"{len(waiting)} reads wait, the longest for {longest.seconds:.0f} s, for {longest.reason}"

    def _view(self, name: str) -> tuple[View, float | None]:
        found = self._views.get(name)
        if found is not None:
            return found
        if name in self._closed:
            raise NotFoundError(f"nobody shows the view any more: {name}")
        return self._open(name, *parse_view_name(name))

    def _open(self, name: str, map_id: str, patience: Patience) -> tuple[View, float | None]:
        record = self._catalog.map(map_id)
        if record is None or record.needs_lower:
            raise NotFoundError(f"no such view in this domain: {name}")
        keys = [record.key, *record.lowers]
        view = View(name, [self._source(key) for key in dict.fromkeys(keys)])
        self._views[name] = view, patience.seconds
        return self._views[name]

    def _table(self, key: LayerKey) -> LayerTable:
        return self._open_table(key)

    def _source(self, key: LayerKey) -> LayerSource:
        if key not in self._sources:
            record = self._catalog.layer(key)
            if record is None:
                raise NotFoundError(f"no such layer in this domain: {key.blob}")

            async def make_spans() -> Table:
                found = await self._layers.ensure_spans(key)
                table = self._open_table(key)
                if found.whole:
                    await self._layers.refill(key, lambda job: refill(job, self._pool, table))
                return table

            self._sources[key] = LayerSource(
                key=_name_of(key),
                table=self._open_table(key),
                blob=self._blobs.blob(record.blob, record.blob_size),
                make_spans=make_spans,
            )
        return self._sources[key]


def map_of(view: str) -> str:
    """The map that a view, or somebody without one, reads."""
    return view.removeprefix("look/").partition("~")[0]


def _name_of(key: LayerKey) -> str:
    return f"{key.blob}/{key.index}"
