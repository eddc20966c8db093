"""Spools: a blob's compressed bytes on disk, while they are still needed.

Owns the file: it only grows, each byte is written once, and what is there after an interruption is gone on with. Under
the domain's key its header is that of any sealed file, so a spool that is begun anew has another keystream. One writer
at a time, which is for its callers to see to. Blocks; belongs in a job or a thread.
"""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

from nsfs.errors import CorruptError, NoSpaceError, NotFoundError
from nsfs.store.files import open_private
from nsfs.store.sealed import HEADER_SIZE, encrypt_at, make_header, open_stream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from io import FileIO

    from nsfs.store.crypt import DomainKey, Keystream

PIECE: Final = 1 << 20
"""Bytes read at once: a multiple of a keystream's units."""


class Spool:
    """One blob's spool. Sizes and offsets are those of the blob."""

    def __init__(self, path: str, key: DomainKey | None) -> None:
        self.path = path
        self._key = key
        self._before = HEADER_SIZE if key else 0

    def size(self) -> int:
        """How many bytes are there; 0 without a file."""
        try:
            return max(0, os.stat(self.path).st_size - self._before)
        except FileNotFoundError:
            return 0

    def remove(self) -> None:
        """Delete it, if it is there."""
        with suppress(FileNotFoundError):
            os.unlink(self.path)

    def pieces(self) -> Iterator[bytes]:
        """All that is there, from the beginning; raises NotFoundError, and CorruptError if it is not our key's."""
        try:
            with open(self.path, "rb", buffering=0) as file:
                stream = self._stream(file.read(self._before))
                at = 0
                while data := _read(file, PIECE):
                    yield data if stream is None else stream.apply(at, data)
                    at += len(data)
        except FileNotFoundError:
            raise NotFoundError(f"the blob is not spooled: {self.path}") from None

    @contextmanager
    def appending(self, most: int) -> Iterator[Callable[[bytes], None]]:
        """What adds bytes behind those that are there, of which `most` are kept; raises NoSpaceError, CorruptError."""
        with self._mapped_errors():
            os.makedirs(os.path.dirname(self.path), 0o700, exist_ok=True)
            with open(self.path, "a+b", buffering=0, opener=open_private) as file:
                if os.fstat(file.fileno()).st_size < self._before:
                    file.truncate(0)
                    file.write(make_header())
                file.seek(0)
                stream = self._stream(file.read(self._before))
                at = min(most, self.size())
                file.truncate(at + self._before)

                def append(data: bytes) -> None:
                    nonlocal at
                    _write(file, data if stream is None else encrypt_at(stream, at, data))
                    at += len(data)

                yield append

    def _stream(self, header: bytes) -> Keystream | None:
        return None if self._key is None else open_stream(header, self._key, self.path)

    @contextmanager
    def _mapped_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpaceError(f"cannot spool the blob: {self.path}: {error.strerror}") from error
            raise CorruptError(f"cannot spool the blob: {self.path}: {error.strerror}") from error


def _read(file: FileIO, size: int) -> bytes:
    """As many bytes as there are up to `size`, so that the next ones are at a unit."""
    data = file.read(size)
    while data and len(data) < size and (more := file.read(size - len(data))):
        data += more
    return data


def _write(file: FileIO, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]
