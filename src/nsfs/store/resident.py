"""Keeping the pages of a mapped file in memory, so that nobody who maps it has to read its disk again.

LMDB maps its file, and where a disk fails, reading a mapped page that is not in memory ends the process (SIGBUS). What
is resident here is locked (mlock(2)) for as long as this process lives, whoever maps it, also what the disk refused to
take: the kernel drops no locked page. Refuses more than `MOST`, for the host's sake, and where the process may not lock
so much, goes on without.

Not for LMDB's lock files: closing any descriptor of one ends the locks that the process has on it (fcntl_locking(2)).
Blocks where a page is not in memory yet; call it in a thread where that may be. Any number of threads.
"""

from __future__ import annotations

import logging
import mmap
import os
import threading
from collections import Counter
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

log = logging.getLogger(__name__)

MOST: Final = 256 << 20
"""Bytes of all files of one process: an index of a few million contents."""
_MAP_LOCKED: Final = 0x2000
"""include/uapi/asm-generic/mman.h."""
_PIECE: Final = 1 << 20


class Resident:
    """Some files that others map, or read, and which may grow by whole pages."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._users = Counter(paths)
        self._locked: dict[str, list[mmap.mmap]] = {}
        self._lock = threading.Lock()
        self._trouble = ""

    def add(self, path: str) -> None:
        """One more, from the next `follow` on; as often as it is added it has to be dropped. Does not block."""
        self._users[path] += 1

    def drop(self, path: str) -> None:
        """It is not needed any more, from the next `follow` on. Does not block."""
        self._users[path] -= 1
        if self._users[path] <= 0:
            del self._users[path]

    def follow(self) -> None:
        """Have in memory what is there now; what cannot be, because it cannot be read or locked, is tried again."""
        with self._lock:
            wanted = list(self._users)
            for path in self._locked.keys() - set(wanted):
                _unmap(self._locked.pop(path))
            trouble = [each for path in wanted if (each := self._extend(path))]
        if trouble and trouble[0] != self._trouble:
            log.info("what is mapped may have to be read again: %s", trouble[0])
        self._trouble = trouble[0] if trouble else ""

    def _extend(self, path: str) -> str:
        """Lock what is new of a file; why not, where that fails."""
        try:
            with open(path, "rb", buffering=0) as file:
                self._lock_new(path, file.fileno())
        except OSError as error:
            return f"{path}: {error.strerror}"
        return ""

    def _lock_new(self, path: str, fd: int) -> None:
        start = sum(map(len, self._locked.get(path, [])))
        room = MOST - sum(len(each) for pieces in self._locked.values() for each in pieces)
        length = min(os.fstat(fd).st_size - start, room)
        if length <= 0 or start % mmap.PAGESIZE:
            return
        for at in range(start, start + length, _PIECE):
            os.pread(fd, min(_PIECE, start + length - at), at)  # not in mmap(2), beside which no thread would run
        flags = mmap.MAP_SHARED | _MAP_LOCKED
        piece = mmap.mmap(fd, length, flags=flags, prot=mmap.PROT_READ, offset=start)
        self._locked.setdefault(path, []).append(piece)

    def close(self) -> None:
        """Let go of all of it."""
        self._users.clear()
        self.follow()


def _unmap(pieces: list[mmap.mmap]) -> None:
    for each in pieces:
        each.close()
