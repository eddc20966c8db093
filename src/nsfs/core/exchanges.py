"""Exchanges: from an ALREADY_EXISTS to the List by which containerd finds out which snapshot was meant.

That List names a chain ID and a parent and, before containerd 2.1, no namespace. So there is one exchange at a time for
a chain ID on a parent, and its List finds the snapshot of that exchange alone: never another namespace's, which may be
made of other bytes. An exchange ends with its List, or after LIFE seconds for a caller who never asks.

Concurrency: whoever begins an exchange waits for the one under way; who is cancelled while waiting has begun none.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from nsfs.model.lazy import Exchange
    from nsfs.model.snapshot import Record

log = logging.getLogger(__name__)

LIFE: Final = 2.0
"""Seconds."""


@dataclass(slots=True)
class _Open:
    record: Record
    until: float
    closed: trio.Event = field(default_factory=trio.Event)


class Exchanges:
    """All that are under way, by plugin name and question."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, Exchange], _Open] = {}

    async def begin(self, exchange: Exchange, record: Record) -> None:
        """Let the next List that asks so find `record`; the caller answers ALREADY_EXISTS now."""
        key = record.snapshotter, exchange
        while (other := self._open.get(key)) is not None and other.until > trio.current_time():
            with trio.move_on_at(other.until):
                await other.closed.wait()
        self._open[key] = _Open(record, trio.current_time() + LIFE)

    def answer(self, snapshotter: str, exchange: Exchange, namespace: str | None) -> Record | None:
        """The snapshot that is meant, and the end of the exchange; None where none is under way for the caller."""
        found = self._open.get((snapshotter, exchange))
        if found is None or namespace not in {None, found.record.namespace}:
            return None
        del self._open[snapshotter, exchange]
        found.closed.set()
        return found.record if found.until > trio.current_time() else None
