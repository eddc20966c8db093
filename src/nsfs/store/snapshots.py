"""Directories of snapshots: what containers and unpacks write, and short names for those that others stand on.

Owns `snapshots/<id>/{fs,work}` below the root, and a symlink for each stacked directory in the flat directory of
lowers: overlay's options are one page, and 128 names there fit into it. Refuses nothing: the records say which
directories count, all others may go. Functions block; no two may `sweep` at a time.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from nsfs.errors import NoSpaceError, NotFoundError, NsfsError
from nsfs.store.trees import delete_tree, visit

if TYPE_CHECKING:
    from collections.abc import Collection

_BLOCK = 512
"""Unit of st_blocks (stat(2))."""


class Usage(NamedTuple):
    """What a directory takes."""

    size: int
    """Bytes of disk."""
    inodes: int


class SnapshotDirs:
    """All of them."""

    def __init__(self, path: str, links: str) -> None:
        self._path = path
        self._links = links
        for directory in (path, links):
            os.makedirs(directory, 0o711, exist_ok=True)
        self._linked: set[int] = set()

    def upper(self, number: int) -> tuple[str, str]:
        """(upper, work) of a snapshot."""
        top = os.path.join(self._path, str(number))
        return os.path.join(top, "fs"), os.path.join(top, "work")

    def make(self, number: int, owner: tuple[int, int]) -> None:
        """Make the directories of a new snapshot, empty; they belong to `owner`."""
        upper, work = self.upper(number)
        try:
            delete_tree(os.path.dirname(upper))
            os.mkdir(os.path.dirname(upper), 0o700)
            for path in (upper, work):
                os.mkdir(path)
                os.chown(path, *owner)
            os.chmod(upper, 0o755)  # noqa: S103  the root directory of a container
        except OSError as error:
            kind = NoSpaceError if error.errno in {errno.ENOSPC, errno.EDQUOT} else NsfsError
            raise kind(f"cannot make the directory of a snapshot: {error}") from error

    def owner(self, number: int) -> tuple[int, int]:
        """Who owns the root of a snapshot's tree; raises NotFoundError."""
        try:
            found = os.stat(self.upper(number)[0])
        except FileNotFoundError:
            raise NotFoundError(f"the directory of a snapshot is gone: {self.upper(number)[0]}") from None
        return found.st_uid, found.st_gid

    def adopt(self, number: int, owner: tuple[int, int]) -> None:
        """Give a snapshot's directories to `owner`, while nothing is in there."""
        upper, work = self.upper(number)
        if owner != self.owner(number) and not os.listdir(upper):
            os.chown(work, *owner)
            os.chown(upper, *owner)

    def link(self, number: int) -> str:
        """A short path to the tree of a snapshot, to be stacked."""
        name = os.path.join(self._links, f"s{number:x}")
        if number not in self._linked:
            with suppress(FileNotFoundError):
                os.unlink(name)
            os.symlink(self.upper(number)[0], name)
            self._linked.add(number)
        return name

    def measure(self, number: int) -> Usage:
        """Walk a snapshot's tree; what goes away meanwhile does not count."""
        upper, _ = self.upper(number)
        blocks = {(found.status.st_dev, found.status.st_ino): found.status.st_blocks for found in visit(upper)}
        with suppress(FileNotFoundError):
            top = os.lstat(upper)
            blocks[top.st_dev, top.st_ino] = top.st_blocks
        return Usage(sum(blocks.values()) * _BLOCK, len(blocks))

    def sweep(self, keep: Collection[int], below: int) -> int:
        """Delete what belongs to none of `keep`, of all numbers lower than `below`; how many directories that was."""
        found = {int(name) for name in os.listdir(self._path) if name.isascii() and name.isdigit()}
        gone = {number for number in found if number < below}.difference(keep)
        for number in gone:
            with suppress(FileNotFoundError):
                os.unlink(os.path.join(self._links, f"s{number:x}"))
            self._linked.discard(number)
            with suppress(OSError):
                delete_tree(os.path.join(self._path, str(number)))
        return len(gone)
