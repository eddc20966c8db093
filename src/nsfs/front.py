"""The front: one process for each mount of a user who is not root, between the kernel and the domain's worker.

Owns the FUSE session at the user's directory. It maps the layers' maps, reads what is in the pool by itself, and asks
the worker over its socket to make the rest present; it never writes. The worker may die and come back: a front waits
for it as long as its mount waits for a registry.

Concurrency: one trio run; reads of the pool in its threads. One connection to the worker, made when it is first needed.
"""

from __future__ import annotations

import logging
import os
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Final

import msgspec
import trio

from nsfs.core import worker_api
from nsfs.core.dropping import drop_often
from nsfs.core.maps import Maps
from nsfs.core.tasks import open_tasks, running
from nsfs.core.union import UnionTree
from nsfs.core.vfs import TreeFs
from nsfs.errors import NsfsError, UnreachableError
from nsfs.model.policy import parse_view_name
from nsfs.serve.fronts import FrontArgs
from nsfs.serve.fuse import FuseOperations
from nsfs.serve.session import Session
from nsfs.serve.wire import Peer, open_peer
from nsfs.store.layout import DomainLayout
from nsfs.store.pool import Pool, open_pool
from nsfs.store.sealed import load_content

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

log = logging.getLogger(__name__)

_USAGE_EVERY: Final = 1.0
"""Seconds between two questions how much of the mount is local."""
_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 1.0
"""Seconds between two attempts to reach a worker that is being started again."""


class WorkerLine:
    """The line to the worker, made again whenever it is asked for and broken. Made by `open_worker_line`."""

    def __init__(self, path: str, nursery: trio.Nursery) -> None:
        self._path = path
        self._nursery = nursery
        self._peer: Peer | None = None
        self._lock = trio.Lock()

    async def fetch(self, view: str, address: int, size: int) -> None:
        """Have blocks made present. Raises what the worker raises; while there is no worker, waits as `view` says."""
        request = worker_api.Fetch(view=view, address=address, size=size)
        patience = parse_view_name(view).patience.seconds
        give_up = trio.current_time() + (float("inf") if patience is None else patience)
        pause = _FIRST_PAUSE
        while True:
            peer = None
            try:
                peer = await self._connected()
                await peer.call("Fetch", request, worker_api.Empty)
            except UnreachableError:
                if (peer is not None and not peer.is_closed) or trio.current_time() + pause > give_up:
                    raise
            else:
                return
            await trio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def usage(self, maps: list[str]) -> worker_api.UsageReport:
        """What the worker says of these maps; raises UnreachableError while there is none."""
        peer = await self._connected()
        return await peer.call("Usage", worker_api.Usage(maps=maps), worker_api.UsageReport)

    async def _connected(self) -> Peer:
        async with self._lock:
            if self._peer is None or self._peer.is_closed:
                self._peer = await self._nursery.start(self._hold)
            return self._peer

    async def _hold(self, task_status: trio.TaskStatus[Peer]) -> None:
        """Keep one connection for as long as it lasts; a failure to connect is the starter's."""
        try:
            stream = await trio.open_unix_socket(self._path)
        except OSError as error:
            raise UnreachableError(f"the domain's worker does not answer: {self._path}") from error
        async with open_peer(stream, {}, name=f"front {os.getpid()}") as peer:
            task_status.started(peer)
            await peer.wait_closed()
        log.info("worker is gone: %s", self._path)


@asynccontextmanager
async def open_worker_line(path: str) -> AsyncIterator[WorkerLine]:
    """A line to the worker that listens at `path`, now or later."""
    async with open_tasks() as nursery:
        yield WorkerLine(path, nursery)


class FrontReader:
    """Reads of views: from the pool what is there, the rest when the worker has put it there."""

    def __init__(self, pool: Pool, line: WorkerLine) -> None:
        self._pool = pool
        self._line = line

    async def read(self, view: str, address: int, size: int) -> bytes | memoryview:
        """See `core.vfs.Reader`."""
        while (data := await trio.to_thread.run_sync(self._pool.read_present, address, size)) is None:
            await self._line.fetch(view, address, size)
        return data


class FrontState:
    """What `.nsfs/mount.json` says: as the worker said it at most `_USAGE_EVERY` ago, while there is one."""

    def __init__(self, args: FrontArgs) -> None:
        self._info = args.info
        self._maps = [parse_view_name(view).map_id for view in args.views]
        self._usage = worker_api.UsageReport(local=0, fetched=0, state="starts")

    def files(self) -> dict[str, Callable[[], bytes]]:
        """For the tree."""
        return {"mount.json": lambda: worker_api.render_mount(self._info, self._usage)}

    async def follow(self, line: WorkerLine) -> None:
        """Ask again and again."""
        while True:
            try:
                self._usage = await line.usage(self._maps)
            except NsfsError as error:
                self._usage = msgspec.structs.replace(self._usage, state=str(error))
            await trio.sleep(_USAGE_EVERY)


async def serve(args: FrontArgs, fuse_fd: int, bitmap_fd: int, ready: Callable[[], None]) -> None:
    """Serve the mount until it is taken away; `ready` is called when requests begin to be answered."""
    maps = Maps(partial(load_content, key=None))
    tree = UnionTree([maps.open(path) for path in args.maps])
    pool = open_pool(DomainLayout(args.domain), bitmap_fd, readonly=True)
    async with open_worker_line(args.worker) as line:
        reader = FrontReader(pool, line)
        state = FrontState(args)
        vfs = TreeFs(tree, args.views, reader.read, state=state.files())
        async with running(lambda: state.follow(line)), running(lambda: drop_often(pool)):
            await Session(FuseOperations(vfs), fuse_fd).serve(args.init, on_ready=ready)


def main(args: bytes, fds: list[int]) -> None:
    """Entry point for a fork server; a byte to the last descriptor says that the mount is served."""
    fuse_fd, bitmap_fd, ready_fd = fds

    def ready() -> None:
        os.write(ready_fd, b"1")
        os.close(ready_fd)

    trio.run(serve, msgspec.msgpack.decode(args, type=FrontArgs), fuse_fd, bitmap_fd, ready)
