"""An OCI image layout directory (OCI image specification, image-layout.md) as a source of documents and blobs.

Owns the lookup of tags in index.json and in indexes nested there. Blobs are opened by digest, which is validated
before, so no name from the layout becomes a path. Documents are verified by digest; blob bytes are not. Files are read
in threads. The layout may not change while it is used, and is never written.
"""

from __future__ import annotations

import os
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from nsfs.errors import CorruptError, NotFoundError, UsageError
from nsfs.model.digest import Digest
from nsfs.model.oci import MAX_MANIFEST, OCI_INDEX, Descriptor, Document, ImageIndex, Traffic, parse_document
from nsfs.remote.registry import check_digest

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

REF_NAME = "org.opencontainers.image.ref.name"

_PIECE = 1 << 20
_MAX_DEPTH = 4


class LayoutSource:
    """One layout directory."""

    def __init__(self, directory: str) -> None:
        self.directory = directory

    async def manifest(self, identifier: str) -> Document:
        """The manifest or index of a tag or digest, verified; "" means the only one. Raises NsfsError."""
        return await trio.to_thread.run_sync(self._manifest, identifier)

    def blob(self, descriptor: Descriptor) -> LayoutBlob:
        """The blob that `descriptor` names; nothing is opened before it is read."""
        return LayoutBlob(blob_path(self.directory, descriptor.digest), descriptor.digest, descriptor.size)

    async def read_blob(self, descriptor: Descriptor, limit: int) -> bytes:
        """All of a small blob, verified; raises CorruptError if it is larger than `limit`."""
        if descriptor.size > limit:
            raise CorruptError(f"too large: {descriptor.digest}: {descriptor.size} bytes, at most {limit}")
        data = await self.blob(descriptor).fetch(0, descriptor.size)
        check_digest(data, descriptor.digest)
        return data

    def statistics(self) -> Traffic:
        """Nothing: no network is used."""
        return Traffic()

    def _manifest(self, identifier: str) -> Document:
        if ":" in identifier:
            return self._document(Digest(identifier), "")
        named = self._named(self._index(), 0)
        if not identifier:
            if len(named) != 1:
                raise UsageError(f"the layout has {len(named)} images: {self.directory}", hint=_listing(named))
            chosen = named[0]
        else:
            chosen = _only(named, identifier, self.directory)
        return self._document(chosen.digest, chosen.media_type)

    def _index(self) -> ImageIndex:
        data = _read_file(f"{self.directory}/index.json", MAX_MANIFEST)
        index = parse_document(Document(data, OCI_INDEX, Digest.of(data)))
        assert isinstance(index, ImageIndex)
        return index

    def _named(self, index: ImageIndex, depth: int) -> list[Descriptor]:
        """What the index offers: its manifests, and those with a name in an index that has none itself."""
        found: list[Descriptor] = []
        for descriptor in index.manifests:
            nested = [] if REF_NAME in descriptor.notes else self._nested(descriptor, depth)
            found += nested or [descriptor]
        return found

    def _nested(self, descriptor: Descriptor, depth: int) -> list[Descriptor]:
        if descriptor.media_type != OCI_INDEX or depth >= _MAX_DEPTH:
            return []
        index = parse_document(self._document(descriptor.digest, descriptor.media_type))
        assert isinstance(index, ImageIndex)
        return [child for child in self._named(index, depth + 1) if REF_NAME in child.notes]

    def _document(self, digest: Digest, media_type: str) -> Document:
        data = _read_file(blob_path(self.directory, digest), MAX_MANIFEST)
        check_digest(data, digest)
        return Document(data, media_type, digest)


@dataclass(frozen=True, slots=True)
class LayoutBlob:
    """One blob of a layout; see `core.ports.Blob`. `local_path` can be read directly instead."""

    local_path: str
    digest: Digest
    size: int

    async def fetch(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes at `offset`; unverified."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise CorruptError(f"a range reaches beyond its blob: {offset}+{length} of {self.size}: {self.digest}")
        return await trio.to_thread.run_sync(self._read, offset, length)

    @asynccontextmanager
    async def stream(self, offset: int = 0) -> AsyncIterator[AsyncIterator[bytes]]:
        """The blob's bytes from `offset` to its end, in pieces."""
        async with aclosing(self._pieces(offset)) as pieces:
            yield pieces

    def open_fd(self) -> int:
        """A descriptor to read the blob from, which the caller closes; checks that the file has the right size."""
        try:
            fd = os.open(self.local_path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _unreadable(self.local_path, error) from None
        size = os.fstat(fd).st_size
        if size != self.size:
            os.close(fd)
            raise CorruptError(f"a blob of the layout has {size} bytes, its descriptor says {self.size}: {self.digest}")
        return fd

    async def _pieces(self, offset: int) -> AsyncGenerator[bytes, None]:
        while offset < self.size:
            piece = await self.fetch(offset, min(_PIECE, self.size - offset))
            offset += len(piece)
            yield piece

    def _read(self, offset: int, length: int) -> bytes:
        fd = self.open_fd()
        try:
            data = os.pread(fd, length, offset)
            while len(data) < length and (more := os.pread(fd, length - len(data), offset + len(data))):
                data += more
        except OSError as error:
            raise _unreadable(self.local_path, error) from None
        finally:
            os.close(fd)
        if len(data) != length:
            raise CorruptError(f"a blob of the layout became shorter while it was read: {self.digest}")
        return data


def blob_path(directory: str, digest: Digest) -> str:
    """Where a layout keeps a blob."""
    return f"{directory}/blobs/{digest.algorithm}/{digest.hex}"


def _read_file(path: str, limit: int) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise _unreadable(path, error) from None
    if len(data) > limit:
        raise CorruptError(f"longer than {limit} bytes: {path}")
    return data


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
