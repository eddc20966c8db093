"""Workers: one process per domain, started when it is first needed and started again when it dies.

Owns, per domain, what must outlive a worker: the /dev/fuse descriptor (so the connection stays), the live bitmap (a
memfd), the INIT that the kernel sent. A new worker gets all three and goes on where the last one was killed. A worker
that dies again and again is given longer and longer pauses, never given up.

Concurrency: one task per domain keeps its worker; callers wait on an event until it answers. Nothing here touches a
path below a FUSE mount.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import trio
from msgspec import Struct

from nsfs.core import worker_api
from nsfs.errors import UnreachableError
from nsfs.serve.config import Config, pack_config
from nsfs.serve.wire import Peer, open_peer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from nsfs.model.policy import Domain
    from nsfs.serve.forkserver import ForkServer

T = TypeVar("T")
log = logging.getLogger(__name__)

_ENTRY = "nsfs.worker:main"
_START_DEADLINE = 30.0
_LONGEST_PAUSE = 5.0
"""Seconds between two starts of a worker that dies at once."""


class WorkerArgs(Struct, kw_only=True):
    """What a worker is started with.

    Its descriptors: the socket to the daemon, the bitmap and, where `fuse`, the FUSE connection.
    """

    domain: str
    config: bytes
    """`serve.config.pack_config`."""
    fuse: bool
    init: bytes = b""
    """The connection's INIT request."""
    views: list[str] = msgspec.field(default_factory=list)
    trees: list[worker_api.Tree] = msgspec.field(default_factory=list)


class Ready(Struct, kw_only=True):
    """Worker to daemon: requests are being served."""


@dataclass(frozen=True, slots=True)
class Connection:
    """A domain's FUSE connection, as the daemon opened it."""

    fd: int
    mountpoint: str
    init: bytes
    """The INIT request that the kernel sent; every worker has libfuse answer it."""


@dataclass(slots=True)
class _Kept:
    """What outlives the workers of a domain, and the worker of now."""

    domain: str
    bitmap: int
    connection: Connection | None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)
    ready: trio.Event = field(default_factory=trio.Event)
    peer: Peer | None = None
    pid: int = 0
    starts: int = 0
    views: set[str] = field(default_factory=set)
    trees: dict[str, worker_api.Tree] = field(default_factory=dict)

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


class Supervisor:
    """The service. Made by `open_supervisor`."""

    def __init__(
        self,
        config: Config,
        zygote: ForkServer,
        nursery: trio.Nursery,
        *,
        connect: Callable[[str], Awaitable[Connection]] | None,
        bitmap: Callable[[str], int],
        disconnect: Callable[[Connection], Awaitable[None]],
        domain_dir: Callable[[str], str],
    ) -> None:
        self._config = config
        self._zygote = zygote
        self._nursery = nursery
        self._connect = connect
        self._disconnect = disconnect
        self._bitmap = bitmap
        self._domain_dir = domain_dir
        self._kept: dict[str, _Kept] = {}
        self._lock = trio.Lock()

    async def call(
        self,
        domain: Domain,
        method: str,
        params: Struct,
        result: type[T],
        report: Callable[[Any], Awaitable[None]] | None = None,
    ) -> T:
        """Ask the worker of `domain`; raises what it raises, UnreachableError where it dies meanwhile."""
        kept = await self._keep(domain.name)
        peer = await self._wait_peer(kept)
        kept.note(method, params)
        return await peer.call(method, params, result, report, worker_api.OnTheWay)

    async def end(self, domain: Domain) -> None:
        """End the worker, its connection, and delete the domain's directory."""
        async with self._lock:
            kept = self._kept.pop(domain.name, None)
            if kept is not None:
                kept.scope.cancel()
                await kept.ended.wait()
        await trio.to_thread.run_sync(lambda: shutil.rmtree(self._domain_dir(domain.name), ignore_errors=True))

    def pids(self) -> dict[str, int]:
        """The worker of each domain that has one; 0 while it is being started."""
        return {name: kept.pid for name, kept in self._kept.items()}

    def bitmap(self, domain: str) -> int:
        """The descriptor of the live bitmap of a domain whose worker was called before."""
        return self._kept[domain].bitmap

    async def _keep(self, name: str) -> _Kept:
        async with self._lock:
            if name not in self._kept:
                bitmap = await trio.to_thread.run_sync(self._bitmap, name)
                connection = await self._connect(name) if self._connect else None
                kept = self._kept[name] = _Kept(name, bitmap, connection)
                self._nursery.start_soon(self._run, kept)
            return self._kept[name]

    async def _wait_peer(self, kept: _Kept) -> Peer:
        with trio.move_on_after(_START_DEADLINE):
            await kept.ready.wait()
        if kept.peer is None:
            raise UnreachableError(
                f"the worker of domain {kept.domain} does not start: no answer within {_START_DEADLINE:g} s",
                hint="the daemon's log says more",
            )
        return kept.peer

    async def _run(self, kept: _Kept) -> None:
        """Keep a worker running until the domain ends."""
        try:
            with kept.scope:
                while True:
                    started = trio.current_time()
                    await self._run_once(kept)
                    log.warning("the worker of domain %s died: pid %d", kept.domain, kept.pid)
                    if trio.current_time() - started < _LONGEST_PAUSE:
                        await trio.sleep(min(_LONGEST_PAUSE, 0.01 * 2 ** min(kept.starts, 10)))
        finally:
            with trio.CancelScope(shield=True):
                await self._drop(kept)

    async def _drop(self, kept: _Kept) -> None:
        if kept.connection is not None:
            await self._disconnect(kept.connection)
            os.close(kept.connection.fd)
        os.close(kept.bitmap)
        kept.ended.set()

    async def _run_once(self, kept: _Kept) -> None:
        kept.starts += 1
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            fds = [theirs.fileno(), kept.bitmap, *([kept.connection.fd] if kept.connection else [])]
            child = await self._zygote.spawn(_ENTRY, self._args(kept), fds)
        kept.pid = child.pid
        try:
            with suppress(UnreachableError):
                stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
                await self._serve(kept, stream)
            with trio.move_on_after(1):
                await child.wait()
        finally:
            child.kill()
            child.close()

    async def _serve(self, kept: _Kept, stream: trio.SocketStream) -> None:
        async def ready(_params: Ready, _report: object) -> worker_api.Empty:
            kept.ready.set()
            return worker_api.Empty()

        async with open_peer(stream, {"Ready": (Ready, ready)}, name="daemon") as peer:
            kept.peer = peer
            try:
                await peer.wait_closed()
            finally:
                kept.peer = None
                kept.ready = trio.Event()

    def _args(self, kept: _Kept) -> WorkerArgs:
        connection = kept.connection
        return WorkerArgs(
            domain=kept.domain,
            config=pack_config(self._config),
            fuse=connection is not None,
            init=connection.init if connection else b"",
            views=sorted(kept.views),
            trees=list(kept.trees.values()),
        )


@asynccontextmanager
async def open_supervisor(
    config: Config,
    zygote: ForkServer,
    *,
    connect: Callable[[str], Awaitable[Connection]] | None,
    disconnect: Callable[[Connection], Awaitable[None]],
    bitmap: Callable[[str], int],
    domain_dir: Callable[[str], str],
) -> AsyncIterator[Supervisor]:
    """A Supervisor whose workers end with the block.

    `connect` opens and mounts a domain's FUSE connection (None: workers without), `bitmap` makes its live bitmap.
    """
    async with trio.open_nursery() as nursery:
        yield Supervisor(
            config,
            zygote,
            nursery,
            connect=connect,
            disconnect=disconnect,
            bitmap=bitmap,
            domain_dir=domain_dir,
        )
        nursery.cancel_scope.cancel()
