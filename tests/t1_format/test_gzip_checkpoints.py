from __future__ import annotations

import contextlib
import gzip
import hashlib
import itertools
import random
import zlib
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsfs.errors import CorruptError
from nsfs.format.checkpoints import LEAST, NEAR, CheckpointScanner, Parts
from nsfs.format.gzip import GzipInflater, inflate_deflate, restart_prefix

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nsfs.model.layer import Span

RANDOM = random.Random(5)
WORDS = [RANDOM.randbytes(RANDOM.randrange(1, 9)) for _ in range(300)]


def prose(size: int, seed: int = 0) -> bytes:
    source = random.Random(seed)
    return b" ".join(source.choice(WORDS) for _ in range(size // 5))[:size]


def scan(blob: bytes, spacing: int, step: int | None = None, wanted: Iterable[tuple[int, int]] = ()) -> list[Span]:
    scanner = CheckpointScanner(spacing, wanted)
    step = step or len(blob) or 1
    pieces = (blob[at : at + step] for at in range(0, len(blob), step))
    return [*itertools.chain.from_iterable(map(scanner.feed, pieces)), *scanner.finish()]


def read(blob: bytes, span: Span) -> bytes:
    compressed = blob[span.offset : span.offset + span.length]
    assert hashlib.sha256(compressed).digest() == span.digest
    window = zlib.decompress(span.window) if span.window else b""
    ours = inflate_deflate(compressed, span.size, bits=span.bits, window=window)
    assert len(ours) == span.size
    stdlib = zlib.decompressobj(-15, zdict=window)
    prefix = restart_prefix(span.bits, compressed[0]) if span.bits else b""
    theirs = stdlib.decompress(prefix + compressed[span.bits > 0 :], span.size)
    assert ours == theirs or (stdlib.eof and ours.startswith(theirs))
    return ours


def check(blob: bytes, stream: bytes, spacing: int) -> list[Span]:
    spans = scan(blob, spacing)
    assert [span.start for span in spans] == list(itertools.accumulate((span.size for span in spans), initial=0))[:-1]
    assert b"".join(read(blob, span) for span in spans) == stream
    return spans


PLAIN = prose(200_000) + RANDOM.randbytes(100_000) + bytes(50_000)


@pytest.mark.parametrize("level", [0, 1, 6, 9])
@pytest.mark.parametrize("strategy", [zlib.Z_DEFAULT_STRATEGY, zlib.Z_FIXED, zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE])
def test_spans_give_back_the_stream(level: int, strategy: int) -> None:
    compress = zlib.compressobj(level, wbits=31, memLevel=1, strategy=strategy)
    blob = compress.compress(PLAIN) + compress.flush()
    assert len(check(blob, PLAIN, 10_000)) >= len(PLAIN) // 65535


def test_every_bit_phase_is_met_and_restarted_at_before_every_type_of_block() -> None:
    blob, stream = b"", b""
    for seed in range(4):
        compress = zlib.compressobj(6, wbits=31, memLevel=1)
        for turn in range(60):
            data = prose(900, turn) if turn % 2 else random.Random(turn * 7 + seed).randbytes(300)
            blob += compress.compress(data) + compress.flush(zlib.Z_SYNC_FLUSH if turn % 8 == 3 else zlib.Z_BLOCK)
            stream += data
        blob += compress.flush()
    spans = check(blob, stream, 1)
    stored = [span for span in spans if _is_stored(blob, span)]
    assert {span.bits for span in spans} == {span.bits for span in stored} == set(range(8))


def _is_stored(blob: bytes, span: Span) -> bool:
    first = int.from_bytes(blob[span.offset : span.offset + 2], "little") >> ((8 - span.bits) % 8)
    return first & 7 == 0


@given(
    st.lists(st.tuples(st.integers(0, 40_000), st.integers(0, 9), st.booleans()), min_size=1, max_size=8),
    st.integers(1, 60_000),
    st.integers(1, 40_000),
)
@settings(max_examples=60)
def test_any_members_in_any_pieces(members: list[tuple[int, int, bool]], spacing: int, step: int) -> None:
    parts = [
        prose(size, size) if compressible else random.Random(size).randbytes(size) for size, _, compressible in members
    ]
    blob = b"".join(gzip.compress(part, level) for part, (_, level, _) in zip(parts, members, strict=True))
    spans = check(blob, b"".join(parts), spacing)
    assert scan(blob, spacing, step) == spans


def test_fed_byte_by_byte_and_with_padding() -> None:
    blob = gzip.compress(prose(3000)) + gzip.compress(b"") + gzip.compress(prose(500)) + bytes(40)
    assert scan(blob, 400, 1) == scan(blob, 400) != []


def test_the_first_span_of_a_member_needs_no_window() -> None:
    blob = gzip.compress(prose(5000)) + gzip.compress(prose(5000))
    spans = check(blob, prose(5000) * 2, 5000)
    assert [(span.start, span.window) for span in spans] == [(0, b""), (5000, b"")]


def test_a_blob_without_stream_has_no_spans() -> None:
    assert scan(gzip.compress(b"") * 3, 1) == []
    assert scan(gzip.compress(b"") * 5000 + gzip.compress(b"x"), 1000, 700)[0].size == 1


def test_a_long_header_between_members_is_in_no_span() -> None:
    data = prose(2000)
    long = (
        gzip.compress(data)[:3]
        + b"\x08"
        + gzip.compress(data)[4:10]
        + b"n" * 100_000
        + b"\0"
        + gzip.compress(data)[10:]
    )
    spans = check(gzip.compress(data) + long, data * 2, 50_000)
    assert max(span.length for span in spans) < 2000
    assert len(check(gzip.compress(data) + long, data * 2, 200_000)) == 1


@pytest.mark.parametrize("step", [None, 1])
def test_what_the_inflater_refuses_the_scanner_refuses(step: int | None) -> None:
    good = gzip.compress(prose(300))
    bad = [
        b"",
        b"\0",
        b"garbage",
        *(good[:end] for end in range(0, len(good), 7)),
        good + b"x",
        good + b"\0x",
        good + good[:5],
    ]
    for blob in bad:
        inflater = GzipInflater()
        with pytest.raises(CorruptError):
            inflater.finish() if list(inflater.feed(blob)) is not None else None
        with pytest.raises(CorruptError):
            scan(blob, 100, step)


def test_damaged_compressed_bytes_give_an_error_or_other_bytes_but_never_more() -> None:
    blob = gzip.compress(prose(4000))
    span = scan(blob, 500)[-1]
    for bit in range(8 * min(span.length, 200)):
        damaged = bytearray(blob[span.offset : span.offset + span.length])
        damaged[bit // 8] ^= 1 << bit % 8
        with contextlib.suppress(CorruptError):
            assert len(inflate_deflate(bytes(damaged), span.size, bits=span.bits)) == span.size


def test_little_else_comes_with_what_is_wanted() -> None:
    stream = random.Random(9).randbytes(4 << 20)
    compress = zlib.compressobj(6, wbits=31)
    blob = b"".join(
        compress.compress(stream[at : at + 20_000]) + compress.flush(zlib.Z_BLOCK)
        for at in range(0, len(stream), 20_000)
    )
    blob += compress.flush()
    wanted = [(3_000_000, 3_000_100), (1_000_000, 1_050_000), (1_040_000, 1_070_000)]
    spans = scan(blob, 1 << 20, wanted=wanted)
    assert b"".join(read(blob, span) for span in spans) == stream
    assert scan(blob, 1 << 20, 1000, wanted) == spans
    with_any = [span for span in spans if Parts(wanted).touch(span.start, span.start + span.size)]
    assert sum(span.size for span in with_any) < 70_000 + 100 + 2 * (NEAR + 40_000)
    assert min(span.size for span in spans[:-1]) >= LEAST
    assert len(spans) < len(scan(blob, 1 << 20)) + 12
    assert scan(blob, 1 << 20, wanted=[(0, 2 * len(stream))]) == scan(blob, 1 << 20)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9)), max_size=9), st.integers(0, 60), st.integers(1, 9))
def test_parts_know_what_they_touch(parts: list[tuple[int, int]], start: int, size: int) -> None:
    found = Parts((low, low + length) for low, length in parts).touch(start, start + size)
    inside = {at for low, length in parts for at in range(low, low + length)}
    assert found == any(at in inside for at in range(start, start + size))
