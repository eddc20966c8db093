"""The door to the daemon's socket: looks who connects, and passes on what the admitted say.

gRPC serves unix sockets without telling whose process is at the other end, so it does not get to see them: connections
are accepted here, their peers' credentials checked (SO_PEERCRED, unix(7): those of the moment of connecting), and their
bytes relayed to the socket that gRPC listens on, which has no name. Refuses whoever is neither root nor the daemon's
own user, whatever the modes of socket and folder have become, with a line in the log.
A daemon that gives its place away by execve(2) hands the listening socket on: who comes meanwhile waits for the next.

Concurrency: a task for each direction of each connection, and one buffer, so that who reads slowly is waited for. It
costs a call 0.1 ms (Stat over one channel, median of 2,000: 0.66 ms without, 0.77 with; two processors, Linux 6.18),
and `nsfs cat` of 300 MiB nothing that could be told from noise.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from nsfs.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, MutableMapping

log = logging.getLogger(__name__)

_CREDENTIALS: Final = struct.Struct("=iII")
"""struct ucred."""
_BUFFER: Final = 1 << 18
"""All that a unix socket holds at a time by default (net.core.wmem_default): so a stream is passed on in few steps."""
_WAITING: Final = 1024
"""Connections that nobody accepted yet."""
_TELL_EVERY: Final = 60.0
"""Seconds between two lines about one user."""
_HANDED_ON: Final = "NSFS_LISTENER"
"""Of the environment: the descriptor that a daemon in our place listened on."""


class Peer(NamedTuple):
    """Who is at the other end of a unix socket."""

    pid: int
    uid: int
    gid: int


def peer_of(connection: socket.socket | trio.socket.SocketType) -> Peer:
    """Who connected; raises OSError."""
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return Peer(*_CREDENTIALS.unpack(found))


class Door:
    """One listening socket's, which stays its owner's. `inside` is where who is admitted is led."""

    def __init__(self, listener: socket.socket, inside: str, admitted: Collection[int]) -> None:
        self._inside = inside
        self._admitted = admitted
        self._told: dict[int, float] = {}
        self._open = trio.CancelScope()
        self._listener = trio.SocketListener(trio.socket.from_stdlib_socket(listener.dup()))

    async def serve(self, nursery: trio.Nursery) -> None:
        """Until it is shut, or cancelled; who is inside by then stays, in `nursery`."""
        with self._open:
            async with self._listener:
                await trio.serve_listeners(self._admit, [self._listener], handler_nursery=nursery)

    def shut(self) -> None:
        """Admit nobody more: who comes waits for who listens at the same socket next."""
        self._open.cancel()

    async def _admit(self, stream: trio.SocketStream) -> None:
        with stream.socket as outer, trio.socket.socket(socket.AF_UNIX) as inner:
            try:
                peer = peer_of(outer)
                if peer.uid not in self._admitted:
                    self._refuse(peer)
                    return
                await inner.connect(self._inside)
                await _relay(outer, inner)
            except OSError as error:
                log.debug("a connection ended: %s", error)

    def _refuse(self, peer: Peer) -> None:
        now = trio.current_time()
        if self._told.get(peer.uid, -_TELL_EVERY) + _TELL_EVERY <= now:
            self._told[peer.uid] = now
            log.warning("refused a connection: uid=%d gid=%d pid=%d", peer.uid, peer.gid, peer.pid)


@contextmanager
def listening(
    path: str, environ: MutableMapping[str, str], is_handed_on: Callable[[], bool] = lambda: False
) -> Iterator[socket.socket]:
    """The daemon's socket at `path`: the one that was handed on to us, or a new one; raises UsageError.

    At the end it is gone, or, where `is_handed_on`, left open for what is executed in our place.
    """
    listener = _take_over(path, environ) or listen_unix(path, "socket")
    try:
        yield listener
    finally:
        if is_handed_on():
            listener.set_inheritable(True)
            environ[_HANDED_ON] = str(listener.detach())
        else:
            _close(listener)


def _close(listener: socket.socket) -> None:
    path = listener.getsockname()
    listener.close()
    with suppress(FileNotFoundError):
        os.unlink(path)


def _take_over(path: str, environ: MutableMapping[str, str]) -> socket.socket | None:
    """What was handed on, if that is still the socket at `path`."""
    number = environ.pop(_HANDED_ON, "")
    if not number:
        return None
    listener = socket.socket(fileno=int(number))
    listener.set_inheritable(False)
    if listener.getsockname() == path and os.path.exists(path):
        return listener
    _close(listener)
    return None


def listen_unix(path: str, key: str) -> socket.socket:
    """The socket, 0600; what was there before is gone. Raises UsageError about the `key` that says where."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    mask = os.umask(0o177)
    try:
        if os.path.lexists(path):
            os.unlink(path)
        listener.bind(path)
        listener.listen(_WAITING)
    except OSError as error:
        listener.close()
        raise UsageError(f"{key}: cannot listen there: {path}: {error.strerror}") from None
    finally:
        os.umask(mask)
    return listener


async def _relay(outer: trio.socket.SocketType, inner: trio.socket.SocketType) -> None:
    """Until either side ends: HTTP/2 has no use for the other direction then."""
    async with trio.open_nursery() as nursery:
        for source, sink in ((outer, inner), (inner, outer)):
            nursery.start_soon(_pump, source, sink, nursery.cancel_scope)


async def _pump(source: trio.socket.SocketType, sink: trio.socket.SocketType, scope: trio.CancelScope) -> None:
    buffer = memoryview(bytearray(_BUFFER))
    try:
        while size := await source.recv_into(buffer):
            left = buffer[:size]
            while left:
                left = left[await sink.send(left) :]
    except OSError as error:
        log.debug("a connection broke: %s", error)
    scope.cancel()
