"""The daemon's gRPC server: several services behind one door, and the way from gRPC's threads into trio.

Each call occupies one thread for as long as it runs. Threads are made when they are needed, and calls that may wait
long (`Bridge.wait`) are refused before they could take the last ones, so that a quick call finds one at all times. A
client that goes away cancels its work. Who ends the server may have it wait for a moment at which no call runs.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Generic, TypeVar

import grpc
import trio
import trio.from_thread

from nsfs.errors import UnreachableError
from nsfs.serve.door import Door

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

T = TypeVar("T")
log = logging.getLogger(__name__)

_THREADS = 1024
_GRACE = 2.0
"""Seconds for answers that are on their way when the daemon ends."""
_PATIENT = _THREADS - 128
"""Calls that may wait at one time."""


class _Job(Generic[T]):
    """Work in trio whose outcome a thread waits for."""

    def __init__(self, work: Callable[[], Awaitable[T]]) -> None:
        self._work = work
        self._scope = trio.CancelScope()
        self.outcome: Future[T] = Future()

    async def run(self) -> None:
        with self._scope:
            try:
                self.outcome.set_result(await self._work())
            except Exception as error:  # noqa: BLE001  every failure is the client's to hear
                self.outcome.set_exception(error)
            finally:
                if not self.outcome.done():
                    self.outcome.set_exception(UnreachableError("the call was cancelled"))

    def cancel(self) -> None:
        self._scope.cancel()


class Bridge:
    """From gRPC's threads into trio. Made in trio; `start`, `call`, `wait` and `soon` are for the threads."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self.token = trio.lowlevel.current_trio_token()
        self._running = 0
        self._idle = trio.Event()
        self._waiting = threading.Semaphore(_PATIENT)

    def start(self, work: Callable[[], Awaitable[None]]) -> None:
        """Begin `work` in a task."""
        trio.from_thread.run_sync(self._begin, work, trio_token=self.token)

    def _begin(self, work: Callable[[], Awaitable[None]]) -> None:
        self._running += 1
        self._nursery.start_soon(self._run, work)

    async def _run(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()
                self._idle = trio.Event()

    async def finish(self) -> None:
        """As `wait_idle`, and say so."""
        if self._running:
            log.info("calls that are under way are waited for: %d", self._running)
        await self.wait_idle()

    async def wait_idle(self) -> None:
        """Until no call runs; for trio."""
        while self._running:
            await self._idle.wait()

    def soon(self, what: Callable[[], None]) -> None:
        """Have `what` done in trio, if that still runs."""
        try:
            self.token.run_sync_soon(what)
        except trio.RunFinishedError:
            log.debug("a call ended after the daemon")

    def call(self, work: Callable[[], Awaitable[T]], context: grpc.ServicerContext) -> T:
        """What `work` gives; raises what it raises, UnreachableError if it was cancelled."""
        job = _Job(work)
        if not context.add_callback(lambda: self.soon(job.cancel)):
            raise UnreachableError("the client went away")
        self.start(job.run)
        return job.outcome.result()

    def wait(self, work: Callable[[], Awaitable[T]], context: grpc.ServicerContext) -> T:
        """As `call`, for what may take long; raises UnreachableError where too many do."""
        with self.patience():
            return self.call(work, context)

    @contextmanager
    def patience(self) -> Iterator[None]:
        """Count the calling thread among those that may wait."""
        if not self._waiting.acquire(blocking=False):
            raise UnreachableError(f"too many calls wait: {_PATIENT}", hint="see nsfs status")
        try:
            yield
        finally:
            self._waiting.release()


@asynccontextmanager
async def serve_rpc(
    entrance: AbstractContextManager[socket.socket],
    services: Sequence[Callable[[Bridge], grpc.GenericRpcHandler]],
    patience: Callable[[], float] = lambda: 0.0,
) -> AsyncIterator[None]:
    """Answer on the unix socket `entrance` (0600) until the block ends.

    While calls run then, it goes on for up to `patience` seconds; those that run still are cancelled. Only root and the
    user that we run as are let in.
    """
    threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="rpc")
    async with trio.open_nursery() as outside, trio.open_nursery() as nursery:
        bridge = Bridge(nursery)
        handlers = [service(bridge) for service in services]
        server = grpc.server(threads, handlers=handlers, options=[("grpc.so_reuseport", 0)])
        with entrance as listener, _started(server, os.path.dirname(listener.getsockname())) as inside:
            door = Door(listener, inside, {0, os.geteuid()})
            outside.start_soon(door.serve, outside)
            try:
                yield
                door.shut()  # a client that gRPC tells to connect anew comes to the next daemon
                with trio.move_on_after(patience()):
                    await bridge.finish()
            finally:
                stopped = server.stop(grace=_GRACE)
                with trio.move_on_after(_GRACE if patience() else 0.0, shield=True):
                    await bridge.wait_idle()
                nursery.cancel_scope.cancel()
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(stopped.wait)
                threads.shutdown(wait=False)
                outside.cancel_scope.cancel()


@contextmanager
def _started(server: grpc.Server, directory: str) -> Iterator[str]:
    """Start it; gives the path of its socket for this process: nobody else can name it, and no file is left."""
    with tempfile.TemporaryDirectory(dir=directory) as private, ExitStack() as stack:
        folder = _open_path(stack, private)
        server.add_insecure_port(f"unix:/proc/self/fd/{folder}/rpc")
        server.start()
        inside = _open_path(stack, f"{private}/rpc")
        kept = stack.pop_all()
    with kept:
        yield f"/proc/self/fd/{inside}"


def _open_path(stack: ExitStack, path: str) -> int:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    stack.callback(os.close, descriptor)
    return descriptor
