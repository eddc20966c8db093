"""Short-lived processes that do a layer's heavy work, so that the worker's event loop never does any per-file work.

Owns what a job and its worker say to each other: over a socket pair the job sends how far it is, and at last its result
or its error, each one msgpack datagram. A job that is killed, or whose caller was cancelled, leaves nothing committed:
whatever a job makes becomes visible by one rename or one transaction at its end.

A job's entry point is `module:function`, called with the msgpack of its arguments and its descriptors; `run_job` gives
it that shape.
"""

from __future__ import annotations

import gc
import logging
import resource
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol, TypeVar

import msgspec
import trio
from msgspec import Raw, Struct

from nsfs.errors import ERRORS, NoSpaceError, NsfsError, UnreachableError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

log = logging.getLogger(__name__)

A = TypeVar("A", bound=Struct)
T = TypeVar("T")

_MAX_MESSAGE = 128 << 10
MEMORY = 4 << 30
"""Bytes of private memory that one job may have. A million entries take 0.7 GiB (measured 2026-11), two the parsers let
pass, with up to 0.25 GiB of names."""
_DEATH = 5.0
"""Seconds that a killed job may take to be gone; longer only where a disk does not answer."""


class JobProgress(Struct, tag="progress", array_like=True):
    """How far a job is, in bytes of whatever its caller counts."""

    done: int


class JobDone(Struct, tag="done", array_like=True):
    """The result."""

    result: Raw


class JobFailed(Struct, tag="failed", array_like=True):
    """The error, by code of `nsfs.errors.ERRORS`."""

    code: str
    message: str
    hint: str | None = None


_decoder: msgspec.msgpack.Decoder[JobProgress | JobDone | JobFailed] = msgspec.msgpack.Decoder(
    JobProgress | JobDone | JobFailed
)


class Channel:
    """The job's end of the socket pair."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)

    def progress(self, done: int) -> None:
        """Say how far we are; dropped where the worker is slow to listen."""
        try:
            self._socket.send(msgspec.msgpack.encode(JobProgress(done)), socket.MSG_DONTWAIT)
        except BlockingIOError:
            return

    def send(self, message: JobDone | JobFailed) -> None:
        """Say how it ended."""
        self._socket.send(msgspec.msgpack.encode(message))


def run_job(kind: type[A], work: Callable[[A, Sequence[int], Channel], Struct], args: bytes, fds: list[int]) -> int:
    """Decode the arguments, do the work, and send its result or error; the first descriptor is the channel.

    For a process of its own: limits the memory of the one that calls it.
    """
    gc.disable()  # the many values of a layer hold no cycles, and the process ends with them
    channel = Channel(fds[0])
    most = _limit_memory()
    try:
        result = work(msgspec.msgpack.decode(args, type=kind), fds[1:], channel)
    except MemoryError:
        error = NoSpaceError(f"the layer takes more memory than a job may have: {most} bytes")
        channel.send(JobFailed(error.code, error.message, error.hint))
        return error.exit_code
    except NsfsError as error:
        channel.send(JobFailed(error.code, error.message, error.hint))
        return error.exit_code
    channel.send(JobDone(Raw(msgspec.msgpack.encode(result))))
    return 0


def _limit_memory() -> int:
    """Hold this process to what a job may have, or to what its worker may, if that is less; gives what that is."""
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    limit = MEMORY if most == resource.RLIM_INFINITY else min(MEMORY, most)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    return limit


class Process(Protocol):
    """A child process."""

    async def wait(self) -> int:
        """Its exit status."""

    def kill(self) -> None:
        """End it."""

    def close(self) -> None:
        """Give up what we hold of it."""


class Spawner(Protocol):
    """Starts processes."""

    async def spawn(self, entry: str, args: Struct | None, fds: Sequence[int] = ()) -> Process:
        """Run `entry` in a process of its own."""

    async def make_ready(self) -> None:
        """Have what the first `spawn` would wait for; raises NsfsError."""


class Jobs:
    """The worker's side: runs jobs, at most `limit` at a time; jobs that are fed, `fed_limit` beside them.

    A job that is fed waits for whoever sends its bytes. It has slots of its own, so that a registry that drips holds up
    no job that could work.
    """

    def __init__(self, spawner: Spawner, limit: int, fed_limit: int, shared: Sequence[int] = ()) -> None:
        self._spawner = spawner
        self._shared = shared
        """The first descriptors of every job: what the domain's processes share."""
        self._limiter = trio.CapacityLimiter(limit)
        self._fed_limiter = trio.CapacityLimiter(fed_limit)

    async def make_ready(self) -> None:
        """Have the first job begin at once; where that cannot be, it says why."""
        with suppress(NsfsError):
            await self._spawner.make_ready()

    async def run(
        self,
        entry: str,
        args: Struct,
        fds: Sequence[int],
        result: type[T],
        report: Callable[[int], Awaitable[None]] | None = None,
        *,
        is_fed: bool = False,
    ) -> T:
        """Run a job to its end; raises what the job raised, and NsfsError for one that died. Cancelling kills it."""
        async with self._fed_limiter if is_fed else self._limiter:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with trio.socket.from_stdlib_socket(ours) as channel:
                with theirs:
                    process = await self._spawner.spawn(entry, args, [theirs.fileno(), *self._shared, *fds])
                packed, status = await _attend(process, channel, report)
        if packed is None and status < 0:
            raise NoSpaceError(
                f"a job was killed: {entry.partition(':')[2]}: signal {-status}",
                hint="the kernel kills where memory runs out: see its log; another attempt goes on from what is here",
            )
        if packed is None:
            raise NsfsError(f"a job died: {entry}, exit status {status}", hint="the log of the worker says more")
        return msgspec.msgpack.decode(packed, type=result)


async def _attend(
    process: Process, channel: trio.socket.SocketType, report: Callable[[int], Awaitable[None]] | None
) -> tuple[Raw | None, int]:
    """Wait for the result of a job, or for its end without one: who has given it has only to go.

    Leaves nothing that still writes: one that is given up is killed.
    """
    try:
        packed = await _follow(channel, report)
        return packed, 0 if packed is not None else await process.wait()
    except BaseException:
        process.kill()
        with trio.move_on_after(_DEATH) as scope, suppress(UnreachableError):
            scope.shield = True
            await process.wait()
        raise
    finally:
        process.close()


async def _follow(channel: trio.socket.SocketType, report: Callable[[int], Awaitable[None]] | None) -> Raw | None:
    """The job's result, or None where it ended without a word."""
    while data := await channel.recv(_MAX_MESSAGE):
        match _decoder.decode(data):
            case JobProgress(done):
                if report is not None:
                    await report(done)
            case JobDone(result):
                return result
            case JobFailed(code, message, hint):
                raise ERRORS.get(code, NsfsError)(message, hint=hint)
    return None
