"""Profiles on disk: found again by image and owner, under the key, and never a reason to fail."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from nsfs.errors import NoSpaceError
from nsfs.model.digest import Digest
from nsfs.model.profile import TAR, Profile, ProfiledLayer, Run
from nsfs.store.crypt import DomainKey
from nsfs.store.layout import DomainLayout
from nsfs.store.profiles import Profiles

if TYPE_CHECKING:
    from pathlib import Path

LAYER = "sha256:" + "a" * 64
KEYS = pytest.mark.parametrize("key", [None, DomainKey(bytes(range(32)))], ids=["plain", "sealed"])


def image(number: int) -> Digest:
    return Digest(f"sha256:{number:064x}")


def profile(length: int) -> Profile:
    return Profile(layers=[ProfiledLayer(LAYER)], runs=[Run(0, 0, length)])


@KEYS
def test_each_owner_gets_the_one_that_was_put_last(tmp_path: Path, key: DomainKey | None) -> None:
    layout = DomainLayout(str(tmp_path), key)
    for length, owner in ((1, ""), (2, "a"), (3, "a/b"), (4, "")):
        Profiles(layout).put(image(1), owner, profile(length))
    found = [Profiles(layout).get(image(1), owner) for owner in ("", "a", "a/b", "c")]
    assert found == [profile(4), profile(2), profile(3), None]
    assert Profiles(layout).get(image(2), "") is None
    stored = b"".join(path.read_bytes() + path.name.encode() for path in (tmp_path / "profiles").iterdir())
    assert (b"a" * 64 in stored) == (image(1).hex.encode() in stored) == (key is None)


@KEYS
def test_one_that_was_changed_counts_as_none(
    tmp_path: Path, key: DomainKey | None, caplog: pytest.LogCaptureFixture
) -> None:
    layout = DomainLayout(str(tmp_path), key)
    Profiles(layout).put(image(1), "", profile(1))
    with open(layout.profile(image(1), ""), "r+b") as file:
        file.write(b"not")
    assert Profiles(layout).get(image(1), "") is None
    assert "a profile is not used" in caplog.text


def test_the_oldest_goes(tmp_path: Path) -> None:
    layout = DomainLayout(str(tmp_path))
    profiles = Profiles(layout, kept=2)
    for number in range(4):
        profiles.put(image(number), "", profile(1))
        os.utime(layout.profile(image(number), ""), (number, number))
    assert [profiles.get(image(number), "") is not None for number in range(4)] == [False, False, True, True]


def test_what_cannot_be_kept_is_said(tmp_path: Path) -> None:
    (tmp_path / "profiles").write_bytes(b"")
    with pytest.raises(NoSpaceError, match="profiles cannot be kept"):
        Profiles(DomainLayout(str(tmp_path))).put(image(1), "", profile(1))


@KEYS
def test_what_is_read_of_a_layer_is_in_any_of_them(tmp_path: Path, key: DomainKey | None) -> None:
    profiles = Profiles(DomainLayout(str(tmp_path), key))
    assert profiles.runs_of(Digest(LAYER), TAR) == []
    other = "sha256:" + "b" * 64
    both = Profile(
        layers=[ProfiledLayer(other), ProfiledLayer(LAYER)], runs=[Run(1, 5, 6), Run(0, 7, 8), Run(1, 50, 1)]
    )
    profiles.put(image(1), "", both)
    profiles.put(image(2), "a", profile(3))
    assert profiles.runs_of(Digest(LAYER), TAR) == [Run(1, 5, 6), Run(1, 50, 1), Run(0, 0, 3)]
    assert profiles.runs_of(Digest(other), TAR) == [Run(0, 7, 8)]
    assert profiles.runs_of(Digest(LAYER), "estargz-" + "0" * 64) == []
