"""Profiles come from recordings, and from registries that may say anything."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsfs.errors import CorruptError, UnsupportedError, UsageError
from nsfs.model import profile as profiles
from nsfs.model.profile import (
    TAR,
    Profile,
    ProfiledLayer,
    Run,
    fill_gaps,
    gather_runs,
    least_use,
    merge_runs,
    parse_profile,
    parse_profile_use,
    plan_profile,
    plan_windows,
    render_profile,
    stream_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

LAYERS = [ProfiledLayer("sha256:" + digit * 64) for digit in "abc"]
GOOD = Profile(layers=LAYERS, runs=[Run(1, 50, 10), Run(0, 0, 4096), Run(1, 0, 50)], recorded=1e9, seconds=2.5)

uses = st.lists(st.builds(Run, st.integers(0, 2), st.integers(0, 60), st.integers(0, 20)), max_size=30)


def bytes_of(runs: Iterable[Run]) -> list[tuple[int, int]]:
    return [(run.layer, at) for run in runs for at in range(run.start, run.start + run.length)]


@given(uses)
def test_merging_keeps_each_byte_once_where_it_was_used_first(runs: list[Run]) -> None:
    merged = merge_runs(runs)
    assert bytes_of(merged) == list(dict.fromkeys(bytes_of(runs)))
    assert all(run.length > 0 for run in merged)
    pairs = itertools.pairwise(merged)
    assert not any((one.layer, one.start + one.length) == (other.layer, other.start) for one, other in pairs)


@given(uses, st.text(max_size=20))
def test_a_profile_comes_back_as_it_was(runs: list[Run], flaw: str) -> None:
    made = plan_profile(LAYERS, runs, flaw=flaw, recorded=5.0, seconds=1.0)
    again = parse_profile(render_profile(made))
    assert again == made
    assert again.is_complete == (not flaw)
    assert again.size == len(bytes_of(again.runs))


def test_gaps_are_filled_once_both_sides_are_used() -> None:
    runs = [Run(0, 0, 10), Run(0, 40, 10), Run(1, 15, 5), Run(0, 15, 10), Run(0, 70, 10), Run(0, 60, 5)]
    filled = [*runs[:4], Run(0, 10, 5), *runs[4:], Run(0, 50, 10), Run(0, 65, 5)]
    assert list(fill_gaps(runs, 10, lambda _: True)) == filled
    assert list(fill_gaps(runs, 10, lambda _: False)) == list(fill_gaps(runs, 4, lambda _: True)) == runs


@given(uses)
def test_gathered_runs_have_the_same_bytes_and_none_twice(runs: list[Run]) -> None:
    merged = merge_runs(runs)
    assert sorted(bytes_of(gather_runs(merged, 16))) == sorted(bytes_of(merged))


def test_what_is_near_comes_with_what_is_used_first() -> None:
    runs = [Run(0, 130, 4), Run(1, 0, 8), Run(0, 70, 4), Run(0, 134, 2), Run(0, 128, 2), Run(1, 300, 100)]
    assert gather_runs(runs, 64) == [Run(0, 128, 8), Run(1, 0, 8), Run(0, 70, 4), Run(1, 300, 100)]


def test_what_is_more_than_a_profile_keeps_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "MAX_BYTES", 100)
    made = plan_profile(LAYERS, [Run(0, 0, 60), Run(1, 0, 40), Run(2, 0, 1)])
    assert made.runs == [Run(0, 0, 60), Run(1, 0, 40)]
    assert "more was read than a profile keeps" in made.flaw
    monkeypatch.setattr(profiles, "MAX_RUNS", 1)
    assert plan_profile(LAYERS, GOOD.runs).runs == GOOD.runs[:1]


@given(uses)
def test_windows_have_every_byte_in_order_and_double(runs: list[Run]) -> None:
    windows = list(plan_windows(runs, least=8, most=30))
    sizes = [sum(len(part) for parts in window.values() for part in parts) for window in windows]
    assert all(size == full for size, full in zip(sizes[:-1], [8, 16, *[30] * len(sizes)], strict=False))
    assert all(0 < size <= 30 for size in sizes)
    for layer in range(3):
        parts = [part for window in windows for part in window.get(layer, [])]
        assert [at for part in parts for at in part] == [at for run, at in bytes_of(runs) if run == layer]


def test_uses_of_a_profile_have_names() -> None:
    assert [parse_profile_use(text) for text in ("off", "use", "first", "record")] == list(profiles.ProfileUse)
    with pytest.raises(UsageError, match="not a use of a profile: 'always'"):
        parse_profile_use("always")


def test_the_least_of_several_uses_counts() -> None:
    off, use, first, record = profiles.ProfileUse
    assert least_use(record, first) is first
    assert least_use(first, use, record) is use
    assert least_use(use, off, first) is off


def test_a_table_of_contents_has_a_stream_of_its_own() -> None:
    toc = f"estargz-{'0' * 64}"
    assert [stream_of(index) for index in ("plain", toc, "artifact-00")] == [TAR, toc, TAR]


def test_the_largest_that_a_recording_keeps_can_be_sent() -> None:
    runs = [Run(profiles.MAX_LAYERS - 1, (1 << 61) + 2 * number, 1) for number in range(profiles.MAX_RUNS)]
    layers = [ProfiledLayer(f"sha512:{number:0128x}", f"estargz-{'0' * 128}") for number in range(profiles.MAX_LAYERS)]
    assert parse_profile(render_profile(plan_profile(layers, runs))).runs == runs


def changed(**fields: Any) -> bytes:
    """A profile that says something else, whatever its type."""
    body = {**msgspec.to_builtins(GOOD), **fields}
    return render_profile(GOOD)[:12] + msgspec.msgpack.encode(body)


@pytest.mark.parametrize(
    "fields",
    [
        {"layers": [["sha256:../../etc/passwd", TAR]]},
        {"layers": [["sha256:" + "a" * 64, "../x"]]},
        {"layers": [["sha256:" + "a" * 64, TAR]] * 2},
        {"layers": [["sha256:" + "a" * 64, TAR]]},
        {"runs": [[3, 0, 1]]},
        {"runs": [[-1, 0, 1]]},
        {"runs": [[0, -1, 2]]},
        {"runs": [[0, 0, 0]]},
        {"runs": [[0, 0, -1]]},
        {"runs": [[0, 1 << 62, 1]]},
        {"runs": [[0, 0, 10], [1, 0, 1], [0, 9, 1]]},
        {"runs": [[0, 0, 3 << 30], [1, 0, 3 << 30]]},
        {"runs": [[0, 0]]},
        {"runs": "runs"},
        {"flaw": "x" * 1000},
        {"recorded": math.nan},
        {"seconds": math.inf},
    ],
)
def test_what_could_not_have_been_recorded_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(CorruptError):
        parse_profile(changed(**fields))


def test_more_than_a_recording_keeps_is_refused() -> None:
    with pytest.raises(CorruptError, match="too many runs"):
        parse_profile(changed(runs=[[0, 2 * number, 1] for number in range(profiles.MAX_RUNS + 1)]))
    with pytest.raises(CorruptError, match="too large"):
        parse_profile(render_profile(GOOD) + bytes(profiles.MAX_RENDERED))


@given(st.binary(max_size=200))
def test_noise_is_refused_in_clear_words(noise: bytes) -> None:
    for data in (noise, render_profile(GOOD)[:12] + noise):
        with pytest.raises(CorruptError, match="profile"):
            parse_profile(data)


def test_one_that_ends_early_is_refused() -> None:
    whole = render_profile(GOOD)
    for end in range(len(whole)):
        with pytest.raises(CorruptError, match="profile"):
            parse_profile(whole[:end])


def test_a_newer_format_is_refused_by_its_number() -> None:
    with pytest.raises(UnsupportedError, match="another format: 2"):
        parse_profile(b"nsfsprof\x02\0\0\0")
