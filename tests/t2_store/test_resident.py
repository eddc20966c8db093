"""What others map stays in memory, as far as may be."""

from __future__ import annotations

import errno
import logging
import mmap
import os
from pathlib import Path

import pytest

from nsfs.store import resident
from nsfs.store.index import open_index
from nsfs.store.resident import Resident

SIZE = 16 * mmap.PAGESIZE


@pytest.fixture
def before() -> int:
    return locked()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(SIZE))
    return path


def locked() -> int:
    """Bytes that this process has locked (proc_pid_status(5), VmLck)."""
    (line,) = (each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith("VmLck:"))
    return int(line.split()[1]) << 10


def test_a_file_is_locked_and_what_it_grows_by(file: Path, before: int) -> None:
    kept = Resident([str(file)])
    kept.follow()
    assert locked() - before == SIZE
    with file.open("ab") as opened:
        opened.write(bytes(SIZE))
    for _ in range(2):
        kept.follow()
        assert locked() - before == 2 * SIZE
    kept.close()
    assert locked() == before


def test_a_file_is_let_go_of_when_nobody_needs_it(tmp_path: Path, file: Path, before: int) -> None:
    kept = Resident([])
    for _ in range(2):
        kept.add(str(file))
    kept.add(str(tmp_path / "gone"))
    kept.follow()
    kept.drop(str(file))
    kept.follow()
    assert locked() - before == SIZE
    kept.drop(str(file))
    kept.follow()
    assert locked() == before
    kept.close()


def test_no_more_is_locked_than_is_good_for_the_host(file: Path, before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "MOST", 4 * mmap.PAGESIZE)
    kept = Resident([str(file)])
    kept.follow()
    assert locked() - before == 4 * mmap.PAGESIZE
    kept.close()


def test_what_may_not_be_locked_is_said_once(
    file: Path, before: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    caplog.set_level(logging.INFO)
    monkeypatch.setattr(mmap, "mmap", refuse)
    kept = Resident([str(file), f"{file}.gone"])
    for _ in range(2):
        kept.follow()
    kept.close()
    assert locked() == before
    assert [each.getMessage() for each in caplog.records] == [
        f"what is mapped may have to be read again: {file}: Resource temporarily unavailable"
    ]


def test_the_locks_by_which_lmdb_knows_who_has_an_environment_open_stay(tmp_path: Path) -> None:
    """They are of a process, and end when it closes any descriptor of the lock file."""
    path = str(tmp_path / "index.lmdb")
    with open_index(path):
        inode = f":{os.stat(f'{path}-lock').st_ino} "
        held = [line.split()[4:] for line in Path("/proc/locks").read_text().splitlines() if inode in line]
        kept = Resident([path])
        kept.follow()
        kept.close()
        assert held
        assert [line.split()[4:] for line in Path("/proc/locks").read_text().splitlines() if inode in line] == held
