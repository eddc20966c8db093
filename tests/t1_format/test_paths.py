from __future__ import annotations

import posixpath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsfs.errors import CorruptError
from nsfs.format.paths import are_clean, clean_path


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        (b"", b""),
        (b".", b""),
        (b"./", b""),
        (b"/", b""),
        (b"a", b"a"),
        (b"./a", b"a"),
        (b"/a//b/", b"a/b"),
        (b"a/./b/.", b"a/b"),
        (b"a/../b", b"b"),
        (b"a/..", b""),
        (b".hidden/..x/...", b".hidden/..x/..."),
        (b"caf\xe9/\n", b"caf\xe9/\n"),
        (b"a/" + b"n" * 255, b"a/" + b"n" * 255),
    ],
)
def test_a_name_becomes_a_path_below_the_root(raw: bytes, clean: bytes) -> None:
    assert clean_path(raw) == clean


@pytest.mark.parametrize(
    "raw",
    [
        b"..",
        b"../a",
        b"/../a",
        b"a/../../b",
        b"a\0b",
        b"\0",
        b"n" * 256,
        b"a/" + b"n" * 256,
        b"a/" * 2049,
        b"n" * 65536,
    ],
)
def test_what_leaves_the_root_or_fits_no_filesystem_is_refused(raw: bytes) -> None:
    with pytest.raises(CorruptError):
        clean_path(raw)


@given(st.lists(st.sampled_from([b"a", b"b.c", b".", b"..", b"", b".d", b"..e"]), max_size=8).map(b"/".join))
def test_agrees_with_normpath_and_is_idempotent(raw: bytes) -> None:
    try:
        clean = clean_path(raw)
    except CorruptError:
        assert posixpath.normpath(b"x/" + raw.lstrip(b"/")).partition(b"/")[0] != b"x" or b"../" in raw + b"/"
        return
    assert clean == posixpath.normpath(b"/" + raw.lstrip(b"/")).lstrip(b"/")
    assert clean_path(clean) == clean


_PARTS = st.sampled_from([b"a", b"b.c", b".", b"..", b"", b".d", b"..e", b"\0", b"n" * 255, b"n" * 256])


@given(st.lists(st.lists(_PARTS, max_size=4).map(b"/".join), max_size=4))
def test_many_are_told_to_be_clean_as_each_of_them_is(paths: list[bytes]) -> None:
    def is_clean(path: bytes) -> bool:
        try:
            return clean_path(path) == path
        except CorruptError:
            return False

    try:
        told = are_clean(paths)
    except CorruptError:
        told = False
    assert told == all(map(is_clean, paths))
