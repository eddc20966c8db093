from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest

from nsfs.core.ahead import DEPTH, Ahead

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator


def count(to: int, seen: list[int]) -> Generator[int, None, None]:
    for number in range(to):
        seen.append(number)
        yield number


def doubled(numbers: Iterator[int]) -> Generator[int, None, None]:
    for number in numbers:
        yield 2 * number


def failing(after: int) -> Generator[int, None, None]:
    yield from range(after)
    raise RuntimeError("the third failed")


def test_items_come_in_order_through_two_threads() -> None:
    with Ahead() as ahead:
        assert list(ahead.run(doubled(ahead.run(count(1000, []))))) == list(range(0, 2000, 2))


def test_nobody_runs_further_ahead_than_the_depth() -> None:
    seen: list[int] = []
    with Ahead() as ahead:
        items = ahead.run(count(1000, seen))
        next(items)
        time.sleep(0.3)
        assert len(seen) <= DEPTH + 2


def test_errors_come_out_where_items_are_taken() -> None:
    with Ahead() as ahead:
        items = ahead.run(doubled(ahead.run(failing(3))))
        assert [next(items) for _ in range(3)] == [0, 2, 4]
        with pytest.raises(RuntimeError, match="the third failed"):
            next(items)


def test_leaving_ends_all_threads() -> None:
    before = threading.active_count()
    closed = threading.Event()

    def endless() -> Generator[int, None, None]:
        try:
            while True:
                yield 1
        finally:
            closed.set()

    with Ahead() as ahead:
        next(ahead.run(doubled(ahead.run(endless()))))
    assert closed.is_set()
    assert ahead.is_over
    assert threading.active_count() == before
