"""Which uid a domain gets, and what of a host stands against it."""

import pytest

from nsfs.errors import NoSpaceError, UsageError
from nsfs.model.uids import UidRange, find_overlap, parse_uid_range, plan_uid

TEN = UidRange(100, 109)


@pytest.mark.parametrize(
    "text", ["", "1", "0-5", "5-4", "-5", "1-4294967295", "a-b", "1 - 2", "1-2-3", "99999999999-1"]
)
def test_what_is_no_range(text: str) -> None:
    with pytest.raises(UsageError, match="not a range of uids") as caught:
        parse_uid_range(text)
    assert "FIRST-LAST" in str(caught.value.hint)


def test_a_range_has_both_ends() -> None:
    assert parse_uid_range("100-109") == TEN
    assert [number in TEN for number in (99, 100, 109, 110)] == [False, True, True, False]
    assert str(TEN) == "100-109"


@pytest.mark.parametrize(
    ("accounts", "delegated", "found"),
    [
        ("root:x:0:0::/:/bin/sh\nme:x:1000:1000::/:\n", "me:100000:65536\n", None),
        ("ann:x:109:5::/:\n", "", "ann:109"),
        ("", "me:90:10\n", None),
        ("", "me:90:11\n", "me:90:11"),
        ("", "me:110:9\n", None),
        ("", "me:50:1000\n", "me:50:1000"),
        ("+::::::\n#\nhalf:x\n", "junk\nme:x:5\nme:100:0\n", None),
    ],
)
def test_an_overlap_is_found_by_its_line(accounts: str, delegated: str, found: str | None) -> None:
    assert find_overlap(TEN, accounts, delegated) == found


def test_a_number_is_given_again_as_late_as_may_be() -> None:
    given, latest = [], 0
    for _ in range(10):
        latest = plan_uid(TEN, [], latest)
        given.append(latest)
    assert given == list(range(100, 110))
    assert plan_uid(TEN, [], 109) == 100
    assert plan_uid(TEN, [100, 101], 109) == 102
    assert plan_uid(TEN, [], 5000) == 100


def test_when_all_are_taken_nobody_gets_anothers() -> None:
    with pytest.raises(NoSpaceError, match="100-109"):
        plan_uid(TEN, range(100, 110), 104)
