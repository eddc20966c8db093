"""Starts: what is done with an image's profile when somebody begins to use the image.

Owns the choice between recording and fetching: without a profile the first start of an image is recorded, and only one
at a time; what is known of it, by a profile or by its layers themselves, is fetched meanwhile or instead, and where all
is local, said, so that it can be brought into memory. And how far the kernel may read beyond what a start asks for.

Concurrency: one event loop; a profile is read, and looked up, in a thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import trio
from msgspec import structs

from nsfs.core.worker_api import StartReport, UsageReport
from nsfs.model.profile import ProfileUse
from nsfs.model.report import ProfileReport

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from nsfs.core.images import Image
    from nsfs.core.prefetch import Prefetches
    from nsfs.core.recording import Recordings
    from nsfs.model.digest import Digest
    from nsfs.model.oci import Runtime
    from nsfs.model.pool import LayerKey, MapRecord
    from nsfs.model.profile import Profile


EXACT_KB: Final = 4
"""Read-ahead of a start that somebody wants recorded, or of which it is known what it reads and that comes: what is
read beyond would be recorded, or fetched. A start of Node.js by its profile has 14.5 MB over the line, and 17.4 with
20 KiB."""
CLOSE_KB: Final = 20
"""Of a first start, which is recorded by the way and is not to be slowed by that: 1.2 times the bytes are read that a
start of Python touches, in a fifth as many reads. And of one of which only a builder's landmark is fetched ahead."""
NEAR_KB: Final = 512
"""Of one of which nothing is known, and not all is local: what lies around a read is fetched behind it, so that it need
not be asked for with it, and wait for its turn. NumPy's takes 3.4 s and not 3.55, and 29.7 MB instead of 31.3."""
FAR_KB: Final = 8192
"""Of one that nobody recorded, of what is local: what it will read is not known, and a fault that has to wait for the
worker costs as much as half a mebibyte more. A start of gcc takes 0.23 s and not 0.30, of Node.js 0.40 and not 0.46."""


class Store(Protocol):
    """Where profiles are kept. Calls block."""

    def get(self, image: Digest, owner: str) -> Profile | None:
        """The one of an image, if there is one."""

    def count(self) -> int:
        """How many are kept."""


class Packs(Protocol):
    """Start-up packs."""

    def is_fresh(self, image: Image) -> bool:
        """Whether the image's is under way, or came a moment ago."""

    def progress(self, layers: Collection[LayerKey]) -> tuple[int, int] | None:
        """Bytes that came, and that are to come, of one for one of these layers."""

    def extents(self, image: Image) -> list[tuple[int, int]]:
        """Where what the image's brings is in the pool, or will be, in its order: address and size. Any thread."""


class Libraries(Protocol):
    """What is fetched of programs that nothing is known of."""

    def follow(self, maps: Sequence[MapRecord], owner: str, runtime: Runtime) -> None:
        """A start from these maps, top first, is about to begin, of what `runtime` says; raises NsfsError."""


class Begun(NamedTuple):
    """How views of a start are to be mounted."""

    recording: str = ""
    """The tag of their names; empty where nothing is recorded."""
    read_ahead: int = 0
    """KiB that the kernel reads beyond what it is asked for, at first; 0 for as many as ever."""
    warm: Sequence[tuple[int, int]] = ()
    """What is known to be read, and is local or comes by itself, in the order of first use: address and size."""


class MountedViews(Protocol):
    """What mounts read."""

    def usage(self, maps: Collection[str]) -> UsageReport:
        """What of these maps is local, and what that cost."""

    def layers_of(self, maps: Iterable[str]) -> set[LayerKey]:
        """Whose maps these are."""


class StartsReport(NamedTuple):
    """What is known and done in a domain."""

    profiles: int
    recorded: int
    """Starts, now."""
    prefetching: int
    """The same."""
    prefetched: int
    """Bytes, so far."""


class Starts:
    """The service."""

    def __init__(
        self, store: Store, recordings: Recordings, prefetches: Prefetches, packs: Packs, libraries: Libraries
    ) -> None:
        self._store = store
        self._recordings = recordings
        self._prefetches = prefetches
        self._packs = packs
        self._libraries = libraries

    async def begin(
        self,
        use: ProfileUse,
        image: Image,
        layers: Sequence[LayerKey],
        maps: Sequence[MapRecord],
        flaw: str = "",
        starter: str = "",
    ) -> Begun:
        """Do that for a start from these layers, lowest first, which shows these maps, top first.

        `flaw` says what of the start is not the image's, so that its profile is only of use here. A `starter` who asks
        again is given the same tag.
        """
        owner = image.access.owner
        if use in {ProfileUse.OFF, ProfileUse.RECORD}:
            self._libraries.follow(maps, owner, image.config.runtime)
        if use is ProfileUse.OFF:
            return Begun("", 0 if self._prefetches.have_all(layers) else NEAR_KB)
        if use is ProfileUse.RECORD:
            return Begun(self._recordings.begin(image.digest, owner, layers, flaw), EXACT_KB)
        profile = await trio.to_thread.run_sync(self._store.get, image.digest, owner)
        is_fetched = self._prefetches.begin(image.digest, owner, layers, profile)
        tag = ""
        if use is ProfileUse.FIRST and profile is None:
            tag = self._recordings.begin_first(image.digest, owner, layers, flaw, starter)
        if self._packs.is_fresh(image):
            return Begun(tag, EXACT_KB, await trio.to_thread.run_sync(self._packs.extents, image))
        if not is_fetched:
            self._libraries.follow(maps, owner, image.config.runtime)
        if profile is None:
            return Begun(tag, CLOSE_KB if tag or is_fetched else self._unknown(layers))
        if is_fetched:
            return Begun("", EXACT_KB, await self._prefetches.coming(layers, profile))
        return Begun(warm=await self._prefetches.bring(layers, profile))

    def _unknown(self, layers: Collection[LayerKey]) -> int:
        """Read-ahead of a start of which nothing is known or noted."""
        return FAR_KB if self._prefetches.have_all(layers) else NEAR_KB

    def under_way(self, layers: Collection[LayerKey]) -> StartReport | None:
        """What is done now for a start from these layers."""
        if (recording := self._recordings.about(layers)) is not None and recording.is_under_way:
            return StartReport(how="recorded", done=recording.noted)
        if (prefetch := self._prefetches.about(layers)) is not None:
            return StartReport(how="prefetched", done=prefetch.done, total=prefetch.total)
        if (progress := self._packs.progress(layers)) is not None:
            return StartReport(how="pack", done=progress[0], total=progress[1])
        return None

    async def known(self, image: Image) -> ProfileReport | None:
        """The image's profile."""
        profile = await trio.to_thread.run_sync(self._store.get, image.digest, image.access.owner)
        if profile is None:
            return None
        size, runs = profile.size, len(profile.runs)
        return ProfileReport(
            recorded=profile.recorded, seconds=profile.seconds, runs=runs, size=size, flaw=profile.flaw
        )

    async def report(self) -> StartsReport:
        """How they stand."""
        kept = await trio.to_thread.run_sync(self._store.count)
        return StartsReport(kept, self._recordings.count(), self._prefetches.count(), self._prefetches.fetched)

    async def wait_kept(self) -> None:
        """Return when the profiles of starts that are over are kept."""
        await self._recordings.wait_kept()


def usage_of(maps: Collection[str], views: MountedViews, starts: Starts) -> UsageReport:
    """What a mount of these maps has of its image now, and what is done for a start of it."""
    return structs.replace(views.usage(maps), start=starts.under_way(views.layers_of(maps)))
