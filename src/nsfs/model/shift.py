"""Shifted owners: the maps of a user namespace, from labels of containerd to what the kernel is told. Pure.

A *shift* says which owner on the host stands for which owner in an image. Layers have the image's owners; what a
container in a user namespace writes has the host's. So every layer remembers the shift under which it was written, and
`between` is what leads from there to the shift under which somebody is to see it.

Refuses what the kernel would refuse (user_namespaces(7), uid_map): empty, overlapping or overlong maps, and IDs beyond
32 bits; and maps without root, whose files would be nobody's.
"""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from nsfs.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_UIDS: Final = "containerd.io/snapshot/uidmapping"
_GIDS: Final = "containerd.io/snapshot/gidmapping"
_NO_ID: Final = (1 << 32) - 1
"""-1 as the kernel has it: no ID may reach it."""
_MOST: Final = 340
"""Lines of a map (Linux 4.15, UID_GID_MAP_MAX_EXTENTS)."""


class Range(Struct, frozen=True):
    """So many IDs from `inside` on are those from `outside` on."""

    inside: int
    outside: int
    size: int


class Shift(Struct, frozen=True):
    """Maps of users and of groups, from the owners that are on disk to those that are seen."""

    uids: tuple[Range, ...]
    gids: tuple[Range, ...]

    def owner(self, uid: int, gid: int) -> tuple[int, int]:
        """Who is seen to own what is `uid`'s and `gid`'s; root's counterpart for owners without one."""
        return _seen(self.uids, uid), _seen(self.gids, gid)


def parse_shift(labels: Mapping[str, str]) -> Shift | None:
    """What the labels of a new snapshot ask for, `<inside>:<outside>:<size>[,…]` each; raises UsageError.

    None where they ask for nothing (core/snapshots/snapshotter.go and internal/userns, containerd 2.1).
    """
    given = [name for name in (_UIDS, _GIDS) if labels.get(name)]
    if not given:
        return None
    if len(given) == 1:
        raise UsageError(f"owners are shifted by two maps, and one is missing: only {given[0]} is there")
    return Shift(_parse_map(_UIDS, labels[_UIDS]), _parse_map(_GIDS, labels[_GIDS]))


def render_map(ranges: Sequence[Range]) -> str:
    """The content of uid_map or gid_map (user_namespaces(7))."""
    return "".join(f"{each.inside} {each.outside} {each.size}\n" for each in ranges)


def between(written: Shift | None, wanted: Shift | None) -> Shift | None:
    """What shows a layer that was written under one shift as if under another; None where it shows so by itself.

    Raises UsageError where no owner of the one has a counterpart in the other.
    """
    if written == wanted:
        return None
    if written is None:
        return wanted
    back = Shift(_inverse(written.uids), _inverse(written.gids))
    if wanted is None:
        return back
    joined = Shift(_join(back.uids, wanted.uids), _join(back.gids, wanted.gids))
    if not joined.uids or not joined.gids:
        raise UsageError("a layer below was written in a user namespace that has no owner in common with this one")
    return joined


def _parse_map(label: str, text: str) -> tuple[Range, ...]:
    ranges = tuple(_parse_range(label, part) for part in text.split(","))
    if len(ranges) > _MOST:
        raise UsageError(f"{label}: more than {_MOST} ranges: {len(ranges)}")
    _refuse_overlaps(label, text, [(each.inside, each.size) for each in ranges])
    _refuse_overlaps(label, text, [(each.outside, each.size) for each in ranges])
    if all(each.inside for each in ranges):
        raise UsageError(f"{label}: root has no counterpart: {text[:200]}", hint="one range has to begin with 0")
    return ranges


def _parse_range(label: str, text: str) -> Range:
    found = re.fullmatch(r"([0-9]{1,10}):([0-9]{1,10}):([0-9]{1,10})", text)
    if found is None:
        raise UsageError(f"{label}: not a range such as 0:100000:65536: {text[:100]!r}")
    each = Range(int(found[1]), int(found[2]), int(found[3]))
    if each.size == 0 or max(each.inside, each.outside) + each.size > _NO_ID:
        raise UsageError(f"{label}: a range is empty or leaves the 32 bits of an ID: {text}")
    return each


def _refuse_overlaps(label: str, text: str, spans: list[tuple[int, int]]) -> None:
    for (start, size), (after, _) in itertools.pairwise(sorted(spans)):
        if start + size > after:
            raise UsageError(f"{label}: ranges overlap: {text[:200]}")


def _seen(ranges: Sequence[Range], number: int) -> int:
    for wanted in (number, 0):
        for each in ranges:
            if each.inside <= wanted < each.inside + each.size:
                return each.outside + wanted - each.inside
    return number


def _inverse(ranges: Sequence[Range]) -> tuple[Range, ...]:
    return tuple(Range(each.outside, each.inside, each.size) for each in ranges)


def _join(first: Sequence[Range], then: Sequence[Range]) -> tuple[Range, ...]:
    """The map that does one after the other."""
    return tuple(itertools.chain.from_iterable(_overlap(each, other) for each in first for other in then))


def _overlap(first: Range, then: Range) -> list[Range]:
    start = max(first.outside, then.inside)
    size = min(first.outside + first.size, then.inside + then.size) - start
    if size <= 0:
        return []
    return [Range(first.inside + start - first.outside, then.outside + start - then.inside, size)]
