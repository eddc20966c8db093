"""A warm process that forks children on request, so that starting one costs milliseconds and no thread is forked over.

Owns: the protocol between client and server (SOCK_SEQPACKET, one msgpack message each, descriptors by SCM_RIGHTS),
what a child inherits, and reaping. A child gets exactly the descriptors it was given, stdin from /dev/null, stdout and
stderr of the server, default signals, an empty signal mask, and what it is confined to. It runs `module:function` with
(args, fds) and exits with what that returns: an int, None for 0, an NsfsError's exit code, 1 and a traceback for
anything else.

The server is single-threaded, imports and warms up once, freezes the collector's generations, and ends when its
client's end is closed. A child of one may be one (`serve`); one that was launched has a spare while nothing is asked of
it: a child that is forked already. The client's side is trio. Invariants: every child that a client knows is reaped by
the server and reported once; a child whose spawner was cancelled before it knew it is killed.
"""

from __future__ import annotations

import array
import ctypes
import errno
import gc
import importlib
import itertools
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import Final, NamedTuple, NoReturn, TypeAlias

import msgspec
import trio
from msgspec import Struct

from nsfs.core.tasks import open_tasks
from nsfs.errors import NsfsError, UnreachableError
from nsfs.serve.sandbox import Confinement, confine

MAX_MESSAGE: Final = 128 << 10
"""Bytes of one request; larger arguments belong in a descriptor (unix(7): a datagram must fit the send buffer)."""
MAX_FDS: Final = 64

Entry: TypeAlias = Callable[[bytes, list[int]], int | None]
"""What a child runs: the msgpack of its arguments, and its descriptors in the order they were given."""

_PR_SET_PDEATHSIG: Final = 1
_PAUSE_MS: Final = 20
"""Milliseconds without a request until a spare is forked, behind what was asked for last."""
_DEATH: Final = 2.0
"""Seconds that a killed child may take to be gone."""
_RELAUNCH_PAUSE: Final = 0.5
"""Seconds before a fork server follows one that died: something may kill each of them at once."""
_log = logging.getLogger(__name__)


class Spawn(Struct, tag="spawn", array_like=True):
    """Client to server, with the child's descriptors: fork one."""

    id: int
    entry: str
    args: bytes
    session: bool
    """In a session of its own."""
    tied: bool
    """SIGKILL when the server dies."""
    confinement: Confinement | None = None
    """What it is held to before it runs."""


class Kill(Struct, tag="kill", array_like=True):
    """Client to server: send a signal to a child, for a client that may not do it itself."""

    id: int
    number: int


class Spawned(Struct, tag="spawned", array_like=True):
    """Server to client, with a pidfd."""

    id: int
    pid: int


class Failed(Struct, tag="failed", array_like=True):
    """Server to client: there was no fork."""

    id: int
    reason: str


class Exited(Struct, tag="exited", array_like=True):
    """Server to client: a child has ended and is reaped; `status` as subprocess has it, negative for a signal."""

    id: int
    status: int


Reply: TypeAlias = Spawned | Failed | Exited

_request_decoder: msgspec.msgpack.Decoder[Spawn | Kill] = msgspec.msgpack.Decoder(Spawn | Kill)
_reply_decoder: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


# The server's side.


def die_with_parent(parent: int) -> None:
    """Be killed when the process `parent` ends; at once if it has already.

    The kernel forgets this at execve of a set-uid program and whenever credentials change (prctl(2)): call it again.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def outlive_parent() -> None:
    """Go on when the parent ends, whatever was asked of `die_with_parent`."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 0, 0, 0, 0)


def close_others(keep: Sequence[int]) -> None:
    """Close every descriptor over 2 that is not in `keep`."""
    low = 3
    for fd in sorted(fd for fd in keep if fd >= low):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, 1 << 30)


def _reset_signals() -> None:
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE, signal.SIGXFSZ}:
        with suppress(OSError):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def _confine(request: Spawn, server: int) -> None:
    if request.confinement is not None:
        confine(request.confinement)
        if request.tied:
            die_with_parent(server)


def _call_entry(request: Spawn, fds: list[int], server: int) -> int:
    try:
        _confine(request, server)
        module, _, name = request.entry.partition(":")
        entry: Entry = getattr(importlib.import_module(module), name)
        return entry(request.args, fds) or 0
    except NsfsError as error:
        sys.stderr.write(f"{request.entry}: {error.message}\n")
        return error.exit_code
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # noqa: BLE001 - the child's last line of defence
        traceback.print_exc()
        return 1


def _run_spare(sock: socket.socket, server: int) -> NoReturn:
    """Wait for a request, and be its child."""
    try:
        die_with_parent(server)
        close_others([sock.fileno()])
        data, fds, _, _ = socket.recv_fds(sock, MAX_MESSAGE + 4096, MAX_FDS, socket.MSG_CMSG_CLOEXEC)
        if data:
            request = _request_decoder.decode(data)
            assert isinstance(request, Spawn), "a spare is told what to be, and nothing else"
            _run_child(request, fds, server)
    finally:
        os._exit(0)


def _run_child(request: Spawn, fds: list[int], server: int) -> NoReturn:
    status = 1
    try:
        if request.tied:
            die_with_parent(server)
        else:
            outlive_parent()
        close_others(fds)
        _reset_signals()
        if request.session:
            os.setsid()
        gc.enable()
        status = _call_entry(request, fds, server)
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _open_pidfd(pid: int) -> int:
    """Of our own child, which is killed and reaped if there can be none."""
    try:
        return os.pidfd_open(pid)
    except OSError:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


def _refuse_lost(flags: int) -> None:
    """Raise where descriptors did not come with their message, for want of room for them."""
    if flags & socket.MSG_CTRUNC:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


class _Spare(NamedTuple):
    """A child that waits for its request."""

    pid: int
    pidfd: int
    sock: socket.socket
    """The request is sent here; what waits ends where this is closed."""

    def end(self) -> None:
        self.sock.close()
        os.close(self.pidfd)
        os.waitpid(self.pid, 0)


class _Server:
    def __init__(self, sock: socket.socket, *, keeps_spare: bool) -> None:
        self._sock = sock
        self._keeps_spare = keeps_spare
        self._spare: _Spare | None = None
        self._poll = select.poll()
        self._poll.register(sock.fileno(), select.POLLIN)
        self._children: dict[int, tuple[int, int]] = {}
        """Request and process id by pidfd."""

    def run(self) -> None:
        while True:
            lacks_spare = self._keeps_spare and self._spare is None
            ready = {fd for fd, _ in self._poll.poll(_PAUSE_MS if lacks_spare else None)}
            if not ready:
                self._fork_spare()
            self._bury(ready)  # first: a request makes descriptors, which may have the numbers of these
            if self._sock.fileno() in ready and not self._take():
                return

    def _bury(self, ready: set[int]) -> None:
        if self._spare is not None and self._spare.pidfd in ready:
            self._take_spare().end()
        for pidfd in ready & self._children.keys():
            self._reap(pidfd)

    def end(self) -> None:
        """Leave no spare."""
        if self._spare is not None:
            self._take_spare().end()

    def _fork_spare(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            server = os.getpid()
            pid = os.fork()
            if pid == 0:
                _run_spare(theirs, server)
        self._spare = _Spare(pid, _open_pidfd(pid), ours)
        self._poll.register(self._spare.pidfd, select.POLLIN)

    def _take_spare(self) -> _Spare:
        spare, self._spare = self._spare, None
        assert spare is not None, "whoever takes it has looked"
        self._poll.unregister(spare.pidfd)
        return spare

    def _take(self) -> bool:
        try:
            data, fds, flags, _ = socket.recv_fds(self._sock, MAX_MESSAGE + 4096, MAX_FDS, socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:  # the client went with messages of ours unread
            return False
        if not data:
            return False
        request = _request_decoder.decode(data)
        if isinstance(request, Kill):
            self._kill(request)
            return True
        try:
            _refuse_lost(flags)
            self._know(request.id, *(self._employ_spare(data, fds) or self._fork(request, fds)))
        except OSError as error:
            self._reply(Failed(request.id, str(error)))
        finally:
            for fd in fds:
                os.close(fd)
        return True

    def _kill(self, request: Kill) -> None:
        for pidfd, (number, _) in self._children.items():
            if number == request.id:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, request.number)

    def _employ_spare(self, data: bytes, fds: list[int]) -> tuple[int, int] | None:
        """Give the request to the spare; its pid and pidfd, or None where there is none that takes it."""
        if self._spare is None:
            return None
        spare = self._take_spare()
        try:
            socket.send_fds(spare.sock, [data], fds)
        except OSError:
            spare.end()
            return None
        spare.sock.close()
        return spare.pid, spare.pidfd

    def _fork(self, request: Spawn, fds: list[int]) -> tuple[int, int]:
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            _run_child(request, fds, server)
        return pid, _open_pidfd(pid)

    def _know(self, request: int, pid: int, pidfd: int) -> None:
        self._children[pidfd] = request, pid
        self._poll.register(pidfd, select.POLLIN)
        self._reply(Spawned(request, pid), pidfd)

    def _reap(self, pidfd: int) -> None:
        request, pid = self._children.pop(pidfd)
        self._poll.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        self._reply(Exited(request, os.waitstatus_to_exitcode(status)))

    def _reply(self, reply: Reply, *fds: int) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # the client is gone: the next poll says so
            socket.send_fds(self._sock, [msgspec.msgpack.encode(reply)], fds)


def serve(sock: socket.socket, *, keeps_spare: bool = False) -> None:
    """Be a fork server on `sock` until the other end is closed. Whatever is to be warm is imported already."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sock.setblocking(True)  # noqa: FBT003
    gc.disable()
    gc.collect()
    gc.freeze()
    server = _Server(sock, keeps_spare=keeps_spare)
    try:
        server.run()
    finally:
        server.end()


class ServerProcess(NamedTuple):
    """A fork server as its parent sees it."""

    sock: socket.socket
    """The client's end; closing it ends the server."""
    pid: int


def launch_server(modules: Sequence[str]) -> ServerProcess:
    """Start a fork server in a fresh interpreter that imports `modules` first; of "module:function", it calls that."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, "-m", __spec__.name, str(theirs.fileno()), *modules]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    process.returncode = 0  # whoever holds the ServerProcess reaps it, not Popen
    return ServerProcess(ours, process.pid)


def main() -> None:
    """`python -m nsfs.serve.forkserver FD MODULE[:FUNCTION]…`."""
    sock = socket.socket(fileno=int(sys.argv[1]))
    for name in sys.argv[2:]:
        _warm(name)
    serve(sock, keeps_spare=True)


def _warm(name: str) -> None:
    module, _, function = name.partition(":")
    imported = importlib.import_module(module)
    if function:
        getattr(imported, function)()


# The client's side.


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
                self._take(_reply_decoder.decode(data), received_fds(ancillary))
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


if __name__ == "__main__":
    main()
