"""The files of a layer's directory: its index, and the tables that say where absent bytes come from.

Owns the formats of `index` (msgpack under zstd), `segments` and `spans` (columns of little-endian u64 behind a header
with the counts and a checksum of itself). Refuses files of a newer format, and files whose length is not what their
header says; what is inside was verified before it was written here, so it is not verified again.

Every file appears whole or not at all, under the domain's key where it has one (`store.sealed`). A `LayerTable` has its
columns in memory, and may be used by any number of threads. Tables are never changed in place:
one that was replaced stays valid for who has it open.
"""

from __future__ import annotations

import os
import struct
import sys
import zlib
from array import array
from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import msgspec
import zstandard

from nsfs.errors import CorruptError, NotFoundError, UnsupportedError
from nsfs.model.layer import Codec, Covers, LayerIndex, Span, Spans
from nsfs.store.sealed import load_content, store_files

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from nsfs.store.crypt import DomainKey
    from nsfs.store.files import Pieces
    from nsfs.store.sealed import Content

VERSION = 1
"""Of the formats of `index`, `segments` and `spans`."""

Row: TypeAlias = tuple[int, int, int]
"""(address, length, stream_offset): so many bytes of the disk from there are the stream's bytes from there."""

INDEX_FILE = "index"
SEGMENTS_FILE = "segments"
SPANS_FILE = "spans"

_HEADER = struct.Struct("<8sIIQQQQI4x")
"""Magic, version, kind (of spans: codec and covers), four numbers, crc32 of what is before it, zeros."""

_INDEX_MAGIC = b"nsfsindx"
_SEGMENTS_MAGIC = b"nsfssegs"
_SPANS_MAGIC = b"nsfsspan"
_DIGEST = 32
_INDEX_LIMIT = 1 << 32
_COLUMNS = ("offset", "length", "start", "size", "skip", "bits")


class _Header(NamedTuple):
    kind: int
    counts: tuple[int, int, int, int]


class _StoredIndex(msgspec.Struct, array_like=True):
    index: LayerIndex
    addresses: list[int]


def _render_header(magic: bytes, kind: int, *counts: int) -> bytes:
    padded = (*counts, 0, 0, 0, 0)[:4]
    packed = _HEADER.pack(magic, VERSION, kind, *padded, 0)
    return packed[:-8] + struct.pack("<I4x", zlib.crc32(packed[:-8]))


def _parse_header(data: bytes | memoryview, magic: bytes, path: str) -> _Header:
    if len(data) < _HEADER.size:
        raise CorruptError(f"the file of a layer ends early: {path}")
    found, version, kind, *counts, checksum = _HEADER.unpack_from(data)
    if found != magic:
        raise CorruptError(f"not the file of a layer that it should be: {path}")
    if version > VERSION:
        raise UnsupportedError(
            f"the file of a layer has a newer format: {path}: {version}",
            hint=f"this nsfs reads format {VERSION}; use the release that wrote it",
        )
    if checksum != zlib.crc32(data[: _HEADER.size - 8]):
        raise CorruptError(f"the header of a layer's file is damaged: {path}")
    return _Header(kind, (counts[0], counts[1], counts[2], counts[3]))


def _column(values: Iterable[int]) -> bytes:
    column = array("Q", values)
    if sys.byteorder == "big":
        column.byteswap()
    return column.tobytes()


def render_layer(
    index: LayerIndex, addresses: Sequence[int], rows: Iterable[Row], extents: Iterable[tuple[int, int]]
) -> list[bytes]:
    """What was found in a layer, for `store_layer`: the file of its segments, and that of its index.

    Where its contents are: `rows` of its segments, and the extents (address, size) of all its files, in any order, with
    repetitions, and overlapping where one content occurs twice in the layer; what is stored overlaps no more. Then its
    index, with the address of each entry (0 for what has none).
    """
    return [b"".join(_render_segments(rows, extents)), b"".join(_render_index(index, addresses))]


def store_layer(
    directory: str, rendered: Sequence[bytes], key: DomainKey | None = None, maps: Mapping[str, Pieces] | None = None
) -> None:
    """Write what `render_layer` gave, and the files of the layer's maps, by their paths, all at once.

    Raises NoSpaceError.
    """
    names = (SEGMENTS_FILE, INDEX_FILE)
    files = {os.path.join(directory, name): [data] for name, data in zip(names, rendered, strict=True)}
    store_files(files | dict(maps or {}), key)


# The index


def _render_index(index: LayerIndex, addresses: Sequence[int]) -> list[bytes]:
    packed = msgspec.msgpack.encode(_StoredIndex(index, list(addresses)))
    body = zstandard.ZstdCompressor(level=1).compress(packed)
    return [_render_header(_INDEX_MAGIC, 0, len(index.entries), len(packed), len(body), zlib.crc32(body)), body]


def load_index(directory: str, key: DomainKey | None = None) -> tuple[LayerIndex, list[int]]:
    """The index that `store_layer` wrote; raises NotFoundError, CorruptError, UnsupportedError."""
    path = os.path.join(directory, INDEX_FILE)
    data = bytes(load_content(path, key)[:])
    entries, unpacked, packed, checksum = _parse_header(data, _INDEX_MAGIC, path).counts
    body = data[_HEADER.size :]
    if len(body) != packed or zlib.crc32(body) != checksum or unpacked > _INDEX_LIMIT:
        raise CorruptError(f"the index of a layer is damaged: {path}")
    stored = _decode_index(body, unpacked, path)
    if not entries == len(stored.index.entries) == len(stored.addresses):
        raise CorruptError(f"the index of a layer contradicts its header: {path}")
    return stored.index, stored.addresses


def _decode_index(body: bytes, size: int, path: str) -> _StoredIndex:
    try:
        packed = zstandard.ZstdDecompressor().decompress(body, max_output_size=size)
        return msgspec.msgpack.decode(packed, type=_StoredIndex)
    except (zstandard.ZstdError, msgspec.DecodeError) as error:
        raise CorruptError(f"the index of a layer cannot be read: {path}: {error}") from error


# The tables


def _render_segments(rows: Iterable[Row], extents: Iterable[tuple[int, int]]) -> list[bytes]:
    kept = plan_rows(rows)
    ranges = plan_ranges(extents)
    addresses, lengths, streams = ([row[column] for row in kept] for column in range(3))
    order = sorted(range(len(kept)), key=streams.__getitem__)
    starts, sizes = ([extent[column] for extent in ranges] for column in range(2))
    header = _render_header(_SEGMENTS_MAGIC, 0, len(kept), len(ranges))
    return [header, *map(_column, (addresses, lengths, streams, order, starts, sizes))]


def plan_rows(rows: Iterable[Row]) -> list[Row]:
    """`rows` by address, without empty ones, each cut to begin where all before it have ended."""
    kept: list[Row] = []
    end = 0
    for row in sorted(rows):
        address, length, stream = row
        cut = end - address
        if length > max(cut, 0):
            kept.append(row if cut <= 0 else (end, length - cut, stream + cut))
            end = address + length
    return kept


def plan_ranges(extents: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """`extents` grown to whole blocks, by address, with neighbours joined."""
    ranges: list[tuple[int, int]] = []
    start = end = -1
    for address, size in sorted(extents):
        if not size:
            continue
        if address > end:
            ranges.append((start, end - start))
            start = address
        end = max(end, -(-(address + size) // 4096) * 4096)
    ranges.append((start, end - start))
    return [each for each in ranges if each[1]]


def store_spans(directory: str, spans: Spans, key: DomainKey | None = None) -> None:
    """Write how a layer's stream is had from its blob; raises NoSpaceError."""
    table = spans.spans
    columns = [_column(getattr(span, name) for span in table) for name in _COLUMNS]
    ends = [0]
    for span in table:
        ends.append(ends[-1] + len(span.window))
    kind = spans.codec << 8 | spans.covers
    header = _render_header(_SPANS_MAGIC, kind, len(table), ends[-1])
    body = [b"".join(span.digest for span in table), b"".join(span.window for span in table)]
    store_files({os.path.join(directory, SPANS_FILE): [header, *columns, _column(ends), *body]}, key)


def open_table(directory: str, key: DomainKey | None = None) -> LayerTable:
    """Load the tables of a layer, but for the spans' windows; one without spans has `has_spans` False.

    Of a layer with 100,000 files that takes 2 ms and 4 MB. Raises NotFoundError, CorruptError, UnsupportedError.
    """
    segments = _SegmentColumns(os.path.join(directory, SEGMENTS_FILE), key)
    try:
        spans = _SpanColumns(os.path.join(directory, SPANS_FILE), key)
    except NotFoundError:
        return LayerTable(segments, None)
    return LayerTable(segments, spans)


class _Columns:
    """A file: a header, columns of u64, and raw bytes behind them."""

    def __init__(self, path: str, magic: bytes, key: DomainKey | None) -> None:
        if sys.byteorder == "big":
            raise UnsupportedError("tables of layers need a little-endian host")
        self.path = path
        self._data = load_content(path, key)
        self.header = _parse_header(self._data[: _HEADER.size], magic, path)
        self._at = _HEADER.size

    def column(self, count: int) -> memoryview:
        """The next column."""
        return memoryview(self.raw(count * 8)[:]).cast("Q")

    def raw(self, size: int) -> Content:
        """The next `size` bytes."""
        if size > len(self._data) - self._at:
            raise CorruptError(f"the file of a layer ends early: {self.path}")
        self._at += size
        return self._data.part(self._at - size, self._at)

    def finish(self) -> None:
        """Check that nothing is left."""
        if self._at != len(self._data):
            raise CorruptError(f"the file of a layer is too long: {self.path}")


class _SegmentColumns(_Columns):
    def __init__(self, path: str, key: DomainKey | None) -> None:
        super().__init__(path, _SEGMENTS_MAGIC, key)
        rows, extents, *_ = self.header.counts
        self.address, self.length, self.stream, self.order = (self.column(rows) for _ in range(4))
        self.start, self.size = self.column(extents), self.column(extents)
        self.finish()

    def row(self, number: int) -> Row:
        return self.address[number], self.length[number], self.stream[number]


class _SpanColumns(_Columns):
    def __init__(self, path: str, key: DomainKey | None) -> None:
        super().__init__(path, _SPANS_MAGIC, key)
        spans, windows, *_ = self.header.counts
        self.offset, self.length, self.start, self.size, self.skip, self.bits = (self.column(spans) for _ in _COLUMNS)
        self.window_ends = self.column(spans + 1)
        self.digests = memoryview(self.raw(spans * _DIGEST)[:])
        self.windows = self.raw(windows)
        self.finish()
        try:
            self.codec, self.covers = Codec(self.header.kind >> 8), Covers(self.header.kind & 0xFF)
        except ValueError as error:
            raise CorruptError(f"the spans of a layer are of an unknown kind: {path}") from error

    def span(self, number: int) -> Span:
        return Span(
            self.offset[number],
            self.length[number],
            self.start[number],
            self.size[number],
            self.skip[number],
            bytes(self.digests[number * _DIGEST : (number + 1) * _DIGEST]),
            self.bits[number],
            bytes(self.windows[self.window_ends[number] : self.window_ends[number + 1]]),
        )


class LayerTable:
    """A layer's segments and spans. Numbers of spans count from 0, by rising stream offset."""

    def __init__(self, segments: _SegmentColumns, spans: _SpanColumns | None) -> None:
        self._segments = segments
        self._spans = spans

    @property
    def has_spans(self) -> bool:
        """Whether absent content can be fetched by ranges."""
        return self._spans is not None

    @property
    def codec(self) -> Codec:
        """Of the spans."""
        return self._known_spans().codec

    @property
    def covers(self) -> Covers:
        """What the spans' digests are digests of."""
        return self._known_spans().covers

    def segments(self, address: int, size: int) -> list[Row]:
        """The segments that overlap [address, address + size), whole, by address."""
        columns = self._segments
        first = bisect_right(columns.address, address) - 1
        if first < 0 or columns.address[first] + columns.length[first] <= address:
            first += 1
        end = bisect_left(columns.address, address + size)
        return [columns.row(number) for number in range(first, end)]

    def segments_in_stream(self, start: int, end: int) -> list[Row]:
        """The segments with bytes in the stream's [start, end), whole, by stream offset.

        Where the stream's bytes are used twice, of those that begin before `start` only the last is found.
        """
        columns = self._segments
        first = bisect_right(columns.order, start, key=columns.stream.__getitem__) - 1
        last = bisect_left(columns.order, end, key=columns.stream.__getitem__)
        rows = [columns.row(number) for number in columns.order[max(first, 0) : last]]
        return [row for row in rows if row[2] + row[1] > start]

    def ranges(self) -> list[tuple[int, int]]:
        """All addresses of the layer's files, (address, size) in whole blocks: for eviction and `local_bytes`."""
        return list(zip(self._segments.start, self._segments.size, strict=True))

    def ranges_in(self, address: int, size: int) -> list[tuple[int, int]]:
        """What of [address, address + size) belongs to files of the layer: (address, size), by address."""
        columns = self._segments
        end = address + size
        first = max(bisect_right(columns.start, address) - 1, 0)
        found = []
        for number in range(first, bisect_left(columns.start, end)):
            low = max(address, columns.start[number])
            high = min(end, columns.start[number] + columns.size[number])
            if low < high:
                found.append((low, high - low))
        return found

    def spans(self, start: int, end: int) -> range:
        """The numbers of the spans with bytes in the stream's [start, end)."""
        columns = self._known_spans()
        first = bisect_right(columns.start, start) - 1
        if first < 0 or columns.start[first] + columns.size[first] <= start:
            first += 1
        return range(first, max(first, bisect_left(columns.start, end)))

    def span(self, number: int) -> Span:
        """One span; its window still compressed."""
        return self._known_spans().span(number)

    def group(self, number: int) -> range:
        """The spans that come out of one decompression with this one: those that begin at the same byte of the blob."""
        offset = self._known_spans().offset
        return range(bisect_left(offset, offset[number]), bisect_right(offset, offset[number]))

    def compressed_range(self, group: range) -> tuple[int, int]:
        """Where the blob has what a group is decompressed from: (offset, length)."""
        columns = self._known_spans()
        return columns.offset[group.start], max(columns.length[group.start : group.stop])

    def stream_range(self, group: range) -> tuple[int, int]:
        """What of the stream neighbouring spans give: (start, end)."""
        columns, last = self._known_spans(), group.stop - 1
        return columns.start[group.start], columns.start[last] + columns.size[last]

    def __len__(self) -> int:
        """How many spans there are."""
        return 0 if self._spans is None else len(self._spans.offset)

    def _known_spans(self) -> _SpanColumns:
        if self._spans is None:
            raise NotFoundError(f"the layer has no spans yet: {os.path.dirname(self._segments.path)}")
        return self._spans
