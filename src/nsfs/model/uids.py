"""Which uid a domain's worker has: numbers out of a range that nobody else on the host has.

Pure: a range as the configuration writes it, what of the host's own files it overlaps, and the choice of the next
number. A number is not given again while anything of its last owner is known, and then as late as may be.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from nsfs.errors import NoSpaceError, UsageError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

_HINT = 'a range is FIRST-LAST, such as "1879048192-1879113727"'
_NOBODY = 0xFFFFFFFF
"""(uid_t) -1, which setresuid(2) takes for none."""


@dataclass(frozen=True, slots=True)
class UidRange:
    """From `first` to `last`, both included; for uids and gids alike."""

    first: int
    last: int

    def __contains__(self, uid: int) -> bool:
        return self.first <= uid <= self.last

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"


def parse_uid_range(text: str) -> UidRange:
    """Read FIRST-LAST; raises UsageError, also where it has uid 0 or the number for nobody."""
    found = re.fullmatch(r"(\d{1,10})-(\d{1,10})", text)
    if found is None:
        raise UsageError(f"not a range of uids: {text!r}", hint=_HINT)
    first, last = int(found[1]), int(found[2])
    if not 0 < first <= last < _NOBODY:
        raise UsageError(f"not a range of uids: {text!r}", hint=_HINT)
    return UidRange(first, last)


def find_overlap(wanted: UidRange, accounts: str, delegated: str) -> str | None:
    """The first line that has a number of `wanted`, None if there is none.

    `accounts` is passwd(5) or group(5), number in the third field; `delegated` subuid(5) or subgid(5), first number and
    count in the second and third. Lines that are neither are passed over, as the C library does.
    """
    for line, first, last in (*_accounts(accounts), *_delegated(delegated)):
        if first <= wanted.last and last >= wanted.first:
            return line
    return None


def _accounts(text: str) -> Iterator[tuple[str, int, int]]:
    for line in text.splitlines():
        fields = line.split(":")
        if len(fields) > 2 and fields[2].isdecimal():
            yield f"{fields[0]}:{fields[2]}", int(fields[2]), int(fields[2])


def _delegated(text: str) -> Iterator[tuple[str, int, int]]:
    for line in text.splitlines():
        fields = line.split(":")
        if len(fields) == 3 and fields[1].isdecimal() and fields[2].isdecimal() and int(fields[2]) > 0:
            yield line, int(fields[1]), int(fields[1]) + int(fields[2]) - 1


def plan_uid(wanted: UidRange, taken: Collection[int], latest: int) -> int:
    """The next number after `latest`, round the range, that is not `taken`; raises NoSpaceError where all are."""
    start = latest + 1 if latest in wanted else wanted.first
    for uid in chain(range(start, wanted.last + 1), range(wanted.first, start)):
        if uid not in taken:
            return uid
    raise NoSpaceError(
        f"every uid of the range is a domain's: {wanted}", hint="set a larger uid_range, or delete domains"
    )
