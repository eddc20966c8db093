"""Starts: what is done with an image's profile when somebody begins to use the image.

Owns the choice between recording and fetching: without a profile the first start of an image is recorded, and only one
at a time; what is known of it, by a profile or by its layers themselves, is fetched meanwhile or instead.

Concurrency: one event loop; a profile is read in a thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import trio

from nsfs.model.profile import ProfileUse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nsfs.core.images import Image
    from nsfs.core.prefetch import Prefetches
    from nsfs.core.recording import Recordings
    from nsfs.model.digest import Digest
    from nsfs.model.pool import LayerKey
    from nsfs.model.profile import Profile


class Store(Protocol):
    """Where profiles are kept. Calls block."""

    def get(self, image: Digest, owner: str) -> Profile | None:
        """The one of an image, if there is one."""


class Begun(NamedTuple):
    """How views of a start are to be mounted."""

    recording: str = ""
    """The tag of their names; empty where nothing is recorded."""
    careful: bool = False
    """Read in small pieces at first: what the kernel reads beyond would be recorded, or fetched."""


class Starts:
    """The service."""

    def __init__(self, store: Store, recordings: Recordings, prefetches: Prefetches) -> None:
        self._store = store
        self._recordings = recordings
        self._prefetches = prefetches

    async def begin(
        self, use: ProfileUse, image: Image, layers: Sequence[LayerKey], flaw: str = "", starter: str = ""
    ) -> Begun:
        """Do that for a start from these layers, lowest first.

        `flaw` says what of the start is not the image's, so that its profile is only of use here. A `starter` who asks
        again is given the same tag.
        """
        if use is ProfileUse.OFF:
            return Begun()
        owner = image.access.owner
        if use is ProfileUse.RECORD:
            return Begun(self._recordings.begin(image.digest, owner, layers, flaw), careful=True)
        profile = await trio.to_thread.run_sync(self._store.get, image.digest, owner)
        is_fetched = self._prefetches.begin(image.digest, owner, layers, profile)
        if use is ProfileUse.USE or profile is not None:
            return Begun(careful=is_fetched)
        tag = self._recordings.begin_first(image.digest, owner, layers, flaw, starter)
        return Begun(tag, careful=is_fetched or tag != "")

    async def wait_kept(self) -> None:
        """Return when the profiles of starts that are over are kept."""
        await self._recordings.wait_kept()
