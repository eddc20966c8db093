"""Maps of owners: what labels say, what is refused, and what leads from one shift to another."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsfs.errors import UsageError
from nsfs.model.shift import Range, Shift, between, parse_shift, render_map

UIDS, GIDS = "containerd.io/snapshot/uidmapping", "containerd.io/snapshot/gidmapping"
USUAL = "0:100000:65536"


def shift(uids: str, gids: str = USUAL) -> Shift:
    parsed = parse_shift({UIDS: uids, GIDS: gids})
    assert parsed is not None
    return parsed


def look_up(ranges: tuple[Range, ...], number: int) -> int | None:
    """As the kernel does (kernel/user_namespace.c, map_id_down)."""
    found = [each for each in ranges if each.inside <= number < each.inside + each.size]
    return found[0].outside + number - found[0].inside if found else None


def test_what_containerd_says() -> None:
    assert parse_shift({"containerd.io/snapshot.ref": "x", UIDS: ""}) is None
    found = shift("0:1000:1,1:100000:65535", "0:7:1")
    assert found == Shift((Range(0, 1000, 1), Range(1, 100000, 65535)), (Range(0, 7, 1),))
    assert render_map(found.uids) == "0 1000 1\n1 100000 65535\n"
    assert found.owner(0, 0) == (1000, 7)
    assert found.owner(5, 0) == (100004, 7)
    assert found.owner(70000, 5) == (1000, 7), "root stands in for who has no counterpart"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("-1:-1:-2", "not a range"),
        ("0:1", "not a range"),
        ("0:1:2:3", "not a range"),
        (USUAL + ",", "not a range"),
        ("0:1:0x10", "not a range"),
        ("\u0660:1:1", "not a range"),
        ("0:100000:0", "empty"),
        ("0:0:4294967296", "leaves the 32 bits"),
        ("0:4294967295:1", "leaves the 32 bits"),
        ("1:100000:65536", "root has no counterpart"),
        ("0:1000:10,5:2000:10", "overlap"),
        ("0:1000:10,10:1009:10", "overlap"),
        (",".join(f"{number}:{number}:1" for number in range(341)), "more than 340"),
    ],
)
def test_what_the_kernel_would_refuse(text: str, words: str) -> None:
    for uids, gids in ((text, USUAL), (USUAL, text)):
        with pytest.raises(UsageError, match=words):
            shift(uids, gids)


def test_the_whole_of_all_ids() -> None:
    assert shift("0:0:4294967295").uids[0].size == 4294967295
    assert len(shift(",".join(f"{number}:{number}:1" for number in range(340))).uids) == 340


@pytest.mark.parametrize("missing", [UIDS, GIDS])
def test_one_map_alone_is_refused(missing: str) -> None:
    labels = {UIDS: USUAL, GIDS: USUAL}
    del labels[missing]
    with pytest.raises(UsageError, match="one is missing"):
        parse_shift(labels)


def test_nothing_in_common() -> None:
    with pytest.raises(UsageError, match="no owner in common"):
        between(Shift((Range(0, 5, 1),), (Range(0, 5, 1),)), Shift((Range(1, 7, 1),), (Range(0, 7, 1),)))


@st.composite
def maps(draw: st.DrawFn) -> tuple[Range, ...]:
    """Of a few ranges with gaps, in another order outside."""
    sizes = draw(st.lists(st.integers(1, 20), min_size=1, max_size=5))
    outside = draw(st.permutations(range(len(sizes))))
    gap = draw(st.integers(20, 30))
    return tuple(Range(number * gap, 1000 + outside[number] * gap, size) for number, size in enumerate(sizes))


SHIFTS = st.one_of(st.none(), st.builds(Shift, maps(), maps()))


@given(written=SHIFTS, wanted=SHIFTS, owner=st.integers(0, 150))
def test_between_leads_from_what_is_on_disk_to_what_is_to_be_seen(
    written: Shift | None, wanted: Shift | None, owner: int
) -> None:
    step = between(written, wanted)
    for kind in ("uids", "gids"):
        on_disk = look_up(getattr(written, kind), owner) if written else owner
        seen = look_up(getattr(wanted, kind), owner) if wanted else owner
        if on_disk is not None and seen is not None:
            assert (look_up(getattr(step, kind), on_disk) if step else on_disk) == seen
        elif on_disk is not None and step is not None:
            assert look_up(getattr(step, kind), on_disk) is None
