"""Snapshots as containerd means them: records, what each call does to them, and the mounts that show them. Pure.

A *record* is an active snapshot (somebody writes to it), a view (somebody reads it) or a committed one (others stand on
it). Each is known to one plugin name (`snapshotter`) and, but for those of clients without namespaces, to one
namespace: nobody else's calls find it. The order in which errors are looked for is that of containerd's own store
(core/snapshots/storage, containerd 1.6 to 2.x), so that a caller cannot tell the difference.

Times are nanoseconds since the epoch.
"""

from __future__ import annotations

import enum
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

import msgspec
from msgspec import Struct

from nsfs.errors import BusyError, DeniedError, ExistsError, NotFoundError, UsageError
from nsfs.model.lazy import LazyLayer, is_offered, is_unpack
from nsfs.model.mounts import OVERLAY_OPTIONS, Bind, plan_rootfs
from nsfs.model.policy import ISOLATION_LABEL, ScopeRequest, check_namespace
from nsfs.model.profile import ProfileUse
from nsfs.model.shift import Shift, parse_shift

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from nsfs.model.filters import Filters

_KEY: Final = re.compile(r"([^/]+)/[0-9]+/(.+)", re.DOTALL)
"""How containerd's metadata store names snapshots: namespace, sequence number, the client's key."""

_COPY: Final = "-remap"
"""How keys end under which containerd's client copies a tree, to shift its owners; it commits without that end."""


class Kind(enum.IntEnum):
    """What may be done with a snapshot; the numbers are those of the wire."""

    VIEW = 1
    ACTIVE = 2
    COMMITTED = 3


class Record(Struct, frozen=True, kw_only=True):
    """One snapshot."""

    snapshotter: str
    name: str
    """A key while it is active or a view."""
    namespace: str
    """Empty for clients that have none."""
    id: int
    """Names its directory; never given twice, kept by a commit."""
    kind: Kind
    parent: str
    labels: dict[str, str]
    created: int
    updated: int
    layer: LazyLayer | None = None
    """Where it is served on demand; such a snapshot is committed, and has no directory."""
    shift: Shift | None = None
    """How the owners of what is in its directory were shifted when that was written."""
    copied: bool = False
    """All that it shows has the owners of a user namespace already: containerd's client copied a tree below it."""


class Mount(Struct, frozen=True, kw_only=True):
    """One mount, as containerd carries it out."""

    type: str
    source: str
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What one call does to the records: some go, some come, all or none."""

    gone: Record | None = None
    put: Record | None = None


class Table(Protocol):
    """The records of one plugin name."""

    def get(self, name: str) -> Record | None:
        """The record of that name or key."""

    def has_children(self, name: str) -> bool:
        """Whether others stand on it."""


# Whose it is


def namespace_of(key: str, claimed: str | None) -> str:
    """The namespace that a new snapshot belongs to: the key's, which must be the `claimed` one where one is.

    A key that is not containerd's own belongs to the claimed namespace, or to none.
    """
    found = _KEY.fullmatch(key)
    if found is None:
        return check_namespace(claimed) if claimed else ""
    namespace = check_namespace(found[1])
    if claimed is not None and claimed != namespace:
        raise DeniedError(f"the call is for namespace {claimed[:100]!r}, its key for {namespace!r}")
    return namespace


def find(table: Table, name: str, claimed: str | None) -> Record:
    """The record `name`, if it is the claimed namespace's (None: anybody's); raises NotFoundError."""
    record = table.get(name)
    if record is None or (claimed is not None and record.namespace not in {claimed, ""}):
        raise NotFoundError(f"no such snapshot: {name}")
    return record


def chain(table: Table, record: Record) -> list[Record]:
    """What `record` stands on, nearest first."""
    found: list[Record] = []
    while record.parent:
        parent = table.get(record.parent)
        if parent is None:
            raise NotFoundError(f"no such parent: {record.parent}")
        found.append(parent)
        record = parent
    return found


def request_of(record: Record, layers: Sequence[LazyLayer | None]) -> ScopeRequest:
    """What `record` says of itself where it wants these layers, top first (None: one that is not lazy).

    What an image says of itself decides nothing: its descriptors' annotations become labels of its layers
    (core/unpack, containerd 1.6 to 2.x), and so those are not looked at.
    """
    is_layer = is_offered(record.labels) or is_unpack(record.name)
    return ScopeRequest(
        namespace=record.namespace,
        references=tuple(dict.fromkeys(layer.reference for layer in layers if layer is not None)),
        plugin=record.snapshotter,
        label=None if is_layer else record.labels.get(ISOLATION_LABEL),
        mount_id=f"snapshot-{record.id}",
    )


def use_of(record: Record) -> ProfileUse:
    """What may be done at most with what is read first of `record`: a view is looked at, and an unpack no start."""
    if is_unpack(record.name):
        return ProfileUse.OFF
    return ProfileUse.FIRST if record.kind is Kind.ACTIVE else ProfileUse.USE


def select(records: Iterable[Record], filters: Filters, claimed: str | None) -> list[Record]:
    """Those of the claimed namespace (None: all) that the filters let through."""
    return [
        record
        for record in records
        if (claimed is None or record.namespace == claimed) and filters.match(partial(_field, record))
    ]


def _field(record: Record, path: Sequence[str]) -> str | None:
    match path:
        case ["name", *_]:
            return record.name
        case ["parent", *_]:
            return record.parent
        case ["kind", *_]:
            return record.kind.name.lower()
        case ["labels", *rest]:
            return record.labels.get(".".join(rest))
    return None


# What a call does


def plan_create(table: Table, new: Record) -> Change:
    """Prepare or View; raises NotFoundError, UsageError or ExistsError."""
    if not new.name:
        raise UsageError("a snapshot needs a key")
    if new.parent:
        parent = table.get(new.parent)
        if parent is None or parent.namespace != new.namespace:
            raise NotFoundError(f"no such parent: {new.parent}")
        if parent.kind is not Kind.COMMITTED:
            raise UsageError(f"the parent is not committed: {new.parent}")
    if table.get(new.name) is not None:
        raise ExistsError(f"there is such a snapshot already: {new.name}")
    return Change(put=msgspec.structs.replace(new, labels=_worth_keeping(new.labels)))


def plan_commit(
    table: Table, name: str, key: str, *, labels: Mapping[str, str], parent: str, claimed: str | None, now: int
) -> Change:
    """Commit: `key` becomes `name`. A snapshot that was begun without a parent may be put onto one."""
    if not name:
        raise UsageError("a committed snapshot needs a name")
    if table.get(name) is not None:
        raise ExistsError(f"there is such a snapshot already: {name}")
    active = find(table, key, claimed)
    if namespace_of(name, claimed) != active.namespace:
        raise DeniedError(f"a snapshot of one namespace cannot be committed to another: {name}")
    if active.kind is not Kind.ACTIVE:
        raise BusyError(f"not an active snapshot: {key}")
    if parent not in {"", active.parent}:
        if active.parent:
            raise UsageError(f"the parent cannot be changed by a commit: {key}")
        _check_new_parent(table, parent, active.namespace)
    base = table.get(parent or active.parent)
    put = msgspec.structs.replace(
        active,
        name=name,
        kind=Kind.COMMITTED,
        parent=parent or active.parent,
        labels=_worth_keeping(labels),
        created=now,
        updated=now,
        copied=(base is not None and base.copied) or _client_key(key) == _client_key(name) + _COPY,
    )
    return Change(gone=active, put=put)


def _client_key(name: str) -> str:
    return name.split("/", 2)[-1]


def shift_of(key: str, labels: Mapping[str, str], parent: Record | None) -> Shift | None:
    """How the owners of a new snapshot are shifted; raises UsageError.

    Not at all where a layer is unpacked, since its labels may be an image's annotations; nor over a copy that was made
    for the same labels (client/snapshotter_opts_unix.go, containerd 1.7 to 2.x, without the capability remap-ids).
    """
    if is_offered(labels) or is_unpack(key) or (parent is not None and parent.copied):
        return None
    return parse_shift(labels)


def _check_new_parent(table: Table, name: str, namespace: str) -> None:
    parent = table.get(name)
    if parent is None or parent.namespace != namespace:
        raise NotFoundError(f"no such parent: {name}")
    if parent.kind is not Kind.COMMITTED:
        raise BusyError(f"the parent is not committed: {name}")


def plan_remove(table: Table, name: str, claimed: str | None) -> Change:
    """Remove; raises NotFoundError, BusyError."""
    record = find(table, name, claimed)
    if table.has_children(name):
        raise BusyError(f"cannot remove a snapshot that others stand on: {name}")
    return Change(gone=record)


def plan_update(
    table: Table, name: str, *, labels: Mapping[str, str], paths: Sequence[str], claimed: str | None, now: int
) -> Change:
    """Update: labels alone can be changed, all of them or each by itself."""
    record = find(table, name, claimed)
    kept = dict(record.labels)
    for path in paths or ["labels"]:
        if path == "labels":
            kept = dict(labels)
        elif path.startswith("labels."):
            label = path.removeprefix("labels.")
            kept[label] = labels.get(label, "")
        else:
            raise UsageError(f"only labels can be updated, of {name}: not {path[:100]!r}")
    return Change(gone=record, put=msgspec.structs.replace(record, labels=_worth_keeping(kept), updated=now))


def plan_recall(records: Iterable[Record], base: Record) -> list[str]:
    """By which keys containerd knows `base` and all committed snapshots that stand on it, the highest first."""
    above: defaultdict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record.kind is Kind.COMMITTED:
            above[record.parent].append(record)
    found = [base]
    for record in found:
        found += above[record.name]
    return [_key_of(record) for record in reversed(found)]


def _key_of(record: Record) -> str:
    """By which containerd knows it; for one that was lazily made that is the chain ID which its client asked for."""
    if record.layer is not None:
        return record.layer.chain
    named = _KEY.fullmatch(record.name)
    return named[2] if named else record.name


def _worth_keeping(labels: Mapping[str, str]) -> dict[str, str]:
    """An empty label is none, as in containerd's own store."""
    return {name: value for name, value in labels.items() if value}


# How it is mounted


@dataclass(frozen=True, slots=True)
class Stacked:
    """One layer as a directory to be stacked."""

    path: str
    marks: bool = False
    """Has whiteouts or opaque marks, which only an overlay understands."""
    opaque: bool = False
    """Hides all layers below, which not even an overlay understands."""


def plan_mounts(kind: Kind, lowers: Sequence[Stacked], *, upper: tuple[str, str], empty: str) -> list[Mount]:
    """The mounts of an active snapshot or a view over `lowers`, top first; `upper` is (upper, work).

    Raises BusyError for a committed one. A directory that comes twice is stacked once, at its topmost place: overlay
    refuses it twice (ELOOP), and the upper of the two hides the lower whole.
    """
    refuse_committed(kind)
    if kind is Kind.ACTIVE and not lowers:
        return [_bind(upper[0], "rw")]
    shown = _visible(lowers)
    marks = any(lower.marks for lower in shown)
    plan = plan_rootfs(
        list(dict.fromkeys(lower.path for lower in shown)),
        marks=marks,
        empty=empty,
        upper=upper if kind is Kind.ACTIVE else None,
    )
    if isinstance(plan, Bind):
        return [_bind(plan.source, "ro")]
    writable = (f"workdir={plan.work}", f"upperdir={plan.upper}") if plan.upper else ()
    options = (*writable, "lowerdir=" + ":".join(plan.lowers), *OVERLAY_OPTIONS)
    return [Mount(type="overlay", source="overlay", options=options)]


def refuse_committed(kind: Kind) -> None:
    """Raise BusyError for what has no mounts."""
    if kind is Kind.COMMITTED:
        raise BusyError("a committed snapshot has no mounts of its own")


def _visible(lowers: Sequence[Stacked]) -> list[Stacked]:
    shown: list[Stacked] = []
    for lower in lowers:
        shown.append(lower)
        if lower.opaque:
            break
    return shown


def _bind(source: str, access: str) -> Mount:
    return Mount(type="bind", source=source, options=(access, "rbind"))
