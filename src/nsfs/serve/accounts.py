"""Accounts: what each owner's requests to registries cost, of all domains, kept for longer than workers live.

Owns the collecting: workers count what they ask and receive, as their one owner; every few seconds the daemon takes
that over into its records. A shared domain asks by its owners' own workers, so it is charged to whom it is due. What a
worker counted since it was last asked is lost where it is killed; what cannot be written is kept in memory, and written
when it can be.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

import trio

from nsfs.core.tasks import run_all
from nsfs.core.worker_api import Costs, Empty
from nsfs.errors import NsfsError
from nsfs.model.report import Cost, plan_costs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nsfs.serve.supervisor import Supervisor

log = logging.getLogger(__name__)

_EVERY: Final = 5.0
"""Seconds."""


class Book(Protocol):
    """Where costs are kept, durably. Blocks."""

    def costs(self, owner: str) -> list[Cost]:
        """So far, by server."""

    def add_costs(self, owner: str, costs: Sequence[Cost]) -> None:
        """Add to them."""


class Accounts:
    """The service."""

    def __init__(self, book: Book, supervisor: Supervisor) -> None:
        self._book = book
        self._supervisor = supervisor
        self._unwritten: defaultdict[str, list[Cost]] = defaultdict(list)
        """By owner."""
        self._told = ""

    async def follow(self) -> None:
        """Take over what workers counted, again and again."""
        while True:
            await trio.sleep(_EVERY)
            await self.collect()

    async def collect(self) -> None:
        """Take over what workers counted until now, all at once; one that does not answer is asked the next time."""

        async def take(domain: str, owner: str) -> None:
            with suppress(NsfsError):
                found = await self._supervisor.ask_now(domain, "TakeCosts", Empty(), Costs)
                self._unwritten[owner] += found.costs

        await run_all([partial(take, domain, owner) for domain, owner in self._supervisor.owned().items()])
        for owner in [owner for owner, costs in self._unwritten.items() if costs]:
            await self._write(owner)

    async def _write(self, owner: str) -> None:
        """One at a time has the costs: what is written is no more among them."""
        costs = self._unwritten.pop(owner, [])
        try:
            await trio.to_thread.run_sync(self._book.add_costs, owner, costs)
            self._told = ""
        except NsfsError as error:
            self._unwritten[owner] = plan_costs((), [*costs, *self._unwritten[owner]])
            if error.message != self._told:
                log.warning("what requests cost is not written yet: %s", error)
            self._told = error.message

    async def of(self, owners: Sequence[str]) -> list[Cost]:
        """What these owners' requests cost until now, by server."""
        await self.collect()
        return await self.known(owners)

    async def known(self, owners: Sequence[str]) -> list[Cost]:
        """As `of`, but for what workers counted in the last seconds: nobody is asked."""
        found: list[Cost] = []
        for owner in owners:
            found += await trio.to_thread.run_sync(self._book.costs, owner)
            found += self._unwritten.get(owner, [])
        return plan_costs({cost.server for cost in found}, found)
