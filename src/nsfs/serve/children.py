"""How processes that the zygote forked for us end: let go, killed, waited for.

Owns no process: who had it forked ends it. Refuses to wait for ever: a disk that does not answer may keep a killed
process, and nobody else. Concurrency: trio; what must be done is shielded from cancelling.
"""

from __future__ import annotations

import signal
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import trio

from nsfs.errors import UnreachableError

if TYPE_CHECKING:
    from nsfs.serve.forkclient import Child

_DEATH: Final = 5.0
"""Seconds that a killed worker may take to be gone; longer only where a disk does not answer."""


def end_trial(survivor: Child | None, trial: Child | None) -> None:
    """Where a daemon was killed while it tried a worker beside another, which it had stopped: that one goes on."""
    if trial is not None:
        trial.kill()
        trial.close()
    if survivor is not None:
        survivor.kill(signal.SIGCONT)


async def cancel_when_gone(child: Child, scope: trio.CancelScope) -> None:
    """A copy of its socket may be left somewhere: then its end is not seen there."""
    await child.wait_gone()
    scope.cancel()


async def status_of(child: Child) -> str:
    """For the log, of a child that closed its socket and so is about to end."""
    with trio.move_on_after(1), suppress(UnreachableError):
        return f", exit status {await child.wait()}"
    return ""


async def end_child(child: Child, grace: float) -> None:
    """Let it end by itself for `grace` seconds, now that its socket is closed; then kill it.

    Returns when it can write nothing any more.
    """
    with trio.move_on_after(grace, shield=True):
        await child.wait_gone()
    child.kill()
    with trio.move_on_after(_DEATH, shield=True):
        await child.wait_gone()
    child.close()
