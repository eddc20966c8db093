"""The kernel's own view of what we write: file-backed EROFS and overlay mounts by mount(2), gone when the block ends.

Needs root. util-linux's mount is not used: before 2.39 it makes a loop device of the image and then fails on `device=`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_MS_RDONLY = 1
DISK_BLOCKS = (1 << 32) - 1
"""16 TiB less one block, as many as EROFS can address and ext4 can hold."""


def make_disk(path: Path) -> Path:
    """A sparse file of the size of a pool's disk."""
    with path.open("wb") as file:
        file.truncate(DISK_BLOCKS * 4096)
    return path


@contextlib.contextmanager
def mounted_erofs(image: Path, disk: Path, target: Path) -> Iterator[Path]:
    """`image` at `target`, with `disk` as its device 1."""
    target.mkdir(exist_ok=True)
    _mount(image, target, "erofs", f"device={disk}")
    try:
        yield target
    finally:
        _umount(target)


@contextlib.contextmanager
def mounted_overlay(lowers: Sequence[Path], target: Path) -> Iterator[Path]:
    """`lowers`, top first, read-only at `target`."""
    target.mkdir(exist_ok=True)
    options = "redirect_dir=nofollow,metacopy=off,index=off"
    _mount("overlay", target, "overlay", f"lowerdir={':'.join(map(str, lowers))},{options}")
    try:
        yield target
    finally:
        _umount(target)


def _mount(source: Path | str, target: Path, kind: str, options: str) -> None:
    if _LIBC.mount(os.fsencode(source), os.fsencode(target), kind.encode(), _MS_RDONLY, options.encode()):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(source))


def _umount(target: Path) -> None:
    if _LIBC.umount2(os.fsencode(target), 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))
