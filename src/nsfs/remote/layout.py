"""An OCI image layout directory (OCI image specification, image-layout.md) as a source of documents and blobs.

Owns the lookup of tags in index.json and in indexes nested there. Blobs are opened by digest, which is validated
before, so no name from the layout becomes a path; and no symlink in it leads out of it (openat2(2), Linux 5.6).
Documents are verified by digest; blob bytes are not. Files are read in threads, or by another process that may. The
layout may not change while it is used, and is never written.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import trio

from nsfs.errors import CorruptError, NotFoundError, UsageError
from nsfs.model.digest import Digest
from nsfs.model.oci import MAX_MANIFEST, OCI_INDEX, Descriptor, Document, ImageIndex, Traffic, parse_document
from nsfs.remote.documents import check_digest

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from nsfs.model.referrers import Referrer

REF_NAME = "org.opencontainers.image.ref.name"

_PIECE = 1 << 20
_MAX_DEPTH = 4


class FilePiece(NamedTuple):
    """A piece of a file."""

    data: bytes
    """Shorter than asked for only at the file's end."""
    file_size: int


class LayoutFiles(Protocol):
    """Reads the files of one layout."""

    async def read(self, name: str, offset: int, size: int) -> FilePiece:
        """At most `size` bytes of a blob, by its digest, or of index.json ("") from `offset` on.

        Raises NotFoundError for what cannot be read.
        """


@dataclass(frozen=True, slots=True)
class LayoutDirectory:
    """A layout that this process may read."""

    path: str

    async def read(self, name: str, offset: int, size: int) -> FilePiece:
        """See LayoutFiles."""
        return await trio.to_thread.run_sync(read_piece, self.path, name, offset, size)


def read_piece(directory: str, name: str, offset: int, size: int) -> FilePiece:
    """What `LayoutFiles.read` gives; raises UsageError for a `name` that is no digest. Blocks."""
    path = blob_path(Digest(name)) if name else "index.json"
    try:
        fd = _open_beneath(directory, path)
    except OSError as error:
        raise _unreadable(f"{directory}/{path}", error) from None
    try:
        return FilePiece(_read(fd, offset, size), os.fstat(fd).st_size)
    except OSError as error:
        raise _unreadable(f"{directory}/{path}", error) from None
    finally:
        os.close(fd)


# openat2(2) has no wrapper in the C libraries of 2022; its number is the same on all architectures.
_OPENAT2 = 437
_NO_MAGIC_LINKS, _BENEATH = 2, 8
_libc = ctypes.CDLL(None, use_errno=True)


def _open_beneath(directory: str, path: str) -> int:
    """A descriptor of a regular file to which no symlink leads from outside of `directory`."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    how = struct.pack("=QQQ", flags, 0, _NO_MAGIC_LINKS | _BENEATH)
    root = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fd: int = _libc.syscall(ctypes.c_long(_OPENAT2), root, os.fsencode(path), how, ctypes.c_size_t(len(how)))
    finally:
        os.close(root)
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(0, "not a regular file")
    return fd


def _read(fd: int, offset: int, size: int) -> bytes:
    data = os.pread(fd, size, offset)
    while len(data) < size and (more := os.pread(fd, size - len(data), offset + len(data))):
        data += more
    return data


class LayoutSource:
    """One layout."""

    def __init__(self, directory: str, files: LayoutFiles) -> None:
        self.directory = directory
        self._files = files

    async def manifest(self, identifier: str) -> Document:
        """The manifest or index of a tag or digest, verified; "" means the only one. Raises NsfsError."""
        if ":" in identifier:
            return await self._document(Digest(identifier), "")
        named = await self._named(await self._index(), 0)
        if not identifier:
            if len(named) != 1:
                raise UsageError(f"the layout has {len(named)} images: {self.directory}", hint=_listing(named))
            chosen = named[0]
        else:
            chosen = _only(named, identifier, self.directory)
        return await self._document(chosen.digest, chosen.media_type)

    def blob(self, descriptor: Descriptor) -> LayoutBlob:
        """The blob that `descriptor` names; nothing is opened before it is read."""
        return LayoutBlob(self.directory, descriptor.digest, descriptor.size, self._files)

    async def read_blob(self, descriptor: Descriptor, limit: int) -> bytes:
        """All of a small blob, verified; raises CorruptError if it is larger than `limit`."""
        if descriptor.size > limit:
            raise CorruptError(f"too large: {descriptor.digest}: {descriptor.size} bytes, at most {limit}")
        data = await self.blob(descriptor).fetch(0, descriptor.size)
        check_digest(data, descriptor.digest)
        return data

    async def referrers(self, subject: Digest, artifact_type: str) -> list[Referrer]:
        """Nothing: what a layout has beside its images is not looked for."""
        del subject, artifact_type
        return []

    def statistics(self) -> Traffic:
        """Nothing: no network is used."""
        return Traffic()

    async def _index(self) -> ImageIndex:
        data = await self._whole("")
        index = parse_document(Document(data, OCI_INDEX, Digest.of(data)))
        assert isinstance(index, ImageIndex)
        return index

    async def _named(self, index: ImageIndex, depth: int) -> list[Descriptor]:
        """What the index offers: its manifests, and those with a name in an index that has none itself."""
        found: list[Descriptor] = []
        for descriptor in index.manifests:
            nested = [] if REF_NAME in descriptor.notes else await self._nested(descriptor, depth)
            found += nested or [descriptor]
        return found

    async def _nested(self, descriptor: Descriptor, depth: int) -> list[Descriptor]:
        if descriptor.media_type != OCI_INDEX or depth >= _MAX_DEPTH:
            return []
        index = parse_document(await self._document(descriptor.digest, descriptor.media_type))
        assert isinstance(index, ImageIndex)
        return [child for child in await self._named(index, depth + 1) if REF_NAME in child.notes]

    async def _document(self, digest: Digest, media_type: str) -> Document:
        data = await self._whole(str(digest))
        check_digest(data, digest)
        return Document(data, media_type, digest)

    async def _whole(self, name: str) -> bytes:
        """A document's file."""
        piece = await self._files.read(name, 0, MAX_MANIFEST)
        if piece.file_size > MAX_MANIFEST:
            raise CorruptError(f"longer than {MAX_MANIFEST} bytes: {self.directory}: {name or 'index.json'}")
        return piece.data


@dataclass(frozen=True, slots=True)
class LayoutBlob:
    """One blob of a layout; see `core.ports.LocalBlob`."""

    directory: str
    digest: Digest
    size: int
    files: LayoutFiles = field(repr=False)

    async def fetch(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes at `offset`; unverified."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise CorruptError(f"a range reaches beyond its blob: {offset}+{length} of {self.size}: {self.digest}")
        data = b""
        while len(data) < length:
            data += await self._piece(offset + len(data), min(_PIECE, length - len(data)))
        return data

    @asynccontextmanager
    async def stream(self, offset: int = 0) -> AsyncIterator[AsyncIterator[bytes]]:
        """The blob's bytes from `offset` to its end, in pieces."""
        async with aclosing(self._pieces(offset)) as pieces:
            yield pieces

    async def _pieces(self, offset: int) -> AsyncGenerator[bytes, None]:
        while offset < self.size:
            piece = await self._piece(offset, min(_PIECE, self.size - offset))
            offset += len(piece)
            yield piece

    async def _piece(self, offset: int, size: int) -> bytes:
        data, file_size = await self.files.read(str(self.digest), offset, size)
        if file_size != self.size:
            raise CorruptError(
                f"a blob of the layout has {file_size} bytes, its descriptor says {self.size}: {self.digest}"
            )
        if len(data) != size:
            raise CorruptError(f"a blob of the layout became shorter while it was read: {self.digest}")
        return data


def blob_path(digest: Digest) -> str:
    """Where a layout keeps a blob."""
    return f"blobs/{digest.algorithm}/{digest.hex}"


def _unreadable(path: str, error: OSError) -> NotFoundError:
    return NotFoundError(f"the layout's file cannot be read: {path}: {error.strerror}")


def _only(named: list[Descriptor], tag: str, directory: str) -> Descriptor:
    matching = [descriptor for descriptor in named if descriptor.notes.get(REF_NAME) == tag]
    if not matching:
        raise NotFoundError(f"the layout has no such tag: {directory}: {tag}", hint=_listing(named))
    return matching[0]


def _listing(named: list[Descriptor]) -> str:
    tags = [descriptor.notes[REF_NAME] for descriptor in named if REF_NAME in descriptor.notes]
    printable = ["".join(character if character.isprintable() else "?" for character in tag[:80]) for tag in tags[:20]]
    return f"tags: {', '.join(printable)}" if printable else "it names no tags"
