"""Sparse maps of tar: which pieces of a file an archive stores.

Owns the tables of the old GNU format and of PAX sparse formats 0.1 and 1.0 (GNU tar manual, "Storing Sparse Files";
format 0.0 is turned into 0.1 by `format.pax`). Refuses maps that overlap, go back, pass the file's end or do not
account for every stored byte, as Go's archive/tar does. Pure; every function raises ValueError for what is malformed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias

from nsfs.format.pax import Records, parse_decimal
from nsfs.model.layer import Segment

if TYPE_CHECKING:
    from collections.abc import Callable

SparseMap: TypeAlias = list[tuple[int, int]]
"""Offset in the file and length of each stored piece."""

_OLD_ENTRY: Final = 24
_MAX_DIGITS: Final = 19


def parse_old_gnu(table: bytes, number: Callable[[bytes], int]) -> SparseMap:
    """The entries of one table of the old GNU format, up to its first unused one."""
    entries = []
    for pos in range(0, len(table), _OLD_ENTRY):
        if table[pos] == 0:
            break
        entries.append((number(table[pos : pos + 12]), number(table[pos + 12 : pos + 24])))
    return entries


def parse_map_0x1(records: Records) -> SparseMap:
    """The map of formats 0.0 and 0.1, which is in the extended header."""
    text = records.get(b"GNU.sparse.map", b"")
    numbers = [parse_decimal(part) for part in text.split(b",")] if text else []
    if len(numbers) != 2 * parse_decimal(records.get(b"GNU.sparse.numblocks", b"")):
        raise ValueError(text[:40])
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def count_1x0_lines(start: bytes | bytearray) -> int:
    """How many lines a map of format 1.0 has, seen from its first block."""
    end = start.find(b"\n", 0, _MAX_DIGITS + 1)
    if end < 0:
        raise ValueError(bytes(start[:40]))
    count = parse_decimal(bytes(start[:end]))
    if count < 0:
        raise ValueError(count)
    return 1 + 2 * count


def parse_map_1x0(text: bytes | bytearray) -> SparseMap:
    """The map of format 1.0, which precedes the stored bytes, in whole blocks."""
    lines = bytes(text).split(b"\n", count_1x0_lines(text))
    numbers = [parse_decimal(line) for line in lines[1:-1]]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def plan_segments(entries: SparseMap, size: int, stored: int, offset: int) -> tuple[Segment, ...]:
    """Where in the stream the pieces of a file are, whose `stored` bytes begin at `offset`; empty ones are left out."""
    segments = []
    at = 0
    end = 0
    for start, length in entries:
        if length < 0 or start < end or start + length > size:
            raise ValueError(start)
        end = start + length
        if length:
            segments.append(Segment(start, offset + at, length))
        at += length
    if at != stored:
        raise ValueError(stored)
    return tuple(segments)
