"""From fetched bytes to verified stream: decode the spans that share a range, and check every digest.

Owns `decode`, `verify`, both in the right order (`decode_verified`), and the limit of what is decoded in memory. A span
may come from a table that somebody else wrote, so nothing in it is believed: whatever is wrong ends in a CorruptError
that says which span, within the memory that `SPAN_MAX` allows.

Everything is pure and may run in any thread.
"""

from __future__ import annotations

import hashlib
import zlib
from itertools import pairwise
from typing import TYPE_CHECKING

from nsfs.errors import CorruptError, NsfsError
from nsfs.format.gzip import inflate_deflate, inflate_member
from nsfs.format.zstd import inflate_frames
from nsfs.model.layer import Codec, Covers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nsfs.model.layer import Span

SPAN_MAX = 128 << 20
"""Bytes of a span, compressed or not, that are decoded in memory at once; as many as zstd's largest window needs."""
_WINDOW_MAX = 32 << 10


def is_decodable(span: Span) -> bool:
    """Whether the span is small enough to be decoded in memory."""
    return 0 <= span.length <= SPAN_MAX and span.skip >= 0 and span.size >= 0 and span.skip + span.size <= SPAN_MAX


def decode_verified(codec: Codec, covers: Covers, spans: Sequence[Span], compressed: bytes) -> list[bytes]:
    """Return the stream bytes of `spans`, which share the range of `compressed`, all of them verified.

    Raises CorruptError, which names the span.
    """
    if covers is Covers.COMPRESSED:
        for span in spans:
            verify(covers, span, compressed)
        return decode(codec, spans, compressed)
    streams = decode(codec, spans, compressed)
    for span, stream in zip(spans, streams, strict=True):
        verify(covers, span, stream)
    return streams


def verify(covers: Covers, span: Span, data: bytes) -> None:
    """Check the digest of `data`, which is what `covers` says; raises CorruptError."""
    if hashlib.sha256(data).digest() != span.digest:
        what = "compressed" if covers is Covers.COMPRESSED else "decompressed"
        raise _corrupt(span, f"its {what} bytes do not have the digest: sha256:{span.digest.hex()}")


def decode(codec: Codec, spans: Sequence[Span], compressed: bytes) -> list[bytes]:
    """Return the stream bytes of `spans`, which share the range of `compressed`; nothing is verified.

    Decompresses once, as far as needed and no further. Raises CorruptError, which names the span.
    """
    for span in spans:
        if not is_decodable(span):
            raise _corrupt(span, f"it is larger than {SPAN_MAX} bytes, or negative")
        if span.length != len(compressed) or span.offset != spans[0].offset:
            raise _corrupt(span, f"it has another range than what was fetched: {len(compressed)} bytes")
    by_skip = sorted(spans, key=lambda span: span.skip)
    for span, after in pairwise(by_skip):
        if span.skip + span.size > after.skip:
            raise _corrupt(span, f"it overlaps the span at byte {after.start} of the stream")
    if not by_skip:
        return []
    last = by_skip[-1]
    try:
        stream = _decompress(codec, last, compressed)
    except NsfsError as error:
        raise _corrupt(last, error.message) from None
    return [stream[span.skip : span.skip + span.size] for span in spans]


def _decompress(codec: Codec, span: Span, compressed: bytes) -> bytes:
    size = span.skip + span.size
    match codec:
        case Codec.GZIP_MEMBER:
            return inflate_member(compressed, size)
        case Codec.DEFLATE:
            return inflate_deflate(compressed, size, bits=span.bits, window=_window(span.window))
        case Codec.ZSTD:
            return inflate_frames(compressed, size)
        case Codec.NONE:
            if size > len(compressed):
                raise CorruptError(f"it has {len(compressed)} bytes and should give {size}")
            return compressed


def _window(packed: bytes) -> bytes:
    if not packed:
        return b""
    inflate = zlib.decompressobj()
    try:
        window = inflate.decompress(packed, _WINDOW_MAX + 1)
    except zlib.error as error:
        raise CorruptError(f"its window is damaged: {error}") from None
    if not inflate.eof or len(window) > _WINDOW_MAX:
        raise CorruptError(f"its window is cut off or longer than {_WINDOW_MAX} bytes")
    return window


def _corrupt(span: Span, why: str) -> CorruptError:
    where = (
        f"the span at byte {span.start} of the stream, bytes {span.offset} to {span.offset + span.length} of the blob"
    )
    return CorruptError(f"{where}: {why}")
