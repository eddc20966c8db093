"""Directory trees that others write: containers, workers that were taken over.

Owns how they are walked and deleted: by descriptors, of which two are open at a time, so at whatever depth (a path has
at most PATH_MAX bytes, a tree has not) and without following anything, also while somebody moves and replaces what is
there. Refuses to enter other filesystems. What goes away meanwhile is left out. Blocks.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Found(NamedTuple):
    """Something in a tree."""

    directory: int
    """A descriptor of where it is, until the next one is asked for."""
    name: str
    status: os.stat_result

    @property
    def is_directory(self) -> bool:
        """It was one."""
        return stat.S_ISDIR(self.status.st_mode)


@dataclass(slots=True)
class _Level:
    """A directory that is being visited."""

    identity: tuple[int, int]
    files: list[tuple[str, os.stat_result]] = field(default_factory=list)
    directories: list[tuple[str, os.stat_result]] = field(default_factory=list)
    """The last one is that in which the visitor is, while it is below."""


def visit(top: str) -> Iterator[Found]:
    """Everything below a directory, each directory behind what is in it; nothing where there is no directory."""
    try:
        fd = os.open(top, _DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return
    levels: list[_Level] = []
    here = _look(fd)
    try:
        while True:
            yield from (Found(fd, *each) for each in here.files)
            here.files.clear()
            if here.directories and (below := _enter(fd, here)) is not None:
                levels.append(here)
                fd, here = _replaced(fd, below), _look(below)
                continue
            if not here.directories:
                if not levels:
                    return
                fd, here = _replaced(fd, os.open("..", _DIRECTORY, dir_fd=fd)), levels.pop()
                if _identity(os.fstat(fd)) != here.identity:
                    return  # somebody moved it, and nobody knows where this is
            yield Found(fd, *here.directories.pop())
    finally:
        os.close(fd)


def _replaced(fd: int, other: int) -> int:
    os.close(fd)
    return other


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _look(fd: int) -> _Level:
    level = _Level(_identity(os.fstat(fd)))
    with os.scandir(fd) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                (level.directories if stat.S_ISDIR(status.st_mode) else level.files).append((entry.name, status))
    return level


def _enter(fd: int, level: _Level) -> int | None:
    """The last of the directories, opened; None where it cannot be, is another one by now, or another filesystem's."""
    name, status = level.directories[-1]
    try:
        below = os.open(name, _DIRECTORY, dir_fd=fd)
    except OSError:
        return None
    if status.st_dev == level.identity[0] and _identity(os.fstat(below)) == _identity(status):
        return below
    os.close(below)
    return None


def delete_tree(top: str) -> None:
    """Delete a directory and all below it, as far as that can be; raises OSError where anything is left."""
    for found in visit(top):
        with suppress(OSError):
            (os.rmdir if found.is_directory else os.unlink)(found.name, dir_fd=found.directory)
    with suppress(FileNotFoundError):
        os.rmdir(top)
