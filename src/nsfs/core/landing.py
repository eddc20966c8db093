"""What a thread does with fetched bytes: decompress, verify, store.

Owns the order of these: nothing is stored that was not verified, and nothing is handed on either. Refuses a span that
is not what its digest says, and says so for that group of spans alone. Concurrency: any thread; the pool and the tables
are safe there, and nothing else is touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from nsfs.core.fetchplan import (
    Batch,
    Group,
    Range,
    ReadPlan,
    Table,
    Window,
    intersect,
    join_blocks,
    plan_fill,
    render_blocks,
    render_run,
    subtract,
)
from nsfs.errors import CorruptError, NoSpaceError, NsfsError
from nsfs.format import spans as codecs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_WRITE = 1 << 20
"""Bytes stored by one call, so that a buffer of a flight's size is never copied whole."""

Decoded = dict[int, tuple[int, bytes]]
"""The spans of a group by number: stream offset and bytes."""


class Pool(Protocol):
    """Where bytes are kept; all calls are quick enough for an event loop, except those that write."""

    def missing(self, address: int, size: int) -> list[Range]:
        """The absent runs of blocks."""

    def read_present(self, address: int, size: int) -> bytes | memoryview | None:
        """The bytes, if all of them are there."""

    def begin_reading(self, extents: Iterable[Range]) -> None:
        """Have the disk begin to read what is about to be asked for."""

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Store whole blocks; raises NsfsError."""

    def write_zeros(self, address: int, size: int) -> None:
        """Store a hole."""

    def evict(self, address: int, size: int) -> int:
        """Drop blocks."""


class Landing(NamedTuple):
    """What came out of a fetched range, by first span of each group."""

    decoded: dict[int, Decoded]
    failed: dict[int, NsfsError]
    refused: NsfsError | None = None
    """Why the pool could not take all of it."""

    def amended(self, again: Landing) -> Landing:
        """This with the outcome of fetching one group again."""
        failed = {first: error for first, error in self.failed.items() if first not in again.decoded}
        return Landing(self.decoded | again.decoded, failed | again.failed, self.refused or again.refused)


@dataclass(eq=False, slots=True)
class Supply:
    """All that a miss needs, in memory."""

    plan: ReadPlan
    windows: list[Window]
    """By number of the layer in the view."""
    refused: NsfsError | None = None
    """Why the pool could not take it."""


def take_apart(pool: Pool, table: Table, batch: Batch, data: bytes, beside: list[tuple[int, bytes]]) -> Landing:
    """Decompress and verify each group of a fetched range, and store every block that is complete by it.

    `beside` are verified parts of the stream around it, (stream offset, bytes).
    """
    decoded: dict[int, Decoded] = {}
    failed: dict[int, NsfsError] = {}
    for group in batch.groups:
        start = group.offset - batch.offset
        compressed = data if group.length == batch.length else data[start : start + group.length]
        try:
            decoded[group.spans.start] = _decode(table, group, compressed)
        except CorruptError as error:
            failed[group.spans.start] = error
    window = Window([*beside, *(part for spans in decoded.values() for part in spans.values())])
    return Landing(decoded, failed, store_window(pool, table, window))


def _decode(table: Table, group: Group, compressed: bytes) -> Decoded:
    spans = [(number, table.span(number)) for number in group.spans]
    decoded: Decoded = {}
    for length in {span.length for _, span in spans}:
        alike = [(number, span) for number, span in spans if span.length == length]
        streams = codecs.decode_verified(table.codec, table.covers, [span for _, span in alike], compressed[:length])
        decoded |= {number: (span.start, data) for (number, span), data in zip(alike, streams, strict=True)}
    return decoded


def store_window(pool: Pool, table: Table, window: Window) -> NsfsError | None:
    """Store the absent ones of all blocks that `window` has whole; returns why the pool could not take them."""
    try:
        for whole in plan_fill(table, window):
            for run in _pieces_of(pool.missing(*whole)):
                pool.write(run[0], render_run(run, table, window))
    except (NoSpaceError, CorruptError) as error:
        return error
    return None


def store_supply(pool: Pool, supply: Supply) -> NsfsError | None:
    """Store what no flight could complete: blocks that straddle, and holes. Returns why the pool could not take it."""
    written = join_blocks((piece.address, piece.length) for piece in supply.plan.pieces)
    absent = [run for covered in supply.plan.covered for run in pool.missing(*covered)]
    try:
        for run in _pieces_of(intersect(absent, written)):
            pool.write(run[0], render_blocks(run, supply.plan.pieces, supply.windows))
        for hole in subtract(absent, written):
            pool.write_zeros(*hole)
    except (NoSpaceError, CorruptError) as error:
        return error
    return None


def _pieces_of(runs: Iterable[Range]) -> Iterator[Range]:
    for address, size in runs:
        for start in range(address, address + size, _WRITE):
            yield start, min(_WRITE, address + size - start)
