from __future__ import annotations

import pytest

from nsfs.core.fetchview import FetchConfig, Head, View

CONFIG = FetchConfig(read_ahead_least=100, read_ahead_first=200, read_ahead_most=450)
FAR = 10 << 20


def view() -> View:
    return View("v", [])


def test_a_first_miss_brings_what_lies_around_it() -> None:
    head = view().missed(0, FAR, FAR + 50, is_small=False)
    assert head is not None
    ahead = head.advance(CONFIG, 0)
    assert ahead.start < FAR - 100_000
    assert ahead.stop == FAR + 50 + 100


@pytest.mark.parametrize(("under_way", "first"), [(0, 100), (150, 150), (1 << 30, 200)])
def test_the_first_step_suits_what_the_route_has_under_way(under_way: int, first: int) -> None:
    head = Head(0, 40, 50)
    assert head.advance(CONFIG, under_way) == range(40, 50 + first)


def test_steps_double_once_a_sequence_goes_on() -> None:
    head = Head(0, 0, 50)
    assert [len(head.advance(CONFIG, 0)) for _ in range(5)] == [150, 100, 200, 400, 450]


def test_misses_behind_the_end_are_the_same_sequence_and_others_are_not() -> None:
    reads = view()
    head = reads.missed(0, FAR, FAR + 50, is_small=False)
    assert head is not None
    head.advance(FetchConfig(), 0)
    end = head.end
    assert reads.missed(0, end + 1000, end + 2000, is_small=False) is head
    assert head.end == end + 2000
    assert reads.missed(1, end + 1000, end + 2000, is_small=False) is not head
    assert reads.missed(0, 2 * FAR, 2 * FAR + 50, is_small=False) is not head


def test_reads_that_jump_about_are_left_alone_until_one_goes_on() -> None:
    reads = view()
    found = [reads.missed(0, at * FAR, at * FAR + 50, is_small=False) for at in range(1, 40)]
    assert all(head is not None for head in found[:16])
    assert not any(found[16:])
    assert reads.missed(0, 39 * FAR + 50, 39 * FAR + 99, is_small=False) is not None
    assert reads.missed(0, 80 * FAR, 80 * FAR + 50, is_small=False) is not None


def test_nothing_comes_beside_what_somebody_reads_who_does_not_read_on() -> None:
    reads = View("v", [], reads_on=False)
    assert reads.missed(0, FAR, FAR + 50, is_small=False) is None
    assert reads.missed(0, FAR + 50, FAR + 99, is_small=False) is None
    assert not reads.heads


def test_a_first_miss_of_a_block_brings_nothing_beside_it() -> None:
    reads = view()
    assert reads.missed(0, FAR, FAR + 50, is_small=True) is None
    assert reads.missed(0, 3 * FAR, 3 * FAR + 50, is_small=False) is not None


def test_it_does_where_the_view_was_read_elsewhere_before() -> None:
    reads = view()
    assert [reads.missed(0, at * FAR, at * FAR + 50, is_small=True) for at in (1, 3)] == [None, None]
    assert reads.missed(0, 5 * FAR, 5 * FAR + 50, is_small=True) is not None
