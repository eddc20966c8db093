"""Several things at once: errors as they are, nothing left running, and work that cannot be cancelled."""

import pytest
import trio

from nsfs.core.tasks import finish, open_tasks, run_all, running
from nsfs.errors import BusyError, NotFoundError
from trio_tests import run


async def fail() -> None:
    raise NotFoundError("no")


def test_the_first_error_ends_the_others_and_is_raised_as_it_is() -> None:
    ended: list[str] = []

    async def wait() -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.append("waiting")

    async def body() -> None:
        with pytest.raises(NotFoundError):
            await run_all([wait, fail, wait])
        assert ended == ["waiting"] * 2

    run(body)


def test_work_beside_a_block_ends_with_it() -> None:
    async def body() -> None:
        ended = trio.Event()

        async def wait() -> None:
            try:
                await trio.sleep_forever()
            finally:
                ended.set()

        async with running(wait):
            await trio.lowlevel.checkpoint()
        assert ended.is_set()

    run(body)


def test_work_beside_a_block_that_fails_ends_it() -> None:
    async def body() -> None:
        with pytest.raises(NotFoundError):
            async with running(fail):
                await trio.sleep_forever()

    run(body)


def test_a_block_that_fails_is_heard_and_not_the_work_beside_it() -> None:
    async def body() -> None:
        with pytest.raises(BusyError):
            async with running(trio.sleep_forever):
                raise BusyError("in use")
        with pytest.raises(BusyError):
            await _fail_beside_a_task()

    run(body)


async def _fail_beside_a_task() -> None:
    async with open_tasks() as tasks:
        tasks.start_soon(trio.sleep_forever)
        raise BusyError("in use")


def test_what_must_end_ends_though_its_caller_is_cancelled() -> None:
    async def body() -> None:
        undone = trio.Event()

        async def undo() -> None:
            await trio.sleep(3)
            undone.set()

        with trio.CancelScope() as scope:
            scope.cancel()
            await finish(undo())
        assert undone.is_set()

    run(body)
