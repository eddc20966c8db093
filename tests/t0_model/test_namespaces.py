from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from mount_records import mount_record
from nsfs.model.namespaces import plan_drop, plan_holdings
from nsfs.model.policy import Domain, Isolation
from nsfs.model.snapshot import Kind, Record

if TYPE_CHECKING:
    from nsfs.model.mounts import MountRecord


def snapshot(
    number: int, namespace: str, kind: Kind = Kind.COMMITTED, parent: str = "", plugin: str = "nsfs"
) -> Record:
    return Record(
        snapshotter=plugin,
        name=f"{namespace}/{number}",
        namespace=namespace,
        id=number,
        kind=kind,
        parent=parent,
        labels={},
        created=0,
        updated=0,
    )


def mount(namespace: str, domain: str) -> MountRecord:
    where = {"target": f"/mnt/{namespace}", "namespace": namespace, "domain": domain}
    return mount_record(**where, transient=domain.startswith("pod/"))


def test_everything_is_somebodys() -> None:
    found = plan_holdings(
        ["ns/a", "ns/a/tenant", "ns/gone", "public", "pod/left"],
        [mount("a", "pod/1"), mount("b", "public")],
        [snapshot(1, "a"), snapshot(2, "a", Kind.ACTIVE), snapshot(3, "c"), snapshot(4, "b", Kind.VIEW)],
        {2: Domain("pod/snapshot-2", Isolation.POD), 4: Domain("ns/b", Isolation.ISOLATED)},
        ["a/other", "keeper"],
    )
    assert list(found) == ["a", "b", "c", "gone", "keeper"]
    assert found["a"].owners == ["a", "a/other", "a/tenant"]
    assert found["keeper"].logins == {"keeper"}
    assert found["a"].own == {"ns/a", "ns/a/tenant", "pod/1", "pod/snapshot-2"}
    assert (found["a"].shared, found["a"].containers, found["a"].targets) == (set(), ["a/2"], ["/mnt/a"])
    assert (found["b"].own, found["b"].shared, found["b"].containers) == ({"ns/b"}, {"public"}, ["b/4"])
    assert (found["gone"].own, found["gone"].snapshots) == ({"ns/gone"}, [])


@given(st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=20), st.randoms(use_true_random=False))
def test_nothing_goes_before_what_stands_on_it(shape: list[tuple[int, bool]], order: object) -> None:
    records: list[Record] = []
    for number, (parent, other) in enumerate(shape):
        plugin = "nsfs-b" if other else "nsfs"
        below = [record for record in records if record.snapshotter == plugin]
        name = below[parent % len(below)].name if below else ""
        records.append(snapshot(number, "a", parent=name, plugin=plugin))
    shuffled = list(records)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    gone = plan_drop(shuffled)
    assert sorted(gone, key=lambda record: record.id) == records
    for place, record in enumerate(gone):
        assert all(later.parent != record.name for later in gone[place:] if later.snapshotter == record.snapshotter)
