"""The line to a domain's workers: a pair of sockets over which each is sent its next socket, to its next daemon.

Both ends outlive the daemon in the descriptor store, so that whoever has the one end is a daemon, and whoever has the
other a worker of that domain: nothing else need be checked. What lies in the line unread when a worker dies was meant
for nobody else: it is drained before there is another.
"""

from __future__ import annotations

import array
import os
import socket
from contextlib import suppress
from dataclasses import dataclass

from nsfs.errors import UnreachableError
from nsfs.serve.forkclient import received_fds


@dataclass(frozen=True, slots=True)
class Line:
    """A pair of sockets over which a domain's worker is sent its next socket."""

    near: int
    """The daemon's end."""
    far: int
    """The workers' end: each gets a copy."""

    def close(self) -> None:
        """Give up both."""
        os.close(self.near)
        os.close(self.far)


def make_line() -> Line:
    """A new pair; SOCK_SEQPACKET."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Line(near.detach(), far.detach())


def send_over(line: Line, sock: socket.socket) -> None:
    """Give the worker at the other end a socket; raises UnreachableError where it takes none."""
    _send(line, b"s", [sock.fileno()])


def send_end(line: Line) -> None:
    """Tell the worker at the other end that no other socket comes; raises UnreachableError where it does not hear."""
    _send(line, b"e", [])


def drain(line: Line) -> None:
    """Forget what a worker that is gone did not take, or the next would take it; and what is never taken adds up."""
    with socket.socket(fileno=os.dup(line.far)) as far, suppress(BlockingIOError):
        while True:
            _, ancillary, _, _ = far.recvmsg(16, socket.CMSG_SPACE(4), socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
            for fd in received_fds(ancillary):
                os.close(fd)


def _send(line: Line, what: bytes, fds: list[int]) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    with socket.socket(fileno=os.dup(line.near)) as near:
        try:
            near.sendmsg([what], rights, socket.MSG_DONTWAIT)  # socket.send_fds drops its flags (Python 3.11)
        except OSError as error:
            raise UnreachableError(f"a worker takes no socket: {error.strerror}") from None
