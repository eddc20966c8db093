"""Lulls: when work that nobody waits for is in nobody's way.

Owns the decision that starts are over: nothing was read for a while, whether or not it was here, no layer is passed
over for the first time, and no start is being recorded. Refuses to put work off for ever: after a time it goes on
beside whatever is read.

Concurrency: one event loop; who waits looks again when there may be a lull at the earliest. Nothing is kept: a
successor of the worker begins with a start of its own.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import trio

from nsfs.core.recording import LONGEST, QUIET

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Lulls:
    """The service."""

    def __init__(
        self, idle_for: Callable[[], float], is_recording: Callable[[], bool], *, quiet: float = QUIET
    ) -> None:
        """`idle_for` says for how many seconds nobody has read; a lull begins after `quiet` of them."""
        self._idle_for = idle_for
        self._is_recording = is_recording
        self._quiet = quiet
        self._disturbers = 0
        self._disturbed = trio.current_time()
        """When the last of them ended."""

    @contextmanager
    def disturbed(self) -> Iterator[None]:
        """While the block lasts, and for a while after, there is no lull."""
        self._disturbers += 1
        try:
            yield
        finally:
            self._disturbers -= 1
            self._disturbed = trio.current_time()

    async def wait(self, since: float) -> None:
        """Return in a lull, but at the latest so long after `since` (trio's time) as a start may be recorded."""
        with trio.move_on_at(since + LONGEST):
            while (rest := self._rest()) > 0:  # noqa: ASYNC110  a read is not to set an event
                await trio.sleep(rest)

    def _rest(self) -> float:
        """Seconds until there can be a lull at the earliest."""
        if self._disturbers or self._is_recording():
            return self._quiet
        return self._quiet - min(self._idle_for(), trio.current_time() - self._disturbed)
