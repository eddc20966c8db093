from __future__ import annotations

import contextlib
import gzip
import hashlib
import itertools
import random
import tracemalloc
import zlib
from typing import TYPE_CHECKING

import msgspec
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from nsfs.errors import CorruptError
from nsfs.format.checkpoints import CheckpointScanner
from nsfs.format.spans import (
    SPAN_MAX,
    decode,
    decode_verified,
    is_decodable,
    verify,
)
from nsfs.format.zstd import FrameScanner
from nsfs.model.layer import Codec, Covers, Span

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

RANDOM = random.Random(3)
STREAM = b"".join(b"%d;" % RANDOM.randrange(300) for _ in range(40_000)) + RANDOM.randbytes(20_000) + bytes(30_000)


def gzip_blob() -> bytes:
    return gzip.compress(STREAM[:50_000], 6) + gzip.compress(b"") + gzip.compress(STREAM[50_000:], 1) + bytes(100)


def zstd_blob() -> bytes:
    compress = zstandard.ZstdCompressor().compress
    return b"".join(compress(STREAM[at : at + 3000]) for at in range(0, len(STREAM), 3000))


def scan(scanner: CheckpointScanner | FrameScanner, blob: bytes) -> list[Span]:
    pieces = (blob[at : at + 5000] for at in range(0, len(blob), 5000))
    return [*itertools.chain.from_iterable(map(scanner.feed, pieces)), *scanner.finish()]


def cut(blob: bytes, size: int) -> list[Span]:
    parts = [(at, blob[at : at + size]) for at in range(0, len(blob), size)]
    return [Span(at, len(part), at, len(part), 0, hashlib.sha256(part).digest()) for at, part in parts]


LAYERS: list[tuple[Codec, bytes, list[Span]]] = [
    (Codec.DEFLATE, gzip_blob(), scan(CheckpointScanner(7000), gzip_blob())),
    (Codec.ZSTD, zstd_blob(), scan(FrameScanner(7000), zstd_blob())),
    (Codec.NONE, STREAM, cut(STREAM, 7000)),
]


def read(codec: Codec, blob: bytes, spans: Sequence[Span], start: int, size: int) -> bytes:
    """What a reader does: decode the spans of a piece of stream and put them together."""
    wanted = [span for span in spans if span.start < start + size and start < span.start + span.size]
    pieces = []
    for span in wanted:
        compressed = blob[span.offset : span.offset + span.length]
        pieces += decode_verified(codec, Covers.COMPRESSED, [span], compressed)
    begin = start - wanted[0].start if wanted else 0
    return b"".join(pieces)[begin : begin + size]


@pytest.mark.parametrize(("codec", "blob", "spans"), LAYERS, ids=["deflate", "zstd", "none"])
@given(data=st.data())
@settings(max_examples=60)
def test_any_read_equals_a_slice_of_the_original(
    codec: Codec, blob: bytes, spans: list[Span], data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, len(STREAM)))
    size = data.draw(st.integers(0, min(60_000, len(STREAM) - start)))
    assert read(codec, blob, spans, start, size) == STREAM[start : start + size]


@pytest.mark.parametrize(("codec", "blob", "spans"), LAYERS, ids=["deflate", "zstd", "none"])
def test_every_damaged_byte_is_found_before_it_is_decoded(codec: Codec, blob: bytes, spans: list[Span]) -> None:
    span = spans[1]
    for at in range(0, span.length, 97):
        damaged = bytearray(blob[span.offset : span.offset + span.length])
        damaged[at] ^= 0x10
        with pytest.raises(CorruptError, match=f"the span at byte {span.start} of the stream, bytes {span.offset} to"):
            decode_verified(codec, Covers.COMPRESSED, [span], bytes(damaged))


@pytest.mark.parametrize(("codec", "blob", "spans"), LAYERS, ids=["deflate", "zstd", "none"])
def test_cut_off_at_every_offset_is_an_error(codec: Codec, blob: bytes, spans: list[Span]) -> None:
    span = spans[2]
    compressed = blob[span.offset : span.offset + span.length]
    for end in range(0, span.length - 16, 13):
        with pytest.raises(CorruptError, match=r"cut off|should give"):
            decode(codec, [msgspec.structs.replace(span, length=end)], compressed[:end])
        with pytest.raises(CorruptError, match="another range"):
            decode(codec, [span], compressed[:end])


PAYLOAD = b"first" + b"\0" * 507 + b"second" + b"\0" * 506 + b"third"
MEMBER = gzip.compress(PAYLOAD)


def inner(skip: int, size: int, start: int = 0, length: int = len(MEMBER)) -> Span:
    return Span(0, length, start, size, skip, hashlib.sha256(PAYLOAD[skip : skip + size]).digest())


def test_spans_of_one_member_are_one_decompression() -> None:
    spans = [inner(512, 6, 5), inner(0, 5), inner(1024, 5, 11), inner(1029, 0, 16)]
    assert decode_verified(Codec.GZIP_MEMBER, Covers.STREAM, spans, MEMBER) == [b"second", b"first", b"third", b""]
    assert decode(Codec.GZIP_MEMBER, [], MEMBER) == []
    wrong = msgspec.structs.replace(spans[0], digest=bytes(32))
    with pytest.raises(CorruptError, match=r"byte 5 of the stream.*decompressed bytes"):
        decode_verified(Codec.GZIP_MEMBER, Covers.STREAM, [spans[1], wrong], MEMBER)


def test_the_end_of_a_member_need_not_be_there() -> None:
    head = zlib.compressobj(wbits=31)
    data = head.compress(PAYLOAD) + head.flush(zlib.Z_SYNC_FLUSH)
    assert decode(Codec.GZIP_MEMBER, [inner(512, 6, length=len(data))], data) == [b"second"]


HOSTILE: dict[str, list[Span]] = {
    "larger than allowed": [inner(0, SPAN_MAX + 1)],
    "skips more than allowed": [inner(SPAN_MAX, 1)],
    "negative size": [inner(0, -1)],
    "negative skip": [inner(-1, 1)],
    "more than there is": [inner(0, len(PAYLOAD) + 1)],
    "overlap": [inner(0, 512), inner(0, 512)],
    "two ranges": [inner(0, 1), msgspec.structs.replace(inner(1, 1), offset=1)],
}


@pytest.mark.parametrize("spans", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("codec", Codec)
def test_hostile_spans_are_refused(codec: Codec, spans: list[Span]) -> None:
    with pytest.raises(CorruptError, match="the span at byte"):
        decode(codec, spans, MEMBER)


@pytest.mark.parametrize("bits", [-1, 8, 255])
def test_hostile_bits_are_refused(bits: int) -> None:
    with pytest.raises(CorruptError, match="the span at byte"):
        decode(Codec.DEFLATE, [Span(0, 4, 0, 9, 0, b"", bits)], b"abcd")


@pytest.mark.parametrize(
    "window", [b"x", zlib.compress(bytes(32_769)), zlib.compress(bytes(200 << 20)), zlib.compress(b"x")[:-1]]
)
def test_hostile_windows_are_refused_cheaply(window: bytes) -> None:
    tracemalloc.start()
    with pytest.raises(CorruptError, match="window"):
        decode(Codec.DEFLATE, [Span(0, 4, 0, 9, 0, b"", 0, window)], b"abcd")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@given(
    st.sampled_from(Codec), st.binary(max_size=80), st.integers(0, 7), st.binary(max_size=40), st.integers(0, 1 << 20)
)
def test_any_bytes_decode_or_are_refused(codec: Codec, compressed: bytes, bits: int, window: bytes, size: int) -> None:
    span = Span(0, len(compressed), 0, size, 0, b"", bits, zlib.compress(window))
    with contextlib.suppress(CorruptError):
        assert [len(piece) for piece in decode(codec, [span], compressed)] == [size]


@pytest.mark.parametrize(
    "bomb", [(Codec.GZIP_MEMBER, gzip.compress), (Codec.ZSTD, zstandard.compress)], ids=["gzip", "zstd"]
)
def test_no_more_is_decompressed_than_asked(bomb: tuple[Codec, Callable[[bytes], bytes]]) -> None:
    codec, compress = bomb
    compressed = compress(bytes(100 << 20))
    tracemalloc.start()
    assert decode(codec, [Span(0, len(compressed), 0, 10, 1000, b"")], compressed) == [bytes(10)]
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_span_says_whether_it_can_be_decoded() -> None:
    assert is_decodable(Span(0, SPAN_MAX, 0, SPAN_MAX - 1, 1, b""))
    for wrong in (Span(0, SPAN_MAX + 1, 0, 1, 0, b""), Span(0, 1, 0, SPAN_MAX, 1, b""), Span(0, 1, 0, -1, 1, b"")):
        assert not is_decodable(wrong)


def test_verify_says_what_it_covers() -> None:
    verify(Covers.STREAM, inner(0, 5), b"first")
    with pytest.raises(CorruptError, match="its compressed bytes do not have the digest: sha256:"):
        verify(Covers.COMPRESSED, inner(0, 5), b"forst")
