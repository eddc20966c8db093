"""What a start of an image reads, in the order of first use, in coordinates that hold on every node. Pure.

Owns the format of a profile: `nsfsprof`, a version (u32, little-endian), and a msgpack map of the fields of `Profile`.
A run is a piece of a layer's stream, not of addresses, which every domain gives out for itself; which stream that is
depends on what the layer is read by (`stream_of`). Refuses, as it may come from anybody, what could not have been
recorded: runs that overlap, that lead past any stream, or that are more than a recording keeps.

Invariants of a Profile that `plan_profile` or `parse_profile` gave: no layer twice, no two runs overlap, none is empty.
"""

from __future__ import annotations

import enum
import itertools
import math
import re
import struct
from bisect import bisect_right
from collections import defaultdict
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec import Struct

from nsfs.errors import CorruptError, UnsupportedError, UsageError
from nsfs.model.digest import Digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

VERSION: Final = 1
TAR: Final = "tar"
"""The stream of a layer that is read by an index of its tar, whoever made that."""
MAX_LAYERS: Final = 1024
MAX_RUNS: Final = 1 << 17
MAX_BYTES: Final = 4 << 30
"""Of all runs."""
MAX_RENDERED: Final = 4 << 20
"""Bytes of a profile as it is stored or sent."""

WINDOW_LEAST: Final = 1 << 20
WINDOW_MOST: Final = 16 << 20
"""Bytes of a profile that are fetched together."""

_HEADER = struct.Struct("<8sI")
_MAGIC = b"nsfsprof"
_STREAM_LIMIT = 1 << 62
_MAX_TEXT = 300
_TOC = "estargz-"
_STREAM = re.compile(rf"{TAR}|{_TOC}[0-9a-f]{{64,128}}")


class ProfileUse(enum.StrEnum):
    """What a mount does with its image's profile."""

    OFF = "off"
    USE = "use"
    """Fetch what is in it, where there is one."""
    FIRST = "first"
    """Make one where there is none, else fetch what is in it."""
    RECORD = "record"
    """Make one of what this mount reads first, instead of what there is."""


_MORE = (ProfileUse.OFF, ProfileUse.USE, ProfileUse.FIRST, ProfileUse.RECORD)


def least_use(*uses: ProfileUse) -> ProfileUse:
    """The most that all of `uses` allow."""
    return min(uses, key=_MORE.index)


def parse_profile_use(text: str) -> ProfileUse:
    """What that text says; raises UsageError."""
    try:
        return ProfileUse(text)
    except ValueError:
        raise UsageError(f"not a use of a profile: {text[:100]!r}", hint="record, first, use or off") from None


class ProfiledLayer(Struct, frozen=True, gc=False, array_like=True):
    """A layer that runs are pieces of."""

    blob: str
    """Its blob's digest."""
    stream: str = TAR
    """Which of the streams that the blob may be read as: `stream_of`."""


class Run(Struct, frozen=True, gc=False, array_like=True):
    """One piece of one layer's stream, first used here."""

    layer: int
    """Its number in Profile.layers."""
    start: int
    """Stream offset, bytes."""
    length: int

    @property
    def stream(self) -> range:
        """The part of the layer's stream that it is."""
        return range(self.start, self.start + self.length)

    def cut(self, size: int) -> Iterator[Run]:
        """Its parts of at most `size` bytes, in order."""
        for start in range(self.start, self.start + self.length, size):
            yield Run(self.layer, start, min(size, self.start + self.length - start))


class Profile(Struct, frozen=True, kw_only=True):
    """What one start of an image read."""

    layers: list[ProfiledLayer]
    """Lowest first, each once."""
    runs: list[Run]
    """In the order of first use."""
    flaw: str = ""
    """Why something may be missing from it: then it is of use here, but never published. Empty where nothing is."""
    recorded: float = 0.0
    """When, in seconds since the epoch."""
    seconds: float = 0.0
    """From the first read to the last new one."""

    @property
    def is_complete(self) -> bool:
        """Whether a start that has all of the runs needs nothing else."""
        return not self.flaw

    @property
    def size(self) -> int:
        """Bytes of all runs."""
        return sum(run.length for run in self.runs)

    def runs_of(self, blob: str, stream: str) -> Iterator[Run]:
        """What is read of one layer as that stream."""
        numbers = {number for number, layer in enumerate(self.layers) if (layer.blob, layer.stream) == (blob, stream)}
        return (run for run in self.runs if run.layer in numbers)


def stream_of(index: str) -> str:
    """The stream that a layer is read as by that index (`pool.LayerKey.index`).

    A table of contents has a stream of its own, of the chunks it names; all others are indexes of the tar.
    """
    return index if index.startswith(_TOC) else TAR


def merge_runs(runs: Iterable[Run]) -> list[Run]:
    """`runs` with each byte at its first use only; what follows on what came just before is one run with it."""
    seen: defaultdict[int, _Seen] = defaultdict(_Seen)
    merged: list[Run] = []
    for run in runs:
        for start, end in seen[run.layer].add(run.start, run.start + run.length):
            last = merged[-1] if merged else None
            if last is not None and last.layer == run.layer and last.start + last.length == start:
                merged[-1] = Run(run.layer, last.start, end - last.start)
            else:
                merged.append(Run(run.layer, start, end - start))
    return merged


def fill_gaps(runs: Iterable[Run], most: int, is_whole: Callable[[Run], bool]) -> Iterator[Run]:
    """`runs`, which do not overlap, and behind the second of two what lies between them, of up to `most` bytes.

    But for what is not `is_whole`, as part of one file.
    """
    seen: defaultdict[int, _Seen] = defaultdict(_Seen)
    for run in runs:
        yield run
        parts = seen[run.layer]
        parts.add(run.start, run.start + run.length)
        for start, end in parts.gaps_beside(run.start):
            gap = Run(run.layer, start, end - start)
            if gap.length <= most and is_whole(gap):
                parts.add(start, end)
                yield gap


def gather_runs(runs: Iterable[Run], size: int) -> list[Run]:
    """`runs` with all that is of the same `size` bytes of a stream where the first of that is used, by stream offset.

    They are cut at multiples of `size` from where they begin.
    """
    near: defaultdict[tuple[int, int], list[Run]] = defaultdict(list)
    for part in (part for run in runs for part in run.cut(size)):
        near[part.layer, part.start // size].append(part)
    return merge_runs(part for parts in near.values() for part in sorted(parts, key=lambda part: part.start))


class _Seen:
    """Parts of one stream: disjoint and sorted, neighbours joined."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, start: int, end: int) -> list[tuple[int, int]]:
        """Count [start, end) in; gives what of it is new, (start, end) each."""
        low = bisect_right(self._ends, start - 1)
        high = bisect_right(self._starts, end)
        known = list(zip(self._starts[low:high], self._ends[low:high], strict=True))
        if start < end:
            self._starts[low:high] = [min([start, *(begin for begin, _ in known[:1])])]
            self._ends[low:high] = [max([end, *(stop for _, stop in known[-1:])])]
        edges = [start, *(edge for part in known for edge in part), end]
        gaps = zip(edges[::2], edges[1::2], strict=True)
        return [(begin, stop) for begin, stop in gaps if begin < stop]

    def gaps_beside(self, at: int) -> list[tuple[int, int]]:
        """What lies between the part that has this offset and the next ones, (start, end) each, where there are any."""
        number = bisect_right(self._starts, at) - 1
        near = slice(max(0, number - 1), number + 2)
        return list(zip(self._ends[near][:-1], self._starts[near][1:], strict=True))


def plan_profile(
    layers: Sequence[ProfiledLayer], uses: Iterable[Run], *, flaw: str = "", recorded: float = 0.0, seconds: float = 0.0
) -> Profile:
    """The profile of `uses`, in their order and however they overlap; what is too much is left out, and said."""
    merged = merge_runs(uses)
    kept = _cut(merged)
    if len(kept) < len(merged):
        flaw = flaw or f"more was read than a profile keeps: {len(merged)} runs"
    return Profile(layers=list(layers), runs=kept, flaw=flaw[:_MAX_TEXT], recorded=recorded, seconds=seconds)


def _cut(runs: list[Run]) -> list[Run]:
    """The first of them, as many as a profile keeps."""
    size = 0
    for number, run in enumerate(runs[:MAX_RUNS]):
        size += run.length
        if size > MAX_BYTES:
            return runs[:number]
    return runs[:MAX_RUNS]


def plan_windows(
    runs: Iterable[Run], *, least: int = WINDOW_LEAST, most: int = WINDOW_MOST
) -> Iterator[dict[int, list[range]]]:
    """`runs` in their order as parts that are fetched together, each by layer; each twice as large, up to `most`."""
    window: defaultdict[int, list[range]] = defaultdict(list)
    rest = least
    for run in runs:
        start, end = run.start, run.start + run.length
        while start < end:
            stop = min(end, start + rest)
            window[run.layer].append(range(start, stop))
            rest -= stop - start
            start = stop
            if not rest:
                yield dict(window)
                window.clear()
                rest = least = min(least * 2, most)
    if window:
        yield dict(window)


def render_profile(profile: Profile) -> bytes:
    """As it is stored and sent; the same profile gives the same bytes."""
    return _HEADER.pack(_MAGIC, VERSION) + msgspec.msgpack.encode(profile)


def parse_profile(data: bytes) -> Profile:
    """What `render_profile` gave, checked; raises CorruptError, and UnsupportedError for a newer format."""
    if len(data) > MAX_RENDERED:
        raise CorruptError(f"a profile is too large: {len(data)} bytes")
    if len(data) < _HEADER.size or not data.startswith(_MAGIC):
        raise CorruptError("not a profile")
    _, version = _HEADER.unpack_from(data)
    if version != VERSION:
        raise UnsupportedError(f"a profile has another format: {version}", hint=f"this nsfs reads format {VERSION}")
    try:
        profile = msgspec.msgpack.decode(data[_HEADER.size :], type=Profile)
    except (msgspec.DecodeError, RecursionError) as error:
        raise CorruptError(f"a profile cannot be read: {error}") from error
    _check(profile)
    return profile


def _check(profile: Profile) -> None:
    layers, runs = profile.layers, profile.runs
    if len(layers) > MAX_LAYERS or len({layer.blob for layer in layers}) < len(layers):
        raise CorruptError(f"a profile has too many layers, or one twice: {len(layers)}")
    for layer in layers:
        _check_layer(layer)
    if len(runs) > MAX_RUNS or any(not _is_sound(run, len(layers)) for run in runs):
        raise CorruptError(f"a profile has too many runs, or runs that cannot be: {len(runs)}")
    if profile.size > MAX_BYTES or overlap(runs):
        raise CorruptError(f"the runs of a profile overlap, or are too large: {profile.size} bytes")
    if len(profile.flaw) > _MAX_TEXT or not (math.isfinite(profile.recorded) and math.isfinite(profile.seconds)):
        raise CorruptError("a profile says of itself what cannot be")


def _check_layer(layer: ProfiledLayer) -> None:
    try:
        Digest(layer.blob)
    except UsageError as error:
        raise CorruptError(f"a profile names no layer: {error}") from error
    if _STREAM.fullmatch(layer.stream) is None:
        raise CorruptError(f"a profile names no stream: {layer.stream[:200]!r}")


def _is_sound(run: Run, layers: int) -> bool:
    return 0 <= run.layer < layers and run.start >= 0 < run.length and run.start + run.length <= _STREAM_LIMIT


def overlap(runs: list[Run]) -> bool:
    """Whether any byte of a stream is in two of them."""
    ordered = sorted(runs, key=lambda run: (run.layer, run.start))
    pairs = itertools.pairwise(ordered)
    return any(one.layer == other.layer and one.start + one.length > other.start for one, other in pairs)
