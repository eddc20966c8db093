"""Which pages of files are in memory: whether a start is cold, and what it touched.

Owns: asking the kernel, by cachestat(2) (Linux 6.5) for sums and by mincore(2) for which. Looks at files without
reading them; what it reads afterwards, to compress it, are pages that are in memory.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import stat
import struct
import zlib
from typing import TYPE_CHECKING

from nsfs.bench.model import Touched
from nsfs.errors import NsfsError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PAGE = mmap.PAGESIZE
_CACHESTAT = 451
_LEVEL = 6
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_LIBC.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
_MAP_FAILED = ctypes.c_void_p(-1).value


def drop_caches() -> None:
    """Write everything out, then have the kernel forget pages, dentries and inodes that nobody uses."""
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as file:
        file.write("3")


def forget_pages(paths: Iterable[str]) -> None:
    """Write these files out, then have the kernel forget their pages; nothing else of the machine is touched."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fdatasync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def count_cached(paths: Iterable[str]) -> int:
    """Bytes of the files that are in memory."""
    return sum(map(_cached, paths))


def regular_files(root: str) -> Iterator[str]:
    """The regular files below `root` that are not empty, on its filesystem."""
    for directory, _, names in os.walk(root):
        for name in names:
            status = os.lstat(f"{directory}/{name}")
            if stat.S_ISREG(status.st_mode) and status.st_size:
                yield f"{directory}/{name}"


def measure_touched(root: str) -> Touched:
    """What of the tree at `root` is in memory; each file once, by whichever name."""
    files = size = compressed = 0
    packer = zlib.compressobj(_LEVEL)
    seen: set[tuple[int, int]] = set()
    for path in regular_files(root):
        status = os.lstat(path)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        pages = 0
        for data in _resident(path, status.st_size):
            compressed += len(packer.compress(data))
            pages += 1
        files += pages > 0
        size += pages * PAGE
    return Touched(files, size, compressed + len(packer.flush()))


def _cached(path: str) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        whole, result = struct.pack("=QQ", 0, 0), ctypes.create_string_buffer(40)
        if _LIBC.syscall(_CACHESTAT, fd, whole, result, 0):
            raise NsfsError(f"cachestat fails: {path}: {os.strerror(ctypes.get_errno())}", hint="it needs Linux 6.5")
        return int(struct.unpack_from("=Q", result.raw)[0]) * PAGE
    finally:
        os.close(fd)


def _resident(path: str, size: int) -> Iterator[bytes]:
    """The pages of the file that are in memory; the last may be shorter."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for number, resident in enumerate(_mincore(fd, size, path)):
            if resident & 1:
                yield os.pread(fd, PAGE, number * PAGE)
    finally:
        os.close(fd)


def _mincore(fd: int, size: int, path: str) -> bytes:
    """A byte for each page, its lowest bit set where the page is in memory (mincore(2))."""
    vector = ctypes.create_string_buffer(-(-size // PAGE))
    address = _LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if address == _MAP_FAILED:
        raise NsfsError(f"mmap fails: {path}: {os.strerror(ctypes.get_errno())}")
    try:
        if _LIBC.mincore(address, size, vector):
            raise NsfsError(f"mincore fails: {path}: {os.strerror(ctypes.get_errno())}")
        return vector.raw
    finally:
        _LIBC.munmap(address, size)
