"""Trees that are deeper than a path is long, and than a program recurses."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

DEPTH = 1100
"""More than sys.getrecursionlimit()."""
_NAME = "deep"
"""So often it is longer than PATH_MAX, 4,096 bytes."""


def dig(top: Path) -> None:
    """Make directories within directories below `top`, and a file of a block in the last one."""
    fd = os.open(top, os.O_RDONLY)
    for _ in range(DEPTH):
        os.mkdir(_NAME, dir_fd=fd)
        below = os.open(_NAME, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    leaf = os.open("leaf", os.O_WRONLY | os.O_CREAT, dir_fd=fd)
    os.write(leaf, b"x" * 4096)
    os.close(leaf)
    os.close(fd)


def is_too_deep(top: Path) -> bool:
    """Whether walking by paths fails."""
    try:
        for _ in os.walk(top, onerror=_raise):
            pass
    except (RecursionError, OSError):
        return True
    return False


def _raise(error: OSError) -> None:
    raise error
