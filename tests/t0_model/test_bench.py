"""What a bench compares, in which order, and what its samples come to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest

from nsfs.bench.journal import NAME, open_journal
from nsfs.bench.model import (
    WAYS,
    Plan,
    Sample,
    Touched,
    Turn,
    Way,
    estimate_rest,
    local_run,
    plan_limit,
    plan_rest,
    plan_turns,
    summarize,
)
from nsfs.bench.units import parse_delay, parse_rate, render_rate
from nsfs.errors import BusyError, CorruptError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

PLAN = Plan(
    reference="registry.example/app:1",
    digest="sha256:" + "0" * 64,
    command=["true"],
    wait_for="",
    rate=12.5e6,
    round_trip=0.03,
    ways=list(WAYS),
    baseline="containerd",
    version="1",
)
TOUCHED = Touched(3, 12288, 5_000_000)


def sample(way: str, number: int, run: float, settled: int = 0) -> Sample:
    phases = {"resolve": 0.5, "index": 1.0, "mount": 0.25, "run": run}
    trace = [(0.5, settled)] if settled else []
    return Sample(way=way, number=number, phases=phases, received=settled, settled=settled, cached=0, trace=trace)


@pytest.mark.parametrize(
    ("text", "rate"), [("100mbit", 12.5e6), ("1 Gbit", 125e6), ("1.5kbit", 187.5), ("8bit", 1), ("0", 0)]
)
def test_rates_are_bits_written_and_bytes_meant(text: str, rate: float) -> None:
    assert parse_rate(text) == rate
    assert not rate or parse_rate(render_rate(rate)) == rate


@pytest.mark.parametrize(("text", "delay"), [("30ms", 0.03), ("1.5s", 1.5), ("250us", 0.00025), ("0", 0)])
def test_delays_are_seconds(text: str, delay: float) -> None:
    assert parse_delay(text) == pytest.approx(delay)


@pytest.mark.parametrize("text", ["", "fast", "100", "-1mbit", "1e3mbit", "30ms", "100mb"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a bandwidth"):
        parse_rate(text)


def test_each_round_has_each_way_once_in_an_order_that_the_seed_decides() -> None:
    turns = plan_turns(WAYS, 20, seed=1)
    rounds = [turns[at : at + len(WAYS)] for at in range(0, len(turns), len(WAYS))]
    assert all({turn.way for turn in each} == set(WAYS) for each in rounds)
    assert len({tuple(turn.way for turn in each) for each in rounds}) > 1
    assert turns == plan_turns(WAYS, 20, seed=1) != plan_turns(WAYS, 20, seed=2)
    assert turns[: 2 * len(WAYS)] == plan_turns(WAYS, 2, seed=1)


def test_of_a_way_whose_time_is_known_one_sample_is_enough() -> None:
    turns = plan_turns(WAYS, 3, seed=1, once={Way.EAGER})
    assert [turns.count(Turn(way, number)) for way in (Way.EAGER, Way.FIRST) for number in range(3)] == [
        1,
        0,
        0,
        1,
        1,
        1,
    ]


def test_what_is_to_come_takes_what_it_took_and_nobody_knows_before() -> None:
    rest = [Turn(Way.EAGER, 1), Turn(Way.LOCAL, 1), Turn(Way.EAGER, 2)]
    assert estimate_rest(rest, {Way.EAGER: 10.0}) is None
    assert estimate_rest(rest, {Way.EAGER: 10.0, Way.LOCAL: 1.0}) == 21.0
    assert estimate_rest([], {}) == 0.0


def test_what_was_taken_is_not_taken_again() -> None:
    turns = plan_turns(WAYS, 2, seed=1)
    done = [sample(turn.way, turn.number, 1.0) for turn in turns[:3]]
    assert plan_rest(turns, done) == turns[3:]
    assert Turn(done[0].way, done[0].number) not in plan_rest(turns, done)


def test_the_limit_is_a_local_run_the_touched_pages_and_four_round_trips() -> None:
    limit = plan_limit(PLAN, 0.2, TOUCHED)
    assert limit.seconds == pytest.approx(0.2 + 0.4 + 0.12)
    assert plan_limit(msgspec.structs.replace(PLAN, rate=0.0), 0.2, TOUCHED).seconds == pytest.approx(0.32)


def test_the_local_run_is_the_other_sides_where_there_is_one() -> None:
    ours = [sample(Way.LOCAL, number, 3.0) for number in range(3)]
    theirs = [sample(Way.OVERLAY, number, run) for number, run in enumerate((1.0, 9.0, 2.0))]
    assert (local_run([]), local_run(ours), local_run(ours + theirs)) == (None, 3.0, 2.0)


def test_a_way_is_held_against_the_limit_eager_and_the_touched_bytes() -> None:
    samples = [sample(Way.EAGER, 0, 8.25, 80_000_000), sample(Way.INDEXED, 0, 3.25, 10_000_000)]
    limit = plan_limit(PLAN, 0.48, TOUCHED)
    eager, indexed = summarize(PLAN, samples, limit)
    assert (eager.way, eager.seconds, eager.sooner, eager.overhead) == (Way.EAGER, 10.0, 1.0, 16.0)
    assert (indexed.way, indexed.seconds, indexed.sooner, indexed.overhead) == (Way.INDEXED, 5.0, 2.0, 2.0)
    assert indexed.of_limit == pytest.approx(5.0)
    (alone,) = summarize(PLAN, samples[1:], None)
    assert (alone.sooner, alone.of_limit, alone.overhead) == (None, None, None)


def test_a_journal_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    journal = open_journal(str(tmp_path), PLAN, seed=5)
    journal.add(sample(Way.FIRST, 0, 1.0))
    journal.add_touched(TOUCHED)
    with (tmp_path / NAME).open("ab") as file:
        file.write(b'{"sample":{"way":"fi')
    moved = msgspec.structs.replace(PLAN, reference="127.0.0.1:5000/app:1")
    again = open_journal(str(tmp_path), moved, seed=6)
    assert (again.seed, again.samples, again.touched) == (5, journal.samples, TOUCHED)
    again.add(sample(Way.LOCAL, 0, 2.0))
    assert open_journal(str(tmp_path), PLAN, seed=7).samples == again.samples


def test_samples_of_something_else_are_left_alone(tmp_path: Path) -> None:
    open_journal(str(tmp_path), PLAN, seed=5)
    before = (tmp_path / NAME).read_bytes()
    with pytest.raises(BusyError, match="of something else"):
        open_journal(str(tmp_path), msgspec.structs.replace(PLAN, rate=0.0), seed=5)
    assert (tmp_path / NAME).read_bytes() == before
    (tmp_path / NAME).write_text("not JSON\n")
    with pytest.raises(CorruptError, match="not samples"):
        open_journal(str(tmp_path), PLAN, seed=5)
