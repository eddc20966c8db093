"""The porter: a process that greets who connects between two daemons, and has them wait for the next one.

Clients give up a server that is silent when they connect, however patient their calls are: grpc-go within the second
that containerd leaves it, and a start of Python with all that a daemon imports can take longer on a busy host. So who
connects is sent what a server begins with (`serve.http2`), and kept until the next daemon asks for the listening socket
and all connections, over a line whose near end is with the descriptors that outlive a daemon. Where none asks in time,
those who wait are hung up on, and who comes then is refused, as where no daemon is.

One thread; it reads nothing of what clients say, and judges nobody: the next daemon's door does.
"""

from __future__ import annotations

import os
import select
import socket
import time
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec import Struct

from nsfs.serve.http2 import GREETING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nsfs.serve.forkclient import ForkServer

_ENTRY: Final = "nsfs.serve.porter:run_porter"
_DEADLINE: Final = 5.0
"""Seconds for a porter to hand over: it has nothing else to do."""


class PorterArgs(Struct, frozen=True, kw_only=True):
    """What it is started with."""

    patience: float
    """Seconds for another daemon to ask."""
    pid: int = 0
    """The process that this daemon will be; where it ends, none asks."""


async def post_porter(server: ForkServer, listener: socket.socket, args: PorterArgs) -> int:
    """Start one, which outlives us; the near end of its line. Raises UnreachableError where it cannot be started."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far:
        child = await server.spawn(_ENTRY, args, [listener.fileno(), far.fileno()], session=True, tied=False)
        child.close()
        return near.detach()


def relieve_porter(line: int) -> list[socket.socket]:
    """The listening socket, and after it all who wait; nothing where there is no porter any more. Blocks for moments.

    Takes the descriptor `line`.
    """
    found: list[socket.socket] = []
    with socket.socket(fileno=line) as near, suppress(OSError):
        near.settimeout(_DEADLINE)
        near.send(b"take")
        while fds := socket.recv_fds(near, 1, 1, socket.MSG_CMSG_CLOEXEC)[1]:
            found.append(socket.socket(fileno=fds[0]))
    return found


def run_porter(args: bytes, fds: list[int]) -> int:
    """Entry point for a fork server; `fds` are the listening socket and the far end of the line."""
    awaited = msgspec.msgpack.decode(args, type=PorterArgs)
    with ExitStack() as stack:
        listener, line = (stack.enter_context(socket.socket(fileno=fd)) for fd in fds)
        greeted = [stack.enter_context(each) for each in _greet(listener, line, awaited)]
        with suppress(OSError):  # nobody asked, or is there any more
            line.settimeout(0)
            line.recv(16)
            line.settimeout(_DEADLINE)
            for each in (listener, *greeted):
                socket.send_fds(line, [b"s"], [each.fileno()])
    return 0


def _greet(listener: socket.socket, line: socket.socket, awaited: PorterArgs) -> Iterator[socket.socket]:
    """Who connects, until somebody asks at the other end of `line`, or nobody will any more."""
    deadline = time.monotonic() + awaited.patience
    poll = select.poll()
    with _watched(awaited.pid) as ends:
        for fd in (listener.fileno(), line.fileno(), *ends):
            poll.register(fd, select.POLLIN)
        while (left := deadline - time.monotonic()) > 0:
            ready = {fd for fd, _ in poll.poll(left * 1000)}
            if not ready.isdisjoint({line.fileno(), *ends}):
                return
            yield from _accept(listener)


def _accept(listener: socket.socket) -> Iterator[socket.socket]:
    with suppress(OSError):  # another has accepted it; or it is gone
        connection, _ = listener.accept()
        connection.sendall(GREETING)
        yield connection


@contextmanager
def _watched(pid: int) -> Iterator[list[int]]:
    """A descriptor that is readable once the process has ended, where there is one to watch."""
    if not pid:
        yield []
        return
    pidfd = os.pidfd_open(pid)
    try:
        yield [pidfd]
    finally:
        os.close(pidfd)
