"""LMDB after a failed disk."""

from __future__ import annotations

import lmdb


class PanickingEnvironment:
    """As LMDB leaves one in which the disk failed in the middle of a commit: it can be closed, and nothing else."""

    def __init__(self, env: lmdb.Environment) -> None:
        self._env = env

    def begin(self, **_: object) -> None:
        raise lmdb.PanicError("mdb_txn_begin: MDB_PANIC")

    def close(self) -> None:
        self._env.close()
