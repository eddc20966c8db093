"""Flights: one run for all who wait, whoever leaves."""

import pytest
import trio

from nsfs.core.flights import Flights
from nsfs.errors import CorruptError, UnreachableError
from trio_tests import run


class Work:
    """Counts its runs; lands when it is let."""

    def __init__(self, error: Exception | None = None) -> None:
        self.runs = 0
        self.error = error
        self.may_land = trio.Event()

    async def __call__(self) -> int:
        self.runs += 1
        await self.may_land.wait()
        if self.error is not None:
            raise self.error
        return self.runs


def test_all_who_ask_meanwhile_share_one_run() -> None:
    async def body() -> None:
        got: list[int] = []
        work = Work()
        async with trio.open_nursery() as nursery:
            flights: Flights[int] = Flights(nursery)

            async def ask() -> None:
                got.append(await flights.join("key", work))

            async with trio.open_nursery() as readers:
                for _ in range(5):
                    readers.start_soon(ask)
                await trio.testing.wait_all_tasks_blocked()
                work.may_land.set()
            assert got == [1] * 5
            assert await flights.join("key", work) == 2

    run(body)


def test_who_leaves_cancels_nobody() -> None:
    async def body() -> None:
        work = Work()
        async with trio.open_nursery() as nursery:
            flights: Flights[int] = Flights(nursery)
            with trio.move_on_after(1) as scope:
                await flights.join("key", work)
            assert scope.cancelled_caught
            nursery.start_soon(_set_later, work.may_land)
            assert await flights.join("key", work) == 1

    run(body)


async def _set_later(event: trio.Event) -> None:
    await trio.sleep(1)
    event.set()


def test_an_error_is_heard_by_all_and_the_next_begins_anew() -> None:
    async def body() -> None:
        work = Work(CorruptError("bad"))
        heard: list[str] = []
        async with trio.open_nursery() as nursery:
            flights: Flights[int] = Flights(nursery)

            async def ask() -> None:
                with pytest.raises(CorruptError, match="bad"):
                    await flights.join("key", work)
                heard.append("bad")

            async with trio.open_nursery() as readers:
                for _ in range(3):
                    readers.start_soon(ask)
                await trio.testing.wait_all_tasks_blocked()
                work.may_land.set()
            work.error = None
            assert await flights.join("key", work) == 2
        assert heard == ["bad"] * 3

    run(body)


def test_an_error_that_nobody_waits_for_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        work = Work(CorruptError("bad"))
        async with trio.open_nursery() as nursery:
            flights: Flights[int] = Flights(nursery)
            with trio.move_on_after(1):
                await flights.join("key", work)
            work.may_land.set()

    run(body)
    assert [record.getMessage() for record in caplog.records] == ["nobody waited any more for what failed: key: bad"]


def test_the_end_of_the_nursery_is_an_error_and_no_hang() -> None:
    async def body() -> None:
        asked: list[str] = []
        async with trio.open_nursery() as outer, trio.open_nursery() as nursery:
            flights: Flights[int] = Flights(nursery)

            async def ask() -> None:
                with pytest.raises(UnreachableError, match="ends before"):
                    await flights.join("key", Work())
                asked.append("key")

            outer.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert asked == ["key"]

    run(body)
