"""The directories and the records of snapshots."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import lmdb
import pytest

from nsfs.errors import CorruptError, NotFoundError
from nsfs.model.snapshot import Change, Kind, Record
from nsfs.store.meta import open_meta
from nsfs.store.snapshots import SnapshotDirs

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def directories(tmp_path: Path) -> SnapshotDirs:
    return SnapshotDirs(str(tmp_path / "snapshots"), str(tmp_path / "l"))


def record(number: int, name: str) -> Record:
    return Record(
        snapshotter="nsfs",
        name=name,
        namespace="ns",
        id=number,
        kind=Kind.ACTIVE,
        parent="",
        labels={"a": "1"},
        created=1,
        updated=2,
    )


def test_a_new_directory_is_empty_and_its_owners(directories: SnapshotDirs) -> None:
    mask = os.umask(0o077)
    try:
        directories.make(7, (5, 6))
    finally:
        os.umask(mask)
    upper, work = directories.upper(7)
    assert os.listdir(upper) == os.listdir(work) == []
    assert os.stat(upper).st_mode & 0o7777 == 0o755
    assert directories.owner(7) == (5, 6)
    with pytest.raises(NotFoundError):
        directories.owner(8)


def test_what_an_interrupted_make_left_is_replaced(directories: SnapshotDirs) -> None:
    directories.make(7, (0, 0))
    with open(f"{directories.upper(7)[0]}/old", "w"):
        pass
    directories.make(7, (0, 0))
    assert os.listdir(directories.upper(7)[0]) == []


def test_a_link_is_short_and_stays_right(tmp_path: Path, directories: SnapshotDirs) -> None:
    directories.make(0xABCDEF, (0, 0))
    path = directories.link(0xABCDEF)
    assert len(os.path.basename(path)) <= 8
    assert os.path.samefile(path, directories.upper(0xABCDEF)[0])
    os.unlink(path)
    os.symlink("/elsewhere", path)
    again = SnapshotDirs(str(tmp_path / "snapshots"), str(tmp_path / "l"))
    assert os.path.samefile(again.link(0xABCDEF), directories.upper(0xABCDEF)[0])


def test_measuring_counts_each_inode_once(directories: SnapshotDirs) -> None:
    directories.make(1, (0, 0))
    top = directories.upper(1)[0]
    os.mkdir(f"{top}/d")
    with open(f"{top}/d/f", "wb") as file:
        file.write(bytes(100_000))
    os.link(f"{top}/d/f", f"{top}/d/same")
    os.symlink("/nowhere", f"{top}/link")
    usage = directories.measure(1)
    assert usage.inodes == 4
    assert 100_000 <= usage.size < 200_000
    assert directories.measure(2).inodes == 0


def test_sweeping_leaves_what_is_kept_or_newer(tmp_path: Path, directories: SnapshotDirs) -> None:
    for number in range(1, 6):
        directories.make(number, (0, 0))
        directories.link(number)
    os.makedirs(f"{directories.upper(2)[0]}/deep/er")
    assert directories.sweep({1, 3}, 5) == 2
    assert sorted(os.listdir(tmp_path / "snapshots")) == ["1", "3", "5"]
    assert sorted(os.listdir(tmp_path / "l")) == ["s1", "s3", "s5"]
    assert directories.sweep({1, 3}, 5) == 0


def test_records_outlive_the_daemon(tmp_path: Path) -> None:
    path = str(tmp_path / "meta")
    with open_meta(path) as meta:
        meta.change_snapshots(Change(put=record(1, "one")))
        meta.change_snapshots(Change(put=record(2, "two" * 500)))
        meta.change_snapshots(Change(gone=record(1, "one"), put=record(1, "renamed")))
        meta.change_snapshots(Change(gone=record(2, "two" * 500)))
    with open_meta(path) as meta:
        assert meta.snapshots() == [record(1, "renamed")]
        assert meta.last_snapshot() == 2


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    path = str(tmp_path / "meta")
    with open_meta(path) as meta:
        assert meta.snapshots() == []
    with lmdb.open(path, max_dbs=4) as env, env.begin(write=True) as txn:
        txn.put(b"\0" * 8, b"\xc1", db=env.open_db(b"snapshots", txn))
    with open_meta(path) as meta, pytest.raises(CorruptError, match="cannot be read"):
        meta.snapshots()
