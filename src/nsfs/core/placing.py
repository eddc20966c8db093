"""Puts the contents of one layer into the pool while it is read.

Owns which content gets which address: one that the domain has is joined, any other gets a new extent, and neighbours
are written together. Refuses layers that take more addresses than allowed. Belongs to one thread, and has one more that
writes, a few batches behind. Invariants: it writes only to addresses that it reserved itself, to each once; every
extent is padded with zeros to whole blocks; contents whose digest is unknown are never registered.
"""

from __future__ import annotations

import mmap
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, Protocol

from nsfs.core.ports import BLOCK
from nsfs.errors import CorruptError
from nsfs.format.tar import Begin, Event, Member
from nsfs.model.pool import Extent, Slab

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from nsfs.model.layer import Entry

SLAB: Final = 64 << 20
"""Bytes of addresses that are reserved at least at once. Each time waits for the disk, behind what is written to it."""
_BATCH: Final = 4 << 20
"""Bytes of neighbouring contents that are written at once."""
_BEHIND: Final = 3
"""Batches that may wait to be written."""
_ZEROS: Final = bytes(_BATCH)
_LONG_GAP: Final = 64 << 10
"""Holes of at least so many bytes are left out of the disk."""


class Disk(Protocol):
    """Where contents go: the domain's pool."""

    def write_past(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Store whole blocks and mark them present, past the page cache as far as the disk keeps up."""

    def write_zeros(self, address: int, size: int) -> None:
        """Mark blocks present that were never written."""

    def evict(self, address: int, size: int) -> int:
        """Drop blocks; returns bytes freed."""


class Contents(Protocol):
    """What the domain knows of contents and addresses."""

    def reserve(self, size: int) -> Slab:
        """Addresses that nobody had before, durably."""

    def forget_slab(self, slab: Slab) -> None:
        """These addresses were cleared and belong to no layer."""

    def contents_of(self, digests: Iterable[bytes]) -> Mapping[bytes, Extent]:
        """The extents of those contents that are known."""


class Placer:
    """Gives every content of a layer its address, and writes those that the domain has not."""

    def __init__(self, disk: Disk, contents: Contents, max_addresses: int, expected: int = 0) -> None:
        """At first as many addresses are reserved as are `expected` to be needed."""
        self.entries: list[Entry] = []
        self.addresses: list[int] = []
        """Of each entry's content; 0 where it has none."""
        self.joined = 0
        """Bytes of contents that were known already."""
        self._disk = disk
        self._contents = contents
        self._writer = _Writer(disk, contents, max_addresses, expected)
        self._new: dict[bytes, Extent] = {}
        self._large = 0
        self._unused: list[tuple[int, int]] = []

    @property
    def slabs(self) -> list[Slab]:
        """The addresses that were reserved."""
        return self._writer.slabs

    def place(self, events: Sequence[Event]) -> None:
        """Take the entries and contents of one piece of the tar."""
        digests = (event.entry.digest for event in events if isinstance(event, Member) and event.content)
        small = {digest for digest in digests if digest not in self._new}
        known = self._contents.contents_of(small) if small else {}
        for event in events:
            if isinstance(event, Member):
                self.entries.append(event.entry)
                self.addresses.append(self._address_of(event, known))
            elif isinstance(event, Begin):
                self._large = self._writer.begin(event.size)
            else:
                self._writer.append_at(self._large + event.file_offset, event.data)

    def _address_of(self, member: Member, known: Mapping[bytes, Extent]) -> int:
        entry, content = member.entry, member.content
        if not entry.size:
            return 0
        if content is None:
            return self._end_large(entry)
        found = self._new.get(entry.digest) or known.get(entry.digest)
        if found is not None:
            self.joined += entry.size
            return found.address
        address = self._writer.begin(entry.size)
        self._writer.append(content)
        self._writer.end()
        self._new[entry.digest] = Extent(address, entry.size)
        return address

    def _end_large(self, entry: Entry) -> int:
        self._writer.end()
        address, digest = self._large, entry.digest
        if not digest:
            return address
        found = self._new.get(digest) or self._contents.contents_of([digest]).get(digest)
        if found is None:
            self._new[digest] = Extent(address, entry.size)
            return address
        self._unused.append((address, entry.size))
        self.joined += entry.size
        return found.address

    def new_contents(self) -> list[tuple[bytes, int, int]]:
        """What to register: digest, address, size."""
        return [(digest, extent.address, extent.size) for digest, extent in self._new.items()]

    def finish(self) -> None:
        """Write what is still held back."""
        self._writer.finish()
        self._writer.close()

    def move(self, elsewhere: Mapping[int, int]) -> None:
        """Use the later address instead of the earlier, for contents that another layer brought meanwhile."""
        sizes = dict(self._new.values())
        self._unused += [(address, sizes[address]) for address in elsewhere]
        self.addresses = [elsewhere.get(address, address) for address in self.addresses]

    def drop_unused(self) -> None:
        """Free what was written and is not used."""
        for address, size in self._unused:
            self._disk.evict(address, size)

    def clear(self) -> None:
        """Free everything that was written, and give up the addresses."""
        self._writer.close()
        for slab in self.slabs:
            self._disk.evict(slab.address, slab.size)
        for slab in self.slabs:
            self._contents.forget_slab(slab)


class _Behind:
    """Writes batches in a thread of its own, in order; an error is raised at a later call."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._thread = ThreadPoolExecutor(1, "write")
        self._pending: deque[tuple[Future[None], memoryview]] = deque()
        self._free = [_make_batch() for _ in range(_BEHIND)]

    def put(self, address: int, batch: memoryview, size: int) -> memoryview:
        """Have `size` bytes of `batch` written, and give another one to fill."""
        self._pending.append((self._thread.submit(self._write, address, batch, size), batch))
        if not self._free:
            self._retire()
        return self._free.pop()

    def _retire(self) -> None:
        written, batch = self._pending.popleft()
        self._free.append(batch)
        written.result()

    def drain(self) -> None:
        """Return when all is written."""
        while self._pending:
            self._retire()

    def close(self) -> None:
        """Return when nothing is written any more, whether it was or not."""
        self._thread.shutdown(cancel_futures=True)

    def _write(self, address: int, batch: memoryview, size: int) -> None:
        """Write whole blocks. Long zeros, as in a bomb, take no space."""
        if size == _BATCH and _is_zeros(batch):
            self._disk.write_zeros(address, size)
        else:
            self._disk.write_past(address, batch[:size])


def _make_batch() -> memoryview:
    """Memory that is taken when it is filled: a small layer needs little of it. Private pages are had for less."""
    return memoryview(mmap.mmap(-1, _BATCH, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def _is_zeros(batch: memoryview) -> bool:
    """Looks at the first block before it looks at all."""
    return batch[:BLOCK] == _ZEROS[:BLOCK] and bytes(batch) == _ZEROS


class _Writer:
    """Puts contents at rising addresses, neighbours in one write, each padded with zeros to whole blocks."""

    def __init__(self, disk: Disk, contents: Contents, max_addresses: int, expected: int) -> None:
        self.slabs: list[Slab] = []
        self._expected = expected
        self._behind = _Behind(disk)
        self._contents = contents
        self._left = max_addresses
        self._next = 0
        self._end = 0
        self._buffer = _make_batch()
        self._base = 0
        self._fill = 0

    def begin(self, size: int) -> int:
        """Give out an extent of `size` bytes, which `append` then fills; returns its address."""
        room = -(-size // BLOCK) * BLOCK
        if self._next + room > self._end:
            self._take_slab(max(room, SLAB, min(self._expected, self._left)))
        address = self._next
        self._next += room
        if self._base + self._fill != address:
            self.flush()
            self._base = address
        return address

    def _take_slab(self, size: int) -> None:
        self._left -= size
        self._expected = 0
        if self._left < 0:
            raise CorruptError("the contents of the layer are larger than allowed")
        self.flush()
        slab = self._contents.reserve(size)
        self.slabs.append(slab)
        self._next = self._base = slab.address
        self._end = slab.address + slab.size

    def append(self, data: memoryview) -> None:
        """Put `data` behind what was put last."""
        while data:
            step = min(len(data), _BATCH - self._fill)
            self._buffer[self._fill : self._fill + step] = data[:step]
            self._fill += step
            data = data[step:]
            if self._fill == _BATCH:
                self.flush()

    def append_at(self, address: int, data: memoryview) -> None:
        """Put `data` at `address`, which is not before what was put last; between them are zeros, or a hole."""
        gap = address - self._base - self._fill
        if gap >= _LONG_GAP:
            self._jump(address)
        elif gap:
            self.append(memoryview(bytes(gap)))
        self.append(data)

    def _jump(self, address: int) -> None:
        self.end()
        self.flush()
        self._base = address // BLOCK * BLOCK
        self.append(memoryview(bytes(address - self._base)))

    def end(self) -> None:
        """Pad to whole blocks."""
        padding = -self._fill % BLOCK
        self._buffer[self._fill : self._fill + padding] = bytes(padding)
        self._fill += padding

    def flush(self) -> None:
        """Have what is held back written: whole blocks."""
        if self._fill:
            self._buffer = self._behind.put(self._base, self._buffer, self._fill)
            self._base += self._fill
            self._fill = 0

    def finish(self) -> None:
        """Return when all is written."""
        self.flush()
        self._behind.drain()

    def close(self) -> None:
        """Write nothing any more."""
        self._behind.close()
