"""The daemon's own records, in one LMDB environment that only the daemon writes.

Keys and values, described here and nowhere else:

    db `about`   b"version" -> ASCII decimal of FORMAT
    db `mounts`  mount ID (ASCII) -> msgpack of MountRecord

No transaction stays open across an await: every method opens, reads or writes, and closes. Writes are durable when a
method returns.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

import lmdb
import msgspec

from nsfs.errors import CorruptError, NotFoundError, UnsupportedError
from nsfs.model.mounts import MountRecord

if TYPE_CHECKING:
    from collections.abc import Iterator

FORMAT = 1
_MAP_SIZE = 1 << 30


class Meta:
    """The open environment."""

    def __init__(self, env: lmdb.Environment) -> None:
        self._env = env
        self._mounts = env.open_db(b"mounts")

    def mounts(self) -> list[MountRecord]:
        """All mounts, by ID."""
        with self._env.begin() as txn:
            return [_decode(value) for _, value in txn.cursor(self._mounts)]

    def mount_at(self, target: str) -> MountRecord:
        """The mount whose target is `target`; raises NotFoundError."""
        for record in self.mounts():
            if record.target == target:
                return record
        raise NotFoundError(f"nothing of nsfs is mounted there: {target}", hint="nsfs status lists the mounts")

    def put_mount(self, record: MountRecord) -> None:
        """Remember a mount."""
        with self._env.begin(write=True) as txn:
            txn.put(record.id.encode(), msgspec.msgpack.encode(record), db=self._mounts)

    def delete_mount(self, mount_id: str) -> None:
        """Forget a mount, if it is known."""
        with self._env.begin(write=True) as txn:
            txn.delete(mount_id.encode(), db=self._mounts)


def _decode(value: bytes) -> MountRecord:
    try:
        return msgspec.msgpack.decode(value, type=MountRecord)
    except msgspec.DecodeError as error:
        raise CorruptError(f"a mount's record cannot be read: {error}") from error


@contextmanager
def open_meta(path: str) -> Iterator[Meta]:
    """Open (or create) the environment at directory `path`; raises UnsupportedError for a newer format."""
    os.makedirs(path, mode=0o700, exist_ok=True)
    env = lmdb.open(path, map_size=_MAP_SIZE, max_dbs=4, mode=0o600)
    try:
        _check_format(env, path)
        yield Meta(env)
    finally:
        env.close()


def _check_format(env: lmdb.Environment, path: str) -> None:
    about = env.open_db(b"about")
    with env.begin(write=True) as txn:
        found = txn.get(b"version", db=about)
        if found is None:
            txn.put(b"version", str(FORMAT).encode(), db=about)
        elif int(found) > FORMAT:
            raise UnsupportedError(
                f"{path} was written by a newer nsfs: format {int(found)}",
                hint=f"this version reads format {FORMAT} and older; install the newer one again",
            )
