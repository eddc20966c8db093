from __future__ import annotations

import hashlib
import random
import struct
from typing import Any

import msgspec
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from nsfs.errors import CorruptError, UnsupportedError
from nsfs.format.pack import PIECE, PackPiece, PackTable, PackWriter, open_piece, parse_table, render_table
from nsfs.model.digest import Digest
from nsfs.model.profile import Run

LAYERS = [str(Digest.of(b"one")), str(Digest.of(b"two"))]
RANDOM = random.Random(5)


def make(uses: list[tuple[Run, bytes]]) -> tuple[bytes, PackTable]:
    writer = PackWriter(LAYERS)
    parts = [writer.add(run, data) for run, data in uses]
    rest, table = writer.finish()
    return b"".join([*parts, rest]), table


def unpack(pack: bytes, table: PackTable) -> dict[tuple[int, int], int]:
    """Each byte by layer and place in the stream."""
    at = 0
    found: dict[tuple[int, int], int] = {}
    for piece in table.pieces:
        for run, data in open_piece(piece, pack[at : at + piece.length]):
            found |= {(run.layer, run.start + number): byte for number, byte in enumerate(data)}
        at += piece.length
    assert at == len(pack)
    return found


@given(st.lists(st.tuples(st.integers(0, 1), st.binary(min_size=1, max_size=300)), max_size=30))
def test_a_pack_has_what_was_put_into_it(parts: list[tuple[int, bytes]]) -> None:
    uses = [(Run(layer, 1000 * number, len(data)), data) for number, (layer, data) in enumerate(parts)]
    pack, table = make(uses)
    assert parse_table(render_table(table), len(pack)) == table
    bytes_of = {(run.layer, run.start + at): byte for run, data in uses for at, byte in enumerate(data)}
    assert unpack(pack, table) == bytes_of


def test_pieces_are_of_one_size_and_cut_no_block() -> None:
    big = RANDOM.randbytes(3 * PIECE + 5)
    pack, table = make([(Run(0, 512, 100), b"x" * 100), (Run(1, 8704, len(big)), big)])
    assert len(table.pieces) == 4
    assert all(piece.size <= PIECE for piece in table.pieces)
    assert all((run.start - 8704) % 4096 == 0 for piece in table.pieces for run in piece.runs if run.layer)
    found = unpack(pack, table)
    assert bytes(found[1, 8704 + at] for at in range(len(big))) == big


def test_an_empty_pack_is_one() -> None:
    pack, table = make([])
    assert pack == b""
    assert parse_table(render_table(table), 0) == table


PACK, TABLE = make([(Run(0, 0, 5000), RANDOM.randbytes(5000)), (Run(1, 512, 9), b"nine byte")])
PIECE_ONE = TABLE.pieces[0]


def test_a_table_that_is_cut_off_or_followed_by_garbage_is_refused() -> None:
    rendered = render_table(TABLE)
    for broken in (*(rendered[:end] for end in range(len(rendered))), rendered + b"\0"):
        with pytest.raises(CorruptError):
            parse_table(broken, len(PACK))


def boxed(table: Any) -> bytes:
    packed = msgspec.msgpack.encode(table)
    return struct.pack("<8sIIQ", b"nsfspack", 1, 0, len(packed)) + zstandard.ZstdCompressor().compress(packed)


@pytest.mark.parametrize(
    "table",
    [
        PackTable([*LAYERS, LAYERS[0]], TABLE.pieces),
        PackTable(["sha256:../x", LAYERS[1]], TABLE.pieces),
        PackTable(LAYERS[:1], TABLE.pieces),
        PackTable(LAYERS, [PIECE_ONE, PIECE_ONE]),
        PackTable(LAYERS, []),
        *(
            PackTable(LAYERS, [msgspec.structs.replace(PIECE_ONE, **change)])
            for change in (
                {"length": 0},
                {"length": PIECE_ONE.length + 1},
                {"size": 1 << 40},
                {"size": 0, "runs": []},
                {"digest": b"short"},
                {"runs": [Run(0, 0, PIECE_ONE.size - 1)]},
                {"runs": [Run(2, 0, PIECE_ONE.size)]},
                {"runs": [Run(0, -1, PIECE_ONE.size)]},
                {"runs": [Run(0, 0, PIECE_ONE.size + 5), Run(0, 9000, -5)]},
                {"runs": [Run(0, 0, 5000), Run(0, 4999, 9)]},
            )
        ),
    ],
)
def test_a_table_that_cannot_be_is_refused(table: PackTable) -> None:
    with pytest.raises((CorruptError, UnsupportedError)):
        parse_table(boxed(table), len(PACK))


@given(st.data())
def test_a_piece_that_is_not_what_its_table_says_is_refused(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(PACK) - 1))
    broken = PACK[:at] + bytes([PACK[at] ^ 1 << data.draw(st.integers(0, 7))]) + PACK[at + 1 :]
    with pytest.raises(CorruptError, match="digest"):
        open_piece(PIECE_ONE, broken)


@pytest.mark.parametrize(
    "packed",
    [
        b"no zstd",
        zstandard.ZstdCompressor().compress(bytes(5000)),
        zstandard.ZstdCompressor().compress(bytes(5009)) + b"more",
        zstandard.ZstdCompressor().compress(bytes(64 << 20)),
    ],
)
def test_a_piece_whose_digest_is_right_may_still_be_none(packed: bytes) -> None:
    piece = PackPiece(len(packed), 5009, hashlib.sha256(packed).digest(), PIECE_ONE.runs)
    with pytest.raises(CorruptError):
        open_piece(piece, packed)
