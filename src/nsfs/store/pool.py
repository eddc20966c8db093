"""The pool of a domain: a sparse file of bytes, and a bitmap that says which of its blocks are there.

Owns what is in `disk`, in `present` (the durable bitmap) and in the live bitmap, a memfd that outlives its workers and
is shared by a worker, its jobs and its fronts; `store.poolfiles` makes them. Where the domain has a key, the disk is
ciphertext behind its header: an address never has two plaintexts, since it is given out once and padded with zeros.

Invariants: a live bit is set only after its block was written, a durable one only after its block was synced; a block
is punched only after both are cleared, and that is synced. So nothing and nobody gets a hole for data.

Concurrency: any number of threads. At most one process at a time writes to the blocks behind one byte of the bitmap (a
job to the slabs it reserved, the worker to the rest); `flush` and `evict` exclude each other across processes.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import threading
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

from nsfs.errors import CorruptError
from nsfs.store.buffers import Buffers
from nsfs.store.crypt import ROOM
from nsfs.store.index import FIRST_ADDRESS
from nsfs.store.poolfiles import (
    BITMAP_SIZE,
    BLOCK,
    DISK_SIZE,
    check_headers,
    check_key,
    data_ranges,
    mapped_error,
    mapped_errors,
)
from nsfs.store.writeback import Writeback

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from nsfs.store.crypt import DiskCipher
    from nsfs.store.layout import DomainLayout

_PAGE = 4096
_PAGE_COVERS = _PAGE * 8 * BLOCK
_FOLIO = 1 << 20
_BEHIND = 8 << 20
"""The kernel drops folios only whole, and read-ahead makes large ones: a reader that goes on drops what lies behind."""
_LEFT = 32 << 20
"""Bytes that scattered reads may leave in the page cache: dropped together they cost less than one by one, and files
that lie beside each other are read soon after each other."""

_STEP = 4096
"""Blocks looked at together where a range may be long."""

_EPOCH_AT = 512
"""Of the live bitmap: a counter, u64 in the host's order, that is odd while somebody evicts and even between.

While it is odd no bit is set; so bytes were there if the counter was even before and after they were read, or if it was
the same odd number and their bits were set before and after.
"""

_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def open_pool(layout: DomainLayout, bitmap_fd: int, salt: bytes = b"", *, readonly: bool = False) -> Pool:
    """Open the pool whose live bitmap `create_bitmap` made; every process opens its own.

    `bitmap_fd` stays the caller's and may be closed at once. `salt` is that of the index which gives out the addresses:
    where the domain has a key, an index that was made anew begins a new keystream. Raises CorruptError if the bitmap is
    not this pool's, DeniedError for another key.
    """
    with mapped_errors(f"cannot open the pool: {layout.path}"), ExitStack() as stack:
        mode = os.O_RDONLY if readonly else os.O_RDWR
        disk = os.open(layout.disk, mode)
        stack.callback(os.close, disk)
        present = os.open(layout.present, mode)
        stack.callback(os.close, present)
        header = check_headers(layout, disk, present, bitmap_fd)
        check_key(layout, header, os.pread(disk, BLOCK, 0))
        cipher = layout.key.disk(salt) if layout.key else None
        pool = Pool(disk, present, bitmap_fd, cipher, readonly=readonly)
        stack.pop_all()
        return pool


def _runs(bits: int, start: int) -> Iterator[tuple[int, int]]:
    """The runs of ones in `bits`, whose lowest bit stands for block `start`: (first block, end)."""
    while bits:
        low = (bits & -bits).bit_length() - 1
        bits >>= low
        length = (~bits & (bits + 1)).bit_length() - 1
        yield start + low, start + low + length
        bits >>= length
        start += low + length


class Pool:
    """An open pool. Addresses and sizes are bytes; `close` it when no thread uses it any more."""

    def __init__(
        self, disk: int, present: int, bitmap_fd: int, cipher: DiskCipher | None = None, *, readonly: bool = False
    ) -> None:
        """Take over `disk` and `present`; `open_pool` is the way to get one."""
        self._disk = disk
        self._cipher = cipher
        self._buffers = Buffers()
        self._writeback = Writeback(disk)
        self._present = present
        access = mmap.ACCESS_READ if readonly else mmap.ACCESS_WRITE
        self._bitmap = mmap.mmap(bitmap_fd, BITMAP_SIZE, access=access)
        self._view = memoryview(self._bitmap)
        self._epoch = self._view[_EPOCH_AT : _EPOCH_AT + 8].cast("Q")
        self._bits_lock = threading.Lock()
        self._durable_lock = threading.Lock()
        self._dirty: set[int] = set() if readonly else _pages_with_data(bitmap_fd)
        """Pages of the bitmap with bits that the durable one may lack."""
        self._syncing: frozenset[int] = frozenset()
        """Those that a flush is about."""
        self._was_read = False
        self._read_in: set[int] = set()
        """Pages of the bitmap in whose blocks something was read."""
        self._left = 0
        """Bytes that were, but where a read went on, less those that are to be: before these were, nothing is dropped
        behind a read, where they may lie."""
        self._end = 0
        """Of the last read."""
        os.posix_fadvise(disk, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        if not readonly:
            with self._exclusive():
                self._end_interrupted()

    def close(self) -> None:
        """Close both files and unmap the bitmap. Flushes nothing."""
        self._epoch.release()
        self._view.release()
        self._bitmap.close()
        os.close(self._disk)
        os.close(self._present)

    # Asking

    def is_present(self, address: int, size: int) -> bool:
        """Whether every block that [address, address + size) touches is there."""
        first = address >> 12
        count = ((address + size + 4095) >> 12) - first
        if address < FIRST_ADDRESS or count > _STEP:
            return not self.missing(address, size)
        bits = int.from_bytes(self._bitmap[first >> 3 : (first + count + 7) >> 3], "little") >> (first & 7)
        mask = (1 << count) - 1
        return bits & mask == mask

    def missing(self, address: int, size: int) -> list[tuple[int, int]]:
        """The absent runs of blocks that [address, address + size) touches: (address, size), by address."""
        runs: list[tuple[int, int]] = []
        for start, count in _steps(address, size):
            for first, end in _runs(self._get(start, count) ^ (1 << count) - 1, start):
                if runs and runs[-1][0] + runs[-1][1] == first * BLOCK:
                    runs[-1] = (runs[-1][0], end * BLOCK - runs[-1][0])
                else:
                    runs.append((first * BLOCK, (end - first) * BLOCK))
        return runs

    def local_bytes(self, ranges: Iterable[tuple[int, int]]) -> int:
        """How many bytes of `ranges` (address, size) are there, counted in whole blocks."""
        return BLOCK * sum(
            self._get(start, count).bit_count() for address, size in ranges for start, count in _steps(address, size)
        )

    # Data. `_load` and `_store` are the only places where bytes enter and leave the disk.

    def read(self, address: int, size: int) -> bytes | memoryview:
        """The local bytes, whatever is there, in memory that stays theirs; raises CorruptError if the disk fails.

        What they leave in the page cache goes when they go on, when it is `_LEFT` bytes, or by `drop_read`: a view that
        reads them keeps them itself. What is not clean stays until `flush` was told that it is on the disk: the kernel
        calls clean, too, what it failed to write, and may read something else in its place later. By O_DIRECT, which
        also waits for dirty pages to be written first, 128 KiB a read come at 0.65 GB/s, where this makes 2.3 (Linux
        6.18, ext4, two cores).
        """
        data = self._load(address, size)
        self._was_read = True
        goes_on = address == self._end and self._left >= 0
        self._note_left(address, 0 if goes_on else size)
        if goes_on and (address + size) % _FOLIO < size:
            self._drop_behind(address + size)
        elif self._left > _LEFT:
            self._drop()
        self._end = address + size
        return data

    def begin_reading(self, extents: Iterable[tuple[int, int]]) -> None:
        """Have the disk read what lies there (address, size), all at once, ahead of who will ask for it one by one.

        May block where the disk has much to do. What fails costs speed alone.
        """
        with suppress(OSError):
            for address, size in extents:
                os.posix_fadvise(self._disk, address, size, os.POSIX_FADV_WILLNEED)
                self._note_left(address, -size)

    def drop_read(self) -> None:
        """Drop the clean pages that reads left behind, unless there was one since the last call."""
        if not self._was_read:
            self._drop()
        self._was_read = False

    def _note_left(self, address: int, size: int) -> None:
        self._read_in.add(address // _PAGE_COVERS)
        self._left += size

    def _drop_behind(self, end: int) -> None:
        if (end - 1) // _PAGE_COVERS not in self._dirty | self._syncing:
            os.posix_fadvise(self._disk, end - _BEHIND, _BEHIND, os.POSIX_FADV_DONTNEED)

    def _drop(self) -> None:
        clean = self._read_in - self._dirty - self._syncing
        self._read_in -= clean
        self._left = 0
        for page in clean:
            os.posix_fadvise(self._disk, page * _PAGE_COVERS, _PAGE_COVERS, os.POSIX_FADV_DONTNEED)

    def read_present(self, address: int, size: int) -> bytes | memoryview | None:
        """The bytes if every block of them is there, also while somebody evicts; else None."""
        while True:
            epoch = self._epoch[0]
            if not self.is_present(address, size):
                return None
            data = self.read(address, size)
            if self._epoch[0] == epoch and (not epoch & 1 or self.is_present(address, size)):
                return data

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Store verified bytes, whole blocks of them, and then say that they are there.

        Raises NoSpaceError, or CorruptError if the disk fails; then nothing is said.
        """
        _check_aligned(address, len(data))
        epoch = self._epoch[0]
        self._store(address, data)
        with self._bits_lock:
            if self._epoch[0] == epoch and not epoch & 1:
                self._set(address, len(data))
                return
        with self._exclusive():
            self._store(address, data)
            with self._bits_lock:
                self._set(address, len(data))

    def write_past(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """As `write`, for one of many runs at rising addresses: the page cache keeps little of them."""
        self.write(address, data)
        self._writeback.follow(address, len(data))

    def write_zeros(self, address: int, size: int) -> None:
        """Say that these blocks, which were never written or are punched, are there: a hole of a file."""
        _check_aligned(address, size)
        with self._bits_lock:
            self._set(address, size)

    def _load(self, address: int, size: int) -> bytes | memoryview:
        with mapped_errors("cannot read the pool"):
            if self._cipher is None:
                plain = self._buffers.take(size)
                self._fill(plain, address)
                return plain.toreadonly()
            first, end = address // BLOCK * BLOCK, -(-(address + size) // BLOCK) * BLOCK
            plain = self._buffers.take(end - first + ROOM)
            self._cipher.load(first, plain, self._fill)
            return plain[address - first : address - first + size].toreadonly()

    def _fill(self, buffer: memoryview, address: int) -> None:
        done = 0
        while done < len(buffer):
            count = os.preadv(self._disk, [buffer[done:]], address + done)
            if not count:
                raise CorruptError(f"the pool ends early: {address + done}")
            done += count

    def _store(self, address: int, data: bytes | bytearray | memoryview) -> None:
        with mapped_errors("cannot write to the pool"):
            if self._cipher is None:
                self._write(memoryview(data), address)
            else:
                self._cipher.store(address, memoryview(data), self._write)

    def _write(self, data: memoryview, address: int) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._disk, data[done:], address + done)

    # Durability

    def mark_dirty(self, address: int, size: int) -> None:
        """Let the next `flush` cover what another process wrote here."""
        with self._bits_lock:
            self._dirty.update(_pages(address, size))

    def flush(self) -> None:
        """Sync the disk, then make the live bits of what was synced durable. Blocks; call it in a thread.

        Raises NoSpaceError or CorruptError; then blocks that may not have reached the disk are no longer present.
        """
        with self._exclusive():
            with self._bits_lock:
                pages, self._syncing, self._dirty = sorted(self._dirty), frozenset(self._dirty), set()
            try:
                if pages:
                    self._make_durable(pages)
            finally:
                self._syncing = frozenset()
            if not self._dirty:
                os.posix_fadvise(self._disk, 0, 0, os.POSIX_FADV_DONTNEED)

    def _make_durable(self, pages: list[int]) -> None:
        bits = [self._bitmap[page * _PAGE : (page + 1) * _PAGE] for page in pages]
        try:
            os.fdatasync(self._disk)
            for page, data in zip(pages, bits, strict=True):
                os.pwrite(self._present, data, page * _PAGE)
            os.fdatasync(self._present)
        except OSError as error:
            self._fall_back(pages)
            raise mapped_error(error, "cannot sync the pool") from error

    def evict(self, address: int, size: int) -> int:
        """Drop all blocks that [address, address + size) touches; returns how many bytes were there."""
        return self.evict_all([(address, size)])

    def clear(self) -> int:
        """Drop every block there is; for who has just opened the pool. Returns how many bytes were there."""
        with self._bits_lock:
            pages = sorted(self._dirty)
        covered = ((page * _PAGE_COVERS, _PAGE_COVERS) for page in pages)
        return self.evict_all([(address, min(size, DISK_SIZE - address)) for address, size in covered])

    def evict_all(self, ranges: Sequence[tuple[int, int]]) -> int:
        """Drop all blocks that `ranges` (address, size) touch; returns how many bytes were there.

        Blocks for one sync where durable bits were set. Raises UnsupportedError where the filesystem cannot punch
        holes (the blocks are absent all the same), CorruptError or NoSpaceError where it fails.
        """
        with self._exclusive(), mapped_errors("cannot evict from the pool"):
            self._end_interrupted()
            with self._bits_lock:
                self._epoch[0] |= 1
                freed = sum(self._clear(address, size) for address, size in ranges)
            try:
                self._clear_durable(ranges)
                for address, size in ranges:
                    first, count = _blocks(address, size)
                    self._punch(first * BLOCK, count * BLOCK)
            finally:
                with self._bits_lock:
                    self._epoch[0] += 1
        return freed

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Keep every other `flush` and `evict` out, in this process and in others."""
        with self._durable_lock:
            fcntl.flock(self._present, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._present, fcntl.LOCK_UN)

    def _end_interrupted(self) -> None:
        """Close the eviction that a process died in; the bits that it did clear stay cleared.

        Durable ones it may have cleared and not synced: nobody would clear these again, and so sync them.
        """
        if self._epoch[0] & 1:
            os.fdatasync(self._present)
            with self._bits_lock:
                self._epoch[0] += 1

    def _clear_durable(self, ranges: Sequence[tuple[int, int]]) -> None:
        changed = [self._clear_durable_run(*_blocks(address, size)) for address, size in ranges]
        if any(changed):
            os.fdatasync(self._present)

    def _clear_durable_run(self, first: int, count: int) -> bool:
        lo, hi = first >> 3, (first + count + 7) >> 3
        changed = False
        for at in range(lo, hi, _PAGE):
            end = min(at + _PAGE, hi)
            old = int.from_bytes(os.pread(self._present, end - at, at), "little")
            new = old & ~_mask(first, count, at, end)
            if new != old:
                os.pwrite(self._present, new.to_bytes(end - at, "little"), at)
                changed = True
        return changed

    def _punch(self, address: int, size: int) -> None:
        flags = _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE
        if _libc.fallocate(self._disk, flags, address, size) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def _fall_back(self, pages: list[int]) -> None:
        """Return to the durable bits: what a failed sync was about may be lost, though it still can be read."""
        with self._bits_lock:
            self._epoch[0] |= 1
            for page in pages:
                durable = int.from_bytes(os.pread(self._present, _PAGE, page * _PAGE), "little")
                live = int.from_bytes(self._bitmap[page * _PAGE : (page + 1) * _PAGE], "little")
                self._bitmap[page * _PAGE : (page + 1) * _PAGE] = (live & durable).to_bytes(_PAGE, "little")
            self._epoch[0] += 1
            self._dirty.update(pages)

    # Bits

    def _get(self, first: int, count: int) -> int:
        if first < FIRST_ADDRESS // BLOCK:
            return 0
        bits = int.from_bytes(self._bitmap[first >> 3 : (first + count + 7) >> 3], "little") >> (first & 7)
        return bits & (1 << count) - 1

    def _put(self, first: int, count: int, bits: int) -> None:
        lo, hi = first >> 3, (first + count + 7) >> 3
        shift = first & 7
        around = int.from_bytes(self._bitmap[lo:hi], "little") & ~((1 << count) - 1 << shift)
        self._bitmap[lo:hi] = (around | bits << shift).to_bytes(hi - lo, "little")

    def _clear(self, address: int, size: int) -> int:
        """Returns how many bytes were there."""
        there = self.local_bytes([(address, size)])
        for start, count in _steps(address, size):
            self._put(start, count, 0)
        return there

    def _set(self, address: int, size: int) -> None:
        for start, count in _steps(address, size):
            self._put(start, count, (1 << count) - 1)
        self._dirty.update(_pages(address, size))


def _blocks(address: int, size: int) -> tuple[int, int]:
    first = address // BLOCK
    return first, -(-(address + size) // BLOCK) - first


def _steps(address: int, size: int) -> Iterator[tuple[int, int]]:
    """The blocks of a range in pieces that are cheap as one integer each, none on both sides of the first address."""
    first, count = _blocks(address, size)
    end = first + count
    while first < end:
        step = min(end - first, _STEP - first % _STEP)
        yield first, step
        first += step


def _pages(address: int, size: int) -> range:
    return range(address // _PAGE_COVERS, (address + size - 1) // _PAGE_COVERS + 1)


def _mask(first: int, count: int, at: int, end: int) -> int:
    """Which bits of the bitmap's bytes [at, end) stand for one of the blocks [first, first + count)."""
    low = max(first, at * 8)
    high = min(first + count, end * 8)
    return (1 << high - low) - 1 << low - at * 8


def _check_aligned(address: int, size: int) -> None:
    if address % BLOCK or size % BLOCK or size <= 0 or not FIRST_ADDRESS <= address <= DISK_SIZE - size:
        raise ValueError(f"not whole blocks of the pool: {address}, {size}")


def _pages_with_data(bitmap_fd: int) -> set[int]:
    """What an earlier worker may have set without a flush: the pages of the bitmap that have memory."""
    first = FIRST_ADDRESS // _PAGE_COVERS
    return {
        page
        for start, end in data_ranges(bitmap_fd, BITMAP_SIZE)
        for page in range(max(first, start // _PAGE), -(-end // _PAGE))
    }
