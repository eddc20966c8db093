"""Offers: Prepares whose callers would take an existing snapshot, and so download nothing.

Owns the records of lazy layers: made when a layer is offered and can be served, pending until it is proved to be what
its image says, then ready, or fenced off for ever. Refuses nothing: what cannot be served on demand is an ordinary
snapshot, and one line of the log says why.

Concurrency: `take` waits for a layer for so long as was configured. What becomes of a pending one is found out in the
background, one task for each.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final, Protocol

import msgspec
import trio

from nsfs.core.exchanges import Exchanges
from nsfs.errors import CorruptError, NsfsError, UnreachableError
from nsfs.model.lazy import Exchange, State, lazy_name, parse_exchange, parse_offer
from nsfs.model.snapshot import Change, Kind, chain, plan_create, request_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from nsfs.core.ledger import Ledger
    from nsfs.model.filters import Filters
    from nsfs.model.lazy import LazyLayer
    from nsfs.model.policy import Domain, ScopeRequest
    from nsfs.model.profile import ProfileUse
    from nsfs.model.shift import Shift
    from nsfs.model.snapshot import Record, Stacked

log = logging.getLogger(__name__)

_FIRST_PAUSE: Final = 1.0
_LONGEST_PAUSE: Final = 60.0
"""Seconds between two looks at a pending layer whose registry fails."""
_MOST_FENCED: Final = 1000
"""Of which it is remembered beyond their records: a client that pulls such an image again has to be told at once."""


class Lazy(Protocol):
    """Layers that are served on demand: see core.lazy."""

    @property
    def wait(self) -> float:
        """Seconds that calls may take which containerd makes under its locks."""

    def is_guest(self, request: ScopeRequest) -> bool:
        """Whether nothing of an image may be on this host; raises NsfsError for who may not ask so."""

    async def offer(self, request: ScopeRequest, layer: LazyLayer, *, over_local: bool) -> LazyLayer:
        """The layer, ready, pending or unread; raises NsfsError if it cannot be served, or not yet (`retry_after`)."""

    async def settle(self, request: ScopeRequest, layer: LazyLayer) -> LazyLayer:
        """What became of a pending layer: ready or fenced; of an unread one: the same or fenced."""

    async def stack(
        self,
        snapshot: int,
        request: ScopeRequest,
        layers: Sequence[LazyLayer | None],
        shift: Shift | None,
        profile: ProfileUse,
    ) -> tuple[list[Stacked | None], tuple[int, int] | None]:
        """The mounted views of `layers`, top first, None for each that is none; and who owns the top's root.

        With a `shift`, clones of the views; the owner is the one in the image. `profile` is what may be done at most
        with what is read first.
        """

    async def release(self, snapshot: int) -> None:
        """Unmount what only that snapshot stacks; a domain that was its alone ends."""

    def shown(self) -> Mapping[int, Domain]:
        """The domains of snapshots that have views mounted, or a domain of their own, by ID."""

    def stacked(self) -> Mapping[int, Collection[str]]:
        """The maps of the views that snapshots have mounted, by ID."""


class Offers:
    """The service."""

    def __init__(self, ledger: Ledger, lazy: Lazy, nursery: trio.Nursery, on_fenced: Callable[[Record], None]) -> None:
        """`on_fenced` is told of each layer that is fenced off, and once more after a restart."""
        self._on_fenced = on_fenced
        self._fenced: dict[str, str] = {}
        """Why layers were fenced off, by the names of their records, which may be gone."""
        self._settling: set[int] = set()
        """By ID, layers that are looked after."""
        self._ledger = ledger
        self._lazy = lazy
        self._nursery = nursery
        self._exchanges = Exchanges()

    async def take(self, new: Record) -> Record | None:
        """The snapshot to be had instead of `new`; the caller's next question finds it. None where there is none.

        Raises UnreachableError where there will be one, and the caller is to come back.
        """
        try:
            record = await self._find_or_make(new)
        except NsfsError as error:
            if isinstance(error, UnreachableError) and error.retry_after is not None:
                raise
            _say_why(new, error)
            return None
        await self._exchanges.begin(_exchange_of(record), record)
        return record

    def answer(self, snapshotter: str, filters: Filters, namespace: str | None) -> list[Record] | None:
        """What the question of an exchange finds; None for any other question.

        Without a namespace and without an exchange nobody knows whose snapshot is meant, so none is found.
        """
        exchange = parse_exchange(filters)
        if exchange is None:
            return None
        meant = self._exchanges.answer(snapshotter, exchange, namespace)
        record = self._ledger.table(snapshotter).get(meant.name) if meant else None
        if record is not None:
            return [record]
        if namespace is not None:
            return None
        log.warning("a List for chain ID %s comes without its Prepare, or too late", exchange.target)
        return []

    def resume(self) -> None:
        """Go on with what becomes of layers that an earlier daemon left pending, or fenced."""
        for record in list(self._ledger.records()):
            if record.layer is not None and record.layer.state is State.PENDING:
                self._begin(record, record.layer)
            elif record.layer is not None and record.layer.state is State.FENCED:
                self._tell_fenced(record, record.layer)

    async def _find_or_make(self, new: Record) -> Record:
        offered = parse_offer(new.labels)
        table = self._ledger.table(new.snapshotter)
        name = lazy_name(new.namespace, new.snapshotter, new.parent, offered)
        found = table.get(name)
        if name in self._fenced:
            raise CorruptError(f"fenced off: {self._fenced[name]}")
        if found is None:
            over_local = any(each.layer is None for each in chain(table, new))
            layer = await self._lazy.offer(request_of(new, [offered]), offered, over_local=over_local)
            found = await self._make(msgspec.structs.replace(new, name=name, kind=Kind.COMMITTED, layer=layer))
        if found.layer is not None and found.layer.state is State.FENCED:
            raise CorruptError(f"fenced off: {found.layer.reason}")
        return found

    async def _make(self, record: Record) -> Record:
        table = self._ledger.table(record.snapshotter)
        async with self._ledger.lock:
            other = table.get(record.name)
            if other is not None:
                return other
            record = msgspec.structs.replace(record, id=self._ledger.take_number())
            await self._ledger.carry_out(plan_create(table, record))
        if record.layer is not None and record.layer.state is State.PENDING:
            self._begin(record, record.layer)
        return record

    def doubt(self, records: Iterable[Record]) -> None:
        """A mount of these found that one is not what its image says: find out which, of those that nobody has read."""
        for record in records:
            if record.layer is not None and record.layer.state is State.UNREAD:
                self._begin(record, record.layer)

    def _begin(self, record: Record, layer: LazyLayer) -> None:
        if record.id not in self._settling:
            self._settling.add(record.id)
            self._nursery.start_soon(self._settle, record, layer)

    async def _settle(self, record: Record, layer: LazyLayer) -> None:
        """Find out what becomes of a layer, however long that takes, and remember it."""
        try:
            settled = await self._find_out(record, layer)
            if settled is not None:
                await self._remember(record, settled)
        finally:
            self._settling.discard(record.id)

    async def _find_out(self, record: Record, layer: LazyLayer) -> LazyLayer | None:
        """The layer as it turns out; None where its record goes before."""
        pause = _FIRST_PAUSE
        while self._known(record) is not None:
            try:
                return await self._lazy.settle(request_of(record, [layer]), layer)
            except NsfsError as error:
                log.warning("layer %s of %s stays %s: %s", layer.blob, layer.reference, layer.state, error)
                await trio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
        return None

    async def _remember(self, record: Record, settled: LazyLayer) -> None:
        async with self._ledger.lock:
            found = self._known(record)
            if found is None:
                return
            put = msgspec.structs.replace(found, layer=settled)
            await self._ledger.carry_out(Change(gone=found, put=put))
        if settled.state is State.FENCED:
            log.error("layer %s of %s is fenced off: %s", settled.blob, settled.reference, settled.reason)
            self._tell_fenced(put, settled)

    def _tell_fenced(self, record: Record, layer: LazyLayer) -> None:
        if len(self._fenced) >= _MOST_FENCED:
            del self._fenced[next(iter(self._fenced))]
        self._fenced[record.name] = layer.reason
        self._on_fenced(record)

    def _known(self, record: Record) -> Record | None:
        """The record as it is now, if it still is."""
        found = self._ledger.table(record.snapshotter).get(record.name)
        return found if found is not None and found.id == record.id else None


def _exchange_of(record: Record) -> Exchange:
    assert record.layer is not None, "only lazy layers are offered"
    return Exchange(record.layer.chain, record.parent)


def _say_why(new: Record, error: NsfsError) -> None:
    log.info(
        "not lazy: namespace=%s snapshotter=%s image=%s layer=%s reason=%r",
        new.namespace,
        new.snapshotter,
        new.labels.get("containerd.io/snapshot/cri.image-ref", ""),
        new.labels.get("containerd.io/snapshot/cri.layer-digest", ""),
        str(error),
    )
