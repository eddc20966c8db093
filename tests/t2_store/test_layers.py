from __future__ import annotations

import itertools
import os
import time
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layouts import BASE, Layout, layouts
from nsfs.errors import CorruptError, NotFoundError, NsfsError, UnsupportedError
from nsfs.model.layer import Codec, Covers, Entry, Kind, LayerIndex, Segment, Span, Spans
from nsfs.store.crypt import DomainKey
from nsfs.store.layers import load_index, open_table, plan_ranges, plan_rows, render_layer, store_layer, store_spans
from nsfs.store.sealed import load_content

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SPANS = Spans(
    Codec.DEFLATE,
    Covers.COMPRESSED,
    [
        Span(10, 100, 0, 1000, 0, b"a" * 32),
        Span(109, 80, 1000, 500, 0, b"b" * 32, 3, b"window"),
        Span(109, 80, 1500, 500, 500, b"c" * 32, 3, b""),
        Span(189, 1, 2000, 7, 0, b"d" * 32, 0, b"w"),
    ],
)
KEYS = pytest.mark.parametrize("key", [None, DomainKey(bytes(range(32)))], ids=["plain", "sealed"])
NO_INDEX = LayerIndex([], 0)
in_one_directory = settings(max_examples=60)


@KEYS
def test_spans_come_back_as_they_were(tmp_path: Path, key: DomainKey | None) -> None:
    store_layer(str(tmp_path), render_layer(NO_INDEX, [], [], []), key)
    assert not open_table(str(tmp_path), key).has_spans
    store_spans(str(tmp_path), SPANS, key)
    table = open_table(str(tmp_path), key)
    assert (table.has_spans, table.codec, table.covers, len(table)) == (True, Codec.DEFLATE, Covers.COMPRESSED, 4)
    assert [table.span(number) for number in range(4)] == SPANS.spans
    assert table.group(1) == table.group(2) == range(1, 3)
    assert table.compressed_range(range(1, 3)) == (109, 80)
    assert table.stream_range(range(1, 4)) == (1000, 2007)
    assert [table.spans(*part) for part in ((0, 1), (999, 1001), (1999, 9999), (2007, 3000))] == [
        range(1),
        range(2),
        range(2, 4),
        range(4, 4),
    ]


def test_without_spans_nothing_can_be_asked_of_them(tmp_path: Path) -> None:
    store_layer(str(tmp_path), render_layer(NO_INDEX, [], [(4096, 1, 0)], [(4096, 1)]))
    table = open_table(str(tmp_path))
    assert len(table) == 0
    with pytest.raises(NotFoundError, match="no spans"):
        table.spans(0, 1)


@KEYS
@in_one_directory
@given(layout=layouts(), data=st.data())
def test_lookups_are_what_a_scan_finds(
    layout: Layout, data: st.DataObject, tmp_path: Path, key: DomainKey | None
) -> None:
    table = layout.table(str(tmp_path), key)
    address = BASE + data.draw(st.integers(-5000, len(layout.disk) + 5000))
    size = data.draw(st.integers(1, 20_000))
    overlapping = [row for row in layout.rows if row[0] < address + size and row[0] + row[1] > address]
    assert table.segments(address, size) == overlapping
    start = data.draw(st.integers(0, len(layout.stream)))
    end = start + data.draw(st.integers(1, 20_000))
    in_stream = [row for row in layout.rows if row[2] < end and row[2] + row[1] > start]
    assert table.segments_in_stream(start, end) == in_stream
    spans = layout.spans.spans
    numbers = [n for n, span in enumerate(spans) if span.start < end and span.start + span.size > start]
    assert list(table.spans(start, end)) == numbers
    inside = sum(
        min(address + size, low + length) - max(address, low) for low, length in table.ranges_in(address, size)
    )
    blocks = [block for low, length in layout.extents for block in range(low // 4096, -(-(low + length) // 4096))]
    overlaps = (min(address + size, (b + 1) * 4096) - max(address, b * 4096) for b in set(blocks))
    assert inside == sum(max(0, overlap) for overlap in overlaps)


rows = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20), st.integers(0, 1000)), max_size=12)


@given(rows)
def test_kept_rows_cover_the_same_and_overlap_no_more(given_rows: list[tuple[int, int, int]]) -> None:
    kept = plan_rows(given_rows)
    assert all(one[0] + one[1] <= other[0] for one, other in itertools.pairwise(kept))
    assert {a for start, length, _ in kept for a in range(start, start + length)} == {
        a for start, length, _ in given_rows for a in range(start, start + length)
    }
    sources = {(start + k, stream + k) for start, length, stream in given_rows for k in range(length)}
    assert {(start + k, stream + k) for start, length, stream in kept for k in range(length)} <= sources


@given(st.lists(st.tuples(st.integers(0, 30).map(lambda n: n * 4096), st.integers(0, 20_000)), max_size=10))
def test_ranges_are_the_blocks_of_the_extents(extents: list[tuple[int, int]]) -> None:
    ranges = plan_ranges(extents)
    blocks = [block for start, size in ranges for block in range(start, start + size, 4096)]
    assert sorted(blocks) == sorted({b for start, size in extents for b in range(start, start + size, 4096)})
    assert all(one[0] + one[1] < other[0] for one, other in itertools.pairwise(ranges))


@KEYS
def test_an_index_comes_back_as_it_was(tmp_path: Path, key: DomainKey | None) -> None:
    entries = [
        Entry(b"d", Kind.DIRECTORY, 0o755, 0, 0, -5),
        Entry(b"d/\xff", Kind.REGULAR, 0o644, 1, 2, 3, size=9, segments=(Segment(0, 512, 9),), digest=b"x" * 32),
        Entry(b"l", Kind.SYMLINK, 0o777, 0, 0, 0, link=b"/d", xattrs=((b"user.a", b"\0"),)),
    ]
    index = LayerIndex(entries, 4096, 77)
    store_layer(
        str(tmp_path), render_layer(index, [0, 1 << 30, 0], [], []), key, {str(tmp_path / "map"): [b"a", b"map"]}
    )
    assert load_index(str(tmp_path), key) == (index, [0, 1 << 30, 0])
    assert load_content(str(tmp_path / "map"), key)[:] == b"amap"
    assert os.stat(tmp_path / "index").st_mode & 0o777 == 0o600
    assert sorted(os.listdir(tmp_path)) == ["index", "map", "segments"], "nothing temporary stays"


def _fill(directory: str) -> None:
    index = LayerIndex([Entry(b"f", Kind.REGULAR, 0o644, 0, 0, 0, size=1)], 512)
    store_layer(directory, render_layer(index, [1 << 30], [(1 << 30, 1, 0)], [(1 << 30, 1)]))
    store_spans(directory, SPANS)


@pytest.mark.parametrize("name", ["index", "segments", "spans"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data + b"\0" * 8,
        lambda data: data[:30],
        lambda _: b"",
        lambda data: b"NSFS" + data[4:],
        lambda data: data[:12] + b"\xff" + data[13:],
        lambda data: data[:16] + b"\xff" * 8 + data[24:],
    ],
)
def test_damage_is_seen_when_a_file_is_opened(name: str, damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    _fill(str(tmp_path))
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(damage(data))
    opener: Any = load_index if name == "index" else open_table
    with pytest.raises(CorruptError):
        opener(str(tmp_path))


@pytest.mark.parametrize("name", ["index", "segments", "spans"])
def test_no_cut_and_no_flipped_byte_ends_in_a_traceback(name: str, tmp_path: Path) -> None:
    _fill(str(tmp_path))
    whole = (tmp_path / name).read_bytes()
    opener: Any = load_index if name == "index" else open_table
    for at in range(len(whole)):
        for data in (whole[:at], whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :]):
            (tmp_path / name).write_bytes(data)
            try:
                opener(str(tmp_path))
            except NsfsError:
                continue
            assert len(data) == len(whole)


def test_a_newer_format_is_refused_by_name(tmp_path: Path) -> None:
    _fill(str(tmp_path))
    data = (tmp_path / "segments").read_bytes()
    (tmp_path / "segments").write_bytes(data[:8] + b"\x09\0\0\0" + data[12:])
    with pytest.raises(UnsupportedError, match="newer format"):
        open_table(str(tmp_path))


def test_an_open_table_outlives_its_replacement(tmp_path: Path) -> None:
    store_layer(str(tmp_path), render_layer(NO_INDEX, [], [(4096, 10, 0)], [(4096, 10)]))
    table = open_table(str(tmp_path))
    store_layer(str(tmp_path), render_layer(NO_INDEX, [], [(8192, 10, 5)], [(8192, 10)]))
    assert table.segments(0, 1 << 20) == [(4096, 10, 0)]
    assert open_table(str(tmp_path)).segments(0, 1 << 20) == [(8192, 10, 5)]


def test_opening_takes_no_time_that_grows_with_the_table(tmp_path: Path) -> None:
    rows = [(n << 12, 4000, n * 4608) for n in range(200_000)]
    extents = [(n << 12, 4000) for n in range(200_000)]
    store_layer(str(tmp_path), render_layer(NO_INDEX, [], rows, extents))
    begun = time.process_time()
    table = open_table(str(tmp_path))
    assert table.segments(150_000 << 12, 1) == [(150_000 << 12, 4000, 150_000 * 4608)]
    assert time.process_time() - begun < 0.02
