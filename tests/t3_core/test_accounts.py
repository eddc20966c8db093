"""What requests cost is added up, also while it cannot be written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import trio_tests
from nsfs.core.worker_api import Costs
from nsfs.errors import NoSpaceError
from nsfs.model.report import Cost
from nsfs.serve.accounts import Accounts

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest

    from nsfs.serve.supervisor import Supervisor


class Book:
    """Takes nothing while it is `full`."""

    def __init__(self) -> None:
        self.full = False
        self.written: list[Cost] = []

    def costs(self, owner: str) -> list[Cost]:
        return list(self.written)

    def add_costs(self, owner: str, costs: Sequence[Cost]) -> None:
        if self.full:
            raise NoSpaceError("Read-only file system")
        self.written += costs


class Counting:
    """A supervisor of one worker, which made one request of 10 bytes whenever it is asked."""

    def owned(self) -> dict[str, str]:
        return {"ns/red": "red"}

    async def ask_now(self, domain: str, method: str, params: Any, answer: Any) -> Costs:
        return Costs(costs=[Cost(server="r", requests=1, received=10)])


def test_what_cannot_be_written_is_kept_and_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    book = Book()
    accounts = Accounts(book, cast("Supervisor", Counting()))

    async def body() -> None:
        book.full = True
        assert await accounts.of(["red"]) == [Cost(server="r", requests=1, received=10)]
        assert await accounts.of(["red"]) == [Cost(server="r", requests=2, received=20)]
        assert book.written == []
        book.full = False
        assert await accounts.of(["red"]) == [Cost(server="r", requests=3, received=30)]
        assert await accounts.known(["red"]) == [Cost(server="r", requests=3, received=30)]

    trio_tests.run(body)
    assert sum(cost.requests for cost in book.written) == 3
    (record,) = caplog.records
    assert "not written yet" in record.message
    caplog.clear()
