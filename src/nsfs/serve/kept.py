"""What outlives the workers of a domain: descriptors, what is shown, and how its workers fared.

Owns the values, and what of them the next daemon has to know (`serve.keeping`); `serve.supervisor` decides and does.
Everything here is changed between two awaits, by the one task that keeps the domain's worker or by a call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from nsfs.core import worker_api
from nsfs.serve.children import end_child
from nsfs.serve.forkclient import started_at
from nsfs.serve.keeping import BITMAP, FAR_LINE, FUSE, KEY, LINE, Memo

if TYPE_CHECKING:
    from msgspec import Struct

    from nsfs.serve.forkclient import Child
    from nsfs.serve.line import Line
    from nsfs.serve.wire import Peer


@dataclass(frozen=True, slots=True)
class Connection:
    """A domain's FUSE connection, as the daemon opened it."""

    fd: int
    mountpoint: str
    init: bytes
    """The INIT request that the kernel sent; every worker has libfuse answer it."""


@dataclass(slots=True)
class Kept:
    """What outlives the workers of a domain, and the worker of now."""

    domain: str
    owner: str
    bitmap: int
    key: int
    connection: Connection | None
    line: Line | None
    survivor: Child | None = None
    """A worker that waits for a socket over the line: of an earlier daemon, or one that was tried."""
    trial: Child | None = None
    """A worker that is being tried beside the one of now."""
    is_outdated: bool = False
    """The worker of now is of other code than we."""
    is_kept_back: bool = False
    """And stays, since a new one did not answer."""
    is_over: bool = False
    """It does not outlive us, though others may."""
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)
    ready: trio.Event = field(default_factory=trio.Event)
    """Set while a worker answers, and when there will be none any more."""
    peer: Peer | None = None
    worker: Child | None = None
    """The worker of now, also while it does not answer yet."""
    forks: Child | None = None
    """The fork server that the worker of now has its jobs forked by, if it ever asked for one."""
    forking: trio.Lock = field(default_factory=trio.Lock)
    trouble: str = ""
    """Why none could be started, since the last one answered."""
    restarts: int = 0
    """Of the domain's worker, whatever it died of."""
    answered: float = -math.inf
    """When the last worker that came to answer did so, by trio's clock."""
    deaths: int = 0
    """In a row, of workers that had not served."""
    owners: set[str] = field(default_factory=set)
    views: set[str] = field(default_factory=set)
    trees: dict[str, worker_api.Tree] = field(default_factory=dict)
    is_deleted: bool = False
    """Nobody shall have the key any more."""

    def lose(self) -> bool:
        """The worker is gone; whether it had come to answer."""
        had_answered = self.ready.is_set()
        if had_answered:
            self.ready = trio.Event()
        self.peer = None
        return had_answered

    async def end_forks(self) -> None:
        """Where it has a fork server: end it, and with it its jobs."""
        forks, self.forks = self.forks, None
        if forks is not None:
            await end_child(forks, 0)

    def note(self, method: str, params: Struct) -> None:
        """Remember what a worker shows, so that the next one shows it from its start."""
        match method, params:
            case "ShowViews", worker_api.Views():
                self.views.update(params.names)
            case "HideViews", worker_api.Views():
                self.views.difference_update(params.names)
            case "ShowTree", worker_api.Tree():
                self.trees[params.id] = params
            case "HideTree", worker_api.TreeGone():
                self.trees.pop(params.id, None)

    def memo(self) -> Memo:
        """What the next daemon must know."""
        connection = self.connection
        worker = self.survivor or self.worker
        pid = worker.pid if worker else 0
        trial = self.trial.pid if self.trial else 0
        return Memo(
            domain=self.domain,
            owner=self.owner,
            mountpoint=connection.mountpoint if connection else "",
            init=connection.init if connection else b"",
            worker=(pid, started_at(pid)),
            trial=(trial, started_at(trial)),
            views=sorted(self.views),
            trees=list(self.trees.values()),
        )

    def kept(self) -> dict[str, int]:
        """The descriptors that the next daemon must have."""
        fds = {BITMAP: self.bitmap, KEY: self.key}
        if self.connection is not None:
            fds[FUSE] = self.connection.fd
        if self.line is not None:
            fds |= {LINE: self.line.near, FAR_LINE: self.line.far}
        return fds
