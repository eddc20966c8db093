from __future__ import annotations

import hashlib
import os
import time
from typing import TYPE_CHECKING

import lmdb
import msgspec
import pytest

from nsfs.core.blobs import NOBODY
from nsfs.errors import CorruptError, NoSpaceError, NotFoundError, UnsupportedError, UsageError
from nsfs.model.digest import Digest
from nsfs.model.pool import Extent, GrantRecord, ImageRecord, LayerKey, LayerRecord, MapRecord, Slab
from nsfs.store import index as index_module
from nsfs.store.crypt import DomainKey
from nsfs.store.index import END_ADDRESS, FIRST_ADDRESS, DomainIndex, open_index
from panicking import PanickingEnvironment

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BLOB = Digest.of(b"blob")


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "index.lmdb")


@pytest.fixture(params=[None, DomainKey(bytes(range(32)))], ids=["plain", "sealed"])
def key(request: pytest.FixtureRequest) -> DomainKey | None:
    found: DomainKey | None = request.param
    return found


@pytest.fixture
def index(path: str, key: DomainKey | None) -> Iterator[DomainIndex]:
    with open_index(path, key) as opened:
        yield opened


def record(blob: Digest = BLOB, slabs: tuple[Slab, ...] = ()) -> LayerRecord:
    return LayerRecord(
        blob=blob,
        index="plain",
        blob_size=10,
        media_type="application/vnd.oci.image.layer.v1.tar+gzip",
        diff_id=Digest.of(b"tar"),
        verified="diff-id",
        stream_size=20,
        files=2,
        content_bytes=15,
        slabs=slabs,
    )


def sha(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def test_addresses_are_given_out_once(index: DomainIndex) -> None:
    first, second, third = index.reserve(), index.reserve((64 << 20) + 1), index.reserve(1)
    assert first == Slab(FIRST_ADDRESS, 64 << 20)
    assert second == Slab(FIRST_ADDRESS + (64 << 20), (64 << 20) + (32 << 10))
    assert third.address == second.address + second.size
    assert index.reserved() == sum(slab.size for slab in (first, second, third))


def test_addresses_end(index: DomainIndex) -> None:
    index.reserve(END_ADDRESS - FIRST_ADDRESS - (96 << 20))
    index.reserve()
    with pytest.raises(NoSpaceError, match="used up"):
        index.reserve()


def test_a_slab_is_an_orphan_until_its_layer_is_committed(index: DomainIndex) -> None:
    mine, lost = index.reserve(), index.reserve()
    assert index.orphan_slabs() == [mine, lost]
    index.commit_layer(record(slabs=(mine,)), [])
    assert index.orphan_slabs() == [lost]
    index.forget_slab(lost)
    assert index.orphan_slabs() == []
    assert index.reserve().address > lost.address


def test_what_was_committed_survives(path: str) -> None:
    with open_index(path) as index:
        slab = index.reserve()
        index.commit_layer(record(slabs=(slab,)), [(sha("a"), slab.address, 5)])
    with open_index(path, readonly=True) as index:
        assert index.layer(record().key) == record(slabs=(slab,))
        assert index.layers() == [record(slabs=(slab,))]
        assert index.known(sha("a")) == Extent(slab.address, 5)
        assert index.contents_of([sha("b"), sha("a")]) == {sha("a"): Extent(slab.address, 5)}


def test_the_first_extent_of_a_content_stands(index: DomainIndex) -> None:
    assert index.commit_layer(record(), [(sha("a"), 4096, 1), (sha("b"), 8192, 2)]) == {}
    other = record(Digest.of(b"other"))
    assert index.commit_layer(other, [(sha("b"), 1 << 20, 2), (sha("c"), 2 << 20, 3)]) == {1 << 20: 8192}
    assert index.known(sha("b")) == Extent(8192, 2)
    assert index.known(sha("c")) == Extent(2 << 20, 3)
    assert index.commit_layer(other, [(sha("c"), 2 << 20, 3)]) == {}, "again, as after a crash"
    twice = index.commit_layer(other, [(sha("d"), 4 << 20, 4), (sha("d"), 3 << 20, 4)])
    assert twice == {4 << 20: 3 << 20}


def test_a_record_changes_in_one_transaction(index: DomainIndex) -> None:
    index.commit_layer(record(), [])
    changed = index.update_layer(record().key, lambda old: msgspec.structs.replace(old, has_spans=True, fetched=7))
    assert index.layer(record().key) == changed
    assert changed.has_spans
    with pytest.raises(NotFoundError):
        index.update_layer(LayerKey(BLOB, "estargz-00"), lambda old: old)


def test_layers_maps_origins_and_images_are_found_again(index: DomainIndex) -> None:
    assert index.layer(record().key) is None
    made = MapRecord(
        id="m", blob=BLOB, index="plain", path="/x", needs_lower=False, marks=True, lowers=(LayerKey(BLOB, "plain"),)
    )
    index.put_map(made)
    assert (index.map("m"), index.map("n")) == (made, None)
    for name in ("a", "b", "a"):
        index.put_origin([BLOB], name, NOBODY)
    assert index.origins(BLOB, NOBODY) == [("", "a"), ("", "b")]
    assert index.origins(Digest.of(b""), NOBODY) == []
    image = ImageRecord(repository="r", manifest=b"{}", media_type="t", config=b"{}")
    index.put_image("name" * 500, image)
    assert (index.image("name" * 500), index.image("other")) == (image, None)


def test_no_index_name_leads_out_of_its_directory(index: DomainIndex) -> None:
    with pytest.raises(UsageError):
        index.commit_layer(msgspec.structs.replace(record(), index="../x"), [])


def test_a_newer_format_is_refused_by_name(path: str) -> None:
    open_index(path).close()
    with lmdb.open(path, subdir=False, max_dbs=8) as raw, raw.begin(db=raw.open_db(b"about"), write=True) as txn:
        txn.put(b"version", b"9")
    with pytest.raises(UnsupportedError, match=r"newer format.*: 9"):
        open_index(path)


def test_what_is_no_index_is_refused(path: str) -> None:
    with pytest.raises(NotFoundError):
        open_index(path, readonly=True)
    with open(path, "wb") as file:
        file.write(b"x" * 8192)
    with pytest.raises(CorruptError):
        open_index(path)


def test_after_a_commit_in_which_the_disk_failed_it_is_opened_anew(
    index: DomainIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    slab = index.reserve()
    index._environment = PanickingEnvironment(index._environment)  # type: ignore[assignment]
    with monkeypatch.context() as failing:
        failing.setattr(index_module, "_open_environment", _refuse)
        for _ in range(2):
            with pytest.raises(CorruptError, match="cannot be used"):
                index.reserved()
    index.forget_slab(slab)
    assert index.reserve().address >= slab.address
    assert len(index.orphan_slabs()) == 1


def _refuse(_path: str, *, readonly: bool) -> lmdb.Environment:
    del readonly
    raise lmdb.Error("Input/output error")


def test_a_full_index_loses_nothing(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "MAP_SIZE", 256 << 10)
    with open_index(path) as index:
        index.commit_layer(record(), [(sha("a"), 4096, 1)])
        with pytest.raises(NoSpaceError):
            index.commit_layer(record(Digest.of(b"big")), [(sha(str(n)), n << 12, 1) for n in range(20_000)])
        assert index.layers() == [record()]
        assert index.known(sha("a")) == Extent(4096, 1)


def test_two_processes_never_get_the_same_addresses(path: str) -> None:
    open_index(path).close()
    ends, pids = [], []
    for _ in range(2):
        receive, send = os.pipe()
        if (pid := os.fork()) == 0:
            with open_index(path) as index:
                os.write(send, b"".join(b"%d\n" % index.reserve().address for _ in range(20)))
            os._exit(0)
        os.close(send)
        ends.append(receive)
        pids.append(pid)
    addresses = []
    for end in ends:
        with open(end, "rb") as lines:
            addresses += [int(line) for line in lines]
    for pid in pids:
        os.waitpid(pid, 0)
    assert len(set(addresses)) == 40


def test_fifty_thousand_contents_are_committed_quickly(index: DomainIndex) -> None:
    rows = [(sha(str(number)), number << 12, 100) for number in range(50_000)]
    begun = time.process_time()
    index.commit_layer(record(), rows)
    assert time.process_time() - begun < 0.4, "0.08 s on two cores of 2026"


def test_grants_are_one_owner_s(index: DomainIndex) -> None:
    def granted(owner: str, repository: str = "r/x") -> GrantRecord:
        return GrantRecord(owner=owner, repository=repository, blob=BLOB, proved=1.0, expires=5.0)

    for owner in ("a", "a/b", "ab"):
        index.put_grant(granted(owner))
        index.put_grant(granted(owner, "r/y"))
    assert index.grant("a", "r/x", BLOB) == granted("a")
    assert index.grant("a", "r/z", BLOB) is index.grant("b", "r/x", BLOB) is None
    index.delete_grant("a", "r/y", BLOB)
    index.delete_grant("a", "r/y", BLOB)
    assert index.grant("a", "r/y", BLOB) is None
    owners = [(each.owner, each.repository) for each in index.all_grants()]
    assert sorted(owners) == [("a", "r/x"), ("a/b", "r/x"), ("a/b", "r/y"), ("ab", "r/x"), ("ab", "r/y")]
    assert [index.delete_grants("a"), index.delete_grants("a")] == [1, 0]
    assert index.grant("a/b", "r/x", BLOB) == granted("a/b")
    assert index.grant("ab", "r/y", BLOB) == granted("ab", "r/y")


@pytest.mark.parametrize(("now", "holds"), [(0.5, False), (1.0, True), (4.9, True), (5.0, False)])
def test_a_grant_holds_for_a_time_and_not_where_the_clock_was_set_back(now: float, *, holds: bool) -> None:
    record = GrantRecord(owner="a", repository="r", blob=BLOB, proved=1.0, expires=5.0)
    assert record.holds(now) is holds
