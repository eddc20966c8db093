"""Fork servers that are lent: who asks gets one, of the daemon of now or of the next."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from nsfs.core.worker_api import Empty
from nsfs.errors import NsfsError, UnreachableError
from nsfs.serve.joblending import LentServer
from nsfs.serve.lending import Uplink
from nsfs.serve.wire import open_peer
from trio_tests import run

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from nsfs.serve.wire import Peer


class Daemons:
    """Daemons that follow each other, in tasks of this process; each answers for JobServer as `script` says."""

    def __init__(self, uplink: Uplink, nursery: trio.Nursery) -> None:
        self.asked = 0
        self.script: Callable[[], Awaitable[None]] = trio.sleep_forever
        self._uplink = uplink
        self._nursery = nursery

    async def start(self) -> trio.CancelScope:
        """The next one; cancelling ends it."""
        near, far = trio.testing.memory_stream_pair()
        scope = trio.CancelScope()
        self._nursery.start_soon(self._serve, far, scope)
        peer = await self._nursery.start(self._hold, near)
        self._uplink.connect(peer)
        return scope

    async def _serve(self, stream: trio.abc.Stream, scope: trio.CancelScope) -> None:
        async def lend(_params: Empty, _report: object) -> Empty:
            self.asked += 1
            await self.script()
            return Empty()

        with scope:
            async with open_peer(stream, {"JobServer": (Empty, lend)}, name="daemon") as peer:
                await peer.wait_closed()

    async def _hold(self, stream: trio.abc.Stream, task_status: trio.TaskStatus[Peer]) -> None:
        async with open_peer(stream, {}, name="worker") as peer:
            task_status.started(peer)
            await peer.wait_closed()


async def lend(lent: LentServer) -> socket.socket:
    """Give it a fork server; that one's end."""
    ((kind, take),) = lent.methods().values()

    async def report(_progress: object) -> None:
        raise AssertionError("there is nothing on the way")

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    await take(kind(fds=[ours.detach()]), report)
    return theirs


def test_where_the_daemon_goes_meanwhile_the_next_one_is_asked() -> None:
    async def body() -> None:
        uplink = Uplink()
        async with trio.open_nursery() as nursery:
            daemons = Daemons(uplink, nursery)
            first = await daemons.start()
            answered = trio.Event()

            async def ask() -> None:
                await uplink.call_until_answered("JobServer", Empty(), Empty)
                answered.set()

            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            assert daemons.asked == 1
            first.cancel()
            await trio.testing.wait_all_tasks_blocked()
            assert not answered.is_set()
            daemons.script = trio.lowlevel.checkpoint
            second = await daemons.start()
            await answered.wait()
            assert daemons.asked == 2
            second.cancel()

    run(body)


def test_what_a_daemon_refuses_is_not_asked_again() -> None:
    async def body() -> None:
        uplink = Uplink()
        async with trio.open_nursery() as nursery:
            daemons = Daemons(uplink, nursery)

            async def refuse() -> None:
                await trio.lowlevel.checkpoint()
                raise UnreachableError("cannot start a process: no memory")

            daemons.script = refuse
            scope = await daemons.start()
            lent = LentServer(uplink, nursery)
            for _ in range(2):
                with pytest.raises(UnreachableError, match="no memory"):
                    await lent.spawn("a:b", None)
            assert daemons.asked == 2
            daemons.script = trio.lowlevel.checkpoint
            with pytest.raises(NsfsError, match="lends no fork server"):
                await lent.spawn("a:b", None)
            scope.cancel()

    run(body)


def test_one_that_is_ready_is_not_asked_for_again() -> None:
    async def body() -> None:
        uplink = Uplink()
        async with trio.open_nursery() as nursery:
            daemons, lent, ends = Daemons(uplink, nursery), LentServer(uplink, nursery), list[socket.socket]()

            async def give() -> None:
                ends.append(await lend(lent))

            daemons.script = give
            scope = await daemons.start()
            for _ in range(2):
                await lent.make_ready()
            assert daemons.asked == 1
            ends[0].close()
            scope.cancel()

    run(body)


def test_one_that_died_is_followed_by_another() -> None:
    async def body() -> None:
        uplink = Uplink()
        async with trio.open_nursery() as nursery:
            daemons, lent = Daemons(uplink, nursery), LentServer(uplink, nursery)

            async def give() -> None:
                (await lend(lent)).close()

            daemons.script = give
            scope = await daemons.start()
            for count in (1, 2):
                with pytest.raises(UnreachableError, match="the fork server died"):
                    await lent.spawn("a:b", None)
                assert daemons.asked == count
            scope.cancel()

    run(body)
