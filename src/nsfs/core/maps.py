"""Maps in files: read where they lie, by memory maps whose pages are the kernel's and not ours.

Owns how a map's file is opened, and what is said where it cannot be. The files are written whole and renamed into
place, so one that is there is complete, and one that is open stays as it is.
"""

from __future__ import annotations

import mmap
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nsfs.errors import CorruptError, NotFoundError
from nsfs.format.erofs_image import ErofsImage

if TYPE_CHECKING:
    from collections.abc import Iterator


def load_map(path: str) -> memoryview:
    """The bytes of a map; raises NotFoundError, CorruptError. They are there for as long as somebody holds them."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise NotFoundError(f"the map is not there: {path}: {error.strerror}") from error
    try:
        return memoryview(mmap.mmap(fd, 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:
        raise CorruptError(f"the map cannot be read: {path}: {error}") from error
    finally:
        os.close(fd)


def open_map(path: str) -> ErofsImage:
    """A map as an image; raises as `load_map`, and CorruptError for what is none."""
    return ErofsImage(load_map(path))


@contextmanager
def opened_map(path: str) -> Iterator[ErofsImage]:
    """As `open_map`, closed at the end."""
    image = open_map(path)
    try:
        yield image
    finally:
        image.close()
