from __future__ import annotations

import contextlib
import gzip
import random
import struct
import tracemalloc
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsfs.errors import CorruptError
from nsfs.format.gzip import (
    HEADER_MAX,
    PIECE,
    GzipInflater,
    header_size,
    inflate_deflate,
    inflate_member,
    restart_prefix,
)

TEXT = b"".join(b"line %d of something that compresses\n" % n for n in range(400))
NOISE = random.Random(7).randbytes(700)


def header(
    *, extra: bytes | None = None, name: bytes | None = None, comment: bytes | None = None, crc: bool = False
) -> bytes:
    flags = 4 * (extra is not None) + 8 * (name is not None) + 16 * (comment is not None) + 2 * crc
    head = b"\x1f\x8b\x08" + bytes([flags]) + b"\x01\x02\x03\x04\0\xff"
    head += struct.pack("<H", len(extra)) + extra if extra is not None else b""
    head += name + b"\0" if name is not None else b""
    head += comment + b"\0" if comment is not None else b""
    return head + (struct.pack("<H", zlib.crc32(head) & 0xFFFF) if crc else b"")


def member(data: bytes, head: bytes | None = None, level: int = 6) -> bytes:
    compress = zlib.compressobj(level, wbits=-15)
    body = compress.compress(data) + compress.flush()
    return (header() if head is None else head) + body + struct.pack("<II", zlib.crc32(data), len(data))


def inflate(blob: bytes, step: int | None = None) -> bytes:
    inflater = GzipInflater()
    step = step or len(blob) or 1
    stream = b"".join(piece for at in range(0, len(blob), step) for piece in inflater.feed(blob[at : at + step]))
    inflater.finish()
    assert (inflater.consumed, inflater.produced) == (len(blob), len(stream))
    return stream


HEADERS = [
    header(),
    header(extra=b"SG\x01\0x"),
    header(name=b"layer.tar"),
    header(comment=b"made by hand"),
    header(extra=b"", name=b"", comment=b"", crc=True),
    header(extra=b"e" * 300, crc=True),
]
MEMBERS = b"".join(member(data, head) for data in (TEXT, b"", NOISE) for head in HEADERS)
STREAM = b"".join(data * len(HEADERS) for data in (TEXT, b"", NOISE))


@pytest.mark.parametrize("step", [None, 1, 2, 3, 7, 64, 1000])
@pytest.mark.parametrize("padding", [b"", b"\0", b"\0" * 600])
def test_concatenated_members_are_one_stream(step: int | None, padding: bytes) -> None:
    assert inflate(MEMBERS + padding, step) == STREAM


@pytest.mark.parametrize("head", HEADERS)
def test_cut_off_at_every_offset(head: bytes) -> None:
    blob = member(b"first") + member(NOISE, head)
    for end in range(len(blob)):
        if end != len(member(b"first")):
            with pytest.raises(CorruptError, match=r"the blob (ends inside|is empty)"):
                inflate(blob[:end])


@pytest.mark.parametrize(
    "garbage", [b"x", b"\x1f", b"\x1f\x8b", b"\x1f\x8c", b"PK\3\4", b"\0x", b"\0" * 20 + b"\x1f\x8b\x08"]
)
@pytest.mark.parametrize("step", [None, 1])
def test_garbage_behind_the_last_member_is_refused(garbage: bytes, step: int | None) -> None:
    with pytest.raises(CorruptError):
        inflate(member(TEXT) + garbage, step)


def test_every_flipped_bit_is_found_or_harmless() -> None:
    blob = member(NOISE, header(extra=b"abc", crc=True))
    for bit in range(8 * len(blob)):
        damaged = bytearray(blob)
        damaged[bit // 8] ^= 1 << bit % 8
        with contextlib.suppress(CorruptError):
            assert inflate(bytes(damaged)) == NOISE  # the bits that fill the last byte of deflate data


def test_wrong_crc_and_wrong_length_say_where() -> None:
    for at in (-1, -5):
        damaged = bytearray(member(TEXT))
        damaged[at] ^= 1
        with pytest.raises(CorruptError, match=f"gzip member at byte {len(member(b'x'))}, before byte"):
            inflate(member(b"x") + bytes(damaged))


def test_an_endless_header_is_refused() -> None:
    with pytest.raises(CorruptError, match="longer than"):
        inflate(header(name=b"n")[:-1] + b"n" * HEADER_MAX, 65536)


def test_a_bomb_costs_no_memory() -> None:
    inflater, longest, total = GzipInflater(), 0, 0
    blob = gzip.compress(bytes(256 << 20), 9)
    tracemalloc.start()
    for piece in inflater.feed(blob):
        longest, total = max(longest, len(piece)), total + len(piece)
    assert total == 256 << 20
    assert longest <= PIECE
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_many_tiny_members_in_one_piece() -> None:
    assert inflate(member(b"x") * 20_000) == b"x" * 20_000


def test_header_size_of_every_beginning() -> None:
    for head in HEADERS:
        assert [header_size(head[:end]) for end in range(len(head))] == [None] * len(head)
        assert header_size(head + b"data") == len(head)


def test_a_member_is_read_as_far_as_asked() -> None:
    blob = member(TEXT, HEADERS[4])
    assert inflate_member(blob[: len(blob) // 2], 500) == TEXT[:500]
    assert inflate_member(blob + member(NOISE), len(TEXT) + 10) == TEXT + NOISE[:10]
    assert inflate_member(blob, 0) == b""
    for end in (0, 5, 12, len(blob) // 2, len(blob)):
        with pytest.raises(CorruptError):
            inflate_member(blob[:end], len(TEXT) + 1)


@given(st.integers(1, 7), st.text(alphabet="abcdef\n", max_size=300))
@settings(max_examples=100)
def test_a_prefix_restarts_at_every_bit(bits: int, text: str) -> None:
    compress = zlib.compressobj(6, wbits=-15, strategy=zlib.Z_FIXED)  # no stored blocks, so that it can be shifted
    body = compress.compress(text.encode()) + compress.flush()
    shifted = (int.from_bytes(body, "little") << (8 - bits)).to_bytes(len(body) + 1, "little")
    assert zlib.decompress(restart_prefix(bits, shifted[0]) + shifted[1:], wbits=-15) == text.encode()
    assert inflate_deflate(shifted, len(text), bits=bits) == text.encode()


@pytest.mark.parametrize(("bits", "window"), [(8, b""), (-1, b""), (0, b"w" * 32769)])
def test_an_impossible_checkpoint_is_refused(bits: int, window: bytes) -> None:
    with pytest.raises(CorruptError, match="no checkpoint"):
        inflate_deflate(b"\x03\0", 1, bits=bits, window=window)
