"""Tests as trio runs: with a clock that jumps over every pause, and errors that leave as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from unittest import mock

import trio
import trio.testing

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


def run(body: Callable[[], Awaitable[Any]], *, threads: bool = False) -> None:
    """Run `body` on a clock that jumps whenever all tasks wait; what belongs into a thread is done on the spot.

    After 600 seconds of that clock it has failed. With `threads` there are real ones, for other processes, too, and the
    clock is real.
    """

    async def limited() -> None:
        with trio.fail_after(60 if threads else 600):
            await body()

    if threads:
        trio.run(limited)
        return
    with mock.patch("trio.to_thread.run_sync", _do_here):
        trio.run(limited, clock=trio.testing.MockClock(autojump_threshold=0))


async def _do_here(work: Callable[..., Any], *args: object, **_options: object) -> Any:
    await trio.lowlevel.checkpoint()
    return work(*args)
