"""How files of ours are written: whole and durably, or not at all.

Owns the order of writing, syncing and renaming; files that belong together wait for the disk once. Any thread; blocks
for the disk.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, TypeAlias

from nsfs.errors import NoSpaceError
from nsfs.store.writeback import begin_writing

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    Pieces: TypeAlias = Iterable[bytes | bytearray | memoryview]


def replace_files(files: Mapping[str, Pieces]) -> None:
    """Write files of one directory, each of them whole, all of them durable in the end; raises NoSpaceError.

    They take their places in the order given, when the bytes of all are durable: what fails leaves what was there, at
    least of the last.
    """
    written = {f"{path}.{os.getpid()}.tmp": path for path in files}
    try:
        _write_durably(dict(zip(written, files.values(), strict=True)))
        for temporary, path in written.items():
            os.rename(temporary, path)
        sync_directory(os.path.dirname(path))
    except OSError as error:
        for temporary in written:
            with suppress(OSError):
                os.unlink(temporary)
        what = os.path.commonpath(files)
        raise NoSpaceError(f"cannot write a file of ours: {what}: {error.strerror}") from error


def _write_durably(files: Mapping[str, Pieces]) -> None:
    """Write and sync; where the disk has begun with all of them, one commit of a filesystem's journal has them all."""
    with ExitStack() as stack:
        opened = [stack.enter_context(open(path, "wb", opener=open_private)) for path in files]
        for file, pieces in zip(opened, files.values(), strict=True):
            file.writelines(pieces)
            file.flush()
            begin_writing(file.fileno())
        for file in opened:
            os.fsync(file.fileno())


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
