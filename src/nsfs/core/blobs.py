"""Blobs by digest, from whichever repository gives them, with what they cost.

Owns which repository is asked and the count of bytes fetched per blob, which is what a mount's status shows. The
repository that named a blob last is asked first; where that one fails, the others that ever named it: a manifest may
claim a layer that its repository does not have, and a registry may be down while another is not. A source is opened
when a blob's bytes are first wanted, so that nothing that starts needs a network.
"""

from __future__ import annotations

from collections import Counter
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Protocol

import trio

from nsfs.core.ports import Blob, LocalBlob
from nsfs.errors import NotFoundError, NsfsError
from nsfs.model.oci import Descriptor

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence

    from nsfs.core.images import Sources
    from nsfs.core.ports import Source
    from nsfs.model.digest import Digest

_ANY = "application/octet-stream"
_KEPT = 1024
"""Blobs that stay open; another one costs an object, no request."""


class Origins(Protocol):
    """The domain's memory of who has what. Writing may block."""

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
        self._working: dict[Digest, str] = {}
        """Of blobs whose latest repository failed, the one that did not."""

    async def add(self, digest: Digest, repository: str) -> None:
        """Remember that `repository` has the blob."""
        self._working.pop(digest, None)
        await trio.to_thread.run_sync(self._origins.put_origin, digest, repository)

    def blob(self, digest: Digest, size: int) -> OriginBlob:
        """The blob; nothing is asked yet."""
        return OriginBlob(self, digest, size)

    def count(self, blob: Blob, size: int) -> None:
        """Add what came over the network; a layout's files did not."""
        if not isinstance(blob, LocalBlob):
            self.fetched[blob.digest] += size

    async def source(self, repository: str) -> Source:
        """The repository itself."""
        return await self._sources.open(repository)

    async def is_local(self, digest: Digest, size: int) -> bool:
        """Whether the blob is a file of this machine."""
        first = self.repositories(digest)[:1]
        return bool(first) and isinstance(await self.open(digest, size, first[0]), LocalBlob)

    def repositories(self, digest: Digest) -> list[str]:
        """Who may have the blob, in the order in which they are asked."""
        known = self._origins.origins(digest)
        working = self._working.get(digest)
        return known if working is None else sorted(known, key=lambda repository: repository != working)

    def prefer(self, digest: Digest, repository: str) -> None:
        """Ask `repository` first from now on: it has given the blob, and others have not."""
        self._working[digest] = repository

    async def open(self, digest: Digest, size: int, repository: str) -> Blob:
        """The blob as `repository` has it; raises NsfsError."""
        found = self._found.pop((digest, repository), None)
        if found is None:
            source = await self.source(repository)
            found = source.blob(Descriptor(media_type=_ANY, digest=digest, size=size))
        while len(self._found) >= _KEPT:
            del self._found[next(iter(self._found))]
        self._found[digest, repository] = found
        return found


class OriginBlob:
    """A blob as `core.ports.Blob`. What it raises is what its first repository raised, or the first transient error."""

    def __init__(self, blobs: Blobs, digest: Digest, size: int) -> None:
        self._blobs = blobs
        self.digest = digest
        self.size = size

    async def fetch(self, offset: int, length: int) -> bytes:
        """See Blob."""
        failures: list[NsfsError] = []
        for repository in self._blobs.repositories(self.digest):
            try:
                blob = await self._open(repository)
                data = await blob.fetch(offset, length)
            except NsfsError as error:
                failures.append(error)
                continue
            self._note(blob, repository, len(data), failures)
            return data
        raise self._summary(failures)

    @asynccontextmanager
    async def stream(self, offset: int = 0) -> AsyncIterator[AsyncIterator[bytes]]:
        """See Blob. What one repository does not give to the end, the next one goes on with."""
        async with aclosing(self._pieces(offset)) as pieces:
            yield pieces

    async def _pieces(self, offset: int) -> AsyncGenerator[bytes, None]:
        failures: list[NsfsError] = []
        for repository in self._blobs.repositories(self.digest):
            try:
                blob = await self._open(repository)
                async with blob.stream(offset) as pieces:
                    async for piece in pieces:
                        self._note(blob, repository, len(piece), failures)
                        offset += len(piece)
                        yield piece
            except NsfsError as error:
                failures.append(error)
            else:
                return
        raise self._summary(failures)

    async def _open(self, repository: str) -> Blob:
        return await self._blobs.open(self.digest, self.size, repository)

    def _note(self, blob: Blob, repository: str, size: int, failures: Sequence[NsfsError]) -> None:
        self._blobs.count(blob, size)
        if failures:
            self._blobs.prefer(self.digest, repository)

    def _summary(self, failures: Sequence[NsfsError]) -> NsfsError:
        """What to tell: the first error that another attempt may mend, or else the first."""
        unknown = NotFoundError(f"no repository is known that has blob {self.digest.hex[:12]}")
        return next((error for error in failures if error.transient), failures[0] if failures else unknown)
