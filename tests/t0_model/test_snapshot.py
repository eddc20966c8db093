"""What each call does to the records, and the mounts of a snapshot."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from nsfs.errors import BusyError, DeniedError, ExistsError, NotFoundError, UsageError
from nsfs.model.filters import parse_filters
from nsfs.model.mounts import OVERLAY_OPTIONS
from nsfs.model.shift import parse_shift
from nsfs.model.snapshot import (
    Change,
    Kind,
    Record,
    Stacked,
    chain,
    find,
    namespace_of,
    plan_commit,
    plan_create,
    plan_mounts,
    plan_remove,
    plan_update,
    select,
    shift_of,
)

UPPER = ("/u/fs", "/u/work")


class Dict(dict[str, Record]):
    """A table."""

    def has_children(self, name: str) -> bool:
        return any(record.parent == name for record in self.values())

    def carry_out(self, change: Change) -> None:
        if change.gone:
            del self[change.gone.name]
        if change.put:
            self[change.put.name] = change.put


def record(name: str, kind: Kind = Kind.ACTIVE, parent: str = "", namespace: str = "ns", **more: Any) -> Record:
    fields: dict[str, Any] = {"labels": {}, "created": 1, "updated": 1, "id": 1, "snapshotter": "nsfs"} | more
    return Record(name=name, kind=kind, parent=parent, namespace=namespace, **fields)


@pytest.fixture
def table() -> Dict:
    """base <- top <- (writer, reader)"""
    records = [
        record("ns/1/base", Kind.COMMITTED),
        record("ns/2/top", Kind.COMMITTED, "ns/1/base", labels={"a": "1"}),
        record("ns/3/writer", Kind.ACTIVE, "ns/2/top"),
        record("ns/4/reader", Kind.VIEW, "ns/2/top"),
        record("ns/5/fresh", Kind.ACTIVE),
        record("other/6/base", Kind.COMMITTED, namespace="other"),
    ]
    return Dict({each.name: each for each in records})


@pytest.mark.parametrize(
    ("key", "claimed", "namespace"),
    [
        ("a/1/k", None, "a"),
        ("a/1/k", "a", "a"),
        ("a/12/extract-1-x sha256:ff/y", None, "a"),
        ("a.b-c_d/1/k", None, "a.b-c_d"),
        ("k", None, ""),
        ("k", "a", "a"),
        ("/tmp/x/1/k", None, ""),
        ("a/x/k", None, ""),
    ],
)
def test_the_namespace_comes_from_the_key(key: str, claimed: str | None, namespace: str) -> None:
    assert namespace_of(key, claimed) == namespace


@pytest.mark.parametrize(
    ("key", "claimed", "error"),
    [
        ("a/1/k", "b", DeniedError),
        ("../1/k", None, UsageError),
        ("a b/1/k", None, UsageError),
        ("a" * 77 + "/1/k", None, UsageError),
        ("k", "a/b", UsageError),
    ],
)
def test_other_namespaces_are_refused(key: str, claimed: str | None, error: type[Exception]) -> None:
    with pytest.raises(error):
        namespace_of(key, claimed)


def test_a_namespace_finds_its_own(table: Dict) -> None:
    assert find(table, "ns/1/base", None) is find(table, "ns/1/base", "ns")
    for name, claimed in (("ns/1/base", "other"), ("nothing", None)):
        with pytest.raises(NotFoundError):
            find(table, name, claimed)
    assert [each.name for each in chain(table, table["ns/3/writer"])] == ["ns/2/top", "ns/1/base"]


@pytest.mark.parametrize(
    ("new", "error"),
    [
        (record(""), UsageError),
        (record("ns/9/x", parent="nothing"), NotFoundError),
        (record("ns/9/x", parent="other/6/base"), NotFoundError),
        (record("ns/9/x", parent="ns/3/writer"), UsageError),
        (record("ns/9/x", parent="ns/4/reader"), UsageError),
        (record("ns/5/fresh"), ExistsError),
        (record("ns/1/base", Kind.VIEW), ExistsError),
        (record("ns/5/fresh", parent="nothing"), NotFoundError),
    ],
)
def test_what_cannot_be_created(table: Dict, new: Record, error: type[Exception]) -> None:
    with pytest.raises(error):
        plan_create(table, new)


def test_creating(table: Dict) -> None:
    change = plan_create(table, record("ns/9/x", parent="ns/2/top", labels={"a": "1", "b": ""}))
    assert change == Change(put=record("ns/9/x", parent="ns/2/top", labels={"a": "1"}))


def commit(table: Dict, name: str, key: str, parent: str = "", claimed: str | None = None) -> Change:
    return plan_commit(table, name, key, labels={"l": "v"}, parent=parent, claimed=claimed, now=7)


@pytest.mark.parametrize(
    ("name", "key", "parent", "error"),
    [
        ("", "ns/5/fresh", "", UsageError),
        ("ns/1/base", "ns/5/fresh", "", ExistsError),
        ("ns/1/base", "nothing", "", ExistsError),
        ("ns/9/x", "nothing", "", NotFoundError),
        ("ns/9/x", "ns/1/base", "", BusyError),
        ("ns/9/x", "ns/4/reader", "", BusyError),
        ("ns/9/x", "ns/3/writer", "ns/1/base", UsageError),
        ("ns/9/x", "ns/5/fresh", "nothing", NotFoundError),
        ("ns/9/x", "ns/5/fresh", "other/6/base", NotFoundError),
        ("ns/9/x", "ns/5/fresh", "ns/4/reader", BusyError),
        ("other/9/x", "ns/5/fresh", "", DeniedError),
    ],
)
def test_what_cannot_be_committed(table: Dict, name: str, key: str, parent: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        commit(table, name, key, parent)


def test_a_commit_replaces_key_and_labels(table: Dict) -> None:
    change = commit(table, "ns/9/x", "ns/3/writer", "ns/2/top")
    assert change.gone is table["ns/3/writer"]
    assert change.put == record(
        "ns/9/x", Kind.COMMITTED, "ns/2/top", labels={"l": "v"}, created=7, updated=7, id=change.gone.id
    )


def test_a_commit_can_put_what_has_no_parent_onto_one(table: Dict) -> None:
    put = commit(table, "ns/9/x", "ns/5/fresh", "ns/2/top").put
    assert put is not None
    assert put.parent == "ns/2/top"


def test_removing(table: Dict) -> None:
    with pytest.raises(BusyError, match="remove"):
        plan_remove(table, "ns/2/top", None)
    with pytest.raises(NotFoundError):
        plan_remove(table, "ns/5/fresh", "other")
    for name in ("ns/3/writer", "ns/4/reader", "ns/2/top", "ns/1/base"):
        table.carry_out(plan_remove(table, name, None))
    assert set(table) == {"ns/5/fresh", "other/6/base"}


@pytest.mark.parametrize(
    ("paths", "labels", "left"),
    [
        ([], {"b": "2"}, {"b": "2"}),
        (["labels"], {"b": "2", "c": ""}, {"b": "2"}),
        (["labels.b"], {"b": "2", "c": "3"}, {"a": "1", "b": "2"}),
        (["labels.a", "labels.x.y/z"], {"x.y/z": "2"}, {"x.y/z": "2"}),
    ],
)
def test_updating(table: Dict, paths: list[str], labels: dict[str, str], left: dict[str, str]) -> None:
    change = plan_update(table, "ns/2/top", labels=labels, paths=paths, claimed=None, now=9)
    assert change.put == msgspec.structs.replace(table["ns/2/top"], labels=left, updated=9)


@pytest.mark.parametrize("path", ["parent", "kind", "name", "", "label"])
def test_labels_alone_can_be_updated(table: Dict, path: str) -> None:
    with pytest.raises(UsageError):
        plan_update(table, "ns/2/top", labels={}, paths=[path], claimed=None, now=9)


@pytest.mark.parametrize(
    ("filters", "claimed", "names"),
    [
        (["kind==committed"], None, ["ns/1/base", "ns/2/top", "other/6/base"]),
        (["kind==committed"], "ns", ["ns/1/base", "ns/2/top"]),
        (['parent==""', "labels.a"], "ns", ["ns/1/base", "ns/2/top", "ns/5/fresh"]),
        (['name=="ns/4/reader"'], None, ["ns/4/reader"]),
        (["kind==view", "unknown"], None, ["ns/4/reader"]),
        ([], "third", []),
    ],
)
def test_selecting(table: Dict, filters: list[str], claimed: str | None, names: list[str]) -> None:
    assert [each.name for each in select(table.values(), parse_filters(filters), claimed)] == names


@pytest.mark.parametrize(
    ("kind", "lowers", "mount"),
    [
        (Kind.ACTIVE, [], "bind /u/fs rw,rbind"),
        (Kind.VIEW, [], "bind /empty ro,rbind"),
        (Kind.VIEW, [Stacked("a")], "bind a ro,rbind"),
        (Kind.VIEW, [Stacked("a"), Stacked("a")], "bind a ro,rbind"),
        (Kind.VIEW, [Stacked("a", marks=True)], "overlay overlay lowerdir=a:/empty"),
        (Kind.VIEW, [Stacked("a"), Stacked("b")], "overlay overlay lowerdir=a:b"),
        (Kind.VIEW, [Stacked("a", opaque=True), Stacked("b")], "bind a ro,rbind"),
        (Kind.ACTIVE, [Stacked("a")], "overlay overlay workdir=/u/work,upperdir=/u/fs,lowerdir=a"),
        (
            Kind.ACTIVE,
            [Stacked("a"), Stacked("b"), Stacked("a"), Stacked("c", opaque=True), Stacked("d")],
            "overlay overlay workdir=/u/work,upperdir=/u/fs,lowerdir=a:b:c",
        ),
    ],
)
def test_mounts(kind: Kind, lowers: list[Stacked], mount: str) -> None:
    (made,) = plan_mounts(kind, lowers, upper=UPPER, empty="/empty")
    options = [option for option in made.options if option not in OVERLAY_OPTIONS]
    assert f"{made.type} {made.source} {','.join(options)}" == mount
    assert (made.type == "overlay") == (len(options) + len(OVERLAY_OPTIONS) == len(made.options))


def test_a_committed_snapshot_has_no_mounts() -> None:
    with pytest.raises(BusyError):
        plan_mounts(Kind.COMMITTED, [], upper=UPPER, empty="/empty")


def test_128_layers_fit_into_a_page() -> None:
    lowers = [Stacked(f"/run/nsfs/l/s{number:x}") for number in range(0xFFFF00, 0xFFFF80)]
    upper = ("/var/lib/nsfs/snapshots/16777215/fs", "/var/lib/nsfs/snapshots/16777215/work")
    (mount,) = plan_mounts(Kind.ACTIVE, lowers, upper=upper, empty="/run/nsfs/l/empty")
    assert len(",".join(mount.options)) < 4096 - 512


SHIFTED = {"containerd.io/snapshot/uidmapping": "0:7:9", "containerd.io/snapshot/gidmapping": "0:7:9"}


def test_labels_shift_owners_but_not_of_layers_nor_of_copies(table: Dict) -> None:
    assert shift_of("ns/7/c", {}, None) is None
    assert shift_of("ns/7/c", SHIFTED, table["ns/2/top"]) == parse_shift(SHIFTED)
    assert shift_of("ns/7/extract-1 sha256:x", SHIFTED, None) is None
    assert shift_of("ns/7/c", SHIFTED | {"containerd.io/snapshot.ref": "sha256:x"}, None) is None
    table.carry_out(plan_create(table, record("ns/7/sha256:ab-remap", parent="ns/2/top")))
    committed = plan_commit(
        table, "ns/8/sha256:ab", "ns/7/sha256:ab-remap", labels={}, parent="", claimed="ns", now=2
    ).put
    assert committed is not None
    assert shift_of("ns/9/c", SHIFTED, committed) is None
    table["ns/8/sha256:ab"] = committed
    table.carry_out(plan_create(table, record("ns/9/c", parent="ns/8/sha256:ab")))
    above = plan_commit(table, "ns/10/above", "ns/9/c", labels={}, parent="", claimed="ns", now=3).put
    assert above is not None
    assert shift_of("ns/11/c", SHIFTED, above) is None


def test_a_commit_keeps_the_shift_that_it_was_written_under(table: Dict) -> None:
    shift = parse_shift(SHIFTED)
    table.carry_out(plan_create(table, record("ns/7/c", parent="ns/2/top", shift=shift)))
    put = plan_commit(table, "ns/8/done", "ns/7/c", labels={}, parent="", claimed="ns", now=2).put
    assert put is not None
    assert (put.shift, put.copied) == (shift, False)
    assert shift_of("ns/9/c", SHIFTED, put) == shift
