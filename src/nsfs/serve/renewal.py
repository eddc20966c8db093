"""A new worker beside one of older code: only where it answers does the old one end.

Two workers may not write one pool at a time, so the old one is stopped (SIGSTOP) while the new one starts, which needs
nothing of it: whatever code it is of, it has no part in this. If the new one does not greet us in time it is killed,
the kernel is told to repeat what it had taken, and the old one goes on. Reads wait meanwhile, for as long as a start
takes; `_TRIAL` at most.

Invariant: whatever ends a trial, one of the two is gone and the other goes on.
"""

from __future__ import annotations

import signal
import socket
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from nsfs.core import worker_api
from nsfs.core.tasks import running
from nsfs.errors import NsfsError, UnreachableError
from nsfs.serve.session import ask_again
from nsfs.serve.wire import open_peer
from nsfs.serve.worker_args import Ready

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from nsfs.serve.forkclient import Child
    from nsfs.serve.wire import Methods

_TRIAL: Final = 15.0
"""Seconds for a new worker to greet us."""
_DEATH: Final = 5.0


async def try_beside(
    old: Child, fuse_fd: int | None, start: Callable[[socket.socket], Awaitable[Child]], lent: Methods
) -> Child:
    """A worker that has taken the place of `old`, and waits for a socket over its line.

    `start` starts one at the other end of a socket. Raises UnreachableError where it does not answer; then `old` goes
    on.
    """
    old.kill(signal.SIGSTOP)
    new: Child | None = None
    try:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        async with trio.SocketStream(trio.socket.from_stdlib_socket(ours)) as stream:
            with theirs:
                new = await start(theirs)
            await _wait_greeting(stream, new, lent)
    except BaseException:
        if new is not None:
            await _kill(new)
        if fuse_fd is not None:
            with suppress(NsfsError):
                ask_again(fuse_fd)
        old.kill(signal.SIGCONT)
        raise
    old.kill()
    return new


async def _wait_greeting(stream: trio.SocketStream, new: Child, lent: Methods) -> None:
    greeted = trio.Event()

    async def ready(_params: Ready, _report: object) -> worker_api.Empty:
        greeted.set()
        return worker_api.Empty()

    with trio.move_on_after(_TRIAL) as scope:
        methods: Methods = {"Ready": (Ready, ready), "JobServer": (worker_api.Empty, _wait_taken), **lent}
        async with running(partial(_cancel_when_gone, new, scope)), open_peer(stream, methods, name="daemon"):
            await greeted.wait()
    if not greeted.is_set():
        raise UnreachableError(f"a new worker does not answer: pid {new.pid}")


async def _wait_taken(_params: worker_api.Empty, _report: object) -> worker_api.Empty:
    """What it asks of us in the moment before its trial is over, it asks again then."""
    await trio.sleep_forever()
    return worker_api.Empty()


async def _cancel_when_gone(child: Child, scope: trio.CancelScope) -> None:
    await child.wait_gone()
    scope.cancel()


async def _kill(child: Child) -> None:
    child.kill()
    with trio.move_on_after(_DEATH, shield=True):
        await child.wait_gone()
    child.close()
