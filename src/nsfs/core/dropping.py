"""Keeping one copy of what was read: the readers' own pages, not those of the pool's file below them."""

from __future__ import annotations

from typing import Final, Protocol

import trio

_EVERY: Final = 0.5
"""Seconds without a read after which pages of the pool's file go, or twice as many."""


class Pool(Protocol):
    """What is read."""

    def drop_read(self) -> None:
        """Drop the clean pages that reads left behind, unless there was one since the last call."""


async def drop_often(pool: Pool) -> None:
    """Drop what reads leave behind, for as long as the caller wants; costs nothing while nobody reads."""
    while True:
        await trio.sleep(_EVERY)
        await trio.to_thread.run_sync(pool.drop_read)
