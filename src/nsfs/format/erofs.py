"""The EROFS metadata image of one layer: what the kernel mounts as a view.

Owns the writer. The image holds metadata only: a regular file is one chunk index that points at its extent on device 1
(the disk); names, attributes, symlinks and extended attributes are inside. The format is the Linux kernel's
(Documentation/filesystems/erofs.rst, fs/erofs/erofs_fs.h) as every kernel since 5.16 reads it: 4 KiB blocks, extended
inodes, no compression.

The output is a function of the arguments, byte for byte. Pure and synchronous: 50,000 files take some tenths of a
second, so call it where nobody waits on the same thread. Refuses, with CorruptError, what the format cannot say.

Layout: superblock, device slot, inodes in the order of a walk (children of a directory lie together), then the blocks
of directories and symlinks that do not fit behind their inode.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Final

from nsfs.errors import CorruptError
from nsfs.model.layer import Kind, Node

BLOCK: Final = 4096
SUPERBLOCK: Final = struct.Struct("<IIIBBHQQIIII16s16sIHHHBBIQ24x")
"""magic, checksum, compat, block bits, extension slots, root nid, inodes, epoch, nsec, blocks, metadata block, xattr
block, uuid, volume name, incompat, algorithms, devices, device slot, directory block bits, xattr prefixes and their
start, packed nid."""
SUPERBLOCK_OFFSET: Final = 1024
MAGIC: Final = 0xE0F5E1E2
COMPAT: Final = 0x1 | 0x2
"""The superblock has a checksum; inodes carry modification times."""
INCOMPAT: Final = 0x4 | 0x8
"""Chunk-based files; a device table."""
DEVICE_SLOT: Final = struct.Struct("<64sII56x")
DEVICE_SLOT_OFFSET: Final = SUPERBLOCK_OFFSET + SUPERBLOCK.size
FIRST_INODE: Final = DEVICE_SLOT_OFFSET + DEVICE_SLOT.size
INODE: Final = struct.Struct("<HHHHQIIIIqII16x")
"""format, xattr count, mode, -, size, union, ino, uid, gid, seconds, nanoseconds, links."""
CHUNK: Final = struct.Struct("<HHI")
"""High half of the block number, device, block number."""
_SIMPLE: Final = struct.Struct(INODE.format + CHUNK.format.removeprefix("<"))
"""A file of one chunk, without extended attributes: nearly all there are, so it is written at once."""
DIRENT: Final = struct.Struct("<QHBx")
"""nid, where the name begins in the block, type."""
XATTR: Final = struct.Struct("<BBH")
"""Length of the name without its prefix, prefix, length of the value."""
XATTR_HEADER: Final = 12
XATTR_PREFIXES: Final = {
    1: b"user.",
    2: b"system.posix_acl_access",
    3: b"system.posix_acl_default",
    4: b"trusted.",
    6: b"security.",
}
PLAIN, INLINE, CHUNKED = 0, 2, 4
"""Layouts: data in blocks; the last partial block behind the inode; an array of chunk indexes behind the inode."""
CHUNK_INDEXES: Final = 0x20
MAX_CHUNK_BITS: Final = 31
FILE_TYPES: Final = (0, 0o100000, 0o040000, 0o020000, 0o060000, 0o010000, 0o140000, 0o120000)
"""File type bits of a mode, by kind."""

_SLOT: Final = 32
_SECOND: Final = 1_000_000_000
_EXTENDED: Final = 1
_MAX_CHUNK: Final = BLOCK << MAX_CHUNK_BITS
_MAX_XATTR_BODY: Final = XATTR_HEADER + 0xFFFE * 4
_REGULAR, _DIRECTORY, _SYMLINK = Kind.REGULAR, Kind.DIRECTORY, Kind.SYMLINK
_REGULAR_TYPE: Final = FILE_TYPES[Kind.REGULAR]


def render_erofs(root: Node, *, disk_blocks: int, uuid: bytes, volume: bytes = b"") -> bytearray:
    """The image of the tree under `root`; its length is a multiple of 4,096.

    `disk_blocks` is the size of device 1 in blocks, below 2^32; `uuid` (16 bytes) and `volume` (at most 16) end up in
    the superblock. Raises CorruptError if a file does not lie on the device or has more extended attributes than fit.
    """
    return _Writer(root, disk_blocks).render(uuid, volume)


def crc32c(data: bytes | bytearray | memoryview) -> int:
    """CRC-32C of `data` with an all-ones seed and without the final inversion, as EROFS superblocks have it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC_TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc


def superblock_checksum(block: bytes | bytearray | memoryview) -> int:
    """What the checksum field of the superblock in the image's first block must be."""
    covered = bytearray(block[SUPERBLOCK_OFFSET:BLOCK])
    covered[4:8] = bytes(4)
    return crc32c(covered)


def _crc_row(value: int) -> int:
    for _ in range(8):
        value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
    return value


_CRC_TABLE: Final = tuple(_crc_row(value) for value in range(256))


class _Directory:
    """One directory's names, sorted as the format wants them, and where each block of them begins."""

    __slots__ = ("cuts", "names", "node", "parent", "size")

    def __init__(self, node: Node, parent: Node) -> None:
        self.node = node
        self.parent = parent
        self.names = sorted([*_children(node), b".", b".."])
        self.cuts = [0]
        self.size = DIRENT.size * len(self.names) + sum(map(len, self.names))
        if self.size > BLOCK:
            self._cut()

    def _cut(self) -> None:
        used = 0
        for index, name in enumerate(self.names):
            length = DIRENT.size + len(name)
            if used + length > BLOCK:
                self.cuts.append(index)
                used = 0
            used += length
        self.size = (len(self.cuts) - 1) * BLOCK + used

    def blocks(self) -> list[list[bytes]]:
        """The names, block by block."""
        ends = [*self.cuts[1:], len(self.names)]
        return [self.names[start:end] for start, end in zip(self.cuts, ends, strict=True)]


class _Writer:
    """One run: `_place_*` give every inode its offset and count blocks, then `_write_*` fill the buffer."""

    def __init__(self, root: Node, disk_blocks: int) -> None:
        self._root = root
        self._disk_blocks = disk_blocks
        self._offsets: dict[Node, int] = {}
        self._directories: dict[Node, _Directory] = {}
        self._data: dict[Node, tuple[int, int]] = {}
        """Of directories and symlinks: their first block behind the inodes, and their length behind the inode."""
        self._bodies: dict[tuple[tuple[bytes, bytes], ...], bytes] = {(): b""}
        self._end = FIRST_INODE
        self._blocks = 0
        self._base = 0
        self._buffer = bytearray()

    def render(self, uuid: bytes, volume: bytes) -> bytearray:
        self._place_tree()
        self._base = -(-self._end // BLOCK)
        self._buffer = bytearray((self._base + self._blocks) * BLOCK)
        for number, (node, offset) in enumerate(self._offsets.items(), 1):
            self._write(node, offset, number)
        self._write_superblock(uuid, volume)
        return self._buffer

    def _place_tree(self) -> None:
        self._place(self._root, self._root)
        pending = [self._root]
        while pending:
            directory = self._directories[pending.pop()]
            children = _children(directory.node)
            for name in directory.names:
                node = children.get(name)
                if node is None or node in self._offsets:
                    continue
                self._place(node, directory.node)
                if node.kind is _DIRECTORY:
                    pending.append(node)

    def _place(self, node: Node, parent: Node) -> None:
        length = _SIMPLE.size if _is_simple(node) else self._length(node, parent)
        start = (self._end + _SLOT - 1) & -_SLOT
        if length > BLOCK - start % BLOCK and length <= BLOCK:
            start = _align(start, BLOCK)
        self._offsets[node] = start
        self._end = start + length

    def _length(self, node: Node, parent: Node) -> int:
        """Of an inode and what lies behind it."""
        length = INODE.size + self._xattr_size(node)
        if node.kind is _REGULAR:
            if node.size:
                length = _align(length, CHUNK.size) + CHUNK.size * _chunks(node.size)
        elif node.kind is _DIRECTORY:
            directory = self._directories[node] = _Directory(node, parent)
            length += self._place_data(node, directory.size, length)
        elif node.kind is _SYMLINK:
            length += self._place_data(node, len(node.link), length)
        return length

    def _place_data(self, node: Node, size: int, head: int) -> int:
        """How many bytes of the data go behind the inode, whose fixed part is `head` bytes; the rest goes to blocks.

        What goes there must not cross a block boundary, so it costs padding. It is worth that if it fits the current
        block, or is short.
        """
        blocks, tail = divmod(size, BLOCK)
        room = BLOCK - _align(self._end, _SLOT) % BLOCK
        if tail and not (head + tail <= room or head + tail <= BLOCK // 2):
            blocks, tail = blocks + 1, 0
        self._data[node] = (self._blocks, tail)
        self._blocks += blocks
        return tail

    def _xattr_size(self, node: Node) -> int:
        body = self._bodies.get(node.xattrs)
        if body is None:
            body = self._bodies[node.xattrs] = _render_xattrs(node.xattrs)
        return len(body)

    def _write(self, node: Node, offset: int, number: int) -> None:
        if _is_simple(node):
            self._write_simple(node, offset, number)
        elif node.kind is _REGULAR and node.size:
            self._write_file(node, offset, number)
        elif node.kind is _DIRECTORY:
            self._write_directory(node, offset, number)
        elif node.kind is _SYMLINK:
            self._write_inode(node, offset, number, len(node.link), self._data_start(node), self._layout(node))
            self._write_data(node, offset, [node.link])
        else:
            self._write_inode(node, offset, number, 0, _encode_device(node.device), PLAIN)

    def _write_inode(self, node: Node, offset: int, number: int, size: int, union: int, layout: int) -> int:
        """Write the fixed part and the extended attributes; answers where they end."""
        body = self._bodies[node.xattrs]
        end = offset + INODE.size
        seconds, nanoseconds = divmod(node.mtime_ns, _SECOND)
        INODE.pack_into(
            self._buffer,
            offset,
            layout << 1 | _EXTENDED,
            (len(body) - XATTR_HEADER) // 4 + 1 if body else 0,
            FILE_TYPES[node.kind] | node.mode,
            0,
            size,
            union,
            number,
            node.uid,
            node.gid,
            seconds,
            nanoseconds,
            node.links if node.children is None else 2 + _subdirectories(node.children),
        )
        if body:
            self._buffer[end : end + len(body)] = body
        return end + len(body)

    def _write_simple(self, node: Node, offset: int, number: int) -> None:
        size, (block, rest) = node.size, divmod(node.address, BLOCK)
        if rest or block <= 0 or block + (size + BLOCK - 1) // BLOCK > self._disk_blocks:
            raise CorruptError(f"a file does not lie on the disk: {size} bytes at address {node.address}")
        seconds, nanoseconds = divmod(node.mtime_ns, _SECOND)
        _SIMPLE.pack_into(
            self._buffer,
            offset,
            CHUNKED << 1 | _EXTENDED,
            0,
            _REGULAR_TYPE | node.mode,
            0,
            size,
            (_chunk_bits(size) if size > BLOCK else 0) | CHUNK_INDEXES,
            number,
            node.uid,
            node.gid,
            seconds,
            nanoseconds,
            node.links,
            0,
            1,
            block,
        )

    def _write_file(self, node: Node, offset: int, number: int) -> None:
        blocks = _blocks(node)
        if node.address % BLOCK or node.address <= 0 or blocks.stop > self._disk_blocks:
            raise CorruptError(f"a file does not lie on the disk: {node.size} bytes at address {node.address}")
        bits = _chunk_bits(node.size)
        end = self._write_inode(node, offset, number, node.size, bits | CHUNK_INDEXES, CHUNKED)
        at = _align(end, CHUNK.size)
        for block in blocks[:: 1 << bits]:
            CHUNK.pack_into(self._buffer, at, 0, 1, block)
            at += CHUNK.size

    def _write_directory(self, node: Node, offset: int, number: int) -> None:
        directory = self._directories[node]
        self._write_inode(node, offset, number, directory.size, self._data_start(node), self._layout(node))
        self._write_data(node, offset, [self._dirents(directory, names) for names in directory.blocks()])

    def _write_data(self, node: Node, offset: int, pieces: list[bytes]) -> None:
        """Write `pieces`, each at most a block long, to the node's blocks; the last may go behind the inode."""
        start, tail = self._data[node]
        at = (self._base + start) * BLOCK
        for piece in pieces[:-1] if tail else pieces:
            self._buffer[at : at + len(piece)] = piece
            at += BLOCK
        if tail:
            at = offset + INODE.size + len(self._bodies[node.xattrs])
            self._buffer[at : at + tail] = pieces[-1]

    def _data_start(self, node: Node) -> int:
        return self._base + self._data[node][0]

    def _layout(self, node: Node) -> int:
        return INLINE if self._data[node][1] else PLAIN

    def _dirents(self, directory: _Directory, names: list[bytes]) -> bytes:
        children, offsets = _children(directory.node), self._offsets
        fields: list[int] = []
        name_offset = DIRENT.size * len(names)
        for name in names:
            node = children.get(name) or (directory.node if name == b"." else directory.parent)
            fields += offsets[node] // _SLOT, name_offset, node.kind
            name_offset += len(name)
        return _dirent_table(len(names)).pack(*fields) + b"".join(names)

    def _write_superblock(self, uuid: bytes, volume: bytes) -> None:
        fields = (
            *(
                MAGIC,
                0,
                COMPAT,
                BLOCK.bit_length() - 1,
                0,
                self._offsets[self._root] // _SLOT,
                len(self._offsets),
                0,
                0,
            ),
            *(len(self._buffer) // BLOCK, 0, 0, uuid, volume, INCOMPAT, 0, 1, DEVICE_SLOT_OFFSET // DEVICE_SLOT.size),
            *(0, 0, 0, 0),
        )
        SUPERBLOCK.pack_into(self._buffer, SUPERBLOCK_OFFSET, *fields)
        DEVICE_SLOT.pack_into(self._buffer, DEVICE_SLOT_OFFSET, b"disk", self._disk_blocks, 0)
        struct.pack_into("<I", self._buffer, SUPERBLOCK_OFFSET + 4, superblock_checksum(self._buffer[:BLOCK]))


def _is_simple(node: Node) -> bool:
    return node.kind is _REGULAR and not node.xattrs and 0 < node.size <= _MAX_CHUNK


def _align(offset: int, unit: int) -> int:
    return (offset + unit - 1) & -unit


def _children(node: Node) -> dict[bytes, Node]:
    assert node.children is not None
    return node.children


def _subdirectories(children: dict[bytes, Node]) -> int:
    return sum([child.children is not None for child in children.values()])


def _chunk_bits(size: int) -> int:
    """Logarithm of a chunk's blocks: the whole file is one chunk, up to 8 TiB."""
    return min(max(0, (size - 1).bit_length() - (BLOCK.bit_length() - 1)), MAX_CHUNK_BITS)


def _chunks(size: int) -> int:
    """How many chunks a file has: one, up to 8 TiB."""
    return -(-size // _MAX_CHUNK)


def _blocks(node: Node) -> range:
    """The blocks of the disk that a regular file lies on."""
    first = node.address // BLOCK
    return range(first, first + (node.size + BLOCK - 1) // BLOCK)


def _encode_device(device: tuple[int, int]) -> int:
    """As the kernel's new_encode_dev (include/linux/kdev_t.h)."""
    major, minor = device
    return minor & 0xFF | major << 8 | (minor & ~0xFF) << 12


@lru_cache(maxsize=512)
def _dirent_table(count: int) -> struct.Struct:
    return struct.Struct("<" + "QHBx" * count)


def _render_xattrs(xattrs: tuple[tuple[bytes, bytes], ...]) -> bytes:
    body = bytes(XATTR_HEADER) + b"".join([_render_xattr(name, value) for name, value in xattrs])
    if len(body) > _MAX_XATTR_BODY:
        raise CorruptError(f"too many extended attributes for one file: {len(body)} bytes")
    return body


def _render_xattr(name: bytes, value: bytes) -> bytes:
    for index, prefix in XATTR_PREFIXES.items():
        if name.startswith(prefix):
            entry = XATTR.pack(len(name) - len(prefix), index, len(value)) + name[len(prefix) :] + value
            return entry + bytes(-len(entry) % 4)
    raise CorruptError(f"no such kind of extended attribute: {name[:64]!r}")
