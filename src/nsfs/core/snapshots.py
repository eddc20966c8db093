"""Snapshots: what containerd's calls mean, carried out.

Owns the records of every plugin name, in memory as they are on disk, and the directories that belong to them. Refuses
what `model.snapshot` refuses. `remove` deletes a record and nothing else; what it leaves behind is `cleanup`'s.

Concurrency: one lock around everything that changes records, from the decision to the durable write, so that a call
sees a change whole or not at all. Whoever only asks takes no lock. containerd holds locks of its own through these
calls, so nothing here waits for a network but `mounts`, which it asks without any.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

import trio

from nsfs.core.flights import Flights
from nsfs.errors import UsageError
from nsfs.model.filters import parse_filters
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
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence

    from nsfs.model.snapshot import Mount

log = logging.getLogger(__name__)

_USAGE_FRESH: Final = 5.0
"""Seconds for which a walk's result is given again: containerd asks for every active snapshot every ten."""
_WALKERS: Final = 2
_ROOT: Final = (0, 0)


class Usage(Protocol):
    """What a snapshot takes by itself, without what it stands on."""

    @property
    def size(self) -> int:
        """Bytes of disk."""

    @property
    def inodes(self) -> int:
        """How many."""


class Records(Protocol):
    """Where snapshots are remembered, durably. Blocks."""

    def snapshots(self) -> list[Record]:
        """All of them."""

    def last_snapshot(self) -> int:
        """The highest ID ever given."""

    def change_snapshots(self, change: Change) -> None:
        """Carry out a change, all of it or nothing."""


class Directories(Protocol):
    """Where active snapshots are written. Blocks."""

    def upper(self, number: int) -> tuple[str, str]:
        """(upper, work) of a snapshot."""

    def make(self, number: int, owner: tuple[int, int]) -> None:
        """Make them, empty."""

    def owner(self, number: int) -> tuple[int, int]:
        """Who owns the root of a snapshot's tree."""

    def link(self, number: int) -> str:
        """A short path to the tree of a snapshot, to be stacked."""

    def measure(self, number: int) -> Usage:
        """Walk a snapshot's tree."""

    def sweep(self, keep: Collection[int], below: int) -> int:
        """Delete what belongs to none of `keep`, of all numbers lower than `below`."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: through which plugin name, and for which namespace where the call says so."""

    snapshotter: str
    namespace: str | None = None


class _Table:
    """The records of one plugin name."""

    def __init__(self) -> None:
        self._records: dict[str, Record] = {}
        self._children: Counter[str] = Counter()

    def get(self, name: str) -> Record | None:
        return self._records.get(name)

    def has_children(self, name: str) -> bool:
        return self._children[name] > 0

    def records(self) -> Iterable[Record]:
        return self._records.values()

    def apply(self, change: Change) -> None:
        if change.gone is not None:
            del self._records[change.gone.name]
            self._children[change.gone.parent] -= 1
        if change.put is not None:
            self._records[change.put.name] = change.put
            self._children[change.put.parent] += 1


class Snapshots:
    """The service. Made by `open_snapshots`."""

    def __init__(
        self,
        records: Records,
        directories: Directories,
        nursery: trio.Nursery,
        *,
        empty: str,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self._records = records
        self._directories = directories
        self._empty = empty
        self._clock = clock
        self._lock = trio.Lock()
        self._sweeping = trio.Lock()
        self._walking: Flights[tuple[Usage, float]] = Flights(nursery)
        self._walkers = trio.CapacityLimiter(_WALKERS)
        self._walked: dict[int, tuple[Usage, float]] = {}
        self._next = records.last_snapshot() + 1
        self._tables: dict[str, _Table] = {}
        for record in records.snapshots():
            self._table_of(record.snapshotter).apply(Change(put=record))

    async def create(self, caller: Caller, kind: Kind, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        """Prepare or View: a new snapshot over `parent`, and its mounts."""
        table = self._table(caller)
        namespace = namespace_of(key, caller.namespace)
        async with self._lock:
            now = self._clock()
            new = Record(
                snapshotter=caller.snapshotter,
                name=key,
                namespace=namespace,
                id=self._next,
                kind=kind,
                parent=parent,
                labels=dict(labels),
                created=now,
                updated=now,
            )
            change = plan_create(table, new)
            self._next += 1
            await self._make_directory(table, new)
            await self._carry_out(table, change)
        return await self._mounts(table, new)

    async def mounts(self, caller: Caller, key: str) -> list[Mount]:
        """The mounts of an active snapshot or a view."""
        table = self._table(caller)
        return await self._mounts(table, find(table, key, caller.namespace))

    async def commit(self, caller: Caller, name: str, key: str, parent: str, labels: Mapping[str, str]) -> None:
        """Turn an active snapshot into a committed one of another name."""
        table = self._table(caller)
        async with self._lock:
            await self._carry_out(
                table,
                plan_commit(
                    table, name, key, labels=labels, parent=parent, claimed=caller.namespace, now=self._clock()
                ),
            )

    async def remove(self, caller: Caller, key: str) -> None:
        """Forget a snapshot."""
        table = self._table(caller)
        async with self._lock:
            await self._carry_out(table, plan_remove(table, key, caller.namespace))

    async def update(self, caller: Caller, name: str, labels: Mapping[str, str], paths: Sequence[str]) -> Record:
        """Change labels."""
        table = self._table(caller)
        async with self._lock:
            change = plan_update(table, name, labels=labels, paths=paths, claimed=caller.namespace, now=self._clock())
            await self._carry_out(table, change)
        return self.stat(caller, name)

    def stat(self, caller: Caller, name: str) -> Record:
        """A snapshot's record; raises NotFoundError."""
        return find(self._table(caller), name, caller.namespace)

    def select(self, caller: Caller, filters: Sequence[str]) -> list[Record]:
        """The records of the caller's namespace; of all of them where the call names none."""
        return select(self._table(caller).records(), parse_filters(filters), caller.namespace)

    async def usage(self, caller: Caller, key: str) -> Usage:
        """What a snapshot takes; an active one's changes, so it is looked at again after a while."""
        record = self.stat(caller, key)
        found = self._walked.get(record.id)
        if found is None or found[1] < trio.current_time():
            found = await self._walking.join(str(record.id), partial(self._walk, record))
        return found[0]

    async def _walk(self, record: Record) -> tuple[Usage, float]:
        usage = await trio.to_thread.run_sync(self._directories.measure, record.id, limiter=self._walkers)
        until = trio.current_time() + _USAGE_FRESH if record.kind is Kind.ACTIVE else float("inf")
        self._walked[record.id] = usage, until
        return usage, until

    async def cleanup(self) -> int:
        """Delete what belongs to no snapshot any more; how many directories that was."""
        async with self._sweeping:
            async with self._lock:
                keep = {record.id for table in self._tables.values() for record in table.records()}
                below = self._next
            for number in self._walked.keys() - keep:
                del self._walked[number]
            return await trio.to_thread.run_sync(self._directories.sweep, keep, below)

    def _table(self, caller: Caller) -> _Table:
        if not caller.snapshotter:
            raise UsageError("the call does not say which snapshotter it means")
        return self._table_of(caller.snapshotter)

    def _table_of(self, snapshotter: str) -> _Table:
        return self._tables.setdefault(snapshotter, _Table())

    async def _make_directory(self, table: _Table, new: Record) -> None:
        """The root of a tree is its upper's: it takes the owner of the one below."""
        parent = table.get(new.parent)

        def make() -> None:
            owner = _ROOT if parent is None else self._directories.owner(parent.id)
            self._directories.make(new.id, owner)

        await trio.to_thread.run_sync(make)

    async def _carry_out(self, table: _Table, change: Change) -> None:
        await trio.to_thread.run_sync(self._records.change_snapshots, change)
        # CHECKPOINT-FREE: what is on disk and what is in memory are one, also for a caller who is cancelled here.
        table.apply(change)
        if change.gone is not None:
            self._walked.pop(change.gone.id, None)

    async def _mounts(self, table: _Table, record: Record) -> list[Mount]:
        parents = chain(table, record)

        def stack() -> list[Stacked]:
            return [Stacked(self._directories.link(parent.id)) for parent in parents]

        lowers = await trio.to_thread.run_sync(stack) if parents else []
        return plan_mounts(record.kind, lowers, upper=self._directories.upper(record.id), empty=self._empty)


@asynccontextmanager
async def open_snapshots(records: Records, directories: Directories, *, empty: str) -> AsyncIterator[Snapshots]:
    """A service that has read its records and deletes in the background what an earlier daemon left behind."""
    async with trio.open_nursery() as nursery:
        snapshots = await trio.to_thread.run_sync(partial(Snapshots, records, directories, nursery, empty=empty))
        nursery.start_soon(snapshots.cleanup)
        yield snapshots
        nursery.cancel_scope.cancel()
