"""Trees that others write, walked and deleted."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from deep import DEPTH, dig, is_too_deep
from nsfs.store.owners import give_to
from nsfs.store.trees import delete_tree, visit

if TYPE_CHECKING:
    from pathlib import Path


def test_each_is_found_once_and_directories_behind_what_they_hold(tmp_path: Path) -> None:
    for name in ("a/b/c", "a/d", "e"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("a/b/f", "g"):
        (tmp_path / name).write_text(name)
    (tmp_path / "e/link").symlink_to("/")
    found = []
    for each in visit(str(tmp_path)):
        where = os.path.relpath(os.readlink(f"/proc/self/fd/{each.directory}"), tmp_path)
        found.append((os.path.normpath(f"{where}/{each.name}"), each.is_directory))
    names = [name for name, _ in found]
    assert sorted(names) == ["a", "a/b", "a/b/c", "a/b/f", "a/d", "e", "e/link", "g"]
    assert [name for name, is_directory in found if is_directory] == [
        name for name in names if (tmp_path / name).is_dir() and not (tmp_path / name).is_symlink()
    ]
    assert all(names.index(os.path.dirname(name)) > names.index(name) for name in names if "/" in name)


def test_what_is_not_there_or_no_directory_has_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("/")
    for name in ("none", "file", "link"):
        assert list(visit(str(tmp_path / name))) == []


def test_depth_has_no_end(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    dig(top)
    assert is_too_deep(top)
    assert sum(1 for _ in visit(str(top))) == DEPTH + 1
    open_before = len(os.listdir("/proc/self/fd"))
    assert max(len(os.listdir("/proc/self/fd")) for _ in visit(str(top))) <= open_before + 2
    give_to(str(top), 12345)
    assert {each.status.st_uid for each in visit(str(top))} == {12345}
    delete_tree(str(top))
    assert not top.exists()
    delete_tree(str(top))


def test_what_is_replaced_by_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "top/a").mkdir(parents=True)
    (tmp_path / "top/z").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/precious").write_text("x")
    walk = visit(str(tmp_path / "top"))
    assert next(walk).name == "z"
    (tmp_path / "top/a").rmdir()
    (tmp_path / "top/a").symlink_to(tmp_path / "other")
    assert [each.name for each in walk] == ["a"]
    delete_tree(str(tmp_path / "top"))
    assert (tmp_path / "other/precious").read_text() == "x"


def test_what_is_moved_away_is_left(tmp_path: Path) -> None:
    (tmp_path / "top/a/b").mkdir(parents=True)
    (tmp_path / "top/a/b/f").write_text("x")
    walk = visit(str(tmp_path / "top"))
    assert next(walk).name == "f"
    (tmp_path / "top/a/b").rename(tmp_path / "b")
    assert list(walk) == []


def test_another_filesystem_is_not_entered() -> None:
    assert os.stat("/dev/shm").st_dev != os.stat("/dev").st_dev
    walk = visit("/dev")
    assert not any(each.status.st_dev == os.stat("/dev/shm").st_dev for each in walk if each.name != "shm")


def test_what_stays_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "top").mkdir()
    (tmp_path / "top/f").write_text("x")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(OSError, match="not empty"):
        delete_tree(str(tmp_path / "top"))
