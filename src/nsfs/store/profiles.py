"""The profiles of a domain: what starts of its images read, a file each, under the domain's key where it has one.

Owns the directory `profiles`, of which the files that were written last are kept. A profile that cannot be read counts
as none: it is of use, and never needed. Calls block; any thread; the last of two that write one profile wins.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from nsfs.errors import NoSpaceError, NotFoundError, NsfsError
from nsfs.model.profile import parse_profile, render_profile
from nsfs.store.sealed import load_content, store_files

if TYPE_CHECKING:
    from nsfs.model.digest import Digest
    from nsfs.model.profile import Profile, Run
    from nsfs.store.layout import DomainLayout

log = logging.getLogger(__name__)

KEPT: Final = 1000
"""Profiles of a domain."""
_LOOKED_THROUGH: Final = 100
"""Of them, for what is read of one layer."""


class Profiles:
    """Those of one domain."""

    def __init__(self, layout: DomainLayout, *, kept: int = KEPT) -> None:
        self._layout = layout
        self._kept = kept

    def get(self, image: Digest, owner: str) -> Profile | None:
        """What `put` was given last for the image with this manifest, if that is still kept."""
        return self._load(self._layout.profile(image, owner))

    def runs_of(self, blob: Digest, stream: str) -> list[Run]:
        """What of a layer is in the profiles that were kept last, whosever they are; one run may be in several."""
        try:
            latest = self._by_age()[-_LOOKED_THROUGH:]
        except FileNotFoundError:
            return []
        profiles = filter(None, map(self._load, latest))
        return [run for profile in profiles for run in profile.runs_of(str(blob), stream)]

    def _load(self, path: str) -> Profile | None:
        try:
            content = load_content(path, self._layout.key)
            return parse_profile(bytes(content[: len(content)]))
        except NotFoundError:
            return None
        except NsfsError as error:
            log.warning("a profile is not used: %s: %s", path, error)
            return None

    def put(self, image: Digest, owner: str, profile: Profile) -> None:
        """Keep it, durably, instead of what there is; raises NoSpaceError."""
        try:
            os.makedirs(self._layout.profiles, 0o700, exist_ok=True)
        except OSError as error:
            raise NoSpaceError(f"profiles cannot be kept: {self._layout.profiles}: {error.strerror}") from error
        store_files({self._layout.profile(image, owner): [render_profile(profile)]}, self._layout.key)
        self._drop_oldest()

    def count(self) -> int:
        """How many are kept."""
        try:
            return len(os.listdir(self._layout.profiles))
        except OSError:
            return 0

    def _drop_oldest(self) -> None:
        files = self._by_age()
        for path in files[: max(0, len(files) - self._kept)]:
            with suppress(FileNotFoundError):
                os.unlink(path)

    def _by_age(self) -> list[str]:
        """Their paths, the one that was written last last."""
        with os.scandir(self._layout.profiles) as entries:
            return [path for _, path in sorted((entry.stat().st_mtime_ns, entry.path) for entry in entries)]
