"""How files of ours are written: whole and durably, or not at all.

Owns the order of writing, syncing and renaming. Any thread; blocks for the disk.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

from nsfs.errors import NoSpaceError

if TYPE_CHECKING:
    from collections.abc import Iterable


def replace_file(path: str, pieces: Iterable[bytes | bytearray | memoryview]) -> None:
    """Write a file whole and durably, or leave what was there; raises NoSpaceError."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb", opener=open_private) as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
        sync_directory(os.path.dirname(path))
    except OSError as error:
        with suppress(OSError):
            os.unlink(temporary)
        raise NoSpaceError(f"cannot write a file of ours: {path}: {error.strerror}") from error


def overwrite(fd: int) -> None:
    """Have zeros where a file's bytes were, durably, as far as its filesystem overwrites in place."""
    os.pwrite(fd, bytes(os.fstat(fd).st_size), 0)
    os.fsync(fd)


def open_private(path: str, flags: int) -> int:
    """For `open`: a file that is made is its owner's alone."""
    return os.open(path, flags, 0o600)


def sync_directory(path: str) -> None:
    """Make names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
