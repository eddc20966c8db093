"""Work that a process has done beside what it does itself, on another processor: by a child that it forks for that.

Owns the child, which is gone when the block ends, and dies with its parent. What it works out comes back as bytes, in a
file that is in memory alone. Whatever keeps it from that, the work is done here instead, when it is asked for.

For processes of one thread: what others held at that moment the child would wait for. It shares memory with its parent
until one of both writes there, so it begins at once, and uses nothing else that its parent has open.
"""

from __future__ import annotations

import os
import signal
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import msgspec

from nsfs.serve.forkserver import die_with_parent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextmanager
def beside(work: Callable[[], list[bytes]]) -> Iterator[Callable[[], list[bytes]]]:
    """Have `work` done while the block runs; what this gives waits for its outcome, once, or raises what it raises."""
    fd = os.memfd_create("nsfs-beside", os.MFD_CLOEXEC)
    child = _Child(work, fd)
    try:
        yield child.take
    finally:
        child.end()
        os.close(fd)


class _Child:
    """The process; none where there cannot be one."""

    def __init__(self, work: Callable[[], list[bytes]], fd: int) -> None:
        self._work = work
        self._fd = fd
        self._pid = 0
        if threading.active_count() == 1:
            with suppress(OSError):
                self._pid = self._fork()

    def _fork(self) -> int:
        parent = os.getpid()
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            die_with_parent(parent)
            with open(self._fd, "wb", closefd=False) as file:
                file.write(msgspec.msgpack.encode(self._work()))
            status = 0
        finally:
            os._exit(status)

    def take(self) -> list[bytes]:
        """What was worked out."""
        if not self._pid or self._wait():
            return self._work()
        os.lseek(self._fd, 0, os.SEEK_SET)
        with open(self._fd, "rb", closefd=False) as file:
            return msgspec.msgpack.decode(file.read(), type=list[bytes])

    def _wait(self) -> int:
        """Its status."""
        _, status = os.waitpid(self._pid, 0)
        self._pid = 0
        return status

    def end(self) -> None:
        """Leave none."""
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            self._wait()
