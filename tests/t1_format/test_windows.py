from __future__ import annotations

import random
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsfs.errors import CorruptError
from nsfs.format.gzip import inflate_deflate
from nsfs.format.windows import WINDOW, OpenWindow

NOISE = random.Random(3).randbytes(3 * WINDOW)


def deflate(window: bytes, data: bytes) -> bytes:
    """Deflate data that refers to `window`."""
    compress = zlib.compressobj(6, wbits=-15, zdict=window) if window else zlib.compressobj(6, wbits=-15)
    return compress.compress(data) + compress.flush()


def kept(window: bytes, compressed: bytes, step: int = 1 << 20) -> bytes:
    """What is kept of `window`."""
    opened = OpenWindow(window, 0)
    for at in range(0, len(compressed), step):
        opened.feed(memoryview(compressed)[at : at + step])
    packed = opened.render()
    return zlib.decompress(packed) if packed else b""


def test_only_what_is_referred_to_is_kept() -> None:
    window = NOISE[:WINDOW]
    data = b"behind " + window[1000:1100] + b" and " + window[-9:] + b"."
    compressed = deflate(window, data)
    sparse = kept(window, compressed)
    assert inflate_deflate(compressed, len(data), window=sparse) == data
    assert len(sparse) == WINDOW - 1000
    assert sparse[:100] == window[1000:1100]
    assert sparse[-9:] == window[-9:]
    assert not any(sparse[100:-9])


@pytest.mark.parametrize("window", [b"", NOISE[:WINDOW]])
def test_nothing_is_kept_where_nothing_is_referred_to(window: bytes) -> None:
    assert kept(window, deflate(b"", NOISE[WINDOW:])) == b""


def test_what_is_copied_from_copies_is_found_in_the_first_of_them() -> None:
    window = NOISE[:WINDOW]
    part = window[5000:6000]
    data = b"".join(part + NOISE[WINDOW + at : WINDOW + at + 20_000] for at in range(0, 60_000, 20_000))
    compressed = deflate(window, data)
    sparse = kept(window, compressed, 100)
    assert inflate_deflate(compressed, len(data), window=sparse) == data
    assert len(sparse) - sparse.count(0) <= len(part)


def test_every_place_of_a_window_can_be_told() -> None:
    window = NOISE[:WINDOW]
    compressed = deflate(window, window)
    sparse = kept(window, compressed)
    assert inflate_deflate(compressed, WINDOW, window=sparse) == window


@given(
    st.integers(0, WINDOW),
    st.lists(st.tuples(st.integers(0, WINDOW), st.integers(0, 3000)), max_size=20),
    st.integers(1, 5000),
)
@settings(max_examples=60, deadline=None)
def test_what_is_kept_is_enough(size: int, parts: list[tuple[int, int]], step: int) -> None:
    window = NOISE[:size]
    data = b"x" + b"".join(NOISE[at : at + length] for at, length in parts)
    compressed = deflate(window, data)
    sparse = kept(window, compressed, step)
    assert len(sparse) <= size
    assert inflate_deflate(compressed, len(data), window=sparse) == data


def test_damage_is_refused() -> None:
    with pytest.raises(CorruptError):
        kept(NOISE[:WINDOW], b"\xff" * 100)
