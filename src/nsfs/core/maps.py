"""Maps in files: shown as they are, or opened as images.

Owns how a map becomes an image. The files are written whole and renamed into place, so one that is there is complete,
and one that is open stays as it is; how they are read, and whether they are decrypted for it, is `load`'s.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from nsfs.format.erofs_image import ErofsImage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nsfs.core.ports import Content


class Maps:
    """The maps of a domain, by the paths of their files."""

    def __init__(self, load: Callable[[str], Content]) -> None:
        self.load = load
        """The bytes of a map; raises NotFoundError, CorruptError."""

    def open(self, path: str) -> ErofsImage:
        """A map as an image; raises as `load`, and CorruptError for what is none."""
        return ErofsImage(memoryview(self.load(path)[:]))

    @contextmanager
    def opened(self, path: str) -> Iterator[ErofsImage]:
        """As `open`, closed at the end."""
        image = self.open(path)
        try:
            yield image
        finally:
            image.close()
