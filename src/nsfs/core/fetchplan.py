"""Decide what a miss needs: which segments, which spans, which ranges of which blobs, and which blocks come out whole.

Owns the arithmetic between the four address spaces of a layer: addresses of the disk, offsets of the stream, numbers of
spans, offsets of the blob. No IO but the tables' mapped memory, no clock, no concurrency. All functions are safe in any
thread.

Rules: an address belongs to the first of a view's layers that has a file there; what none of its segments covers is
zeros, and what no layer has a file at is zeros, too, but nobody's to store.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple, Protocol

from nsfs.core.ports import BLOCK
from nsfs.errors import CorruptError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from nsfs.model.layer import Codec, Covers, Span
    from nsfs.model.route import RangeLimits

Range = tuple[int, int]
"""(address, size)."""

_NEAR = 64 << 10


class Table(Protocol):
    """A layer's segments and spans."""

    @property
    def has_spans(self) -> bool:
        """Whether absent content can be fetched by ranges."""

    @property
    def codec(self) -> Codec:
        """Of the spans."""

    @property
    def covers(self) -> Covers:
        """What the spans' digests are digests of."""

    def segments(self, address: int, size: int) -> list[tuple[int, int, int]]:
        """(address, length, stream offset) of all that overlap the addresses, whole, by address."""

    def segments_in_stream(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """The same of all that overlap the stream's [start, end), by stream offset."""

    def ranges_in(self, address: int, size: int) -> list[Range]:
        """What of the addresses belongs to files of the layer."""

    def spans(self, start: int, end: int) -> range:
        """Numbers of the spans with bytes in the stream's [start, end)."""

    def span(self, number: int) -> Span:
        """One span."""

    def group(self, number: int) -> range:
        """The spans that come out of one decompression with this one."""

    def compressed_range(self, group: range) -> tuple[int, int]:
        """(offset, length) in the blob of what a group is decompressed from."""

    def stream_range(self, group: range) -> tuple[int, int]:
        """(start, end) in the stream of neighbouring spans."""

    def __len__(self) -> int:
        """How many spans there are."""


class Piece(NamedTuple):
    """`length` bytes at `address` are those of the stream of layer number `layer` (of the view) at `stream`."""

    address: int
    length: int
    stream: int
    layer: int


class Group(NamedTuple):
    """Spans of layer number `layer` that are one decompression, and where the blob has its input."""

    layer: int
    spans: range
    offset: int
    length: int


class ReadPlan(NamedTuple):
    """What absent blocks are made of."""

    runs: list[Range]
    """The absent blocks."""
    covered: list[Range]
    """Those of them that belong to a file, which may be stored."""
    pieces: list[Piece]
    groups: list[Group]


class Batch(NamedTuple):
    """Groups of one layer that one range of its blob brings."""

    groups: tuple[Group, ...]
    offset: int
    length: int


def plan_read(tables: Sequence[Table], runs: list[Range]) -> ReadPlan:
    """What the absent `runs` need of `tables`, asked in their order."""
    covered, pieces = locate(tables, runs)
    return ReadPlan(runs, sorted(covered), pieces, plan_groups(tables, pieces))


def locate(tables: Sequence[Table], runs: list[Range]) -> tuple[list[Range], list[Piece]]:
    """What of `runs` belongs to files of `tables`, asked in their order, and the pieces of streams that these are."""
    covered: list[Range] = []
    pieces: list[Piece] = []
    rest = runs
    for layer, table in enumerate(tables):
        own = [found for run in rest for found in table.ranges_in(*run)]
        pieces += [piece for found in own for piece in _pieces(table, layer, found)]
        covered += own
        rest = subtract(rest, own)
    return covered, pieces


def _pieces(table: Table, layer: int, run: Range) -> list[Piece]:
    low, high = run[0], run[0] + run[1]
    cut = []
    for address, length, stream in table.segments(*run):
        start = max(address, low)
        cut.append(Piece(start, min(address + length, high) - start, stream + start - address, layer))
    return cut


def plan_groups(tables: Sequence[Table], pieces: Iterable[Piece]) -> list[Group]:
    """The groups of spans that have the bytes of `pieces`; of a layer without spans, none."""
    found: dict[tuple[int, int], range] = {}
    for piece in pieces:
        table = tables[piece.layer]
        if table.has_spans:
            for number in table.spans(piece.stream, piece.stream + piece.length):
                group = table.group(number)
                found[piece.layer, group.start] = group
    return [Group(layer, spans, *tables[layer].compressed_range(spans)) for (layer, _), spans in found.items()]


def plan_batches(groups: Iterable[Group], limit: int, slack: int) -> list[Batch]:
    """`groups` of one layer as few ranges: neighbours at most `slack` bytes apart share one of up to `limit` bytes."""
    batches: list[Batch] = []
    for group in sorted(groups, key=lambda group: (group.offset, group.spans.start)):
        end = group.offset + group.length
        if batches:
            last = batches[-1]
            joined = max(end, last.offset + last.length) - last.offset
            if group.offset <= last.offset + last.length + slack and joined <= limit:
                batches[-1] = Batch((*last.groups, group), last.offset, joined)
                continue
        batches.append(Batch((group,), group.offset, group.length))
    return batches


def plan_ranges(groups: Collection[Group], limits: RangeLimits) -> list[Batch]:
    """`groups` of one layer as ranges that suit the route: fewer of them, for more bytes, once some have to wait."""
    batches = plan_batches(groups, limits.size, limits.slack)
    if len(batches) <= limits.at_once:
        return batches
    return plan_batches(groups, limits.size, limits.wide_slack)


class Window:
    """Decoded parts of one stream."""

    def __init__(self, parts: Iterable[tuple[int, bytes]]) -> None:
        """Parts are (stream offset, bytes)."""
        self._parts = sorted((start, memoryview(data)) for start, data in parts)
        self._starts = [start for start, _ in self._parts]

    def bounds(self) -> list[tuple[int, int]]:
        """What it has: (start, end), neighbours joined."""
        joined: list[tuple[int, int]] = []
        for start, data in self._parts:
            if joined and start <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(joined[-1][1], start + len(data)))
            else:
                joined.append((start, start + len(data)))
        return joined

    def copy(self, stream: int, target: memoryview) -> None:
        """Fill `target` with the bytes at `stream`; raises CorruptError if some are not here."""
        done = 0
        while done < len(target):
            number = bisect_right(self._starts, stream + done) - 1
            start, data = self._parts[number] if number >= 0 else (0, memoryview(b""))
            part = data[stream + done - start : stream + len(target) - start]
            if not part:
                raise CorruptError(f"no span has the stream's byte at: {stream + done}")
            target[done : done + len(part)] = part
            done += len(part)


def plan_fill(table: Table, window: Window) -> list[Range]:
    """The runs of blocks all of whose bytes `window` has, by address."""
    bounds = window.bounds()
    candidates = join_blocks(found for low, high in bounds for found in _clipped(table, low, high))
    cut_short = [bad for run in candidates for bad in _lacking(table, run, bounds)]
    return subtract(candidates, cut_short) if cut_short else candidates


def plan_ahead(table: Table, layer: int, stream: range, missing: Callable[[int, int], list[Range]]) -> list[Group]:
    """The groups that bring what is absent of a part of a layer's stream."""
    groups = plan_absent(table, blocks_of(table, [stream]), missing)
    return [group._replace(layer=layer) for group in groups]


def blocks_of(table: Table, parts: Iterable[range]) -> list[Range]:
    """The blocks that have bytes of these parts of a layer's stream, by address."""
    return join_blocks(found for part in parts for found in _clipped(table, part.start, part.stop))


def plan_absent(table: Table, blocks: Iterable[Range], missing: Callable[[int, int], list[Range]]) -> list[Group]:
    """The groups that bring what is absent of a layer's blocks."""
    pieces = [piece for known in blocks for run in missing(*known) for piece in _pieces(table, 0, run)]
    return plan_groups([table], pieces)


def stream_pieces(table: Table, part: range) -> list[Range]:
    """Where the bytes of a part of the stream are on the disk, in their order; raises CorruptError for no file's."""
    found = _clipped(table, part.start, part.stop)
    if sum(size for _, size in found) != len(part):
        raise CorruptError(f"a part of the stream is in no file: {len(part)} bytes at {part.start}")
    return found


def address_of(table: Table, stream: int) -> int:
    """Where a byte of the stream, or else the next that belongs to a file, is on the disk; -1 if that is far."""
    return next((found[0] for found in _clipped(table, stream, stream + _NEAR)), -1)


def _clipped(table: Table, low: int, high: int) -> list[Range]:
    """The addresses of the stream's [low, high), by stream offset."""
    found = []
    for address, length, stream in table.segments_in_stream(low, high):
        start, end = max(stream, low), min(stream + length, high)
        if start < end:
            found.append((address + start - stream, end - start))
    return found


def _lacking(table: Table, run: Range, bounds: list[tuple[int, int]]) -> list[Range]:
    """The blocks of `run` with a byte outside of the stream's `bounds`."""
    lacking = []
    for piece in _pieces(table, 0, run):
        if not any(low <= piece.stream and piece.stream + piece.length <= high for low, high in bounds):
            inside = [(low - piece.stream + piece.address, high - low) for low, high in bounds]
            lacking += subtract([(piece.address, piece.length)], inside)
    return join_blocks(lacking)


def join_blocks(ranges: Iterable[Range]) -> list[Range]:
    """`ranges` grown to whole blocks, by address, overlapping and neighbouring ones joined."""
    joined: list[Range] = []
    for address, size in sorted(ranges):
        start = address // BLOCK * BLOCK
        end = -(-(address + size) // BLOCK) * BLOCK
        if joined and start <= sum(joined[-1]):
            joined[-1] = (joined[-1][0], max(end, sum(joined[-1])) - joined[-1][0])
        else:
            joined.append((start, end - start))
    return joined


def intersect(ranges: list[Range], others: Iterable[Range]) -> list[Range]:
    """What of `ranges` is in one of `others`, by address."""
    return subtract(ranges, subtract(ranges, others))


def subtract(ranges: Iterable[Range], taken: Iterable[Range]) -> list[Range]:
    """What of `ranges` is in none of `taken`, by address."""
    rest: list[Range] = []
    sorted_taken = sorted(taken)
    first = 0
    for address, size in sorted(ranges):
        end = address + size
        while first < len(sorted_taken) and sum(sorted_taken[first]) <= address:
            first += 1
        for low, length in sorted_taken[first:]:
            if low >= end:
                break
            if low > address:
                rest.append((address, low - address))
            address = max(address, low + length)  # noqa: PLW2901  what is left of this range
        if address < end:
            rest.append((address, end - address))
    return rest


def render_blocks(run: Range, pieces: Iterable[Piece], windows: Sequence[Window]) -> bytearray:
    """The bytes of `run` out of `pieces`, zeros where there are none; raises CorruptError if a window lacks some."""
    low, high = run[0], run[0] + run[1]
    out = bytearray(run[1])
    view = memoryview(out)
    for piece in pieces:
        start, end = max(piece.address, low), min(piece.address + piece.length, high)
        if start < end:
            windows[piece.layer].copy(piece.stream + start - piece.address, view[start - low : end - low])
    return out


def render_run(run: Range, table: Table, window: Window) -> bytearray:
    """The bytes of `run` of one layer, all of which `window` has."""
    return render_blocks(run, _pieces(table, 0, run), [window])
