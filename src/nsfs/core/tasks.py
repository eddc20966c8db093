"""Several things at once, with errors that leave as they are and not in a group.

A nursery wraps what its tasks raise in an ExceptionGroup; whoever asked for an image wants to hear the NsfsError.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable


async def run_all(works: Iterable[Callable[[], Awaitable[object]]]) -> None:
    """Run all of `works` at once; the first that fails ends the others, and its error is raised."""
    failures: list[Exception] = []

    async def run(work: Callable[[], Awaitable[object]]) -> None:
        try:
            await work()
        except Exception as error:  # noqa: BLE001  raised again below
            failures.append(error)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for work in works:
            nursery.start_soon(run, work)
    if failures:
        raise failures[0]


@asynccontextmanager
async def running(work: Callable[[], Awaitable[object]]) -> AsyncIterator[None]:
    """Run `work` while the block lasts; what the block raises leaves as it is."""
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        try:
            yield
        except Exception as error:  # noqa: BLE001  raised again below
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
