"""Work that many may wait for and nobody may cancel.

Concurrency: the work runs in the given nursery, not in the caller's task: a caller who is cancelled leaves, the work
goes on. Callers with one key share one run and one outcome; after it has ended the next caller begins anew.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Generic, TypeVar

import trio

from nsfs.errors import NsfsError, UnreachableError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")
log = logging.getLogger(__name__)


class _Flight(Generic[T]):
    """One run under way."""

    def __init__(self, by: str) -> None:
        self.landed = trio.Event()
        self.by = by
        self.waiting = 0
        self.result: list[T] = []
        self.error: Exception | None = None


class Flights(Generic[T]):
    """All runs of one kind."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._flights: dict[str, _Flight[T]] = {}

    async def join(self, key: str, work: Callable[[], Awaitable[T]], by: str = "") -> T:
        """The outcome of the run under way for `key`, begun with `work` if there is none.

        Raises what the run raised, and UnreachableError where the nursery ended before it did. A run that somebody else
        began (`by`) may fail for reasons that are only theirs: then it is begun anew.
        """
        while True:
            flight = self._flights.get(key)
            if flight is None:
                flight = self._flights[key] = _Flight(by)
                self._nursery.start_soon(self._fly, key, flight, work)
            try:
                return await self._outcome(key, flight)
            except NsfsError:
                if flight.by == by:
                    raise

    async def _outcome(self, key: str, flight: _Flight[T]) -> T:
        flight.waiting += 1
        try:
            await flight.landed.wait()
        finally:
            flight.waiting -= 1
        if flight.error is not None:
            raise flight.error.with_traceback(None)
        if not flight.result:
            raise UnreachableError(f"the worker ends before this was done: {key}")
        return flight.result[0]

    async def _fly(self, key: str, flight: _Flight[T], work: Callable[[], Awaitable[T]]) -> None:
        try:
            flight.result.append(await work())
        except Exception as error:
            flight.error = error
            if not flight.waiting:
                is_bug = not isinstance(error, NsfsError)
                log.warning("nobody waited any more for what failed: %s: %s", key, error, exc_info=is_bug)
        finally:
            del self._flights[key]
            flight.landed.set()
