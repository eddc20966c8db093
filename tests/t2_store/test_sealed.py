"""Files, spools and records under a key: what goes in comes out, any part of it, and shows nothing on disk."""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsfs.errors import CorruptError, NotFoundError, UnsupportedError
from nsfs.store.crypt import DomainKey
from nsfs.store.sealed import HEADER_SIZE, SealedRecords, load_content, store_files
from nsfs.store.spool import PIECE, Spool

if TYPE_CHECKING:
    from pathlib import Path

KEY = DomainKey(bytes(range(32)))
OTHER = DomainKey(bytes(32))
TEXT = b"a canary of forty-two bytes sings in here." * 500
KEYS = pytest.mark.parametrize("key", [None, KEY], ids=["plain", "sealed"])
in_one_directory = settings(max_examples=40)
cuts = st.lists(st.integers(0, len(TEXT)), max_size=8).map(sorted)


def pieces(at: list[int]) -> list[bytes]:
    ends = [0, *at, len(TEXT)]
    return [TEXT[start:end] for start, end in itertools.pairwise(ends)]


def stored(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


@KEYS
@in_one_directory
@given(at=cuts, start=st.integers(0, len(TEXT)), size=st.integers(0, len(TEXT)), inner=st.integers(0, 100))
def test_any_part_of_a_file(
    tmp_path: Path, key: DomainKey | None, at: list[int], start: int, size: int, inner: int
) -> None:
    path = str(tmp_path / "file")
    store_files({path: pieces(at)}, key)
    content = load_content(path, key)
    assert len(content) == len(TEXT)
    assert content[start : start + size] == TEXT[start : start + size]
    assert content[:] == TEXT
    part = content.part(min(start, len(TEXT)), len(TEXT))
    assert part[inner : inner + size] == TEXT[start:][inner : inner + size]


def test_a_sealed_file_shows_nothing_and_never_the_same(tmp_path: Path) -> None:
    path = str(tmp_path / "file")
    seen = set()
    for _ in range(2):
        store_files({path: [TEXT]}, KEY)
        data = stored(path)
        assert len(data) == HEADER_SIZE + len(TEXT)
        assert TEXT[:16] not in data
        seen.add(data[HEADER_SIZE:])
    assert len(seen) == 2
    assert load_content(path, OTHER)[:] != TEXT


def test_a_file_that_is_not_under_the_key_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "file")
    for data in (b"", b"short", TEXT):
        store_files({path: [data]}, None)
        with pytest.raises(CorruptError, match="not under the key"):
            load_content(path, KEY)
    store_files({path: [TEXT]}, KEY)
    with open(path, "r+b") as file:
        file.seek(8)
        file.write(b"\2")
    with pytest.raises(UnsupportedError, match="newer format"):
        load_content(path, KEY)
    with pytest.raises(NotFoundError):
        load_content(str(tmp_path / "none"), KEY)


@KEYS
@in_one_directory
@given(at=cuts)
def test_a_spool_grows_over_interruptions(tmp_path: Path, key: DomainKey | None, at: list[int]) -> None:
    spool = Spool(str(tmp_path / "blob.partial"), key)
    spool.remove()
    for piece in pieces(at):
        had = spool.size()
        with spool.appending(len(TEXT)) as append:
            append(piece)
        assert spool.size() == had + len(piece)
    assert b"".join(spool.pieces()) == TEXT
    assert (TEXT[:42] in stored(spool.path)) == (key is None)


@KEYS
def test_a_spool_is_cut_gone_or_too_short_to_be_one(tmp_path: Path, key: DomainKey | None) -> None:
    spool = Spool(str(tmp_path / "deep" / "blob.partial"), key)
    assert spool.size() == 0
    with pytest.raises(NotFoundError):
        next(spool.pieces())
    with spool.appending(1 << 30) as append:
        append(TEXT)
    with spool.appending(100) as append:
        assert spool.size() == 100
        append(TEXT[100:])
    assert b"".join(spool.pieces()) == TEXT
    if key is not None:
        os.truncate(spool.path, HEADER_SIZE - 1)
        assert spool.size() == 0
        with pytest.raises(CorruptError):
            next(spool.pieces())
    with spool.appending(0) as append:
        append(TEXT)
    assert b"".join(spool.pieces()) == TEXT


def test_a_long_spool_comes_in_pieces(tmp_path: Path) -> None:
    data = os.urandom(2 * PIECE + 12345)
    spool = Spool(str(tmp_path / "blob.partial"), KEY)
    with spool.appending(len(data)) as append:
        append(data)
    assert [len(piece) for piece in spool.pieces()] == [PIECE, PIECE, 12345]
    assert b"".join(spool.pieces()) == data


def test_records_are_bound_to_their_names_and_salts() -> None:
    records, others = SealedRecords(KEY, b"s" * 16), SealedRecords(KEY, b"t" * 16)
    kept = records.name(b"name")
    assert kept != others.name(b"name")
    assert len({records.seal(kept, TEXT) for _ in range(3)}) == 3
    assert records.unseal(kept, records.seal(kept, TEXT)) == TEXT
    for unseal, name, value in (
        (records.unseal, records.name(b"other"), records.seal(kept, TEXT)),
        (others.unseal, kept, records.seal(kept, TEXT)),
        (records.unseal, kept, records.seal(kept, TEXT)[:-1]),
        (records.unseal, kept, b""),
    ):
        with pytest.raises(CorruptError):
            unseal(name, value)


@given(values=st.lists(st.binary(min_size=16, max_size=16), max_size=50))
def test_fixed_values_are_hidden_each_alone(values: list[bytes]) -> None:
    records = SealedRecords(KEY, b"s" * 16)
    hidden = records.hide(b"".join(values))
    assert hidden == b"".join(records.hide(value) for value in values)
    assert records.show(hidden) == b"".join(values)
