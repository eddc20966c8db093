"""How a value of ours travels: a header that says what it is and how large, and msgpack in one zstd frame behind it.

Owns these bytes; what is in the value is its format's business. Refuses, as it may come from anybody, what is of
another kind or version, larger than its kind may be, cut off, or followed by more. Nothing is decompressed before its
size is known, so memory is bounded by `limit`. Pure.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec
import zstandard

from nsfs.errors import CorruptError, UnsupportedError

if TYPE_CHECKING:
    from msgspec import Struct

VERSION: Final = 1
_HEADER: Final = struct.Struct("<8sIIQ")
"""Magic, version, zeros, bytes of msgpack."""

T = TypeVar("T", bound="Struct")


def render_box(magic: bytes, value: Struct, level: int) -> bytes:
    """Pack `value`, compressed at `level`; the same value gives the same bytes."""
    packed = msgspec.msgpack.encode(value)
    return _HEADER.pack(magic, VERSION, 0, len(packed)) + zstandard.ZstdCompressor(level=level).compress(packed)


def parse_box(data: bytes, magic: bytes, kind: type[T], limit: int, what: str) -> T:
    """What `render_box` packed, if that is `kind` and at most `limit` bytes of msgpack; `what` names it in errors.

    Raises CorruptError, and UnsupportedError for a newer version.
    """
    if len(data) < _HEADER.size or not data.startswith(magic):
        raise CorruptError(f"not {what}")
    _, version, zeros, size = _HEADER.unpack_from(data)
    if version != VERSION:
        raise UnsupportedError(f"{what} has another format: {version}", hint=f"this nsfs reads format {VERSION}")
    if zeros or size > limit:
        raise CorruptError(f"{what} is larger than allowed: {size} bytes, at most {limit}")
    packed = inflate_frame(memoryview(data)[_HEADER.size :], size, what)
    try:
        return msgspec.msgpack.decode(packed, type=kind)
    except (msgspec.DecodeError, RecursionError, OverflowError) as error:
        raise CorruptError(f"{what} cannot be read: {error}") from None


def inflate_frame(frame: bytes | memoryview, size: int, what: str) -> bytes:
    """The `size` bytes that one zstd frame, and nothing behind it, is of; raises CorruptError."""
    try:
        if zstandard.frame_content_size(frame) != size:
            raise CorruptError(f"{what} is not as large as it says: {size} bytes")
        stream = zstandard.ZstdDecompressor().decompress(frame, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptError(f"{what} cannot be decompressed: {error}") from None
    if len(stream) != size:
        raise CorruptError(f"{what} is not as large as it says: {len(stream)} of {size} bytes")
    return stream
