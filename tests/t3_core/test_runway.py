from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsfs.core.runway import Flight, Priority, Runway

if TYPE_CHECKING:
    import random

SOURCE: Any = None
PLACES = 8


class Field:
    """A runway, and who is there."""

    def __init__(self, places: int = PLACES, filling: int = 2) -> None:
        self.runway = Runway(places)
        self.filling = filling
        self.flights: list[Flight] = []

    def enter(self, priority: Priority, count: int = 1) -> list[Flight]:
        entered = [Flight(SOURCE, None, priority, 0.0) for _ in range(count)]
        for flight in entered:
            self.flights.append(flight)
            self.runway.enter(flight, self.filling)
        return entered

    def leave(self, flight: Flight) -> None:
        self.flights.remove(flight)
        self.runway.leave(flight)

    def departed(self, priority: Priority | None = None) -> list[Flight]:
        return [each for each in self.flights if each.departs.is_set() and priority in {None, each.priority}]


@pytest.mark.parametrize(
    ("priority", "expected"),
    [(Priority.READ, 8), (Priority.PROFILE, 4), (Priority.AHEAD, 4), (Priority.BACKGROUND, 1)],
)
def test_alone_each_has_its_places(priority: Priority, expected: int) -> None:
    field = Field()
    field.enter(priority, 20)
    assert len(field.departed()) == expected


def test_beside_a_read_only_so_many_depart_as_fill_the_route() -> None:
    field = Field(filling=3)
    (read,) = field.enter(Priority.READ)
    field.enter(Priority.PROFILE, 10)
    assert len(field.departed(Priority.PROFILE)) == 3
    field.leave(read)
    assert len(field.departed(Priority.PROFILE)) == 4


def test_a_read_departs_at_once_whatever_else_is_on_its_way() -> None:
    field = Field()
    field.enter(Priority.PROFILE, 10)
    field.enter(Priority.AHEAD, 10)
    (read,) = field.enter(Priority.READ)
    assert read.departs.is_set()


def test_who_waits_departs_by_priority() -> None:
    field = Field(places=1)
    field.enter(Priority.READ)
    for priority in reversed(Priority):
        field.enter(priority)
    order = []
    while field.departed():
        order.append(field.departed()[0].priority)
        field.leave(field.departed()[0])
    assert order == [Priority.READ, *Priority]


def test_the_background_waits_until_nothing_else_is_on_its_way() -> None:
    field = Field()
    ahead, _ = field.enter(Priority.AHEAD), field.enter(Priority.BACKGROUND)
    assert not field.departed(Priority.BACKGROUND)
    field.leave(ahead[0])
    assert field.departed(Priority.BACKGROUND)


@settings(max_examples=50)
@given(st.randoms(use_true_random=False), st.integers(1, 6))
def test_places_are_kept_and_nobody_is_forgotten(rng: random.Random, places: int) -> None:
    field = Field(places)
    for _ in range(60):
        field.filling = rng.randint(1, places)
        queued = [each for each in field.flights if each.priority]
        match rng.choice(["enter", "leave", "promote"]):
            case "enter":
                field.enter(rng.choice(list(Priority)))
            case "leave" if field.departed():
                field.leave(rng.choice(field.departed()))
            case "promote" if queued:
                flight = rng.choice(queued)
                field.runway.promote(flight, Priority(rng.randrange(flight.priority)))
        assert len(field.runway) == len(field.flights)
        assert len(field.departed()) <= places
        assert not field.flights or field.departed(), "somebody waits for nobody"
    while field.departed():
        field.leave(field.departed()[0])
    assert field.flights == []
    assert len(field.runway) == 0
