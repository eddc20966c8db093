"""A worker's fork server, for its jobs: forked where it is first needed, by its daemon, since a worker has threads.

Owns the messages and the worker's side of them. The daemon has its zygote fork a server that is held to what the worker
is held to, and gives the worker a socket to it; the server ends when that is closed, and its jobs with it. A worker
that has none yet while there is no daemon waits for the next one. A server that died is followed by another.

Concurrency: trio; one question to the daemon at a time.
"""

from __future__ import annotations

import resource
import socket
from typing import TYPE_CHECKING, Final

import msgspec
import trio
from msgspec import Struct

from nsfs.core.worker_api import Empty
from nsfs.errors import UnreachableError
from nsfs.serve.forkclient import ForkServer
from nsfs.serve.forkserver import serve
from nsfs.serve.logs import start_logging
from nsfs.serve.wire import Passing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nsfs.serve.forkclient import Child
    from nsfs.serve.lending import Uplink
    from nsfs.serve.wire import Methods, Report

ENTRY: Final = "nsfs.serve.joblending:main"


class JobServerArgs(Struct, kw_only=True):
    """What a fork server for jobs is started with, beside its end of the socket."""

    log_format: str
    log_level: str
    memory: int = 0
    """As `serve.worker_args.WorkerArgs.memory`."""


class TakeJobServer(Passing, kw_only=True):
    """The daemon to a worker that asked for a JobServer: the way to it."""


def main(args: bytes, fds: list[int]) -> None:
    """Entry point for the zygote: be a worker's fork server."""
    params = msgspec.msgpack.decode(args, type=JobServerArgs)
    start_logging(params.log_format, params.log_level)
    limit_memory(params.memory)
    serve(socket.socket(fileno=fds[0]))


def limit_memory(most: int) -> None:
    """Hold this process, and each that it forks, to `most` bytes of private memory; 0 for no limit."""
    if most:
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


class LentServer:
    """`core.jobs.Spawner`: starts processes by the fork server that the daemon lends."""

    def __init__(self, uplink: Uplink, nursery: trio.Nursery) -> None:
        self._uplink = uplink
        self._nursery = nursery
        self._server: ForkServer | None = None
        self._lock = trio.Lock()

    def methods(self) -> Methods:
        """What the daemon may call."""
        return {"TakeJobServer": (TakeJobServer, self._take)}

    async def spawn(self, entry: str, args: Struct | None, fds: Sequence[int] = ()) -> Child:
        """See Spawner; raises UnreachableError where there can be no server."""
        server = await self._get()
        return await server.spawn(entry, args, fds)

    async def make_ready(self) -> None:
        """See Spawner."""
        await self._get()

    async def _get(self) -> ForkServer:
        async with self._lock:
            server = self._server
            return server if server is not None and server.is_alive else await self._ask()

    async def _ask(self) -> ForkServer:
        self._server = None
        await self._uplink.call_until_answered("JobServer", Empty(), Empty)
        if self._server is None:
            raise UnreachableError("the daemon lends no fork server")
        return self._server

    async def _take(self, params: TakeJobServer, _report: Report) -> Empty:
        (fd,) = params.fds
        self._server = await self._nursery.start(_talk, socket.socket(fileno=fd))
        return Empty()


async def _talk(sock: socket.socket, task_status: trio.TaskStatus[ForkServer]) -> None:
    server = ForkServer(is_apart=True)
    with trio.socket.from_stdlib_socket(sock) as line:
        async with trio.open_nursery() as nursery:
            await nursery.start(server.talk, line)
            task_status.started(server)
