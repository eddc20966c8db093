"""Work that many may wait for and nobody may cancel.

Concurrency: the work runs in the given nursery, not in the caller's task: a caller who is cancelled leaves, the work
goes on. Callers with one key share one run and one outcome; after it has ended the next caller begins anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")


class _Flight(Generic[T]):
    """One run under way."""

    def __init__(self) -> None:
        self.landed = trio.Event()
        self.result: list[T] = []
        self.error: Exception | None = None


class Flights(Generic[T]):
    """All runs of one kind."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._flights: dict[str, _Flight[T]] = {}

    async def join(self, key: str, work: Callable[[], Awaitable[T]]) -> T:
        """The outcome of the run under way for `key`, begun with `work` if there is none."""
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = _Flight()
            self._nursery.start_soon(self._fly, key, flight, work)
        await flight.landed.wait()
        if flight.error is not None:
            raise flight.error.with_traceback(None)
        return flight.result[0]

    async def _fly(self, key: str, flight: _Flight[T], work: Callable[[], Awaitable[T]]) -> None:
        try:
            flight.result.append(await work())
        except Exception as error:  # noqa: BLE001  it is raised again by everybody who waits
            flight.error = error
        finally:
            del self._flights[key]
            flight.landed.set()
