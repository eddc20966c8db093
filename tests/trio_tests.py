"""Tests as trio runs: with a clock that jumps over every pause, and errors that leave as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import trio
import trio.testing

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


def run(body: Callable[[], Awaitable[Any]], *, threads: bool = False) -> None:
    """Run `body`, of which nothing may be left after 600 seconds of its own clock.

    The clock jumps whenever all tasks wait; with `threads` only after a moment, in which threads and processes may
    answer.
    """

    async def limited() -> None:
        with trio.fail_after(600):
            await body()

    trio.run(limited, clock=trio.testing.MockClock(autojump_threshold=0.1 if threads else 0))
