"""Accounts: what each owner's requests to registries cost, of all domains, kept for longer than workers live.

Owns the collecting: workers count what they ask and receive, as their one owner; every few seconds the daemon takes
that over into its records. A shared domain asks by its owners' own workers, so it is charged to whom it is due. What a
worker counted since it was last asked is lost where it is killed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

import trio

from nsfs.core.worker_api import Costs, Empty
from nsfs.errors import NsfsError
from nsfs.model.report import Cost

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nsfs.serve.supervisor import Supervisor

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

    async def follow(self) -> None:
        """Take over what workers counted, again and again."""
        while True:
            await trio.sleep(_EVERY)
            await self.collect()

    async def collect(self) -> None:
        """Take over what workers counted until now; one that does not answer is asked the next time."""
        for domain, owner in self._supervisor.owned().items():
            try:
                found = await self._supervisor.ask_now(domain, "TakeCosts", Empty(), Costs)
            except NsfsError:
                continue
            if found.costs:
                await trio.to_thread.run_sync(self._book.add_costs, owner, found.costs)

    async def of(self, owners: Sequence[str]) -> list[Cost]:
        """What these owners' requests cost until now, by server."""
        await self.collect()
        return await self.known(owners)

    async def known(self, owners: Sequence[str]) -> list[Cost]:
        """As `of`, but for what workers counted in the last seconds: nobody is asked."""
        total: dict[str, Cost] = {}
        for owner in owners:
            for cost in await trio.to_thread.run_sync(self._book.costs, owner):
                sum_ = total.setdefault(cost.server, Cost(server=cost.server, requests=0, received=0))
                sum_.requests += cost.requests
                sum_.received += cost.received
        return [total[server] for server in sorted(total)]
