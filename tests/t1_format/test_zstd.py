from __future__ import annotations

import contextlib
import hashlib
import itertools
import random
import tracemalloc
from typing import TYPE_CHECKING

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from nsfs.errors import CorruptError, NsfsError, UnsupportedError
from nsfs.format.zstd import WINDOW_MAX, Frame, FrameScanner, FrameWalker, ZstdInflater, inflate_frames

if TYPE_CHECKING:
    from nsfs.model.layer import Span

RANDOM = random.Random(9)
TEXT = b"".join(b"line %d of something that compresses\n" % n for n in range(12_000))
NOISE = RANDOM.randbytes(1500)


def frame(data: bytes, *, checksum: bool = False, content_size: bool = True, level: int = 3) -> bytes:
    compressor = zstandard.ZstdCompressor(level, write_checksum=checksum, write_content_size=content_size)
    if content_size:
        return compressor.compress(data)
    stream = compressor.compressobj()
    return stream.compress(data) + stream.flush()


def skippable(data: bytes, number: int = 0) -> bytes:
    return bytes([0x50 + number]) + b"\x2a\x4d\x18" + len(data).to_bytes(4, "little") + data


def rle_frame(blocks: int, window: int = 0x38) -> bytes:
    block = (128 << 13 | 2).to_bytes(3, "little") + b"\0"
    last = (128 << 13 | 3).to_bytes(3, "little") + b"\0"
    return b"\x28\xb5\x2f\xfd\x00" + bytes([window]) + block * (blocks - 1) + last


def pieces(blob: bytes, step: int | None) -> list[bytes]:
    step = step or len(blob) or 1
    return [blob[at : at + step] for at in range(0, len(blob), step)]


def inflate(blob: bytes, step: int | None = None) -> bytes:
    inflater = ZstdInflater()
    stream = b"".join(itertools.chain.from_iterable(map(inflater.feed, pieces(blob, step))))
    inflater.finish()
    assert (inflater.consumed, inflater.produced) == (len(blob), len(stream))
    return stream


def scan(blob: bytes, spacing: int, step: int | None = None) -> list[Span]:
    scanner = FrameScanner(spacing)
    return [*itertools.chain.from_iterable(map(scanner.feed, pieces(blob, step))), *scanner.finish()]


PARTS = [
    (frame(TEXT), TEXT),
    (skippable(b"seek table"), b""),
    (frame(NOISE, checksum=True), NOISE),
    (frame(b""), b""),
    (frame(b"", content_size=False, checksum=True), b""),
    (skippable(b"", 15), b""),
    (frame(NOISE, content_size=False), NOISE),
    (frame(bytes(300_000), checksum=True), bytes(300_000)),
    (frame(b"x" * 300), b"x" * 300),
]
BLOB = b"".join(compressed for compressed, _ in PARTS)
STREAM = b"".join(plain for _, plain in PARTS)


@pytest.mark.parametrize("step", [None, 1, 2, 3, 7, 64, 1000])
def test_frames_are_one_stream(step: int | None) -> None:
    assert inflate(BLOB, step) == STREAM


@pytest.mark.parametrize("step", [None, 1, 5])
def test_frames_are_walked_without_decompressing(step: int | None) -> None:
    walker = FrameWalker()
    ends = itertools.chain.from_iterable(map(walker.feed, pieces(BLOB, step)))
    frames = [end.frame for end in ends if end.frame]
    walker.finish()
    offsets = itertools.accumulate((len(compressed) for compressed, _ in PARTS), initial=0)
    kinds = [compressed[0] != 0x28 for compressed, _ in PARTS]
    assert frames == [Frame(at, len(part), kind) for at, (part, _), kind in zip(offsets, PARTS, kinds, strict=False)]


def test_cut_off_at_every_offset() -> None:
    blob = b"".join(compressed for compressed, _ in PARTS[1:])
    whole = set(itertools.accumulate(len(compressed) for compressed, _ in PARTS[1:]))
    for end in range(len(blob)):
        if end not in whole:
            with pytest.raises(CorruptError, match=r"ends inside|is empty"):
                inflate(blob[:end])


@pytest.mark.parametrize(
    "garbage", [b"x", b"\0", b"\0" * 512, b"\x28\xb5\x2f\xfe", b"\x1f\x8b\x08\0", b"\x27\xb5\x2f\xfd", b"\x28"]
)
@pytest.mark.parametrize("step", [None, 1])
def test_garbage_behind_the_last_frame_is_refused(garbage: bytes, step: int | None) -> None:
    with pytest.raises(CorruptError):
        inflate(frame(NOISE) + garbage, step)


def test_flipped_bits_never_end_in_anything_but_an_error_of_ours() -> None:
    blob = frame(b"abc" * 40, checksum=True)
    for bit in range(8 * len(blob)):
        damaged = bytearray(blob)
        damaged[bit // 8] ^= 1 << bit % 8
        with contextlib.suppress(NsfsError):
            assert inflate(bytes(damaged) + frame(b"")) == b"abc" * 40  # unused bits, and a larger window


def test_a_bomb_costs_no_memory() -> None:
    longest = total = 0
    inflater = ZstdInflater()
    tracemalloc.start()
    for piece in inflater.feed(rle_frame(4000)):
        longest, total = max(longest, len(piece)), total + len(piece)
    assert total == 4000 * 131_072
    assert longest <= 1 << 20
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_a_window_over_the_limit_is_refused_and_one_at_it_is_not() -> None:
    assert inflate(rle_frame(1, window=(27 - 10) << 3)) == bytes(131_072)
    for blob in (
        rle_frame(1, window=(27 - 10) << 3 | 1),
        b"\x28\xb5\x2f\xfd\xa0" + (WINDOW_MAX + 1).to_bytes(4, "little"),
    ):
        with pytest.raises(UnsupportedError, match="window over 128 MiB"):
            inflate(blob)
        with pytest.raises(CorruptError):
            inflate_frames(blob, 1)


def test_a_dictionary_is_refused() -> None:
    dictionary = zstandard.train_dictionary(2048, [b"sample %d of a dictionary" % n * 4 for n in range(2000)])
    blob = zstandard.ZstdCompressor(dict_data=dictionary).compress(b"sample 1 of a dictionary")
    with pytest.raises(UnsupportedError, match="dictionary"):
        inflate(blob)


@given(
    st.lists(st.tuples(st.integers(0, 6000), st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=12),
    st.integers(1, 8000),
    st.integers(1, 3000),
)
@settings(max_examples=60)
def test_spans_cover_the_stream(parts: list[tuple[int, bool, bool, bool]], spacing: int, step: int) -> None:
    plain = [b"" if skip else random.Random(size).randbytes(size // 2) * 2 for size, skip, _, _ in parts]
    blob = b"".join(
        skippable(bytes(size)) if skip else frame(data, checksum=checksum, content_size=known)
        for data, (size, skip, checksum, known) in zip(plain, parts, strict=True)
    )
    spans = scan(blob, spacing)
    assert scan(blob, spacing, step) == spans
    assert b"".join(read(blob, span) for span in spans) == b"".join(plain)
    assert [span.start for span in spans] == [0, *itertools.accumulate(span.size for span in spans)][: len(spans)]
    assert all(span.size < spacing + 6000 for span in spans)


def read(blob: bytes, span: Span) -> bytes:
    compressed = blob[span.offset : span.offset + span.length]
    assert hashlib.sha256(compressed).digest() == span.digest
    return inflate_frames(compressed, span.size)


def test_skippable_frames_are_in_no_span() -> None:
    table = skippable(bytes(10_000))
    spans = scan(frame(NOISE) + table + frame(NOISE) + table, 1 << 20)
    assert [span.length for span in spans] == [len(frame(NOISE))] * 2


def test_frames_are_read_as_far_as_asked() -> None:
    blob = frame(TEXT) + frame(NOISE)
    assert inflate_frames(blob[: len(frame(TEXT)) - 20], 1000) == TEXT[:1000]
    assert inflate_frames(blob, len(TEXT) + 7) == TEXT + NOISE[:7]
    assert inflate_frames(blob, 0) == b""
    for end in (0, 3, 9, len(blob) - 1, len(blob)):
        with pytest.raises(CorruptError):
            inflate_frames(blob[:end], len(TEXT) + len(NOISE) + 1)
