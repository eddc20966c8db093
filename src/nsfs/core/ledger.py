"""The records of all snapshots, in memory as they are on disk.

Owns the order of changes: whoever decides one holds `lock` from the decision until `carry_out` has returned, so that
every decision sees all changes before it. Reading takes no lock and sees a change whole or not at all.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Protocol

import trio

from nsfs.model.snapshot import Change, Record

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class Records(Protocol):
    """Where snapshots are remembered, durably. Blocks."""

    def snapshots(self) -> list[Record]:
        """All of them."""

    def last_snapshot(self) -> int:
        """The highest ID ever given."""

    def change_snapshots(self, change: Change) -> None:
        """Carry out a change, all of it or nothing."""


class Table:
    """The records of one plugin name, as `model.snapshot` asks for them."""

    def __init__(self) -> None:
        self._records: dict[str, Record] = {}
        self._children: Counter[str] = Counter()

    def get(self, name: str) -> Record | None:
        """See model.snapshot.Table."""
        return self._records.get(name)

    def has_children(self, name: str) -> bool:
        """See model.snapshot.Table."""
        return self._children[name] > 0

    def records(self) -> Iterable[Record]:
        """All of them."""
        return self._records.values()

    def apply(self, change: Change) -> None:
        """Do in memory what was done on disk."""
        if change.gone is not None:
            del self._records[change.gone.name]
            self._children[change.gone.parent] -= 1
        if change.put is not None:
            self._records[change.put.name] = change.put
            self._children[change.put.parent] += 1


class Ledger:
    """All tables. Reads the disk when it is made, so make it in a thread."""

    def __init__(self, records: Records) -> None:
        self._disk = records
        self._tables: dict[str, Table] = {}
        self.lock = trio.Lock()
        self.next = records.last_snapshot() + 1
        """The ID that will be given next."""
        for record in records.snapshots():
            self.table(record.snapshotter).apply(Change(put=record))

    def table(self, snapshotter: str) -> Table:
        """The records of a plugin name."""
        return self._tables.setdefault(snapshotter, Table())

    def records(self) -> Iterator[Record]:
        """The records of every plugin name."""
        return (record for table in self._tables.values() for record in table.records())

    def take_number(self) -> int:
        """An ID that no snapshot has had."""
        self.next += 1
        return self.next - 1

    async def carry_out(self, change: Change) -> None:
        """Make a change durable and known; its records are of one plugin name."""
        record = change.put or change.gone
        assert record is not None, "a change changes something"
        await trio.to_thread.run_sync(self._disk.change_snapshots, change)
        # CHECKPOINT-FREE: what is on disk and what is in memory are one, also for a caller who is cancelled here.
        self.table(record.snapshotter).apply(change)
