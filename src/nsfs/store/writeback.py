"""Writing much to a file without filling the page cache with it, as far as its disk keeps up.

Owns when the disk is told to begin with what was written, and when pages that it has are given back, so that the next
ones are written into memory which was just used. Worth it because fresh memory costs more than the copy into it: 620
MiB in pieces of 4 take 0.8 s of a processor in a virtual machine whose host gets free memory back, and 0.2 s this way
(Linux 6.18, ext4). Refuses to wait: a disk that once took long to be told is left to the kernel's own writing back.

One thread at a time. Promises nothing about durability, and errors of the disk are for whoever syncs the file.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections import deque
from typing import Final

RUN: Final = 4 << 20
"""Bytes that the disk is told of at once."""

BEHIND: Final = 8
"""Runs that it may have before it until their pages are given back."""

_PATIENCE: Final = 0.1
"""Seconds after which a disk is too slow for what is written; where it keeps up, telling it takes 0.5 ms."""

_SYNC_FILE_RANGE_WRITE: Final = 2
_libc = ctypes.CDLL(None, use_errno=True)
_libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


def begin_writing(fd: int, offset: int = 0, size: int = 0) -> None:
    """Have the disk begin with what a file has there, to its end where `size` is 0; nobody waits for it."""
    _libc.sync_file_range(fd, offset, size, _SYNC_FILE_RANGE_WRITE)


class Writeback:
    """Follows who writes to one file at rising offsets."""

    def __init__(self, fd: int, patience: float = _PATIENCE) -> None:
        """`fd` stays the caller's."""
        self._fd = fd
        self._patience = patience
        self._start = 0
        self._end = 0
        self._runs: deque[tuple[int, int]] = deque()

    def follow(self, offset: int, size: int) -> None:
        """Begin to write out what was written up to here, and give back what was a while ago."""
        if offset != self._end:
            self._start = offset
        self._end = offset + size
        if self._end - self._start >= RUN and self._patience:
            self._tell(self._start, self._end - self._start)
            self._start = self._end

    def _tell(self, offset: int, size: int) -> None:
        began = time.monotonic()
        begin_writing(self._fd, offset, size)
        if time.monotonic() - began > self._patience:
            self._patience = 0
        self._runs.append((offset, size))
        if len(self._runs) > BEHIND:
            os.posix_fadvise(self._fd, *self._runs.popleft(), os.POSIX_FADV_DONTNEED)
