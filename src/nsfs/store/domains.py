"""Domains as the daemon has them on disk: begun, opened and deleted whole.

Owns the order in which a domain goes: its key first, so that whatever is left when that is interrupted is noise, which
the next start deletes. Refuses to open a domain whose key is not the one that its pool is encrypted with. Blocks; call
it in a thread. One daemon owns a root.
"""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote

from nsfs.errors import CorruptError, NsfsError
from nsfs.model.encryption import KeyPlace, plan_key
from nsfs.store.crypt import DomainKey, make_key_file
from nsfs.store.poolfiles import create_bitmap, is_encrypted
from nsfs.store.trees import delete_tree, visit

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from nsfs.model.encryption import Encrypt
    from nsfs.store.keys import Keys
    from nsfs.store.layout import DomainLayout, Layout

log = logging.getLogger(__name__)

_POD = "pod/"
_BLOCK = 512
"""Unit of st_blocks (stat(2))."""


class Opened(NamedTuple):
    """Descriptors that outlive the domain's workers; the caller's to close."""

    bitmap: int
    """The live bitmap."""
    key: int
    """`store.crypt.load_key` reads it."""


class Footprint(NamedTuple):
    """What a domain is on disk."""

    size: int
    """Bytes."""
    uid: int
    """Whose it is: its worker's."""
    is_encrypted: bool


class Domains:
    """The domains of one daemon."""

    def __init__(self, layout: Layout, keys: Keys, encrypt: Encrypt) -> None:
        self._layout = layout
        self._keys = keys
        self._encrypt = encrypt

    def open(self, name: str) -> Opened:
        """Begin a domain, or go on with it; raises as `create_bitmap` and `Keys.load` do."""
        key = self._key(name)
        bitmap = create_bitmap(self._layout.domain(name, key))
        try:
            return Opened(bitmap, make_key_file(key))
        except BaseException:
            os.close(bitmap)
            raise

    def _key(self, name: str) -> DomainKey | None:
        match plan_key(name, self._encrypt):
            case KeyPlace.MEMORY:
                self.delete(name)  # nobody has the key of what an earlier pod of that name left
                return DomainKey.generate()
            case place:
                wanted = place is KeyPlace.DISK
                key = self._keys.ensure(name, wanted=wanted)
                if wanted and key is None:
                    log.warning("domain %s was begun without a key, and stays unencrypted until it is deleted", name)
                return key

    def names(self) -> list[str]:
        """The domains that have anything on disk; raises CorruptError where the disk fails."""
        with _mapped_errors(self._layout.domains), suppress(FileNotFoundError):
            return sorted(map(unquote, os.listdir(self._layout.domains)))
        return []

    def measure(self, domain: str) -> Footprint:
        """What a domain has on disk, its indexes included; what goes away meanwhile does not count.

        Raises CorruptError where the disk fails.
        """
        layout = self._layout.domain(domain)
        with _mapped_errors(layout.path):
            return self._measure(layout)

    def _measure(self, layout: DomainLayout) -> Footprint:
        size = sum(found.status.st_blocks for found in visit(layout.path) if not found.is_directory) * _BLOCK
        with suppress(FileNotFoundError):
            return Footprint(size, os.lstat(layout.path).st_uid, _is_encrypted(layout))
        return Footprint(0, os.geteuid(), is_encrypted=False)

    def free(self) -> int:
        """Bytes that the filesystem has left for us; raises CorruptError where the disk fails."""
        with _mapped_errors(self._layout.root):
            found = os.statvfs(self._layout.root)
        return found.f_bavail * found.f_frsize

    def destroy_key(self, name: str) -> None:
        """From now on nobody can read what the domain has on disk, but who has the key in memory."""
        self._keys.destroy(name)

    def delete(self, name: str) -> None:
        """Delete all that a domain has on disk, its key first."""
        self.destroy_key(name)
        with suppress(OSError):
            delete_tree(self._layout.domain(name).path)

    def drop_lost(self, keep: Collection[str]) -> None:
        """Delete the domains of pods, and those whose deletion was interrupted; not those that go on (`keep`)."""
        for name in set(self.names()).difference(keep):
            if name.startswith(_POD) or self._is_lost(name):
                log.info("domain %s is deleted: its mount, or its key, is gone", name)
                self.delete(name)

    def _is_lost(self, name: str) -> bool:
        try:
            return self._keys.is_lost(name)
        except NsfsError as error:
            log.warning("what domain %s has cannot be looked at: %s", name, error)
            return False


@contextmanager
def _mapped_errors(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CorruptError(f"the disk cannot be looked at: {path}: {error.strerror}") from error


def _is_encrypted(layout: DomainLayout) -> bool:
    """As far as that can be told of a pool that may be damaged."""
    try:
        return is_encrypted(layout)
    except NsfsError:
        return False
