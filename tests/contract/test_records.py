"""Where manual mounts are remembered: the same promises of the fake and of the daemon's database."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from manual_fakes import FakeRecords, Script
from nsfs.core.manual import Records
from nsfs.errors import NotFoundError
from nsfs.model.mounts import MountRecord
from nsfs.store.meta import open_meta


def record(number: int, **more: object) -> MountRecord:
    fields = {
        "id": f"{number:016x}",
        "target": f"/mnt/{number}\udcff",
        "reference": "registry/image:tag",
        "digest": "sha256:0",
        "namespace": "default",
        "domain": "ns/default",
        "transient": False,
        "driver": "erofs",
        "writable": True,
        "files": 10**6,
        "size": 10**13,
        "maps": ["a", "b"],
        "suffix": "~60",
        **more,
    }
    return MountRecord(**fields)  # type: ignore[arg-type]


@contextmanager
def fake(_: Path) -> Iterator[Records]:
    yield FakeRecords(Script())


@contextmanager
def real(directory: Path) -> Iterator[Records]:
    with open_meta(str(directory / "meta.lmdb")) as meta:
        yield meta


@pytest.fixture(params=[fake, real])
def records(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Records]:
    with request.param(tmp_path) as opened:
        yield opened


def test_what_was_put_is_there_as_it_was(records: Records) -> None:
    assert records.mounts() == []
    put = [record(number, target=f"/mnt/{number}") for number in range(3)]
    for each in put:
        records.put_mount(each)
    assert sorted(records.mounts(), key=lambda each: each.id) == put
    assert records.mount_at("/mnt/1") == put[1]


def test_a_record_is_replaced_by_one_of_its_id(records: Records) -> None:
    records.put_mount(record(1, target="/a"))
    records.put_mount(record(1, target="/b"))
    assert [each.target for each in records.mounts()] == ["/b"]


def test_what_is_forgotten_is_gone_and_forgetting_twice_is_nothing(records: Records) -> None:
    for number in range(2):
        records.put_mount(record(number, target=f"/mnt/{number}"))
    for _ in range(2):
        records.delete_mount(record(0).id)
    assert [each.id for each in records.mounts()] == [record(1).id]


def test_a_target_without_a_mount_is_not_found(records: Records) -> None:
    records.put_mount(record(1, target="/mnt/1"))
    for target in ("/mnt", "/mnt/1/", ""):
        with pytest.raises(NotFoundError):
            records.mount_at(target)
