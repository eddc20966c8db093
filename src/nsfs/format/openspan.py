"""A span under construction: a scanner knows where it begins, and learns piece by piece where it ends.

Owns the running digest of its compressed bytes, and shows them to its window. Pure but for its own state; belongs to
the scanner that made it. Invariant: pieces come in the blob's order, and each is digested to its end before the next
comes, so the digest is never more than one piece behind.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NamedTuple

from nsfs.model.layer import Span

if TYPE_CHECKING:
    from nsfs.format.windows import OpenWindow


class Piece(NamedTuple):
    """`data` is the blob's at `offset`."""

    data: memoryview
    offset: int

    @property
    def end(self) -> int:
        """Where in the blob the next piece begins."""
        return self.offset + len(self.data)

    def cut(self, start: int, end: int) -> memoryview:
        """Return the bytes between two offsets of the blob, which lie in this piece."""
        assert self.offset <= start <= end <= self.end
        return self.data[start - self.offset : end - self.offset]


class OpenSpan:
    """A span that begins at `offset` of the blob and `start` of the stream."""

    __slots__ = ("_digest", "_end", "_hash", "_hashed", "_stream_end", "_window", "bits", "offset", "start")

    def __init__(self, offset: int, start: int, *, bits: int = 0, window: OpenWindow | None = None) -> None:
        self.offset = self._hashed = self._end = offset
        self.start = self._stream_end = start
        self.bits = bits
        self._window = window
        self._hash = hashlib.sha256()
        self._digest = b""

    def digest_to(self, piece: Piece, end: int) -> None:
        """Digest what `piece` has up to `end` of the blob."""
        data = piece.cut(self._hashed, end)
        self._hash.update(data)
        if self._window is not None:
            self._window.feed(data)
        self._hashed = end

    def settle(self, piece: Piece, end: int, stream_end: int) -> None:
        """Note that the span may end here, unless it gave nothing since this was last noted."""
        if stream_end > self._stream_end:
            self.digest_to(piece, end)
            self._end, self._stream_end, self._digest = end, stream_end, self._hash.digest()

    def close(self) -> list[Span]:
        """Return the span as it was last settled; nothing if it never gave a byte."""
        size = self._stream_end - self.start
        if not size:
            return []
        window = self._window.render() if self._window else b""
        return [Span(self.offset, self._end - self.offset, self.start, size, 0, self._digest, self.bits, window)]
