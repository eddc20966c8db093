"""A start-up pack: what a start of an image reads, in the order of first use, so that reading it is the start-up.

Owns the bytes of the pack (zstd frames one behind the other, a *piece* each) and of its table (what each piece is of,
where it is, and its sha256). A piece has runs of layers' streams; it is verified before it is decompressed, and belongs
to the layers as the artifact beside it says that they are read. Refuses a table whose pieces do not follow each other,
do not have the bytes of their runs, are too large to be held in memory, or bring anything twice. Pure.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

import zstandard
from msgspec import Struct

from nsfs.errors import CorruptError, NsfsError
from nsfs.format.box import inflate_frame, parse_box, render_box
from nsfs.model.digest import Digest
from nsfs.model.profile import MAX_BYTES, MAX_LAYERS, MAX_RUNS, Run, overlap

if TYPE_CHECKING:
    from collections.abc import Sequence

PIECE: Final = 512 << 10
"""Bytes of runs in one piece, about: more compress better, less are there sooner."""
_MAX_PIECE: Final = 4 << 20
_MAX_TABLE: Final = 64 << 20
_LEVEL: Final = 12
_BEST: Final = 19
"""Level of what is made once and fetched often: 9 % less than at 12 of what redis reads, at 3 MB a second."""
_MOST_BEST: Final = 256 << 20
"""Bytes of runs that are packed so; what is larger takes minutes."""
_MAGIC: Final = b"nsfspack"
_STEP: Final = 4096
"""Runs are cut at multiples of this from their beginning, so that no block of a file lies in two pieces."""


class PackPiece(Struct, frozen=True, gc=False, array_like=True):
    """One frame of the pack."""

    length: int
    """Bytes in the pack; a piece begins where the one before it ends."""
    size: int
    """Of all its runs."""
    digest: bytes
    """Raw sha256 of its bytes in the pack."""
    runs: list[Run]


class PackTable(Struct, frozen=True, array_like=True):
    """What is in a pack."""

    layers: list[str]
    """Digests of the blobs that runs are of, each once."""
    pieces: list[PackPiece]

    @property
    def length(self) -> int:
        """Bytes of the pack."""
        return sum(piece.length for piece in self.pieces)

    @property
    def size(self) -> int:
        """Bytes of all runs."""
        return sum(piece.size for piece in self.pieces)


def render_table(table: PackTable) -> bytes:
    """As it is sent; the same table gives the same bytes."""
    return render_box(_MAGIC, table, _LEVEL)


def parse_table(data: bytes, pack_size: int) -> PackTable:
    """What `render_table` wrote, or anybody, for a pack of that size; raises CorruptError, UnsupportedError."""
    table = parse_box(data, _MAGIC, PackTable, _MAX_TABLE, "the table of a pack")
    _check_layers(table.layers)
    for piece in table.pieces:
        _check_piece(piece, len(table.layers))
    runs = [run for piece in table.pieces for run in piece.runs]
    if len(runs) > MAX_RUNS or table.size > MAX_BYTES or overlap(runs):
        raise CorruptError(f"the runs of a pack overlap, or are too many: {len(runs)} of {table.size} bytes")
    if table.length != pack_size:
        raise CorruptError(f"a pack is not as large as its pieces: {pack_size} bytes instead of {table.length}")
    return table


def _check_layers(layers: Sequence[str]) -> None:
    try:
        named = {Digest(layer) for layer in layers}
    except NsfsError as error:
        raise CorruptError(f"a pack is of no layer: {error}") from None
    if len(named) != len(layers) or len(layers) > MAX_LAYERS:
        raise CorruptError(f"a pack is of too many layers, or of one twice: {len(layers)}")


def _check_piece(piece: PackPiece, layers: int) -> None:
    if not 0 < piece.length <= _MAX_PIECE + (_MAX_PIECE >> 7) or not 0 < piece.size <= _MAX_PIECE:
        raise CorruptError(f"a piece of a pack has a size that cannot be: {piece.length} bytes for {piece.size}")
    if len(piece.digest) != 32 or sum(run.length for run in piece.runs) != piece.size:
        raise CorruptError(f"a piece of a pack does not have the bytes of its runs: {piece.size}")
    if any(not (0 <= run.layer < layers and run.start >= 0 < run.length < 1 << 62) for run in piece.runs):
        raise CorruptError("a piece of a pack is of what cannot be")


def open_piece(piece: PackPiece, packed: bytes) -> list[tuple[Run, bytes]]:
    """The runs of a piece with their bytes, out of its bytes in the pack, verified first; raises CorruptError."""
    if hashlib.sha256(packed).digest() != piece.digest:
        raise CorruptError(f"a piece of a pack does not have the digest: sha256:{piece.digest.hex()}")
    stream = inflate_frame(packed, piece.size, "a piece of a pack")
    at, found = 0, []
    for run in piece.runs:
        found.append((run, stream[at : at + run.length]))
        at += run.length
    return found


class PackWriter:
    """Makes a pack of runs that are added in the order of their first use, of about `size` bytes in all."""

    def __init__(self, layers: Sequence[str], size: int = 0) -> None:
        self._layers = list(layers)
        self._pieces: list[PackPiece] = []
        self._runs: list[Run] = []
        self._held: list[bytes] = []
        self._room = PIECE
        self._compressor = zstandard.ZstdCompressor(level=_BEST if size <= _MOST_BEST else _LEVEL)

    def add(self, run: Run, data: bytes) -> bytes:
        """Take the bytes of a run; gives what of the pack is complete by that."""
        at, made = 0, []
        while at < len(data):
            size = min(len(data) - at, max(_STEP, self._room // _STEP * _STEP))
            self._runs.append(Run(run.layer, run.start + at, size))
            self._held.append(data[at : at + size])
            self._room -= size
            at += size
            if self._room < _STEP:
                made.append(self._close())
        return b"".join(made)

    def finish(self) -> tuple[bytes, PackTable]:
        """The rest of the pack, and its table."""
        rest = self._close() if self._held else b""
        return rest, PackTable(self._layers, self._pieces)

    def _close(self) -> bytes:
        stream = b"".join(self._held)
        packed = self._compressor.compress(stream)
        self._pieces.append(PackPiece(len(packed), len(stream), hashlib.sha256(packed).digest(), self._runs))
        self._runs, self._held, self._room = [], [], PIECE
        return packed
