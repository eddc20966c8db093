"""Blobs by digest, from whichever repository had them last, with what they cost.

Owns which repository is asked and the count of bytes fetched per blob, which is what a mount's status shows. A source
is opened when a blob's bytes are first wanted, so that nothing that starts needs a network.
"""

from __future__ import annotations

from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol

from nsfs.core.ports import Blob, LocalBlob
from nsfs.errors import NotFoundError
from nsfs.model.oci import Descriptor

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from nsfs.core.images import Sources
    from nsfs.model.digest import Digest

_ANY = "application/octet-stream"


class Origins(Protocol):
    """The domain's memory of who has what."""

    def origins(self, blob: Digest) -> list[str]:
        """Repositories that have a blob, the latest first."""

    def put_origin(self, blob: Digest, repository: str) -> None:
        """Remember one."""


class Blobs:
    """The service."""

    def __init__(self, sources: Sources, origins: Origins) -> None:
        self._sources = sources
        self._origins = origins
        self.fetched: Counter[Digest] = Counter()
        """Bytes that came over the network, by blob."""
        self._found: dict[tuple[Digest, str], Blob] = {}

    def add(self, digest: Digest, repository: str) -> None:
        """Remember that `repository` has the blob."""
        self._origins.put_origin(digest, repository)

    def blob(self, digest: Digest, size: int) -> OriginBlob:
        """The blob; nothing is asked yet."""
        return OriginBlob(self, digest, size)

    def count(self, blob: Blob, size: int) -> None:
        """Add what came over the network; a layout's files did not."""
        if not isinstance(blob, LocalBlob):
            self.fetched[blob.digest] += size

    async def find(self, digest: Digest, size: int) -> Blob:
        """The blob at the repository that had it last; raises NotFoundError if none is known."""
        for repository in self._origins.origins(digest)[:1]:
            if (digest, repository) not in self._found:
                source = await self._sources.open(repository)
                descriptor = Descriptor(media_type=_ANY, digest=digest, size=size)
                self._found[digest, repository] = source.blob(descriptor)
            return self._found[digest, repository]
        raise NotFoundError(f"no repository is known that has blob {digest.hex[:12]}")

    async def is_local(self, digest: Digest, size: int) -> bool:
        """Whether the blob is a file of this machine."""
        return isinstance(await self.find(digest, size), LocalBlob)


class OriginBlob:
    """A blob as `core.ports.Blob`."""

    def __init__(self, blobs: Blobs, digest: Digest, size: int) -> None:
        self._blobs = blobs
        self.digest = digest
        self.size = size

    async def fetch(self, offset: int, length: int) -> bytes:
        """See Blob."""
        blob = await self._blobs.find(self.digest, self.size)
        data = await blob.fetch(offset, length)
        self._blobs.count(blob, len(data))
        return data

    @asynccontextmanager
    async def stream(self, offset: int = 0) -> AsyncIterator[AsyncIterator[bytes]]:
        """See Blob."""
        blob = await self._blobs.find(self.digest, self.size)
        async with blob.stream(offset) as pieces:
            yield self._counted(blob, pieces)

    async def _counted(self, blob: Blob, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for piece in pieces:
            self._blobs.count(blob, len(piece))
            yield piece

    async def open_fd(self) -> int | None:
        """The blob as a local file, positioned anywhere, the caller's to close; None where it is not local."""
        blob = await self._blobs.find(self.digest, self.size)
        return blob.open_fd() if isinstance(blob, LocalBlob) else None
