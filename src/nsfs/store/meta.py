"""The daemon's own records, in one LMDB environment that only the daemon writes.

Keys and values, described here and nowhere else:
    db `about`      version, last snapshot (highest ID ever), latest uid (of a domain), cap (of pools) -> ASCII decimal
    db `domains`    name of a domain -> msgpack of DomainRecord
    db `mounts`     mount ID (ASCII) -> msgpack of MountRecord
    db `snapshots`  snapshot ID (8 bytes, big-endian) -> msgpack of snapshot.Record, which has the (long) name
    db `namespaces` name of a namespace that ever had a snapshot, and was not ended since -> nothing
    db `costs`      sha256 of owner, sha256 of server (host and port), both raw -> msgpack of report.Cost
    db `stacks`     who stacks lowers: a mount ID, or "snapshot " and a number (ASCII) -> msgpack array of Lower

No transaction stays open across an await; writes are durable when a method returns; opened anew where a commit failed.
"""

from __future__ import annotations

import hashlib
import os
import threading
from contextlib import contextmanager
from itertools import takewhile
from typing import TYPE_CHECKING, TypeVar

import lmdb
import msgspec
from msgspec import Struct

from nsfs.errors import CorruptError, NotFoundError, UnsupportedError
from nsfs.model.mounts import Lower, MountRecord
from nsfs.model.report import Cost, plan_costs
from nsfs.model.snapshot import Record
from nsfs.store.databases import mapped_errors
from nsfs.store.resident import Resident

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from nsfs.model.snapshot import Change

T = TypeVar("T")

_COST_OWNER = 32
"""Bytes of a key that are the owner's."""
FORMAT = 1
_MAP_SIZE = 1 << 30
_LAST = b"last snapshot"
_LATEST_UID = b"latest uid"
_CAP = b"cap"
_NAME = "the database of the daemon"


class DomainRecord(Struct, frozen=True, kw_only=True):
    """What outlives a domain's workers; for as long as there is anything of the domain."""

    uid: int = 0
    """Whose its files are; 0 where they are the daemon's."""
    layouts: tuple[str, ...] = ()
    """Directories of image layouts that its worker may read."""


class Meta:
    """The environment, open from the first; `close` it.

    LMDB refuses an environment in which the disk failed in the middle of a commit. It is then opened anew, at the next
    call that can, and says what was durable before.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._opening = threading.Lock()
        self._resident = Resident([os.path.join(path, "data.mdb")])
        self._is_usable = True
        self._open()

    def close(self) -> None:
        """Nothing may be under way."""
        self._env.close()
        self._resident.close()

    def _open(self) -> None:
        env = self._env = _open_environment(self._path)
        self._resident.follow()
        self._about = env.open_db(b"about")
        self._domains = env.open_db(b"domains")
        self._mounts = env.open_db(b"mounts")
        self._snapshots = env.open_db(b"snapshots")
        self._namespaces = env.open_db(b"namespaces")
        self._stacks = env.open_db(b"stacks")
        self._costs = env.open_db(b"costs")

    @contextmanager
    def _transaction(self, *, write: bool = False) -> Iterator[lmdb.Transaction[bytes]]:
        with mapped_errors(_NAME, self._path), self._begin(write=write) as txn:
            yield txn
        if write:
            self._resident.follow()

    def _begin(self, *, write: bool) -> lmdb.Transaction[bytes]:
        if self._is_usable:
            try:
                return self._env.begin(write=write)
            except lmdb.PanicError:
                self._is_usable = False
        with self._opening:
            if not self._is_usable:
                self._env.close()
                self._open()
                self._is_usable = True
        return self._env.begin(write=write)

    def uids(self) -> dict[str, int]:
        """The uid of every domain that has one."""
        with self._transaction() as txn:
            records = {bytes(key).decode(): _decode(value, DomainRecord) for key, value in txn.cursor(self._domains)}
        return {domain: record.uid for domain, record in records.items() if record.uid}

    def latest_uid(self) -> int:
        """The uid that was given to a domain last; 0 where none was."""
        with self._transaction() as txn:
            return int(txn.get(_LATEST_UID, b"0", db=self._about))

    def put_uid(self, domain: str, uid: int) -> None:
        """Give a domain its uid."""
        with self._transaction(write=True) as txn:
            self._change_domain(txn, domain, uid=uid)
            txn.put(_LATEST_UID, str(uid).encode(), db=self._about)

    def layouts(self, domain: str) -> frozenset[str]:
        """The image layouts that a domain's worker may read."""
        with self._transaction() as txn:
            return frozenset(self._domain(txn, domain).layouts)

    def add_layout(self, domain: str, directory: str) -> None:
        """Let a domain's worker read one more."""
        with self._transaction(write=True) as txn:
            known = self._domain(txn, domain).layouts
            self._change_domain(txn, domain, layouts=tuple(sorted({*known, directory})))

    def forget_domain(self, domain: str) -> None:
        """Nothing is left of it."""
        with self._transaction(write=True) as txn:
            txn.delete(domain.encode(), db=self._domains)

    def _domain(self, txn: lmdb.Transaction[bytes], domain: str) -> DomainRecord:
        value = txn.get(domain.encode(), db=self._domains)
        return DomainRecord() if value is None else _decode(value, DomainRecord)

    def _change_domain(self, txn: lmdb.Transaction[bytes], domain: str, **fields: object) -> None:
        record = msgspec.structs.replace(self._domain(txn, domain), **fields)
        txn.put(domain.encode(), msgspec.msgpack.encode(record), db=self._domains)

    def mounts(self) -> list[MountRecord]:
        """All mounts, by ID."""
        with self._transaction() as txn:
            return [_decode(value, MountRecord) for _, value in txn.cursor(self._mounts)]

    def mount_at(self, target: str) -> MountRecord:
        """The mount whose target is `target`; raises NotFoundError."""
        for record in self.mounts():
            if record.target == target:
                return record
        raise NotFoundError(f"nothing of nsfs is mounted there: {target}", hint="nsfs status lists the mounts")

    def put_mount(self, record: MountRecord) -> None:
        """Remember a mount."""
        with self._transaction(write=True) as txn:
            txn.put(record.id.encode(), msgspec.msgpack.encode(record), db=self._mounts)

    def delete_mount(self, mount_id: str) -> None:
        """Forget a mount, if it is known."""
        with self._transaction(write=True) as txn:
            txn.delete(mount_id.encode(), db=self._mounts)

    def stacks(self) -> dict[str, list[Lower]]:
        """The lowers of everybody who stacks some, as far as they were mounted in this boot or an earlier one."""
        with self._transaction() as txn:
            return {bytes(key).decode(): _decode(value, list[Lower]) for key, value in txn.cursor(self._stacks)}

    def put_stack(self, user: str, lowers: Sequence[Lower]) -> None:
        """Remember what one stacks."""
        with self._transaction(write=True) as txn:
            txn.put(user.encode(), msgspec.msgpack.encode(lowers), db=self._stacks)

    def delete_stack(self, user: str) -> None:
        """Forget it, if it is known."""
        with self._transaction(write=True) as txn:
            txn.delete(user.encode(), db=self._stacks)

    def snapshots(self) -> list[Record]:
        """All snapshots, by ID."""
        with self._transaction() as txn:
            return [_decode(value, Record) for _, value in txn.cursor(self._snapshots)]

    def last_snapshot(self) -> int:
        """The highest snapshot ID that was ever put; 0 where none was."""
        with self._transaction() as txn:
            return int(txn.get(_LAST, b"0", db=self._about))

    def change_snapshots(self, change: Change) -> None:
        """Carry out a change, all of it or nothing."""
        with self._transaction(write=True) as txn:
            if change.gone is not None:
                txn.delete(_number(change.gone.id), db=self._snapshots)
            if change.put is not None:
                txn.put(_number(change.put.id), msgspec.msgpack.encode(change.put), db=self._snapshots)
                last = max(change.put.id, int(txn.get(_LAST, b"0", db=self._about)))
                txn.put(_LAST, str(last).encode(), db=self._about)
                if change.put.namespace:
                    txn.put(change.put.namespace.encode(), b"", db=self._namespaces)

    def pool_cap(self, first: int) -> int:
        """What pools may take where nobody said it: `first`, in bytes, as it was at the first call ever."""
        with self._transaction(write=True) as txn:
            found = txn.get(_CAP, db=self._about)
            if found is None:
                txn.put(_CAP, str(first).encode(), db=self._about)
        return first if found is None else int(found)

    def namespaces(self) -> list[str]:
        """Those that ever had a snapshot, and were not ended since."""
        with self._transaction() as txn:
            return [key.decode() for key, _ in txn.cursor(self._namespaces)]

    def forget_namespace(self, namespace: str) -> None:
        """Forget one, if it is known."""
        with self._transaction(write=True) as txn:
            txn.delete(namespace.encode(), db=self._namespaces)

    def costs(self, owner: str) -> list[Cost]:
        """What an owner's requests cost so far, by server."""
        with self._transaction() as txn:
            return [_decode(value, Cost) for _, value in self._costs_of(txn, owner)]

    def add_costs(self, owner: str, costs: Sequence[Cost]) -> None:
        """Add what they cost since; servers that are too many have one name (`report.plan_costs`)."""
        with self._transaction(write=True) as txn:
            known = {cost.server: cost for _, value in self._costs_of(txn, owner) for cost in [_decode(value, Cost)]}
            for cost in plan_costs(known, costs):
                total = known[cost.server].plus(cost) if cost.server in known else cost
                txn.put(_cost_key(owner, cost.server), msgspec.msgpack.encode(total), db=self._costs)

    def forget_costs(self, owner: str) -> None:
        """Forget what an owner's requests cost, who is no more."""
        with self._transaction(write=True) as txn:
            for key, _ in list(self._costs_of(txn, owner)):
                txn.delete(key, db=self._costs)

    def _costs_of(self, txn: lmdb.Transaction[bytes], owner: str) -> Iterator[tuple[bytes, bytes]]:
        first = _cost_key(owner, "")[:_COST_OWNER]
        cursor = txn.cursor(self._costs)
        cursor.set_range(first)
        return takewhile(lambda pair: pair[0].startswith(first), cursor)


def _cost_key(owner: str, server: str) -> bytes:
    """Hashes, since names may be longer than LMDB's keys; the owner's of one length, so that none begins another's."""
    return b"".join(hashlib.sha256(part.encode()).digest() for part in (owner, server))


def _number(snapshot: int) -> bytes:
    return snapshot.to_bytes(8, "big")


def _decode(value: bytes, kind: type[T]) -> T:
    try:
        return msgspec.msgpack.decode(value, type=kind)
    except msgspec.MsgspecError as error:
        raise CorruptError(f"a record of the daemon cannot be read: {error}") from error


@contextmanager
def open_meta(path: str) -> Iterator[Meta]:
    """Open (or create) the environment at directory `path`.

    Raises UnsupportedError for a newer format, CorruptError, NoSpaceError.
    """
    with mapped_errors(_NAME, path):
        os.makedirs(path, mode=0o700, exist_ok=True)
        meta = Meta(path)
    try:
        yield meta
    finally:
        meta.close()


def _open_environment(path: str) -> lmdb.Environment:
    env = lmdb.open(path, map_size=_MAP_SIZE, max_dbs=8, mode=0o600)
    try:
        _check_format(env, path)
    except BaseException:
        env.close()
        raise
    return env


def _check_format(env: lmdb.Environment, path: str) -> None:
    about = env.open_db(b"about")
    with env.begin(write=True) as txn:
        found = txn.get(b"version", db=about)
        if found is None:
            txn.put(b"version", str(FORMAT).encode(), db=about)
        elif not found.isdigit():
            raise CorruptError(f"{_NAME} has no format that can be read: {path}")
        elif int(found) > FORMAT:
            raise UnsupportedError(
                f"{path} was written by a newer nsfs: format {int(found)}",
                hint=f"this version reads format {FORMAT} and older; install the newer one again",
            )
