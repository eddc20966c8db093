"""PAX extended headers: records in, typed values out (POSIX.1-2017, pax, "pax Extended Header").

Owns the grammar of records, decimal numbers and times, and the two ways to write extended attributes. Refuses what Go's
archive/tar refuses. Pure; time and memory are linear in the header, whose size the caller limits.
"""

from __future__ import annotations

import base64
import binascii
from typing import Final, TypeAlias
from urllib.parse import unquote_to_bytes

from nsfs.errors import CorruptError

Records: TypeAlias = dict[bytes, bytes]

XATTR_NAME_MAX: Final = 255
XATTR_SIZE_MAX: Final = 65536
"""Bytes of an extended attribute's name and value (Linux, limits.h)."""

_SCHILY: Final = b"SCHILY.xattr."
_LIBARCHIVE: Final = b"LIBARCHIVE.xattr."
_TEXT: Final = frozenset((b"path", b"linkpath", b"uname", b"gname", b"GNU.sparse.name"))
_SPARSE_PAIR: Final = (b"GNU.sparse.offset", b"GNU.sparse.numbytes")


def parse_pax(body: bytes) -> Records:
    """The records of one extended header, the last of each keyword; raises CorruptError.

    The repeated keywords of GNU sparse format 0.0 come back as the `GNU.sparse.map` of format 0.1.
    """
    records: Records = {}
    sparse: list[bytes] = []
    pos = 0
    while pos < len(body):
        key, value, pos = _parse_record(body, pos)
        if key in _SPARSE_PAIR:
            if key != _SPARSE_PAIR[len(sparse) % 2] or b"," in value:
                raise CorruptError(f"a PAX header is malformed: at record {key!r}")
            sparse.append(value)
        else:
            records[key] = value
    if sparse:
        records[b"GNU.sparse.map"] = b",".join(sparse)
    return records


def _parse_record(body: bytes, pos: int) -> tuple[bytes, bytes, int]:
    blank = body.find(b" ", pos, pos + 9)
    digits = body[pos:blank]
    if blank < 0 or not digits.isdigit():
        raise CorruptError(f"a PAX header is malformed: at {body[pos : pos + 40]!r}")
    end = pos + int(digits)
    key, equals, value = body[blank + 1 : end - 1].partition(b"=")
    if end > len(body) or end <= blank + 1 or body[end - 1] != 0x0A or not (key and equals):
        raise CorruptError(f"a PAX header is malformed: at {body[pos : pos + 40]!r}")
    if b"\0" in (value if key in _TEXT else key):
        raise CorruptError(f"a PAX header contains a NUL byte: in record {key[:40]!r}")
    return key, value, end


def parse_decimal(text: bytes) -> int:
    """A decimal number of at most 63 bits with its sign; raises ValueError."""
    digits = text[1:] if text[:1] in (b"-", b"+") else text
    if not digits.isdigit() or len(digits.lstrip(b"0")) > 19:
        raise ValueError(text)
    number = int(text)
    if not -1 << 63 <= number < 1 << 63:
        raise ValueError(text)
    return number


def parse_time(text: bytes) -> int:
    """Nanoseconds of a time in decimal seconds, cut off after the ninth decimal; raises ValueError."""
    seconds, _, decimals = text.partition(b".")
    if decimals and not decimals.isdigit():
        raise ValueError(text)
    nanoseconds = int(decimals[:9].ljust(9, b"0"))
    return parse_decimal(seconds) * 10**9 + (-nanoseconds if text[:1] == b"-" else nanoseconds)


def parse_xattrs(records: Records) -> tuple[tuple[bytes, bytes], ...]:
    """Extended attributes by name, sorted; raises ValueError for what is none, CorruptError for what is too large.

    `SCHILY.xattr.` records are raw and win over `LIBARCHIVE.xattr.` ones, whose names are percent-encoded and whose
    values are in base64 without padding.
    """
    found: dict[bytes, bytes] = {}
    for key, value in records.items():
        if key.startswith(_SCHILY):
            found[key[len(_SCHILY) :]] = value
        elif key.startswith(_LIBARCHIVE):
            found.setdefault(unquote_to_bytes(key[len(_LIBARCHIVE) :]), _parse_base64(value))
    for name, value in found.items():
        if not 0 < len(name) <= XATTR_NAME_MAX or b"\0" in name or len(value) > XATTR_SIZE_MAX:
            raise CorruptError(f"an extended attribute is impossible: {name[:60]!r} of {len(value)} bytes")
    return tuple(sorted(found.items()))


def _parse_base64(text: bytes) -> bytes:
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError(text[:40]) from error
