"""Namespaces: what is here on behalf of each, as values. Pure.

A namespace is not made: it is there as soon as something is. Its *own* domains are its alone and end with it; those
that it shares stay for the others.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nsfs.model.policy import namespace_of
from nsfs.model.snapshot import Kind

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from nsfs.model.mounts import MountRecord
    from nsfs.model.policy import Domain
    from nsfs.model.snapshot import Record

    Standing = dict[str, dict[str, list[str]]]
    """Maps that mounts and snapshots stand on, by domain and by namespace."""


@dataclass(slots=True, kw_only=True)
class Holding:
    """What one namespace has."""

    namespace: str
    own: set[str] = field(default_factory=set)
    """Domains that are its alone, its tenants' and pods' included."""
    shared: set[str] = field(default_factory=set)
    """Those that it mounts from, and others may, too."""
    mounts: list[MountRecord] = field(default_factory=list)
    """Made by hand."""
    snapshots: list[Record] = field(default_factory=list)
    """containerd's."""
    logins: set[str] = field(default_factory=set)
    """As whom it logged in to registries: itself, and its tenants."""

    @property
    def containers(self) -> list[str]:
        """Containerd's keys of snapshots that somebody writes to or looks at."""
        return [record.name for record in self.snapshots if record.kind is not Kind.COMMITTED]

    @property
    def owners(self) -> list[str]:
        """As whom its requests to registries are made: itself, and its tenants."""
        served = {name.removeprefix("ns/") for name in self.own if name.startswith("ns/")}
        return sorted({self.namespace} | served | self.logins)

    @property
    def targets(self) -> list[str]:
        """Where it is mounted by hand."""
        return [mount.target for mount in self.mounts]


def plan_holdings(
    domains: Iterable[str],
    mounts: Iterable[MountRecord],
    snapshots: Iterable[Record],
    shown: Mapping[int, Domain],
    logins: Iterable[str] = (),
) -> dict[str, Holding]:
    """By namespace, in alphabetical order.

    `domains` are those on disk, `shown` those of mounted snapshots, by ID, `logins` owners whose credentials are kept.
    """
    found: defaultdict[str, Holding] = _Holdings()
    for domain in domains:
        if owner := _namespace_of(domain):
            found[owner].own.add(domain)
    for mount in mounts:
        found[mount.namespace].mounts.append(mount)
        _note(found[mount.namespace], mount.domain)
    for record in snapshots:
        found[record.namespace].snapshots.append(record)
        if record.id in shown:
            _note(found[record.namespace], shown[record.id].name)
    for owner in logins:
        found[namespace_of(owner)].logins.add(owner)
    return dict(sorted(found.items()))


class _Holdings(defaultdict[str, Holding]):
    def __missing__(self, namespace: str) -> Holding:
        self[namespace] = Holding(namespace=namespace)
        return self[namespace]


def _note(holding: Holding, domain: str) -> None:
    (holding.own if domain.startswith(("ns/", "pod/")) else holding.shared).add(domain)


def _namespace_of(domain: str) -> str:
    """Whose alone a domain is, "" where it is nobody's or a pod's."""
    kind, _, rest = domain.partition("/")
    return namespace_of(rest) if kind == "ns" else ""


def plan_standing(
    mounts: Iterable[MountRecord],
    snapshots: Iterable[Record],
    shown: Mapping[int, Domain],
    stacked: Mapping[int, Collection[str]],
) -> Standing:
    """What stands on which maps; `stacked` are those of mounted snapshots, by ID."""
    found: defaultdict[str, defaultdict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for mount in mounts:
        found[mount.domain][mount.namespace].update(mount.maps)
    for record in snapshots:
        if record.id in shown:
            found[shown[record.id].name][record.namespace].update(stacked.get(record.id, ()))
    return {domain: {name: sorted(maps) for name, maps in used.items()} for domain, used in found.items()}


def plan_gone(came: Iterable[str], there: Collection[str]) -> list[str]:
    """Those that came by containerd and that it has no more; none where it has none at all: it may be a new one."""
    return sorted(set(came).difference(there)) if there else []


def plan_drop(snapshots: Iterable[Record]) -> list[Record]:
    """The order in which all of a namespace's snapshots may go: none before what stands on it."""
    by_name = {(record.snapshotter, record.name): record for record in snapshots}

    def depth(record: Record) -> int:
        count = 0
        parent: Record | None = record
        while parent is not None:
            parent = by_name.get((parent.snapshotter, parent.parent))
            count += 1
        return count

    return sorted(by_name.values(), key=depth, reverse=True)
