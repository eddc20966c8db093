"""Reading the metadata images that `format.erofs` writes, where they lie.

Owns the reader: attributes, lookups and listings straight from a buffer (a memory map, usually), by nid. It keeps
nothing per file, so an image of any size costs the process its open map and no more. Refuses, with CorruptError, any
number in the image that points outside it or that our writer would not have written; garbage gives no other exception
and no endless loop. Immutable after construction, so any number of threads may use one image.

A nid is the number of an inode in its image: its byte offset over 32.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from typing import TYPE_CHECKING, Final, NoReturn

from msgspec import Struct

from nsfs.errors import CorruptError
from nsfs.format import erofs
from nsfs.format.erofs import BLOCK, CHUNK, DIRENT, INODE
from nsfs.model.layer import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator
    from mmap import mmap

_SLOT: Final = 32
_KINDS: Final = {bits: Kind(number) for number, bits in enumerate(erofs.FILE_TYPES) if number}
_KIND_BY_NUMBER: Final = (None, *(Kind(number) for number in range(1, 8)))
_NAME_OFFSET: Final = struct.Struct("<8xH2x")
_HEAD: Final = struct.Struct("<HHH2xQ")
"""What of an inode says how long it is: format, xattr count, mode, size."""
_TYPE, _REGULAR = 0o170000, 0o100000
_CHUNK_SHIFT: Final = BLOCK.bit_length() - 1 + erofs.MAX_CHUNK_BITS
_PER_BLOCK: Final = 512
"""More than the entries that fit a block: positions in a directory are block * 512 + entry."""


class Inode(Struct, frozen=True, gc=False):
    """One inode's attributes."""

    nid: int
    kind: Kind
    mode: int
    """Permission bits, 07777."""
    uid: int
    gid: int
    size: int
    """Content of a regular file, length of a symlink's target, bytes of names of a directory."""
    mtime_ns: int
    links: int
    device: tuple[int, int]
    layout: int
    """Where the data is: `erofs.PLAIN`, `erofs.INLINE` or `erofs.CHUNKED`."""
    union: int
    """First block of the data, or the chunk format, as `layout` says."""
    xattr_size: int
    """Bytes of extended attributes behind the inode's 64."""

    @property
    def is_whiteout(self) -> bool:
        """Overlay's mark of a deleted name: a character device 0/0."""
        return self.kind is Kind.CHARACTER and self.device == (0, 0)


class Dirent(Struct, frozen=True, gc=False):
    """One name of a directory."""

    name: bytes
    kind: Kind
    nid: int
    next: int
    """Position to go on from (`readdir`'s `start`)."""


class ErofsImage:
    """One image in `buffer`, which stays exported until `close`."""

    def __init__(self, buffer: bytes | bytearray | memoryview | mmap) -> None:
        self._data = memoryview(buffer)
        if len(self._data) < BLOCK:
            _refuse("it is shorter than a block")
        fields = erofs.SUPERBLOCK.unpack_from(self._data, erofs.SUPERBLOCK_OFFSET)
        magic, checksum, compat, block_bits, _, self.root, self.inodes = fields[:7]
        blocks, self.uuid, volume, incompat, devices = fields[9], fields[12], fields[13], fields[14], fields[16]
        if (magic, 1 << block_bits & 0xFFFF, incompat, devices) != (erofs.MAGIC, BLOCK, erofs.INCOMPAT, 1):
            _refuse("its superblock is not ours")
        if compat & 1 and checksum != erofs.superblock_checksum(self._data[:BLOCK]):
            _refuse("its superblock's checksum does not match")
        if blocks * BLOCK > len(self._data):
            _refuse(f"it is cut off: {len(self._data)} of {blocks * BLOCK} bytes")
        self.volume: bytes = volume.rstrip(b"\0")
        self.size: int = blocks * BLOCK
        if self.inode(self.root).kind is not Kind.DIRECTORY:
            _refuse("its root is no directory")

    def close(self) -> None:
        """Let go of the buffer; the image can't be used any more."""
        self._data.release()

    def inode(self, nid: int) -> Inode:
        """Attributes of `nid`; raises CorruptError if there is no inode."""
        offset = nid * _SLOT
        if not erofs.SUPERBLOCK_OFFSET < offset <= self.size - INODE.size:
            _refuse(f"no inode can be at nid {nid}")
        fields = INODE.unpack_from(self._data, offset)
        form, xattrs, mode, _, size, union, _, uid, gid, seconds, nanoseconds, links = fields
        kind = _KINDS.get(mode & _TYPE)
        if kind is None or form & ~0xE != 1:
            _refuse(f"nid {nid} is no inode of ours: format {form}, mode {mode:o}")
        return Inode(
            nid=nid,
            kind=kind,
            mode=mode & 0o7777,
            uid=uid,
            gid=gid,
            size=size,
            mtime_ns=seconds * 1_000_000_000 + nanoseconds,
            links=links,
            device=_decode_device(union) if kind in _DEVICES else (0, 0),
            layout=form >> 1,
            union=union,
            xattr_size=erofs.XATTR_HEADER + (xattrs - 1) * 4 if xattrs else 0,
        )

    def kind(self, nid: int) -> Kind:
        """The type alone."""
        return self.inode(nid).kind

    def extent(self, nid: int) -> tuple[int, int]:
        """Address on the disk, and size in bytes, of a regular file; an empty file has address 0."""
        inode = self.inode(nid)
        if inode.kind is not Kind.REGULAR:
            _refuse(f"nid {nid} is no regular file")
        if not inode.size:
            return 0, 0
        if inode.layout != erofs.CHUNKED:
            _refuse(f"nid {nid} has layout {inode.layout}")
        return self._address(nid, nid * _SLOT + INODE.size + inode.xattr_size), inode.size

    def extents(self) -> Iterator[tuple[int, int, int]]:
        """Address, size and nid of every regular file with content, once, in the order in which their inodes lie.

        Looks at inodes and at no names, which takes a quarter of a walk's time: 0.6 us for each.
        """
        data, last = self._data, self.size - INODE.size
        at, left = erofs.FIRST_INODE, self.inodes
        while left:
            if at > last:
                _refuse(f"it has {left} inodes less than it says")
            form, xattrs, mode, size = _HEAD.unpack_from(data, at)
            if not mode:
                at = (at + BLOCK) & -BLOCK
                continue
            end = at + INODE.size + (erofs.XATTR_HEADER + (xattrs - 1) * 4 if xattrs else 0)
            if mode & _TYPE == _REGULAR and size:
                yield self._address(at // _SLOT, end), size, at // _SLOT
                end = (end + 7 & -8) + CHUNK.size * (1 + (size - 1 >> _CHUNK_SHIFT))
            elif form >> 1 == erofs.INLINE:
                end += size % BLOCK
            at, left = (end + _SLOT - 1) & -_SLOT, left - 1

    def _address(self, nid: int, end: int) -> int:
        """Where a file lies whose inode, with what belongs to it, ends there."""
        at = end + 7 & -8
        if at + CHUNK.size > self.size:
            _refuse(f"nid {nid} is cut off")
        high, device, block = CHUNK.unpack_from(self._data, at)
        if high or device != 1 or block == 0xFFFFFFFF:
            _refuse(f"nid {nid} points at block {block} of device {device}")
        return int(block) * BLOCK

    def readlink(self, nid: int) -> bytes:
        """A symlink's target."""
        inode = self.inode(nid)
        if inode.kind is not Kind.SYMLINK or inode.size >= BLOCK:
            _refuse(f"nid {nid} is no symlink")
        return bytes(self._block(inode, 0))

    def xattrs(self, nid: int) -> list[tuple[bytes, bytes]]:
        """Names and values of all extended attributes, overlay's marks among them, in stored order."""
        inode = self.inode(nid)
        return list(self._xattrs(inode)) if inode.xattr_size else []

    def xattr(self, nid: int, name: bytes) -> bytes | None:
        """One extended attribute's value, None if there is none."""
        inode = self.inode(nid)
        return next((value for key, value in self._xattrs(inode) if key == name), None) if inode.xattr_size else None

    def lookup(self, nid: int, name: bytes) -> int | None:
        """The nid of `name` in directory `nid`, None if it has no such name."""
        found = self.find(nid, name)
        return None if found is None else found.nid

    def find(self, nid: int, name: bytes) -> Dirent | None:
        """The entry of `name` in directory `nid`, None if it has no such name."""
        inode = self._directory(nid)
        number = self._find_block(inode, name)
        block = bytes(self._block(inode, number))
        if name not in block:
            return None  # most lookups of a merged tree miss; this is ten times as quick as bisecting
        names = _Names(block)
        index = names.search(name)
        return names.entry(index, number) if index < names.count and names.name(index) == name else None

    def readdir(self, nid: int, start: int = 0) -> Iterator[Dirent]:
        """The entries of directory `nid` in the order of their names, without `.` and `..`.

        `start` is 0, the `next` of an entry, or a `position`.
        """
        inode = self._directory(nid)
        first, index = divmod(start, _PER_BLOCK)
        for block in range(first, _block_count(inode)):
            names = _Names(self._block(inode, block))
            for number in range(index if block == first else 0, names.count):
                entry = names.entry(number, block)
                if entry.name not in _DOTS:
                    yield entry

    def position(self, nid: int, name: bytes) -> int:
        """Where in directory `nid` the names greater than `name` begin."""
        inode = self._directory(nid)
        number = self._find_block(inode, name)
        names = _Names(self._block(inode, number))
        index = names.search(name)
        past = index < names.count and names.name(index) == name
        return number * _PER_BLOCK + index + past

    def name_before(self, nid: int, position: int) -> bytes:
        """The name whose `next` is `position`."""
        block, index = divmod(position - 1, _PER_BLOCK)
        inode = self._directory(nid)
        if not 0 <= block < _block_count(inode):
            _refuse(f"directory {nid} has no position {position}")
        return _Names(self._block(inode, block)).name(index)

    def _find_block(self, inode: Inode, name: bytes) -> int:
        """The number of the only block of a directory that can have `name`."""
        low, high = 0, _block_count(inode)
        while high - low > 1:
            middle = (low + high) // 2
            if _Names(self._block(inode, middle)).name(0) <= name:
                low = middle
            else:
                high = middle
        return low

    def _directory(self, nid: int) -> Inode:
        inode = self.inode(nid)
        if inode.kind is not Kind.DIRECTORY or not inode.size:
            _refuse(f"nid {nid} is no directory")
        return inode

    def _block(self, inode: Inode, number: int) -> memoryview:
        """Block `number` of a directory's or symlink's data, which may be the partial one behind the inode."""
        length = min(BLOCK, inode.size - number * BLOCK)
        if inode.layout == erofs.INLINE and number == inode.size // BLOCK:
            return self._bytes(inode.nid * _SLOT + INODE.size + inode.xattr_size, length)
        if inode.layout not in (erofs.INLINE, erofs.PLAIN):
            _refuse(f"nid {inode.nid} has layout {inode.layout}")
        return self._bytes((inode.union + number) * BLOCK, length)

    def _bytes(self, offset: int, length: int) -> memoryview:
        if length <= 0 or offset + length > self.size:
            _refuse(f"it has no {length} bytes at {offset}")
        return self._data[offset : offset + length]

    def _xattrs(self, inode: Inode) -> Iterator[tuple[bytes, bytes]]:
        body = bytes(self._bytes(inode.nid * _SLOT + INODE.size, inode.xattr_size))
        at = erofs.XATTR_HEADER + 4 * body[4]
        while at + erofs.XATTR.size <= len(body):
            name_size, prefix, value_size = erofs.XATTR.unpack_from(body, at)
            name = at + erofs.XATTR.size
            value = name + name_size
            if prefix not in erofs.XATTR_PREFIXES or value + value_size > len(body):
                _refuse(f"nid {inode.nid} has broken extended attributes")
            yield erofs.XATTR_PREFIXES[prefix] + body[name:value], body[value : value + value_size]
            at = (value + value_size + 3) & -4


class _Names:
    """The entries of one block of a directory."""

    __slots__ = ("_block", "count")

    def __init__(self, block: bytes | memoryview) -> None:
        self._block = block
        names = _NAME_OFFSET.unpack_from(block)[0] if len(block) > DIRENT.size else 0
        self.count = names // DIRENT.size
        if not self.count or names % DIRENT.size or names >= len(block):
            _refuse(f"a directory's names begin at {names} of {len(block)} bytes")

    def name(self, index: int) -> bytes:
        if index >= self.count:
            _refuse(f"a block of a directory has {self.count} names: {index}")
        start = _NAME_OFFSET.unpack_from(self._block, index * DIRENT.size)[0]
        if index + 1 < self.count:
            end = _NAME_OFFSET.unpack_from(self._block, (index + 1) * DIRENT.size)[0]
            name = bytes(self._block[start:end])
        else:
            name = bytes(self._block[start:]).partition(b"\0")[0]
        if not 0 < len(name) <= 255 or start < self.count * DIRENT.size:
            _refuse(f"a directory has a name of {len(name)} bytes at {start}")
        return name

    def search(self, name: bytes) -> int:
        """The index of the first name not less than `name`."""
        return bisect_left(range(self.count), name, key=self.name)

    def entry(self, index: int, block: int) -> Dirent:
        nid, _, number = DIRENT.unpack_from(self._block, index * DIRENT.size)
        kind = _KIND_BY_NUMBER[number] if number < len(_KIND_BY_NUMBER) else None
        if kind is None:
            _refuse(f"a directory has an entry of type {number}")
        return Dirent(self.name(index), kind, nid, block * _PER_BLOCK + index + 1)


_DOTS: Final = (b".", b"..")
_DEVICES: Final = (Kind.CHARACTER, Kind.BLOCK)


def _block_count(inode: Inode) -> int:
    return (inode.size + BLOCK - 1) // BLOCK


def _decode_device(number: int) -> tuple[int, int]:
    return number >> 8 & 0xFFF, number & 0xFF | number >> 12 & 0xFFF00


def _refuse(reason: str) -> NoReturn:
    raise CorruptError(f"not a valid map: {reason}")
