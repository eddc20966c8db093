"""Snapshots: what containerd's calls mean, carried out.

Owns the directories and views that belong to snapshots; their records are the ledger's. Refuses what `model.snapshot`
refuses. `remove` deletes a record and nothing else; what it leaves behind is `cleanup`'s.

Concurrency: containerd holds locks of its own through all calls but `mounts`: that one waits for a layer for as long as
it takes, `create` for as long as is configured, the others for nothing but the local disk.
"""

from __future__ import annotations

import logging
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

import msgspec
import trio

from nsfs.core.flights import Flights
from nsfs.core.ledger import Ledger
from nsfs.core.offers import Offers
from nsfs.core.recall import Recall
from nsfs.errors import CorruptError, DeniedError, ExistsError, NsfsError, UnreachableError, UsageError
from nsfs.model.filters import parse_filters
from nsfs.model.guest import plan_guest_mounts
from nsfs.model.lazy import State, is_offered, is_unpack
from nsfs.model.namespaces import plan_drop
from nsfs.model.shift import between
from nsfs.model.snapshot import (
    Change,
    Kind,
    Mount,
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
    refuse_committed,
    request_of,
    select,
    shift_of,
    use_of,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence

    from nsfs.core.clones import Clones
    from nsfs.core.ledger import Records, Table
    from nsfs.core.offers import Lazy
    from nsfs.core.recall import Runtime
    from nsfs.model.policy import Domain

log = logging.getLogger(__name__)

_USAGE_FRESH: Final = 5.0
"""Seconds for which a walk's result is given again: containerd asks for every active snapshot every ten."""
_UNPACK_WAIT: Final = 10.0
"""Seconds for the mounts of an unpack, which asks once, and fails where they are late."""
_WALKERS: Final = 2
_ROOT: Final = (0, 0)
_END: Final = 30.0
"""Seconds to unmount every view at the end of the daemon."""


class Usage(Protocol):
    """What a snapshot takes by itself, without what it stands on."""

    @property
    def size(self) -> int:
        """Bytes of disk."""

    @property
    def inodes(self) -> int:
        """How many."""


class Directories(Protocol):
    """Where active snapshots are written. Blocks."""

    def upper(self, number: int) -> tuple[str, str]:
        """(upper, work) of a snapshot."""

    def make(self, number: int, owner: tuple[int, int]) -> None:
        """Make them, empty."""

    def owner(self, number: int) -> tuple[int, int]:
        """Who owns the root of a snapshot's tree."""

    def adopt(self, number: int, owner: tuple[int, int]) -> None:
        """Give the root of a snapshot's tree to `owner`, while nothing is in there."""

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


class Snapshots:
    """The service. Made by `open_snapshots`."""

    def __init__(
        self,
        ledger: Ledger,
        directories: Directories,
        lazy: Lazy,
        clones: Clones,
        offers: Offers,
        nursery: trio.Nursery,
        *,
        empty: str,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self._ledger = ledger
        self._directories = directories
        self._lazy = lazy
        self._clones = clones
        self._offers = offers
        self._empty = empty
        self._clock = clock
        self._sweeping = trio.Lock()
        self._walking: Flights[tuple[Usage, float]] = Flights(nursery)
        self._walkers = trio.CapacityLimiter(_WALKERS)
        self._walked: dict[int, tuple[Usage, float]] = {}

    async def create(self, caller: Caller, kind: Kind, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        """Prepare or View: a new snapshot over `parent`, and its mounts.

        Raises ExistsError for a layer that need not be downloaded: the caller asks next which snapshot that is.
        """
        table = self._table(caller)
        new = self._new(caller, kind, key, parent, labels)
        if kind is Kind.ACTIVE and is_offered(labels):
            plan_create(table, new)
            if await self._offers.take(new) is not None:
                raise ExistsError(f"this layer need not be downloaded: {key}")
        self._refuse_guests_layer(table, new)
        async with self._ledger.lock:
            new = msgspec.structs.replace(new, id=self._ledger.take_number())
            change = plan_create(table, new)
            await self._make_directory(table, new)
            await self._ledger.carry_out(change)
        return await self._first_mounts(table, new)

    async def mounts(self, caller: Caller, key: str) -> list[Mount]:
        """The mounts of an active snapshot or a view."""
        table = self._table(caller)
        return await self._mounts(table, find(table, key, caller.namespace))

    async def commit(self, caller: Caller, name: str, key: str, parent: str, labels: Mapping[str, str]) -> None:
        """Turn an active snapshot into a committed one of another name."""
        table = self._table(caller)
        plan = partial(plan_commit, table, name, key, labels=labels, parent=parent, claimed=caller.namespace)
        async with self._ledger.lock:
            change = plan(now=self._clock())
            await self._ledger.carry_out(change)
        if change.put is not None:
            self._walked.pop(change.put.id, None)

    async def remove(self, caller: Caller, key: str) -> None:
        """Forget a snapshot."""
        async with self._ledger.lock:
            await self._ledger.carry_out(plan_remove(self._table(caller), key, caller.namespace))

    async def update(self, caller: Caller, name: str, labels: Mapping[str, str], paths: Sequence[str]) -> Record:
        """Change labels."""
        plan = partial(plan_update, self._table(caller), name, labels=labels, paths=paths, claimed=caller.namespace)
        async with self._ledger.lock:
            await self._ledger.carry_out(plan(now=self._clock()))
        return self.stat(caller, name)

    def stat(self, caller: Caller, name: str) -> Record:
        """A snapshot's record; raises NotFoundError."""
        return find(self._table(caller), name, caller.namespace)

    def select(self, caller: Caller, filters: Sequence[str]) -> list[Record]:
        """The records of the caller's namespace; of all of them where the call names none."""
        table, parsed = self._table(caller), parse_filters(filters)
        answer = self._offers.answer(caller.snapshotter, parsed, caller.namespace)
        return select(table.records(), parsed, caller.namespace) if answer is None else answer

    async def usage(self, caller: Caller, key: str) -> Usage:
        """What a snapshot takes; an active one's changes, so it is looked at again after a while."""
        record = self.stat(caller, key)
        found = self._walked.get(record.id)
        if found is None or found[1] < trio.current_time():
            found = await self._walking.join(f"{record.id} {record.kind}", partial(self._walk, record))
        return found[0]

    async def _walk(self, record: Record) -> tuple[Usage, float]:
        usage = await trio.to_thread.run_sync(self._directories.measure, record.id, limiter=self._walkers)
        until = trio.current_time() + _USAGE_FRESH if record.kind is Kind.ACTIVE else float("inf")
        self._walked[record.id] = usage, until
        return usage, until

    async def cleanup(self) -> int:
        """Unmount and delete what belongs to no snapshot any more; how many directories that was."""
        async with self._sweeping:
            async with self._ledger.lock:
                keep = {record.id for record in self._ledger.records()}
                below = self._ledger.next
            for number in self._walked.keys() - keep:
                del self._walked[number]
            await self._release(keep)
            return await trio.to_thread.run_sync(self._directories.sweep, keep, below)

    def all(self) -> list[Record]:
        """The records of every plugin name."""
        return list(self._ledger.records())

    def shown(self) -> Mapping[int, Domain]:
        """Where the views of those that are mounted are, by ID."""
        return self._lazy.shown()

    def stacked(self) -> Mapping[int, Collection[str]]:
        """The maps that those are of."""
        return self._lazy.stacked()

    async def drop(self, namespace: str) -> int:
        """Forget all of a namespace's snapshots, take away and delete what they had; how many that were."""
        async with self._ledger.lock:
            gone = plan_drop(record for record in self._ledger.records() if record.namespace == namespace)
            for record in gone:
                await self._ledger.carry_out(Change(gone=record))
        await self.cleanup()
        return len(gone)

    def resume(self) -> None:
        """Go on with what an earlier daemon began."""
        self._offers.resume()

    async def end(self) -> None:
        """Unmount every view, in use or not."""
        with trio.move_on_after(_END, shield=True):
            await self._release(())

    async def _release(self, keep: Collection[int]) -> None:
        for number in (self._lazy.shown().keys() | self._clones.stacked()).difference(keep):
            try:
                await self._lazy.release(number)
                await self._clones.release(number)
            except NsfsError as error:
                log.warning("views of snapshot %d are still mounted: %s", number, error)

    def _table(self, caller: Caller) -> Table:
        if not caller.snapshotter:
            raise UsageError("the call does not say which snapshotter it means")
        return self._ledger.table(caller.snapshotter)

    def _new(self, caller: Caller, kind: Kind, key: str, parent: str, labels: Mapping[str, str]) -> Record:
        now = self._clock()
        return Record(
            snapshotter=caller.snapshotter,
            name=key,
            namespace=namespace_of(key, caller.namespace),
            id=0,
            kind=kind,
            parent=parent,
            labels=dict(labels),
            created=now,
            updated=now,
            shift=shift_of(key, labels, self._table(caller).get(parent)),
        )

    def _refuse_guests_layer(self, table: Table, new: Record) -> None:
        """Raise where containerd would unpack a layer of which nothing may be on this host."""
        if is_unpack(new.name) and self._lazy.is_guest(request_of(new, [each.layer for each in chain(table, new)])):
            raise DeniedError(
                "nothing of this image may be on the host, and containerd would unpack it here",
                hint="pull it so that containerd says which layers it means: nsfs pull, or see docs/containerd.md",
            )

    async def _make_directory(self, table: Table, new: Record) -> None:
        """The root of a tree is its upper's: it takes the owner of the one below."""
        parent = table.get(new.parent)

        def make() -> None:
            if parent is None or parent.layer is not None:
                owner, shift = _ROOT, new.shift
            else:
                owner, shift = self._directories.owner(parent.id), between(parent.shift, new.shift)
            self._directories.make(new.id, shift.owner(*owner) if shift else owner)

        await trio.to_thread.run_sync(make)

    async def _first_mounts(self, table: Table, new: Record) -> list[Mount]:
        """The mounts of a new snapshot, if they can be had in time.

        If not, a caller who will ask for them again is told a place that does not exist; an unpack asks once, and is
        told to come back later. A snapshot whose mounts cannot be had at all is not made.
        """
        failure: NsfsError | None = None
        with trio.move_on_after(max(self._lazy.wait, _UNPACK_WAIT) if is_unpack(new.name) else self._lazy.wait):
            try:
                return await self._mounts(table, new)
            except NsfsError as error:
                failure = error
        if failure is None and not is_unpack(new.name):
            return [Mount(type="bind", source=f"{self._empty}/not-ready-ask-again", options=("ro", "rbind"))]
        async with self._ledger.lock:
            if table.get(new.name) == new:
                await self._ledger.carry_out(Change(gone=new))
        raise failure or UnreachableError(f"what it stands on is still being read for the first time: {new.name}")

    async def _mounts(self, table: Table, record: Record) -> list[Mount]:
        refuse_committed(record.kind)
        parents = chain(table, record)
        for parent in parents:
            _refuse_fenced(parent)
        views: list[Stacked | None] = [None] * len(parents)
        owner = None
        layers = [parent.layer for parent in parents]
        request = request_of(record, layers)
        if parents and self._lazy.is_guest(request):
            upper = self._directories.upper(record.id)
            return plan_guest_mounts(record.kind, parents, upper=upper, empty=self._empty)
        if any(layers):
            try:
                views, owner = await self._lazy.stack(record.id, request, layers, record.shift, use_of(record))
            except CorruptError:
                self._offers.doubt(parents)
                raise
        if owner is not None and record.kind is Kind.ACTIVE:
            owner = record.shift.owner(*owner) if record.shift else owner
            await trio.to_thread.run_sync(self._directories.adopt, record.id, owner)
        local = await self._show_unpacked(record, [parent for parent in parents if parent.layer is None])
        lowers = [view or Stacked(local[parent.id]) for view, parent in zip(views, parents, strict=True)]
        return plan_mounts(record.kind, lowers, upper=self._directories.upper(record.id), empty=self._empty)

    async def _show_unpacked(self, record: Record, parents: Sequence[Record]) -> dict[int, str]:
        """Where the trees of unpacked layers show, by snapshot, with the owners that `record` is to see."""

        def link() -> dict[int, str]:
            return {parent.id: self._directories.link(parent.id) for parent in parents}

        paths = await trio.to_thread.run_sync(link) if parents else {}
        shifts = {parent.id: between(parent.shift, record.shift) for parent in parents}
        for shift in {shift for shift in shifts.values() if shift is not None}:
            sources = {number: paths[number] for number, needed in shifts.items() if needed == shift}
            paths |= await self._clones.acquire(sources, shift, record.id)
        return paths


def _refuse_fenced(record: Record) -> None:
    if record.layer is not None and record.layer.state is State.FENCED:
        raise CorruptError(f"layer {record.layer.blob} of {record.layer.reference}: {record.layer.reason}")


@asynccontextmanager
async def open_snapshots(
    records: Records, directories: Directories, lazy: Lazy, clones: Clones, *, empty: str, runtime: Runtime
) -> AsyncIterator[Snapshots]:
    """A service that has read its records, and goes on in the background with what an earlier daemon left.

    Its views stay mounted at the end: `Snapshots.end` takes them away.
    From `runtime` it takes back what turns out not to be what its image says.
    """
    ledger = await trio.to_thread.run_sync(Ledger, records)
    async with trio.open_nursery() as nursery:
        offers = Offers(ledger, lazy, nursery, Recall(ledger, runtime, nursery).begin)
        snapshots = Snapshots(ledger, directories, lazy, clones, offers, nursery, empty=empty)
        nursery.start_soon(snapshots.cleanup)
        snapshots.resume()
        try:
            yield snapshots
        finally:
            nursery.cancel_scope.cancel()
