"""What LMDB raises, as errors of ours.

Owns the translation, for every environment; keys and values are described where they are kept.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import lmdb

from nsfs.errors import CorruptError, NoSpaceError

if TYPE_CHECKING:
    from collections.abc import Iterator

_UNWRITABLE = ("No space left", "Disk quota", "Read-only file system")
"""Of strerror(3), which LMDB passes on as words alone."""


@contextmanager
def mapped_errors(what: str, path: str) -> Iterator[None]:
    """Raise NoSpaceError or CorruptError for what LMDB raises; `what` names the environment at `path` to people."""
    try:
        yield
    except lmdb.MapFullError as error:
        raise NoSpaceError(f"{what} is full: {path}") from error
    except lmdb.DiskError as error:
        raise NoSpaceError(f"{what} cannot be written: {path}: {error}") from error
    except (lmdb.InvalidError, lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.PanicError) as error:
        raise CorruptError(f"{what} is damaged: {path}: {error}") from error
    except lmdb.Error as error:
        if any(words in str(error) for words in _UNWRITABLE):
            raise NoSpaceError(f"{what} cannot be written: {path}: {error}") from error
        raise CorruptError(f"{what} cannot be used: {path}: {error}") from error
