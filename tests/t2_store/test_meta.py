"""The daemon's database: it outlives its process, and says what is wrong with it."""

from pathlib import Path

import lmdb
import msgspec
import pytest

from mount_records import mount_record
from nsfs.errors import CorruptError, NoSpaceError, UnsupportedError
from nsfs.model.mounts import MountRecord
from nsfs.model.report import Cost
from nsfs.store import meta
from nsfs.store.meta import FORMAT, open_meta
from panicking import PanickingEnvironment


def record(number: int) -> MountRecord:
    return mount_record(id=f"{number:x}", target=f"/mnt/{number}")


def write(path: Path, database: bytes, key: bytes, value: bytes) -> None:
    with lmdb.open(str(path), max_dbs=4) as env:
        opened = env.open_db(database)
        with env.begin(write=True) as txn:
            txn.put(key, value, db=opened)


def test_records_outlive_who_wrote_them(tmp_path: Path) -> None:
    for number in range(3):
        with open_meta(str(tmp_path / "meta")) as opened:
            assert opened.mounts() == [record(earlier) for earlier in range(number)]
            opened.put_mount(record(number))


def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    with open_meta(str(tmp_path / "meta")):
        assert (tmp_path / "meta").stat().st_mode & 0o777 == 0o700
        assert (tmp_path / "meta" / "data.mdb").stat().st_mode & 0o777 == 0o600


def open_twice(path: Path) -> None:
    with open_meta(str(path)) as opened:
        opened.mounts()


def test_a_newer_format_is_refused_and_left_alone(tmp_path: Path) -> None:
    open_twice(tmp_path)
    write(tmp_path, b"about", b"version", str(FORMAT + 1).encode())
    for _ in range(2):
        with pytest.raises(UnsupportedError, match="newer"):
            open_twice(tmp_path)


@pytest.mark.parametrize("version", [b"", b"x", b"-1"])
def test_a_format_that_is_none_is_corrupt(tmp_path: Path, version: bytes) -> None:
    write(tmp_path, b"about", b"version", version)
    with pytest.raises(CorruptError):
        open_twice(tmp_path)


@pytest.mark.parametrize("value", [b"", b"\xc1", msgspec.msgpack.encode({"id": 1}), msgspec.msgpack.encode([1])])
def test_a_record_that_is_none_is_corrupt(tmp_path: Path, value: bytes) -> None:
    open_twice(tmp_path)
    write(tmp_path, b"mounts", b"1", value)
    with pytest.raises(CorruptError, match="cannot be read"):
        open_twice(tmp_path)


def test_a_record_of_a_later_release_is_read_as_far_as_it_is_known(tmp_path: Path) -> None:
    open_twice(tmp_path)
    later = msgspec.to_builtins(record(1)) | {"colour": "blue"}
    write(tmp_path, b"mounts", b"1", msgspec.msgpack.encode(later))
    with open_meta(str(tmp_path)) as opened:
        assert opened.mounts() == [record(1)]


def test_a_file_that_is_no_database_is_corrupt(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(b"x" * 8192)
    with pytest.raises(CorruptError, match="database of the daemon"):
        open_twice(tmp_path)


def test_a_full_database_is_no_space_and_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meta, "_MAP_SIZE", 1 << 16)
    with open_meta(str(tmp_path)) as opened:
        with pytest.raises(NoSpaceError, match="full"):
            fill(opened)
        assert len(opened.mounts()) > 10


def fill(opened: meta.Meta) -> None:
    for number in range(10_000):
        opened.put_mount(record(number))


def test_costs_add_up_and_are_one_owner_s(tmp_path: Path) -> None:
    def cost(server: str, requests: int, received: int) -> Cost:
        return Cost(server=server, requests=requests, received=received)

    with open_meta(str(tmp_path / "meta")) as meta:
        meta.add_costs("a", [cost("r:1", 1, 10), cost("s:1", 2, 20)])
        meta.add_costs("a", [cost("r:1", 3, 30)])
        meta.add_costs("a/b", [cost("r:1", 5, 50)])
    with open_meta(str(tmp_path / "meta")) as meta:
        assert sorted(meta.costs("a"), key=lambda each: each.server) == [cost("r:1", 4, 40), cost("s:1", 2, 20)]
        meta.forget_costs("a")
        assert meta.costs("a") == []
        assert meta.costs("a/b") == [cost("r:1", 5, 50)]


def test_after_a_commit_in_which_the_disk_failed_it_is_opened_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_meta(str(tmp_path / "meta")) as opened:
        opened.put_mount(record(1))
        opened._env = PanickingEnvironment(opened._env)  # type: ignore[assignment]
        with monkeypatch.context() as failing:
            failing.setattr(meta, "_open_environment", _refuse)
            for _ in range(2):
                with pytest.raises(CorruptError, match="cannot be used"):
                    opened.mounts()
        opened.put_mount(record(2))
        assert opened.mounts() == [record(1), record(2)]


def _refuse(_path: str) -> lmdb.Environment:
    raise lmdb.Error("Input/output error")
