"""Tests as trio runs: with a clock that jumps over every pause, and errors that leave as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from unittest import mock

import trio
import trio.testing

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


def run(body: Callable[[], Awaitable[Any]], *, threads: bool = False) -> None:
    """Run `body`, of which nothing may be left after 600 seconds of its own clock.

    The clock jumps whenever all tasks wait, and what belongs into a thread is done on the spot. With `threads` there
    are real ones, and the clock jumps only after a moment, in which they and other processes may answer.
    """

    async def limited() -> None:
        with trio.fail_after(600):
            await body()

    if threads:
        trio.run(limited, clock=trio.testing.MockClock(autojump_threshold=0.1))
        return
    with mock.patch("trio.to_thread.run_sync", _do_here):
        trio.run(limited, clock=trio.testing.MockClock(autojump_threshold=0))


async def _do_here(work: Callable[..., Any], *args: object, **_options: object) -> Any:
    await trio.lowlevel.checkpoint()
    return work(*args)
