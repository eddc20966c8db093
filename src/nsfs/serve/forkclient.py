"""Processes that a fork server makes for us: the client's side.

Owns: starting, ending and reaping a server, and its children as whoever asked for them sees them. Invariants: a child
whose spawner was cancelled before it knew it is killed; with a server everything that is tied to it is gone, and nobody
waits for what nobody can tell any more.

Concurrency: trio, one event loop.
"""

from __future__ import annotations

import array
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec
import trio

from nsfs.core.tasks import open_tasks
from nsfs.errors import UnreachableError
from nsfs.serve.forking import MAX_FDS, MAX_MESSAGE, Exited, Failed, Kill, Reply, Spawn, Spawned, reply_decoder

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence

    from msgspec import Struct

    from nsfs.serve.sandbox import Confinement

_SERVER: Final = "nsfs.serve.forkserver"
_DEATH: Final = 2.0
"""Seconds that a killed child may take to be gone."""
_RELAUNCH_PAUSE: Final = 0.5
"""Seconds before a fork server follows one that died: something may kill each of them at once."""
_log = logging.getLogger(__name__)


class ServerProcess(NamedTuple):
    """A fork server as its parent sees it."""

    sock: socket.socket
    """The client's end; closing it ends the server."""
    pid: int


def launch_server(modules: Sequence[str]) -> ServerProcess:
    """Start a fork server in a fresh interpreter that imports `modules` first; of "module:function", it calls that."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, "-m", _SERVER, str(theirs.fileno()), *modules]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    process.returncode = 0  # whoever holds the ServerProcess reaps it, not Popen
    return ServerProcess(ours, process.pid)


class Child:
    """A process that a fork server has made for us."""

    def __init__(self, pid: int, pidfd: int, signal_by: Callable[[int], None] | None = None) -> None:
        self.pid = pid
        self.pidfd = pidfd
        """Ours until `close`; readable once the process has ended."""
        self._signal_by = signal_by or partial(signal.pidfd_send_signal, pidfd)
        self._ended = trio.Event()
        self._status: int | None = None

    async def wait(self) -> int:
        """Give its exit status, negative for a signal; UnreachableError if the fork server died before it told."""
        await self._ended.wait()
        if self._status is None:
            raise UnreachableError(f"exit status is lost, because the fork server died: {self.pid}")
        return self._status

    async def wait_gone(self) -> None:
        """Until it has ended, also where nobody can tell how."""
        if self.pidfd >= 0:
            await trio.lowlevel.wait_readable(self.pidfd)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal; nothing happens if it has ended, or was given up."""
        if self.pidfd >= 0:
            with suppress(ProcessLookupError):
                self._signal_by(number)

    def close(self) -> None:
        """Give up the pidfd. The process goes on."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    def end(self, status: int | None) -> None:
        """Wake who waits; for `ForkServer`."""
        self._status = status
        self._ended.set()


def find_process(pid: int, started: int) -> Child | None:
    """A process that somebody else had made for us, if it still is the one that began at `started`."""
    if not pid:
        return None
    try:
        child = Child(pid, os.pidfd_open(pid))
    except ProcessLookupError:
        return None
    child.end(None)
    if started_at(pid) == started:
        return child
    child.close()
    return None


def started_at(pid: int) -> int:
    """When a process began, in clock ticks since the boot (proc_pid_stat(5)); 0 if there is none, as for PID 0."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return 0


class _Pending:
    """A Spawn that is not answered yet."""

    __slots__ = ("abandoned", "answered", "child", "reason")

    def __init__(self) -> None:
        self.answered = trio.Event()
        self.child: Child | None = None
        self.reason = "the fork server died"
        self.abandoned = False

    def abandon(self) -> None:
        """Nobody waits for it: kill what was or will be started."""
        self.abandoned = True
        if self.child is not None:
            self.child.kill()
            self.child.close()


class ForkServer:
    """The client of a fork server. Made by `open_fork_server`.

    `is_apart`: its children are confined beside us and not below, so that they get signals from it alone (Landlock,
    LANDLOCK_SCOPE_SIGNAL).
    """

    def __init__(self, *, is_apart: bool = False) -> None:
        self._is_apart = is_apart
        self._sock: trio.socket.SocketType | None = None
        """None while there is no server."""
        self._ids = itertools.count(1)
        self._pending: dict[int, _Pending] = {}
        self._children: dict[int, Child] = {}
        self._lock = trio.Lock()

    async def spawn(
        self,
        entry: str,
        args: Struct | None,
        fds: Sequence[int] = (),
        *,
        session: bool = False,
        tied: bool = True,
        confinement: Confinement | None = None,
    ) -> Child:
        """Fork a child that runs `entry` ("module:function") with the msgpack of `args` and copies of `fds`.

        The child sees the descriptors in the same order under other numbers. `session` makes it a session leader;
        `tied` kills it when the server dies; `confinement` holds it from before it runs. Raises UnreachableError if
        there is no server or it cannot fork.
        """
        number = next(self._ids)
        packed = msgspec.msgpack.encode(args)
        message = msgspec.msgpack.encode(Spawn(number, entry, packed, session, tied, confinement))
        if len(message) > MAX_MESSAGE or len(fds) > MAX_FDS:
            raise ValueError(f"request is too large: {len(message)} bytes, {len(fds)} descriptors")
        pending = _Pending()
        await self._send(number, pending, message, fds)
        try:
            await pending.answered.wait()
        except BaseException:
            pending.abandon()
            raise
        if pending.child is None:
            raise UnreachableError(f"cannot start a process: {pending.reason}")
        return pending.child

    @asynccontextmanager
    async def running(self, entry: str, args: Struct | None, fds: Sequence[int] = ()) -> AsyncIterator[Child]:
        """Spawn a child; a block that fails or is cancelled kills it, and it is gone when that is over.

        Unless it cannot be killed for two seconds, because a disk or a kernel does not answer. Where the block returns
        the child goes on, to its end.
        """
        child = await self.spawn(entry, args, fds)
        try:
            yield child
        except BaseException:
            child.kill()
            with trio.move_on_after(_DEATH, shield=True), suppress(UnreachableError):
                await child.wait()
            raise
        finally:
            child.close()

    async def run(self, entry: str, args: Struct | None, fds: Sequence[int] = ()) -> int:
        """The exit status of a child, as by `running`."""
        async with self.running(entry, args, fds) as child:
            return await child.wait()

    async def talk(self, sock: trio.socket.SocketType, task_status: trio.TaskStatus[None]) -> None:
        """Have `sock`'s other end as the server until it is gone; run by `open_fork_server`."""
        self._sock = sock
        task_status.started()
        try:
            while True:
                data, ancillary, _, _ = await sock.recvmsg(4096, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
                if not data:
                    return
                self._take(reply_decoder.decode(data), received_fds(ancillary))
        except (ConnectionResetError, trio.ClosedResourceError):
            pass
        finally:
            self._lose()

    async def _send(self, number: int, pending: _Pending, message: bytes, fds: Sequence[int]) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        async with self._lock:
            if self._sock is None:
                raise UnreachableError("cannot start a process: the fork server died")
            self._pending[number] = pending
            try:
                await self._sock.sendmsg([message], rights)
            except BaseException as error:  # then nothing was sent: a datagram is sent whole
                self._pending.pop(number, None)
                if isinstance(error, BrokenPipeError | ConnectionResetError | trio.ClosedResourceError):
                    raise UnreachableError("cannot start a process: the fork server died") from None
                raise

    def _take(self, reply: Reply, fds: list[int]) -> None:
        match reply:
            case Spawned():
                self._adopt(reply, fds)
            case Failed():
                pending = self._pending.pop(reply.id)
                pending.reason = reply.reason
                pending.answered.set()
            case Exited():
                self._children.pop(reply.id).end(reply.status)

    def _adopt(self, reply: Spawned, fds: list[int]) -> None:
        pending = self._pending.pop(reply.id)
        pidfd = fds[0] if fds else os.pidfd_open(reply.pid)
        signal_by = partial(self._have_signalled, reply.id) if self._is_apart else None
        child = self._children[reply.id] = Child(reply.pid, pidfd, signal_by)
        if pending.abandoned:
            child.kill()
            child.close()
        pending.child = child
        pending.answered.set()

    def _have_signalled(self, child: int, number: int) -> None:
        """By the server; where that takes no more messages, all that it started ends with it."""
        if self._sock is None:
            return
        try:
            os.write(self._sock.fileno(), msgspec.msgpack.encode(Kill(child, number)))
        except BlockingIOError:
            self._sock.shutdown(socket.SHUT_RDWR)
        except (BrokenPipeError, ConnectionResetError):
            return

    @property
    def is_alive(self) -> bool:
        """Whether there is a server, as far as we know."""
        return self._sock is not None

    @property
    def children(self) -> int:
        """How many of our children have not ended."""
        return len(self._children)

    def _lose(self) -> None:
        self._sock = None
        for pending in self._pending.values():
            pending.answered.set()
        for child in self._children.values():
            child.end(None)
        self._pending.clear()
        self._children.clear()


def received_fds(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    """The descriptors that came with a message."""
    fds = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return list(fds)


@contextmanager
def _reaped(pid: int) -> Iterator[None]:
    """Kill and reap it at the end: it has no state to save."""
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@asynccontextmanager
async def open_fork_server(
    process: ServerProcess, relaunch: Callable[[], ServerProcess] | None = None
) -> AsyncIterator[ForkServer]:
    """Talk to a server that this process has started; leaving ends and reaps it.

    Children spawned with `tied` die with it. Where it dies by itself, `relaunch`, called in a thread, makes the next
    one; without, every further spawn fails. What the body raises leaves as it is, not in a group.
    """
    async with open_tasks() as tasks:
        server = ForkServer()
        await tasks.start(_keep, server, process, relaunch)
        yield server


async def _keep(
    server: ForkServer,
    process: ServerProcess,
    relaunch: Callable[[], ServerProcess] | None,
    task_status: trio.TaskStatus[None],
) -> None:
    while True:
        with _reaped(process.pid), trio.socket.from_stdlib_socket(process.sock) as sock:
            await server.talk(sock, task_status)
        if relaunch is None:
            return
        _log.error("the fork server died, and with it what it had started: pid %d; another one follows", process.pid)
        await trio.sleep(_RELAUNCH_PAUSE)
        process = await trio.to_thread.run_sync(relaunch)
        task_status = trio.TASK_STATUS_IGNORED
