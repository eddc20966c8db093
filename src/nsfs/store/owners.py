"""Whose files a domain's are.

Owns giving a directory and all below it to a uid, and telling who has what. The directory may be its worker's own
already, and that worker hostile: nothing is followed, nothing outside is touched. Blocks.
"""

from __future__ import annotations

import os
from contextlib import suppress

from nsfs.store.trees import visit


def give_to(directory: str, uid: int) -> None:
    """Have `directory` and everything in it belong to `uid` and the group of that number, and to nobody else.

    The directory itself is the last, so that it does not look done while it is not; done twice, it does no harm.
    """
    for found in visit(directory):
        if (found.status.st_uid, found.status.st_gid) != (uid, uid):
            with suppress(FileNotFoundError):
                os.chown(found.name, uid, uid, dir_fd=found.directory, follow_symlinks=False)
    os.chown(directory, uid, uid, follow_symlinks=False)
    os.chmod(directory, 0o700)


def owners(directory: str) -> dict[str, int]:
    """The owner of each entry of `directory`, by name; {} where there is no such directory."""
    try:
        with os.scandir(directory) as entries:
            return {entry.name: entry.stat(follow_symlinks=False).st_uid for entry in entries}
    except FileNotFoundError:
        return {}
