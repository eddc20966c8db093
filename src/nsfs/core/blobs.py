"""Blobs by digest, from whichever repository gives them, with what they cost.

A blob is asked for as somebody (`model.pool.Access`): only repositories that this owner named are asked, only those of
one registry, and with this owner's credentials. A domain that is one owner's leaves that open.

Owns which repository is asked and the count of bytes fetched per blob, which is what a mount's status shows. The
repository that named a blob last is asked first; where that one fails, the others that ever named it: a manifest may
claim a layer that its repository does not have, and a registry may be down while another is not. A source is opened
when a blob's bytes are first wanted, so that nothing that starts needs a network.
"""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple, Protocol

import trio

from nsfs.core.ports import Blob, LocalBlob, MeasuredBlob
from nsfs.errors import NotFoundError, NsfsError
from nsfs.model.oci import Descriptor
from nsfs.model.pool import Access
from nsfs.model.route import Route

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence

    from nsfs.core.images import Sources
    from nsfs.core.ports import Source
    from nsfs.model.digest import Digest

log = logging.getLogger(__name__)

NOBODY = Access()
"""Of a domain that is one owner's: whoever it is, of whichever registry."""
_ANY = "application/octet-stream"
_LAYOUT = "oci:"
_KEPT = 1024
"""Blobs that stay open; another one costs an object, no request."""


class Holder(NamedTuple):
    """Who may have a blob: a repository, and as whom to ask it."""

    owner: str
    repository: str


class Origins(Protocol):
    """The domain's memory of who has what. Writing may block."""

    def origins(self, blob: Digest, access: Access) -> list[tuple[str, str]]:
        """Repositories that have a blob, the latest first; behind the owner who knows that."""

    def put_origin(self, blobs: Collection[Digest], repository: str, access: Access) -> None:
        """Remember one, of several blobs."""


class Blobs:
    """The service."""

    def __init__(self, sources: Sources, origins: Origins) -> None:
        self._sources = sources
        self._origins = origins
        self.fetched: Counter[Digest] = Counter()
        """Bytes that came over the network, by blob."""
        self._found: dict[tuple[Digest, Holder], Blob] = {}
        self._working: dict[tuple[Digest, Access], Holder] = {}
        """Of blobs whose latest repository failed, the one that did not."""
        self._unwritten: dict[tuple[Digest, Access], Holder] = {}
        """What could not be remembered for longer than we live."""
        self._latest: dict[tuple[Digest, Access], str] = {}
        """Of some blobs, the repository that was remembered last: it need not be written, nor looked for, again."""

    async def add(self, digests: Collection[Digest], repository: str, access: Access = NOBODY) -> None:
        """Remember that `repository` has the blobs."""
        for digest in digests:
            self._working.pop((digest, access), None)
        place = access if access.origin else NOBODY
        fresh = [digest for digest in digests if self._latest.get((digest, place)) != repository]
        if not fresh:
            return
        try:
            await trio.to_thread.run_sync(self._origins.put_origin, fresh, repository, access)
        except NsfsError as error:
            log.warning("it is not written down that %s has these blobs: %s", repository, error)
            self._unwritten.update({(digest, access): Holder(access.owner, repository) for digest in fresh})
        else:
            self._note_latest(fresh, repository, place)

    def _note_latest(self, digests: Collection[Digest], repository: str, place: Access) -> None:
        if len(self._latest) + len(digests) > _KEPT:
            self._latest.clear()
        self._latest.update({(digest, place): repository for digest in digests})

    def blob(self, digest: Digest, size: int, access: Access = NOBODY) -> OriginBlob:
        """The blob; nothing is asked yet."""
        return OriginBlob(self, digest, size, access)

    def count(self, blob: Blob, size: int) -> None:
        """Add what came over the network; a layout's files did not."""
        if not isinstance(blob, LocalBlob):
            self.fetched[blob.digest] += size

    async def source(self, repository: str, owner: str = "") -> Source:
        """The repository itself, as `owner` sees it."""
        return await self._sources.open(repository, owner)

    async def is_local(self, digest: Digest, size: int, access: Access = NOBODY) -> bool:
        """Whether the blob is a file of this machine."""
        first = self.holders(digest, access)[:1]
        return bool(first) and isinstance(await self.open(digest, size, first[0]), LocalBlob)

    def holders(self, digest: Digest, access: Access) -> list[Holder]:
        """Who may have the blob, in the order in which they are asked."""
        known = [Holder(*each) for each in self._origins.origins(digest, access)]
        unwritten = self._unwritten.get((digest, access))
        if unwritten is not None:
            known = [unwritten, *(holder for holder in known if holder != unwritten)]
        working = self._working.get((digest, access))
        return known if working is None else sorted(known, key=lambda holder: holder != working)

    def prefer(self, digest: Digest, access: Access, holder: Holder) -> None:
        """Ask `holder` first from now on: it has given the blob, and others have not."""
        self._working[digest, access] = holder

    def measured(self, digest: Digest, holder: Holder, name: str) -> Route:
        """What is known of the way to a blob of `holder`, as the route called `name`."""
        found = self._found.get((digest, holder))
        route = found.route() if isinstance(found, MeasuredBlob) else Route()
        return Route(name, route.round_trip, route.rate)

    async def open(self, digest: Digest, size: int, holder: Holder) -> Blob:
        """The blob as `holder` has it; raises NsfsError."""
        found = self._found.pop((digest, holder), None)
        if found is None or found.size != size:
            source = await self.source(holder.repository, holder.owner)
            found = source.blob(Descriptor(media_type=_ANY, digest=digest, size=size))
        while len(self._found) >= _KEPT:
            del self._found[next(iter(self._found))]
        self._found[digest, holder] = found
        return found


class OriginBlob:
    """A blob as `core.ports.Blob`. What it raises is what its first repository raised, or the first transient error."""

    def __init__(self, blobs: Blobs, digest: Digest, size: int, access: Access) -> None:
        self._blobs = blobs
        self._access = access
        self.digest = digest
        self.size = size

    def route(self) -> Route:
        """What is known of the way to the registry that is asked first; whoever asks on somebody's behalf has his own.

        What is called a registry here is what its name says, whichever server it is that answers.
        """
        holder = next(iter(self._holders()), None)
        if holder is None or holder.repository.startswith(_LAYOUT):
            return Route()
        name = " ".join(filter(None, (holder.repository.partition("/")[0], holder.owner)))
        return self._blobs.measured(self.digest, holder, name)

    def _holders(self) -> list[Holder]:
        return self._blobs.holders(self.digest, self._access)

    async def fetch(self, offset: int, length: int) -> bytes:
        """See Blob."""
        failures: list[NsfsError] = []
        for holder in self._holders():
            try:
                blob = await self._open(holder)
                data = await blob.fetch(offset, length)
            except NsfsError as error:
                failures.append(error)
                continue
            self._note(blob, holder, len(data), failures)
            return data
        raise self._summary(failures)

    @asynccontextmanager
    async def stream(self, offset: int = 0) -> AsyncIterator[AsyncIterator[bytes]]:
        """See Blob. What one repository does not give to the end, the next one goes on with."""
        async with aclosing(self._pieces(offset)) as pieces:
            yield pieces

    async def _pieces(self, offset: int) -> AsyncGenerator[bytes, None]:
        failures: list[NsfsError] = []
        for holder in self._holders():
            try:
                blob = await self._open(holder)
                async with blob.stream(offset) as pieces:
                    async for piece in pieces:
                        self._note(blob, holder, len(piece), failures)
                        offset += len(piece)
                        yield piece
            except NsfsError as error:
                failures.append(error)
            else:
                return
        raise self._summary(failures)

    async def _open(self, holder: Holder) -> Blob:
        return await self._blobs.open(self.digest, self.size, holder)

    def _note(self, blob: Blob, holder: Holder, size: int, failures: Sequence[NsfsError]) -> None:
        self._blobs.count(blob, size)
        if failures:
            self._blobs.prefer(self.digest, self._access, holder)

    def _summary(self, failures: Sequence[NsfsError]) -> NsfsError:
        """What to tell: the first error that another attempt may mend, or else the first."""
        unknown = NotFoundError(f"no repository is known that has blob {self.digest.hex[:12]}")
        return next((error for error in failures if error.transient), failures[0] if failures else unknown)
