"""Views: from the name under which a disk was opened to the bytes that its reader gets.

Owns the table and the blob of each layer that somebody reads, opened when first wanted and let go with its last view,
and what of a layer is local. Views that nobody closes, because nobody mounted them, make room for later ones. A view's
name says which map asks and how long its readers wait; nothing has to be registered, so a worker that takes over
from one that was killed serves every view at once.
"""

from __future__ import annotations

from bisect import bisect_left
from functools import cache, partial
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol
from weakref import WeakValueDictionary

import msgspec
import trio

from nsfs.core import landing
from nsfs.core.fetchplan import Table, join_blocks, stream_pieces, subtract
from nsfs.core.fetchview import LayerSource, View
from nsfs.core.refill import refill
from nsfs.core.runway import Priority
from nsfs.core.worker_api import UsageReport, Waits
from nsfs.errors import CorruptError, NotFoundError, UnreachableError
from nsfs.model.policy import Patience, ViewName, parse_view_name, view_name
from nsfs.model.pool import Access

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

    from nsfs.core.blobs import Blobs
    from nsfs.core.fetcher import Fetcher
    from nsfs.core.recording import Recording, Recordings
    from nsfs.core.spanning import Spanning
    from nsfs.model.pool import LayerKey, LayerRecord, MapRecord


_LOOKING: Final = Patience(0)
"""One attempt, however long its bytes take: somebody sits in front of it."""
_COMPLETING: Final = 60.0
"""Seconds that a piece may take which nobody waits for."""

_NOTEWORTHY: Final = 1.0
"""Seconds: shorter waits are what a first read takes."""
_KEPT_VIEWS: Final = 4096
_KEPT_RANGES: Final = 4096
_FEW_RANGES: Final = 256
_MOST_MOVED: Final = 1 << 20
"""Bytes of a layer that may be absent where it first was read to, as another had brought them: what is looked at one by
one."""


class Catalog(Protocol):
    """The domain's records."""

    def layer(self, key: LayerKey) -> LayerRecord | None:
        """A layer whose index is complete."""

    def map(self, map_id: str) -> MapRecord | None:
        """A map."""


class LayerTable(Table, Protocol):
    """A layer's tables, for more than reading."""

    def ranges(self) -> list[tuple[int, int]]:
        """Addresses of all its files, in whole blocks, neighbours joined."""


class Pool(landing.Pool, Protocol):
    """What of the pool is asked here."""

    def local_bytes(self, ranges: Iterable[tuple[int, int]]) -> int:
        """How many bytes of `ranges` are there."""

    def evict_all(self, ranges: Sequence[tuple[int, int]]) -> int:
        """Drop blocks, with one sync; how many bytes that freed."""


class Startups(Protocol):
    """What comes for starts, not by ranges."""

    def awaited(self, key: LayerKey, owner: str, start: int, end: int) -> trio.Event | None:
        """What to wait for before these bytes of a layer's stream are fetched otherwise; None for nothing."""


class _Open(NamedTuple):
    """A view that somebody asked for."""

    view: View
    patience: float | None
    map_id: str
    recording: Recording | None


class Views:
    """The service."""

    def __init__(
        self,
        catalog: Catalog,
        open_table: Callable[[LayerKey], LayerTable],
        blobs: Blobs,
        spanning: Spanning,
        pool: Pool,
        fetcher: Fetcher,
        recordings: Recordings,
        startups: Startups,
    ) -> None:
        self._catalog = catalog
        self._open_table = open_table
        self._blobs = blobs
        self._spanning = spanning
        self._pool = pool
        self._fetcher = fetcher
        self._recordings = recordings
        self._startups = startups
        self._views: dict[str, _Open] = {}
        self._closed: set[str] = set()
        self._sources: WeakValueDictionary[tuple[LayerKey, str], LayerSource] = WeakValueDictionary()
        """Of the views there are, by the owner as whom they ask."""
        self._ranges: dict[LayerKey, list[tuple[int, int]]] = {}
        self._renewed: set[LayerKey] = set()
        """Layers whose tables were exchanged since the worker started: earlier flights are known by another name."""
        self._completing: set[LayerKey] = set()
        """Of which all is being fetched."""

    async def read(self, name: str, address: int, size: int) -> bytes | memoryview:
        """Exactly these bytes of the disk as the view sees it; raises as its mount's patience says."""
        opened = self._view(name)
        if opened.recording is None:
            return await self._fetcher.read(opened.view, address, size, patience=opened.patience)
        with opened.recording.reading(opened.map_id, address, size):
            return await self._fetcher.read(opened.view, address, size, patience=opened.patience)

    async def look(self, map_id: str, owner: str, address: int, size: int) -> bytes:
        """As `read`, for who has no mount, whose taking away would end it."""
        opened = self._looked_at(map_id, owner)
        return bytes(await self._fetcher.read(opened.view, address, size, patience=opened.patience))

    async def peek(self, map_id: str, owner: str, address: int, size: int) -> bytes:
        """As `look`, for who wants nothing that lies around these bytes."""
        opened = self._looked_at(map_id, owner, reads_on=False)
        return bytes(await self._fetcher.read(opened.view, address, size, patience=opened.patience))

    async def fetch_ahead(self, map_id: str, owner: str, runs: Sequence[tuple[int, int]]) -> bool:
        """Begin to fetch what is absent of these addresses, which a start is known to read, behind whoever reads.

        False where nothing comes ahead.
        """
        return await self._fetcher.fetch_ahead(self._looked_at(map_id, owner, reads_on=False).view, runs)

    def extent_at(self, map_id: str, owner: str, address: int) -> int:
        """How many bytes from `address` on are of one file of the map; 0 for none."""
        opened = self._looked_at(map_id, owner, reads_on=False)
        tables = (source.table for source in opened.view.sources)
        found = (start + size for table in tables for start, size, _ in table.segments(address, 1))
        return next(found, address) - address

    def _looked_at(self, map_id: str, owner: str, *, reads_on: bool = True) -> _Open:
        name = f"{'look' if reads_on else 'peek'}/{view_name(map_id, '', owner)}"
        return self._views.get(name) or self._open(name, ViewName(map_id, _LOOKING, owner), reads_on=reads_on)

    def close(self, names: Collection[str]) -> None:
        """Fail who waits for these views, and who asks for them until they are opened again; end their recordings."""
        self._recordings.end(names)
        self._closed.update(names)
        for name in names:
            self._views.pop(name, None)
        self._fetcher.abandon(names)

    def reopen(self, names: Iterable[str]) -> None:
        """Serve views that may have been closed."""
        self._closed.difference_update(names)

    def open(self, names: Iterable[str]) -> None:
        """Raise now what their first reads would find: a table in a newer format, say, or one that is damaged."""
        for name in names:
            self._view(name)

    async def make_present(self, name: str, address: int, size: int) -> None:
        """Have these blocks in the pool."""
        opened = self._view(name)
        await self._fetcher.make_present(opened.view, address, size, patience=opened.patience)

    async def evict(self, key: LayerKey, spared: Iterable[LayerKey] = ()) -> int:
        """Drop a layer's contents, but for what `spared` layers have too; gives the bytes freed.

        They can come back by ranges.
        """
        self._fetcher.forget(_name_of(key, ""))
        taken = [each for other in spared for each in self._ranges_of(other)]
        ranges = subtract(self._ranges_of(key), taken) if taken else self._ranges_of(key)
        return await trio.to_thread.run_sync(lambda: self._pool.evict_all(ranges))

    async def complete(self, key: LayerKey, owner: str) -> None:
        """Have all contents of a layer in the pool, while nobody reads what is absent.

        Raises as its registry does, and NoSpaceError.
        """
        view = View(f"complete/{key.blob}", [self._source(key, owner)])
        self._completing.add(key)
        try:
            for run in self._ranges_of(key):
                await self._fetcher.make_present(view, *run, patience=_COMPLETING, priority=Priority.BACKGROUND)
        finally:
            self._completing.remove(key)

    async def renew(self, key: LayerKey) -> None:
        """Read a layer by its tables as they are now; return when nothing by earlier ones is under way."""
        self._renewed.add(key)
        await self._fetcher.retire(self._drop(key))

    async def fence(self, key: LayerKey) -> None:
        """Fail whoever reads a layer, whose record says why, and drop its contents."""
        names = {name for name, opened in self._views.items() if self._reads(opened, key)}
        self._drop(key)
        self._fetcher.abandon(names)
        await self.evict(key)

    def _drop(self, key: LayerKey) -> list[LayerSource]:
        """Have views of a layer opened anew by who reads next; gives what they had."""
        gone = [source for (known, _), source in self._sources.items() if known == key]
        for name in [name for name, opened in self._views.items() if self._reads(opened, key)]:
            del self._views[name]
        for known in [each for each in self._sources if each[0] == key]:
            del self._sources[known]
        return gone

    def _reads(self, opened: _Open, key: LayerKey) -> bool:
        own = {source for (known, _), source in self._sources.items() if known == key}
        return not own.isdisjoint(opened.view.sources)

    def quiet_for(self) -> float:
        """Seconds since a reader last waited for absent bytes; 0 while one does."""
        return self._fetcher.quiet_for()

    def are_local(self, keys: Collection[LayerKey]) -> bool:
        """Whether all of these layers' contents are in the pool."""
        return all(self._is_local(key) for key in set(keys))

    def _is_local(self, key: LayerKey) -> bool:
        ranges = self._ranges_of(key)
        absent = sum(size for _, size in ranges) - self._pool.local_bytes(ranges)
        if not 0 < absent <= _MOST_MOVED:
            return not absent
        table = self._open_table(key)
        return all(self._is_elsewhere(table, *run) for each in ranges for run in self._pool.missing(*each))

    def _is_elsewhere(self, table: LayerTable, address: int, size: int) -> bool:
        """Whether what belongs there is somewhere else: contents that another layer brought at the same moment."""
        rows = table.segments(address, size)
        return bool(rows) and all(
            any(
                other != at and start == stream and not self._pool.missing(other, length)
                for other, _, start in table.segments_in_stream(stream - 1, stream + 1)
            )
            for at, length, stream in rows
        )

    def leading(self, key: LayerKey, size: int) -> range:
        """The part of a layer's stream that so many bytes at the beginning of its blob are."""
        table = self._open_table(key)
        first_beyond = bisect_left(range(len(table)), size, key=lambda number: table.span(number).offset)
        return range(table.stream_range(range(first_beyond))[1] if first_beyond else 0)

    def locate(self, parts: Iterable[tuple[LayerKey, range]]) -> Iterator[tuple[int, int]]:
        """Where these parts of layers' streams lie in the pool, or would: address and size, in whole blocks.

        Looks at memory maps alone; any thread.
        """
        open_table = cache(self._open_table)
        for key, part in parts:
            yield from join_blocks(stream_pieces(open_table(key), part))

    def is_present(self, address: int, size: int) -> bool:
        """Whether these blocks are in the pool; any thread."""
        return not self._pool.missing(address, size)

    def begin_reading(self, extents: Iterable[tuple[int, int]]) -> None:
        """Have the disk begin to read what lies there in the pool; may block, any thread."""
        self._pool.begin_reading(extents)

    async def prefetch(self, key: LayerKey, owner: str, parts: Sequence[range]) -> None:
        """Have these parts of a layer's stream in the pool; raises as its registry does, and NoSpaceError."""
        await self._fetcher.prefetch(View(f"profile/{key.blob}", [self._source(key, owner)]), parts)

    async def read_stream(self, key: LayerKey, owner: str, start: int, size: int) -> bytes:
        """Bytes of a layer's stream that belong to files; raises as its registry does."""
        source = self._source(key, owner)
        view = View(f"stream/{key.blob}", [source])
        pieces = stream_pieces(source.table, range(start, start + size))
        return b"".join([bytes(await self._fetcher.read(view, *each, patience=_COMPLETING)) for each in pieces])

    def size_of(self, key: LayerKey) -> int:
        """Bytes of all contents of a layer, in whole blocks."""
        return sum(size for _, size in self._ranges_of(key))

    def local_bytes(self, keys: Iterable[LayerKey]) -> int:
        """Bytes of these layers' contents that are in the pool; what two of them share counts once."""
        return self._pool.local_bytes(join_blocks(each for key in set(keys) for each in self._ranges_of(key)))

    def usage(self, maps: Collection[str]) -> UsageReport:
        """What of these maps is local, what their blobs cost, and what their readers wait for."""
        records = [record for map_id in maps if (record := self._catalog.map(map_id))]
        waits = self.waits(set(maps))
        return UsageReport(
            local=self.local_bytes([record.key for record in records]),
            fetched=sum(self._blobs.fetched[blob] for blob in {record.blob for record in records}),
            state=self.state(set(maps)),
            completing=not self._completing.isdisjoint(key for each in records for key in (each.key, *each.lowers)),
            **msgspec.structs.asdict(waits),
        )

    def layers_of(self, maps: Iterable[str]) -> set[LayerKey]:
        """Whose maps these are."""
        return {record.key for map_id in maps if (record := self._catalog.map(map_id))}

    def waits(self, maps: Collection[str] | None, *, beyond: float = 0.0) -> Waits:
        """How many readers of these maps (None: of any) wait now, and have for `beyond` seconds or more."""
        waiting = [
            each
            for each in self._fetcher.statistics().waiting
            if each.seconds >= beyond and (maps is None or map_of(each.view) in maps)
        ]
        if not waiting:
            return Waits()
        longest = max(waiting, key=lambda each: each.seconds)
        return Waits(waiting=len(waiting), longest=longest.seconds, reason=longest.reason)

    def state(self, maps: Collection[str] | None) -> str:
        """What readers of these maps (None: of any) wait for longest; "ready" where nobody waits for a second."""
        waits = self.waits(maps, beyond=_NOTEWORTHY)
        if not waits.waiting:
            return "ready"
        return f"{waits.waiting} reads wait, the longest for {waits.longest:.0f} s, for {waits.reason}"

    def _view(self, name: str) -> _Open:
        found = self._views.get(name)
        if found is not None:
            return found
        if name in self._closed:
            raise UnreachableError(f"nobody shows the view any more: {name}")
        return self._open(name, parse_view_name(name))

    def _open(self, name: str, parsed: ViewName, *, reads_on: bool = True) -> _Open:
        record = self._catalog.map(parsed.map_id)
        if record is None or record.needs_lower:
            raise NotFoundError(f"no such view in this domain: {name}")
        keys = [record.key, *record.lowers]
        sources = [self._source(key, parsed.reader) for key in dict.fromkeys(keys)]
        view = View(name, sources, reads_on=reads_on)
        while len(self._views) >= _KEPT_VIEWS:
            del self._views[next(iter(self._views))]
        recording = self._recordings.of(parsed.recording)
        opened = self._views[name] = _Open(view, parsed.patience.seconds, parsed.map_id, recording)
        return opened

    def _ranges_of(self, key: LayerKey) -> list[tuple[int, int]]:
        """A layer's addresses, kept where they are few, as those of a layer that brought its contents itself are."""
        found = self._ranges.get(key)
        if found is None:
            found = self._open_table(key).ranges()
            if len(found) <= _FEW_RANGES and len(self._ranges) < _KEPT_RANGES:
                self._ranges[key] = found
        return found

    def reader_of(self, record: MapRecord, owner: str) -> str:
        """As whom a view of this map is to ask: as nobody in particular where all of it is here."""
        if not owner:
            return ""
        return "" if self.are_local({record.key, *record.lowers}) else owner

    def _source(self, key: LayerKey, owner: str) -> LayerSource:
        source = self._sources.get((key, owner))
        if source is None:
            record = self._catalog.layer(key)
            if record is None:
                raise NotFoundError(f"no such layer in this domain: {key.blob}")
            if record.fenced:
                raise CorruptError(f"layer {key.blob} is fenced off: {record.fenced}")

            async def make_spans() -> Table:
                found = await self._spanning.ensure(key, owner)
                table = self._open_table(key)
                if found.whole:
                    await self._spanning.refill(key, lambda job: refill(job, self._pool, table), owner)
                return table

            blob = self._blobs.blob(record.blob, record.blob_size, Access(owner, key.origin))
            source = self._sources[key, owner] = LayerSource(
                key=f"{_name_of(key, owner)}{' anew' if key in self._renewed else ''}",
                table=self._open_table(key),
                blob=blob,
                make_spans=make_spans,
                route=blob.route,
                awaited=partial(self._startups.awaited, key, owner),
            )
        return source


def map_of(view: str) -> str:
    """The map that a view, or somebody without one, reads."""
    return view.removeprefix("look/").removeprefix("peek/").partition("~")[0].partition("_")[0]


def _name_of(key: LayerKey, owner: str) -> str:
    """What flights and failures are known by: what one owner cannot have is no other's trouble."""
    return " ".join(filter(None, (f"{key.blob}/{key.index}", key.origin, owner)))
