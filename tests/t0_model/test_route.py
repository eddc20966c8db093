from __future__ import annotations

import heapq
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsfs.model.route import Route, RouteMeter, plan_limits

PIECE = 16 << 10
MBIT = 1e6 / 8


def simulate(rate: float, round_trip: float, sizes: list[int], at_once: int) -> RouteMeter:
    """Fetch bodies of `sizes` over a route that moves one piece after another, `at_once` of them at a time.

    The first answer on each connection comes three round trips later, and servers take up to half a round trip.
    """
    rng = random.Random(1)
    meter = RouteMeter()
    todo, free = list(sizes), 0.0
    events = [(0.0, number, 0, 0.0) for number in range(at_once)]
    """(when, connection, bytes still to come of its body, when it was asked for)."""
    is_open: dict[int, bool] = {}
    while events:
        now, number, left, asked = heapq.heappop(events)
        start = now
        if left:
            size = min(left, PIECE)
            if is_open.get(number):
                meter.received(now, size)
            else:
                meter.answered(now - asked)
                meter.began(now)
                is_open[number] = True
            left -= size
            if not left:
                meter.ended(now)
                is_open[number] = False
        if not left:
            if not todo:
                continue
            left, asked = todo.pop(), now
            start = now + round_trip * (rng.uniform(1, 1.5) if number in is_open else 4)
        free = max(start, free) + min(left, PIECE) / rate
        heapq.heappush(events, (free, number, left, asked))
    return meter


@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize(
    ("mbit", "round_trip"), [(2, 0.2), (20, 0.01), (100, 0.03), (1000, 0.001), (1000, 0.08), (10_000, 0.0005)]
)
def test_a_simulated_route_is_measured(mbit: float, round_trip: float, at_once: int) -> None:
    sizes = [random.Random(2).randrange(100_000, 2_000_000) for _ in range(40)]
    found = simulate(mbit * MBIT, round_trip, sizes, at_once).route("a")
    assert found.rate == pytest.approx(mbit * MBIT, rel=0.35)
    assert round_trip <= found.round_trip <= 1.5 * round_trip + at_once * PIECE / (mbit * MBIT)


def test_small_bodies_that_come_with_their_heads_say_nothing_of_the_rate() -> None:
    found = simulate(100 * MBIT, 0.03, [10_000] * 100, 1).route("a")
    assert (found.rate, found.under_way) == (0.0, 0)
    assert found.round_trip == pytest.approx(0.031, abs=0.005)


def test_of_a_route_that_became_slower_the_old_rate_is_forgotten() -> None:
    meter = simulate(100 * MBIT, 0.01, [1 << 20] * 20, 1)
    for number in range(2000):
        meter.began(1000 + number)
        meter.received(1000 + number + 0.1, 125_000)
        meter.ended(1000 + number + 0.1)
    assert meter.route("a").rate == pytest.approx(10 * MBIT, rel=0.01)


def test_limits_of_a_route_that_nobody_measured_are_the_configured_ones() -> None:
    limits = plan_limits(Route("a"), most=4 << 20, slack=16 << 10, places=12)
    assert limits == (4 << 20, 16 << 10, 16 << 10, 12, 2)


def test_limits_follow_what_is_under_way() -> None:
    def plan(mbit: float, round_trip: float) -> tuple[int, ...]:
        return plan_limits(Route("a", round_trip, mbit * MBIT), most=4 << 20, slack=16 << 10, places=12)

    assert plan(100, 0.03) == (1_500_000, 16 << 10, 31_250, 12, 2)
    assert plan(1000, 0.08) == (4 << 20, 16 << 10, 833_333, 12, 4), "long and fat: several large ranges fill it"
    assert plan(1000, 0.0002) == (512 << 10, 16 << 10, 16 << 10, 12, 2), "near: small ones do"


@given(st.floats(), st.floats(), st.integers(1, 8 << 20), st.integers(0, 1 << 20), st.integers(1, 64))
def test_limits_are_never_beyond_the_configured_ones(
    round_trip: float, rate: float, most: int, slack: int, places: int
) -> None:
    limits = plan_limits(Route("a", round_trip, rate), most=most, slack=slack, places=places)
    assert 0 < limits.size <= most
    assert slack == limits.slack <= limits.wide_slack
    assert 1 <= limits.filling <= places == limits.at_once
