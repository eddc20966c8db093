"""Several things at once, with errors that leave as they are and not in a group; and work that must come to its end.

A nursery wraps what its tasks raise in an ExceptionGroup; whoever asked for an image wants to hear the NsfsError.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable


@asynccontextmanager
async def open_tasks() -> AsyncIterator[trio.Nursery]:
    """A nursery whose tasks are cancelled when the block ends; what the block raises leaves as it is."""
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        try:
            yield nursery
        except Exception as error:  # noqa: BLE001  raised again below, outside of the nursery
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def run_all(works: Iterable[Callable[[], Awaitable[object]]]) -> None:
    """Run all of `works` at once; the first that fails ends the others, and its error is raised."""
    failures: list[Exception] = []
    async with trio.open_nursery() as nursery:
        for work in works:
            nursery.start_soon(_run, work, failures, nursery.cancel_scope)
    if failures:
        raise failures[0]


@asynccontextmanager
async def running(work: Callable[[], Awaitable[object]]) -> AsyncIterator[None]:
    """Run `work` while the block lasts; the first of the two that fails ends the other, and its error is raised."""
    failures: list[Exception] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_run, work, failures, nursery.cancel_scope)
        try:
            yield
        except Exception as error:  # noqa: BLE001  raised again below
            failures.append(error)
        nursery.cancel_scope.cancel()
    if failures:
        raise failures[0]


async def _run(work: Callable[[], Awaitable[object]], failures: list[Exception], scope: trio.CancelScope) -> None:
    """Run `work`; note its error, which the caller raises outside of the nursery, and end the others."""
    try:
        await work()
    except Exception as error:  # noqa: BLE001  the caller raises it again
        failures.append(error)
        scope.cancel()


async def finish(work: Awaitable[object]) -> None:
    """Wait for `work` to its end, also where the caller is cancelled: for what must be undone or ended.

    `work` has a deadline of its own, so that this ends.
    """
    with trio.CancelScope(shield=True):
        await work
