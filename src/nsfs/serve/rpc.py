"""The daemon's gRPC server: several services behind one door, and the way from gRPC's threads into trio.

Each call occupies one thread for as long as it runs. Threads are made when they are needed, and calls that may wait
long (`Bridge.wait`) are refused before they could take the last ones, so that a quick call finds one at all times. A
client that goes away cancels its work. Who ends the server may have calls come to their end before.
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
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from nsfs.serve.entrance import Entrance

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
        self._waiting = threading.Semaphore(_PATIENT)

    def start(self, work: Callable[[], Awaitable[None]]) -> None:
        """Begin `work` in a task."""
        trio.from_thread.run_sync(self._nursery.start_soon, work, trio_token=self.token)

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
    entrance: AbstractContextManager[Entrance],
    services: Sequence[Callable[[Bridge], grpc.GenericRpcHandler]],
    leave: Callable[[Entrance], Awaitable[float]],
) -> AsyncIterator[None]:
    """Answer at `entrance` until the block ends.

    Then `leave` says for how many seconds calls that are under way are waited for; those that run still are cancelled.
    Only root and the user that we run as are let in.
    """
    threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="rpc")
    async with trio.open_nursery() as outside, trio.open_nursery() as nursery:
        bridge = Bridge(nursery)
        handlers = [service(bridge) for service in services]
        server = grpc.server(threads, handlers=handlers, options=[("grpc.so_reuseport", 0)])
        with entrance as place, _started(server, os.path.dirname(place.listener.getsockname())) as inside:
            door = Door(place.listener, inside, {0, os.geteuid()})
            outside.start_soon(door.serve, outside, place.greeted)
            try:
                yield
                await door.shut(await leave(place))
            finally:
                stopped = server.stop(grace=_GRACE)
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
