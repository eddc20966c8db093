"""Tiny ELF files: as much of one as a dynamic linker looks at first."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_BASE = 0x400000
"""Where the file is mapped."""
SIZE = 64 << 10
_STRINGS, _DYNAMIC, _WRITTEN = 8 << 10, 60 << 10, 56 << 10


def render_program(needed: Sequence[bytes], interpreter: bytes = b"", strings: int = _BASE + _STRINGS) -> bytes:
    """A file of SIZE bytes that needs these libraries; what is written to is its last 8 KiB.

    `strings` is where it says that the libraries' names are mapped.
    """
    text, names = bytearray(b"\0"), []
    for name in needed:
        names.append(len(text))
        text += name + b"\0"
    tags = [(1, offset) for offset in names] + [(5, strings), (0, 0)]
    dynamic = b"".join(struct.pack("<qQ", *tag) for tag in tags)
    segments = [
        (1, 4, 0, _BASE, _WRITTEN),
        (1, 6, _WRITTEN, _BASE + _WRITTEN, SIZE - _WRITTEN),
        (2, 6, _DYNAMIC, _BASE + _DYNAMIC, len(dynamic)),
    ]
    if interpreter:
        segments.append((3, 4, 1024, _BASE + 1024, len(interpreter) + 1))
    file = bytearray(SIZE)
    header = struct.pack("<7s9xHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 3, 62, 1, 0, 64, 0, 0, 64, 56, len(segments), 64, 0, 0)
    file[: len(header)] = header
    for number, (kind, flags, offset, address, size) in enumerate(segments):
        entry = struct.pack("<IIQQQQQQ", kind, flags, offset, address, address, size, size, 4096)
        file[64 + 56 * number : 64 + 56 * (number + 1)] = entry
    for offset, data in ((1024, interpreter), (_STRINGS, bytes(text)), (_DYNAMIC, dynamic)):
        file[offset : offset + len(data)] = data
    return bytes(file)
