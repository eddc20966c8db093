"""What a layer contains and where its bytes are: the one model behind every layer format.

A *blob* is what the registry stores. Its *stream* is the layer's decompressed address space: the tar for plain layers,
the concatenated chunk payloads for formats with a table of contents. Entries say which pieces of the stream make up a
file (`Segment`); spans say how a piece of the stream is had from the blob (`Span`).

Entries and spans are many, so they are msgspec structs that the collector does not track; they are values all the same.
All sizes and offsets are bytes.
"""

from __future__ import annotations

import enum

from msgspec import Struct


class Kind(enum.IntEnum):
    """An entry's type. 1 to 7 are the numbers that EROFS directory entries use."""

    REGULAR = 1
    DIRECTORY = 2
    CHARACTER = 3
    BLOCK = 4
    FIFO = 5
    SOCKET = 6
    SYMLINK = 7
    HARDLINK = 8


class Segment(Struct, frozen=True, gc=False, array_like=True):
    """`length` bytes of a file at `file_offset` are the stream's bytes at `stream_offset`.

    What no segment of a file covers is zeros (sparse members).
    """

    file_offset: int
    stream_offset: int
    length: int


class Entry(Struct, frozen=True, gc=False, array_like=True):
    """One entry of a layer, as its format states it, in the order of the layer.

    Invariants that every parser establishes: `path` is relative to the root, without leading or trailing slash, without
    empty, `.` or `..` components (the root itself is b""), each component at most 255 bytes; `mode` has permission
    bits only (07777); `uid` and `gid` fit 32 bits; whiteouts keep their `.wh.` names.
    """

    path: bytes
    kind: Kind
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int = 0
    """Of a regular file; else 0."""
    link: bytes = b""
    """A symlink's target as it stands; a hard link's target, cleaned like `path`."""
    device: tuple[int, int] = (0, 0)
    """Major and minor of a device node."""
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    segments: tuple[Segment, ...] = ()
    digest: bytes = b""
    """BLAKE3 of a regular file's content as we saw it, 32 bytes; b"" if unknown, as where a TOC says what it has."""


class Codec(enum.IntEnum):
    """How a span's compressed bytes become stream bytes."""

    NONE = 0
    GZIP_MEMBER = 1
    """The compressed range starts at a gzip member header."""
    DEFLATE = 2
    """The compressed range starts inside raw deflate data, `bits` before its second byte, with a window."""
    ZSTD = 3
    """The compressed range starts at a zstd frame."""


class Covers(enum.IntEnum):
    """What a span's digest is the digest of."""

    COMPRESSED = 0
    STREAM = 1


class Span(Struct, frozen=True, gc=False, array_like=True):
    """The unit that is fetched, decompressed and verified."""

    offset: int
    """Where its compressed bytes begin in the blob."""
    length: int
    """How many they are. Neighbours may share bytes."""
    start: int
    """Where its bytes begin in the stream."""
    size: int
    """How many stream bytes it gives."""
    skip: int
    """Decompressed bytes before the first that counts. Spans with one `offset` are one decompression."""
    digest: bytes
    """Raw sha256 of what `Spans.covers` says."""
    bits: int = 0
    """Codec.DEFLATE: how many high bits of the first compressed byte belong to the span (0: all)."""
    window: bytes = b""
    """Codec.DEFLATE: up to 32 KiB of stream before `start`, compressed by zlib."""


class Spans(Struct, frozen=True):
    """All spans of a layer, by rising `start`, without overlap in the stream."""

    codec: Codec
    covers: Covers
    spans: list[Span]


class LayerIndex(Struct, frozen=True):
    """A layer's entries, in its own order, and the size of its stream."""

    entries: list[Entry]
    stream_size: int
    prefetch_size: int = 0
    """Blob bytes that the image's builder wants fetched first (eStargz landmark); 0 if it says nothing."""


class Node:
    """One inode of a layer as overlay wants to see it: whiteouts are character devices 0/0, opaque marks xattrs.

    Hard links are one Node under several names. Mutable while `model.tree` builds a tree; read-only after.
    """

    __slots__ = (
        "address",
        "children",
        "device",
        "gid",
        "kind",
        "link",
        "links",
        "mode",
        "mtime_ns",
        "size",
        "uid",
        "xattrs",
    )

    def __init__(self, kind: Kind, mode: int, uid: int = 0, gid: int = 0, mtime_ns: int = 0) -> None:
        self.kind = kind
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self.mtime_ns = mtime_ns
        self.size = 0
        self.link = b""
        self.device: tuple[int, int] = (0, 0)
        self.xattrs: tuple[tuple[bytes, bytes], ...] = ()
        self.address = 0
        """A regular file's first byte on the disk, a multiple of 4,096; meaningless if `size` is 0."""
        self.links = 1
        """Names of a non-directory in this layer."""
        self.children: dict[bytes, Node] | None = {} if kind is Kind.DIRECTORY else None
