"""What inflating from a checkpoint needs of the stream before it: the bytes that are referred to, and zeros for others.

A reference leads back 32 KiB at most (RFC 1951 3.2.5). So only the first 32 KiB of stream behind a checkpoint refer to
what is before it; all that is further on copies what these are made of. They are inflated twice, each time with other
bytes as the window: no byte is the same in both, and no two have the same pair. Where the two streams differ, the pair
says which byte of the window has come there. Of layers made from Debian packages a tenth of a window is kept, which
takes a fifth of the bytes once both are compressed (measured 2026-11).

An `OpenWindow` belongs to one thread; it holds 150 KiB until it has seen enough.
"""

from __future__ import annotations

import re
import zlib
from typing import Final

from isal import igzip_lib

from nsfs.format.gzip import decompress, restart_prefix

WINDOW: Final = 32 << 10
"""Bytes that a reference leads back, at most."""
_FEED: Final = 16 << 10
"""Compressed bytes that are looked at together: few more than are needed."""
_LEVEL: Final = 6
_ONE: Final = bytes(place & 0xFF for place in range(WINDOW))
_OTHER: Final = bytes((place & 0xFF) + 1 + (place >> 8) & 0xFF for place in range(WINDOW))
_DIFFERENT: Final = re.compile(rb"[^\0]+")


class OpenWindow:
    """The stream before a checkpoint, up to 32 KiB of it, while what follows the checkpoint is looked at."""

    def __init__(self, window: bytes, bits: int) -> None:
        """The high `bits` bits (0: all) of the first byte that is fed are behind the checkpoint."""
        self._window = window
        self._bits = bits
        self._pairs: set[tuple[int, int]] = set()
        """Of the bytes of `_ONE` and `_OTHER` at places that are referred to."""
        self._rest = WINDOW if window else 0
        """Bytes of stream that are still to be looked at."""
        self._bodies = tuple(
            igzip_lib.IgzipDecompressor(igzip_lib.DECOMP_DEFLATE, zdict=marks[WINDOW - len(window) :])
            for marks in ((_ONE, _OTHER) if window else ())
        )

    def feed(self, data: memoryview) -> None:
        """Look at the next compressed bytes behind the checkpoint; raises CorruptError."""
        for at in range(0, len(data), _FEED):
            if not self._rest:
                return
            self._look_at(bytes(data[at : at + _FEED]))

    def _look_at(self, data: bytes) -> None:
        if self._bits:
            data, self._bits = restart_prefix(self._bits, data[0]) + data[1:], 0
        one, other = (decompress(body, data, self._rest) for body in self._bodies)
        for run in _DIFFERENT.finditer(_difference(one, other)):
            self._pairs.update(zip(one[slice(*run.span())], other[slice(*run.span())], strict=True))
        self._rest -= len(one)
        if not self._rest or self._bodies[0].eof:
            self._rest, self._bodies = 0, ()

    def render(self) -> bytes:
        """As it is kept, compressed by zlib: from the first byte that is referred to; nothing where none is."""
        places = [(other - one - 1 & 0xFF) << 8 | one for one, other in self._pairs]
        first = min(places, default=WINDOW)
        kept = bytearray(WINDOW - first)
        before = WINDOW - len(self._window)
        for place in places:
            kept[place - first] = self._window[place - before]
        return zlib.compress(kept, _LEVEL) if kept else b""


def _difference(one: bytes, other: bytes) -> bytes:
    """Zeros where both are the same; of equal length."""
    return (int.from_bytes(one, "little") ^ int.from_bytes(other, "little")).to_bytes(len(one), "little")
