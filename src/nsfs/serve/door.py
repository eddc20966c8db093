"""The door to the daemon's socket: looks who connects, and passes on what the admitted say.

gRPC serves unix sockets without telling whose process is at the other end, so it does not get to see them: connections
are accepted here, their peers' credentials checked (SO_PEERCRED, unix(7): those of the moment of connecting), and their
bytes relayed to the socket that gRPC listens on, which has no name. Refuses whoever is neither root nor the daemon's
own user, whatever the modes of socket and folder have become, with a line in the log.
Who is inside when the door is shut is told so: calls that are under way come to their end, and clients know of any
other that it was never begun (`serve.http2`), so that they ask it of who listens at the same socket next.

Concurrency: a task for each direction of each connection, and one buffer, so that who reads slowly is waited for. It
costs a call 0.1 ms (Stat over one channel, median of 2,000: 0.66 ms without, 0.77 with; two processors, Linux 6.18);
looking at frames could not be told from noise in that, and takes 0.9 ms of a processor for a MiB of contents.
"""

from __future__ import annotations

import logging
import socket
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from nsfs.serve.http2 import Conversation

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Sequence

log = logging.getLogger(__name__)

_CREDENTIALS: Final = struct.Struct("=iII")
"""struct ucred."""
_BUFFER: Final = 1 << 18
"""All that a unix socket holds at a time by default (net.core.wmem_default): so a stream is passed on in few steps."""
_TELL_EVERY: Final = 60.0
"""Seconds between two lines about one user."""
_HANG_UP: Final = 0.5
"""Seconds for clients to leave that have heard a farewell, and have nothing to wait for."""


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
        self._relays: set[_Relay] = set()
        self._changes = trio.lowlevel.ParkingLot()

    async def serve(self, nursery: trio.Nursery, greeted: Sequence[socket.socket] = ()) -> None:
        """Until it is shut, or cancelled; who is inside by then stays, in `nursery`.

        Who was `greeted` by others (`serve.porter`) comes first.
        """
        for each in greeted:
            nursery.start_soon(self._admit, trio.socket.from_stdlib_socket(each), True)  # noqa: FBT003
        with self._open:
            async with self._listener:
                await trio.serve_listeners(self._admit_stream, [self._listener], handler_nursery=nursery)

    async def shut(self, patience: float) -> None:
        """Admit nobody more, and nothing new of who is inside; calls have `patience` seconds to come to their end."""
        self._open.cancel()
        for relay in self._relays:
            relay.end()
        with trio.move_on_after(patience) as waiting:
            await self._wait_quiet()
            waiting.deadline = min(waiting.deadline, trio.current_time() + _HANG_UP)
            while self._relays:
                await self._changes.park()

    async def _wait_quiet(self) -> None:
        if calls := sum(relay.calls for relay in self._relays):
            log.info("calls that are under way are waited for: %d", calls)
        while any(relay.calls for relay in self._relays):
            await self._changes.park()

    async def _admit_stream(self, stream: trio.SocketStream) -> None:
        await self._admit(stream.socket, False)  # noqa: FBT003

    async def _admit(self, outer: trio.socket.SocketType, is_greeted: bool) -> None:  # noqa: FBT001
        with outer, trio.socket.socket(socket.AF_UNIX) as inner:
            try:
                peer = peer_of(outer)
                if peer.uid not in self._admitted:
                    self._refuse(peer)
                    return
                await inner.connect(self._inside)
                await self._relay(_Relay(outer, inner, Conversation(is_greeted=is_greeted), self._changes.unpark_all))
            except (OSError, ValueError) as error:
                log.debug("a connection ended: %s", error)

    async def _relay(self, relay: _Relay) -> None:
        self._relays.add(relay)
        try:
            if self._open.cancel_called:
                relay.end()
            await relay.run()
        finally:
            self._relays.discard(relay)
            self._changes.unpark_all()

    def _refuse(self, peer: Peer) -> None:
        now = trio.current_time()
        if self._told.get(peer.uid, -_TELL_EVERY) + _TELL_EVERY <= now:
            self._told[peer.uid] = now
            log.warning("refused a connection: uid=%d gid=%d pid=%d", peer.uid, peer.gid, peer.pid)


class _Relay:
    """One connection, from a client to gRPC; tells by `changed` that a call may have ended."""

    def __init__(
        self,
        outer: trio.socket.SocketType,
        inner: trio.socket.SocketType,
        conversation: Conversation,
        changed: Callable[[], object],
    ) -> None:
        self._outer = outer
        self._inner = inner
        self._conversation = conversation
        self._changed = changed
        self._farewell, self._settled = trio.Event(), trio.Event()
        self._to_client = trio.Lock()

    @property
    def calls(self) -> int:
        """How many are under way."""
        return self._conversation.open

    def end(self) -> None:
        """Have no other call begin."""
        self._farewell.set()

    async def run(self) -> None:
        """Until either side ends: HTTP/2 has no use for the other direction then."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._say_farewell)
            nursery.start_soon(self._pump, self._outer, self._pass_inwards, nursery.cancel_scope)
            nursery.start_soon(self._pump, self._inner, self._pass_outwards, nursery.cancel_scope)

    async def _say_farewell(self) -> None:
        await self._farewell.wait()
        await self._settled.wait()
        with suppress(OSError):  # it has just gone
            await self._tell_client(self._conversation.say_farewell())

    async def _pump(
        self,
        source: trio.socket.SocketType,
        pass_on: Callable[[memoryview], Awaitable[None]],
        scope: trio.CancelScope,
    ) -> None:
        buffer = memoryview(bytearray(_BUFFER))
        try:
            while size := await source.recv_into(buffer):
                await pass_on(buffer[:size])
        except (OSError, ValueError) as error:
            log.debug("a connection broke: %s", error)
        scope.cancel()

    async def _pass_inwards(self, data: memoryview) -> None:
        await _send(self._inner, self._conversation.inwards(data))
        if self._conversation.is_settled:
            self._settled.set()

    async def _pass_outwards(self, data: memoryview) -> None:
        await self._tell_client(self._conversation.outwards(data))
        self._changed()

    async def _tell_client(self, data: bytes) -> None:
        async with self._to_client:
            await _send(self._outer, data)


async def _send(sink: trio.socket.SocketType, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[await sink.send(left) :]
