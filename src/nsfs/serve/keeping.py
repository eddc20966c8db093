"""What a daemon leaves of its domains for the one that follows it, whatever ends it.

Owns, per domain: descriptors in the store (`serve.fdstore`), named `<what>:<domain>` without the colon, and a file in
the run directory with all else that a new daemon or worker has to know. The file is replaced whole, so that a daemon
that is killed leaves the one before or the one after. A reboot takes both away together.

Concurrency: descriptors are handed over in a thread; the file is written by the loop, since it is small and in memory.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec
import trio
from msgspec import Struct

from nsfs.core import worker_api  # noqa: TC001  msgspec looks it up
from nsfs.serve.forkclient import find_process
from nsfs.serve.porter import relieve_porter
from nsfs.store.layout import escape_component

if TYPE_CHECKING:
    import socket
    from collections.abc import Collection, Mapping

    from nsfs.serve.fdstore import FdStore
    from nsfs.store.layout import Layout

log = logging.getLogger(__name__)

FUSE: Final = "fuse"
BITMAP: Final = "bitmap"
KEY: Final = "key"
LINE: Final = "line"
"""The daemon's end of the pair by which a worker is given a new socket to a new daemon."""
FAR_LINE: Final = "farline"
"""The workers' end."""
_PORTER: Final = "porter"
"""The near end of a porter's line; of no domain."""


class Memo(Struct, kw_only=True):
    """What is to be known of a domain."""

    domain: str
    owner: str = ""
    """Whose alone it is (`model.policy.owner_of`)."""
    mountpoint: str = ""
    """Of its FUSE connection."""
    init: bytes = b""
    """The connection's INIT request."""
    worker: tuple[int, int] = (0, 0)
    """Its process, and when that began (`started_at`)."""
    trial: tuple[int, int] = (0, 0)
    """Of one that is being tried in its place."""
    views: list[str] = []
    trees: list[worker_api.Tree] = []


@dataclass(frozen=True, slots=True)
class Left:
    """A domain of an earlier daemon; the descriptors are ours, by what they are."""

    memo: Memo
    fds: Mapping[str, int]


class Keeper:
    """The service."""

    def __init__(self, store: FdStore, layout: Layout, build: str) -> None:
        self.build = build
        """Of what code we are, and so the workers that we start (`serve.build`)."""
        self._store = store
        self._layout = layout
        self._porter = -1

    def take(self) -> list[Left]:
        """What an earlier daemon left, at the start; what cannot be used is given up. Blocks."""
        by_domain: defaultdict[str, dict[str, int]] = defaultdict(dict)
        fds = self._store.take()
        self._porter = fds.pop(_PORTER, -1)
        for name, fd in fds.items():
            what, _, domain = name.partition(".")
            by_domain[domain][what] = fd
        found = [Left(memo, fds) for domain, fds in by_domain.items() if (memo := self._load(domain))]
        usable = [left for left in found if {FUSE, BITMAP, KEY, LINE, FAR_LINE} <= left.fds.keys()]
        known = {escape_component(left.memo.domain) for left in usable}
        for domain, fds in by_domain.items():
            if domain not in known:
                self._give_up(domain, fds)
        self._end_orphans(known)
        return usable

    def _end_orphans(self, known: Collection[str]) -> None:
        """End workers that nobody can reach any more: no other may work on their domains beside them."""
        with suppress(FileNotFoundError):
            for domain in set(os.listdir(self._layout.domain_runs)).difference(known):
                memo = self._load(domain)
                orphan = find_process(*memo.worker) if memo is not None else None
                if orphan is not None:
                    log.warning("a worker that cannot be reached is ended: domain %s, pid %d", domain, orphan.pid)
                    orphan.kill()
                    orphan.close()

    def _load(self, escaped: str) -> Memo | None:
        try:
            with open(os.path.join(self._layout.domain_runs, escaped, "kept"), "rb") as file:
                return msgspec.msgpack.decode(file.read(), type=Memo)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError) as error:
            log.warning("what an earlier daemon left of a domain is not known: %s: %s", escaped, error)
            return None

    def _give_up(self, escaped: str, fds: Mapping[str, int]) -> None:
        for what, fd in fds.items():
            self._store.drop(f"{what}.{escaped}")
            os.close(fd)

    async def post(self, line: int) -> None:
        """Have the near end of a porter's line (`serve.porter`), which is ours now, outlive us."""
        try:
            await trio.to_thread.run_sync(self._store.keep, _PORTER, line)
        finally:
            os.close(line)

    def relieve(self) -> list[socket.socket]:
        """The listening socket and who waits, of the porter that an earlier daemon posted. Blocks for moments."""
        line, self._porter = self._porter, -1
        if line < 0:
            return []
        self._store.drop(_PORTER)
        return relieve_porter(line)

    async def keep(self, domain: str, fds: Mapping[str, int]) -> None:
        """Have descriptors outlive us."""
        for what, fd in fds.items():
            await trio.to_thread.run_sync(self._store.keep, _name(what, domain), fd)

    async def forget(self, domain: str, names: frozenset[str]) -> None:
        """The domain has ended."""
        with suppress(FileNotFoundError):
            os.unlink(self._layout.domain_run(domain).kept)
        for what in names:
            await trio.to_thread.run_sync(self._store.drop, _name(what, domain))

    def carry(self) -> None:
        """The daemon replaces itself by execve(2)."""
        self._store.carry()

    def close(self) -> None:
        """The daemon ends. Blocks for a moment."""
        self._store.close()

    def note(self, memo: Memo) -> None:
        """Remember what is to be known of a domain now."""
        path = self._layout.domain_run(memo.domain).kept
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        with open(path + ".tmp", "wb") as file:
            file.write(msgspec.msgpack.encode(memo))
        os.replace(path + ".tmp", path)


def _name(what: str, domain: str) -> str:
    return f"{what}.{escape_component(domain)}"
