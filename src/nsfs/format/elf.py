"""What the dynamic linker reads of a program: which libraries an ELF file needs, and by which interpreter it runs.

Owns the little of ELF that says so (System V gABI, chapters 4 and 5), of 64 bits and little endian, as all platforms
are that nsfs runs on. Refuses nothing: whatever is not understood needs no libraries, since who asks only wants to know
what is read next. Pure; input may be anything.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

MAGIC: Final = b"\x7fELF\x02\x01\x01"
"""Of 64 bits, little endian, version 1."""
_HEADER: Final = struct.Struct("<16xHHIQQQIHHH")
_SEGMENT: Final = struct.Struct("<IIQQQQQQ")
_TAG: Final = struct.Struct("<qQ")
_LOAD, _DYNAMIC, _INTERPRETER = 1, 2, 3
_WRITABLE = 2
_NEEDED, _STRINGS = 1, 5
_MOST_SEGMENTS: Final = 64
_MOST_DYNAMIC: Final = 64 << 10
LONGEST_NAME: Final = 256
"""Bytes, with the NUL behind it."""


class Program(NamedTuple):
    """What the head of a file says."""

    interpreter: bytes
    """Its path; empty of a library."""
    dynamic: range
    """Where in the file its dynamic section is; empty where it needs nothing."""
    loaded: tuple[tuple[int, int, int], ...]
    """(address, offset in the file, size) of what is mapped."""
    written: range
    """Where in the file that is which is written to, first of all by who relocates it; empty for nothing."""

    def offset_of(self, address: int) -> int | None:
        """Where in the file what is mapped at `address` is."""
        found = (offset + address - start for start, offset, size in self.loaded if start <= address < start + size)
        return next(found, None)


def parse_program(head: bytes) -> Program | None:
    """The file that begins so; None for any other. What lies beyond `head` is left out."""
    if not head.startswith(MAGIC) or len(head) < _HEADER.size:
        return None
    _, _, _, _, table, _, _, _, entry, count = _HEADER.unpack_from(head)
    if entry != _SEGMENT.size or count > _MOST_SEGMENTS or table + count * entry > len(head):
        return None
    segments = [_SEGMENT.unpack_from(head, table + number * entry) for number in range(count)]
    interpreter, dynamic = b"", range(0)
    for kind, _, offset, _, _, size, _, _ in segments:
        if kind == _INTERPRETER and size <= LONGEST_NAME:
            interpreter = head[offset : offset + size].partition(b"\0")[0]
        elif kind == _DYNAMIC and size <= _MOST_DYNAMIC:
            dynamic = range(offset, offset + size)
    loaded = [each for each in segments if each[0] == _LOAD]
    written = [(each[2], each[2] + each[5]) for each in loaded if each[1] & _WRITABLE and each[5]]
    return Program(
        interpreter,
        dynamic,
        tuple((each[3], each[2], each[5]) for each in loaded),
        range(min(low for low, _ in written), max(high for _, high in written)) if written else range(0),
    )


def parse_needed(program: Program, dynamic: bytes) -> list[int]:
    """Where in the file the names of the libraries are that its dynamic section asks for, in that order."""
    tags = list(_TAG.iter_unpack(dynamic[: len(dynamic) // _TAG.size * _TAG.size]))
    strings = next((program.offset_of(value) for tag, value in tags if tag == _STRINGS), None)
    return [] if strings is None else [strings + value for tag, value in tags if tag == _NEEDED]
