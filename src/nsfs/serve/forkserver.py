"""A warm process that forks children on request, so that starting one costs milliseconds and no thread is forked over.

Owns: what a child inherits, and reaping. A child gets exactly the descriptors it was given, stdin from /dev/null,
stdout and stderr of the server, default signals, an empty signal mask, and what it is confined to. It runs
`module:function` with (args, fds) and exits with what that returns: an int, None for 0, an NsfsError's exit code, 1 and
a traceback for anything else.

The server is single-threaded, imports and warms up once, freezes the collector's generations, and ends when its
client's end (`serve/forkclient.py`) is closed. A child of one may be one (`serve`); one that was launched has a spare
while nothing is asked of it: a child that is forked already. Invariant: every child that a client knows is reaped and
reported once.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import importlib
import logging
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, NamedTuple, NoReturn, TypeAlias

import msgspec

from nsfs.errors import NsfsError
from nsfs.serve.forking import MAX_FDS, MAX_MESSAGE, Exited, Failed, Kill, Reply, Spawn, Spawned, request_decoder
from nsfs.serve.sandbox import confine

Entry: TypeAlias = Callable[[bytes, list[int]], int | None]
"""What a child runs: the msgpack of its arguments, and its descriptors in the order they were given."""

_PR_SET_PDEATHSIG: Final = 1
_PAUSE_MS: Final = 20
"""Milliseconds without a request until a spare is forked, behind what was asked for last."""


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
            request = request_decoder.decode(data)
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
        request = request_decoder.decode(data)
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


if __name__ == "__main__":
    main()
