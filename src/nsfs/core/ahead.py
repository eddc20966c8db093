"""Runs generators in threads of their own, each ahead of who takes its items by a bounded number.

Owns the threads: an exception of a generator is raised where its items are taken, and leaving the `Ahead` ends all of
them, whether or not their items were taken. A generator that may wait for something outside looks at `is_over` while it
waits. Worth it for items that take long without the interpreter lock, such as hashing or inflating a megabyte.
"""

from __future__ import annotations

import threading
from contextlib import closing
from queue import Empty, Full, Queue
from typing import TYPE_CHECKING, Final, Generic, Self, TypeVar

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

T = TypeVar("T")

DEPTH: Final = 2
"""Items that a generator may be ahead; with 8, whose memory is cold when it is used again, first passes of a 344 MB
image take 4 % more of a processor (November 2026)."""
_LOOK: Final = 0.1
"""Seconds until a thread that waits for another sees that all is over."""


class _Outcome(Generic[T]):
    """What a generator's thread passes on: an item, an error, or the end."""

    __slots__ = ("error", "items")

    def __init__(self, *items: T, error: BaseException | None = None) -> None:
        self.items = items
        self.error = error


class Ahead:
    """The threads of one pipeline, or none where it is not worth them; a context manager."""

    def __init__(self, *, threaded: bool = True) -> None:
        self._threaded = threaded
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    @property
    def is_over(self) -> bool:
        """Whether nobody takes items any more."""
        return self._over.is_set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def run(self, source: Generator[T, None, None]) -> Iterator[T]:
        """Start `source` in a thread; returns its items."""
        if not self._threaded:
            return source
        passed: Queue[_Outcome[T]] = Queue(DEPTH)
        thread = threading.Thread(target=self._produce, args=(source, passed), daemon=True)
        self._threads.append(thread)
        thread.start()
        return self._consume(passed)

    def _produce(self, source: Generator[T, None, None], passed: Queue[_Outcome[T]]) -> None:
        try:
            with closing(source):
                for item in source:
                    if not self._pass_on(_Outcome(item), passed):
                        return
            self._pass_on(_Outcome(), passed)
        except BaseException as error:  # noqa: BLE001  it is raised again where the items are taken
            self._pass_on(_Outcome(error=error), passed)

    def _pass_on(self, outcome: _Outcome[T], passed: Queue[_Outcome[T]]) -> bool:
        while not self.is_over:
            try:
                passed.put(outcome, timeout=_LOOK)
            except Full:
                continue
            return True
        return False

    def _consume(self, passed: Queue[_Outcome[T]]) -> Iterator[T]:
        while not self.is_over:
            try:
                outcome = passed.get(timeout=_LOOK)
            except Empty:
                continue
            if outcome.error is not None:
                raise outcome.error
            if not outcome.items:
                return
            yield from outcome.items
