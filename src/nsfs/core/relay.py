"""Repositories as another worker sees them: what a domain of several owners gets its bytes from.

Owns both ends of a relay: `RelaySource`, which asks over a line, and `serve_relay`, which answers with what this
worker's own credentials and network reach. What comes over a line is believed by nobody: documents and small blobs are
checked by digest here, lengths against what was asked for, and content where all content is.

Concurrency: any number of calls on one line. A call that is cancelled cancels the request at the other end. A line that
breaks is made anew once per call, and a stream goes on from where it was.
"""

from __future__ import annotations

import hashlib
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

import trio
from msgspec import Struct

from nsfs.core.blobs import Holder
from nsfs.core.ports import MeasuredBlob
from nsfs.core.tasks import open_tasks
from nsfs.errors import CorruptError, NsfsError, UnreachableError, UsageError
from nsfs.model.digest import Digest
from nsfs.model.oci import Descriptor, Document, Traffic
from nsfs.model.referrers import parse_referrers, render_referrers
from nsfs.model.report import Data
from nsfs.model.route import Route

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

    from nsfs.core.blobs import Blobs
    from nsfs.core.ports import Blob
    from nsfs.model.referrers import Referrer

    Report = Callable[[Struct], Awaitable[None]]

T = TypeVar("T")

_PIECE: Final = 1 << 20
_ANY: Final = "application/octet-stream"


class ManifestName(Struct, kw_only=True):
    """Ask for a document. Answered by Manifest."""

    repository: str
    identifier: str


class ReferrersOf(Struct, kw_only=True):
    """Ask what of a type is attached to a manifest. Answered by Attached."""

    repository: str
    subject: str
    artifact_type: str


class Attached(Struct, kw_only=True):
    """Referrers, as a registry lists them: JSON, parsed by who asked."""

    listed: bytes


class Manifest(Struct, kw_only=True):
    """A Document."""

    data: bytes
    media_type: str
    digest: str


class Range(Struct, kw_only=True):
    """Ask for bytes of a blob: for Fetch, `length` at `offset`; for Stream, all from `offset` on. Answered by Data."""

    repository: str
    digest: str
    size: int
    offset: int
    length: int = 0


class Sent(Struct, kw_only=True):
    """Everything was, by this route."""

    route: Route = Route()


class Line(Protocol):
    """A way to another worker, as `serve.wire.Peer`."""

    @property
    def is_closed(self) -> bool:
        """The other side is gone."""

    async def call(
        self,
        method: str,
        params: Struct,
        result_type: type[T],
        on_progress: Callable[[Any], Awaitable[None]] | None = None,
        progress_type: Any = Any,  # noqa: ANN401
    ) -> T:
        """Ask, and wait for the answer."""


class RelaySource:
    """A repository, by way of the worker that `connect` leads to; see `core.ports.Source`."""

    def __init__(self, connect: Callable[[], Awaitable[Line]], repository: str) -> None:
        self._connect = connect
        self._repository = repository

    async def manifest(self, identifier: str) -> Document:
        """See Source."""
        name = ManifestName(repository=self._repository, identifier=str(identifier))
        answer = await self.ask("Manifest", name, Manifest)
        return check_document(answer, identifier)

    def blob(self, descriptor: Descriptor) -> RelayBlob:
        """See Source."""
        return RelayBlob(self, self._repository, descriptor)

    async def read_blob(self, descriptor: Descriptor, limit: int) -> bytes:
        """See Source."""
        if descriptor.size > limit:
            raise CorruptError(f"too large: {descriptor.digest}: {descriptor.size} bytes, at most {limit}")
        data = await self.blob(descriptor).fetch(0, descriptor.size)
        _check_digest(data, descriptor.digest)
        return data

    async def referrers(self, subject: Digest, artifact_type: str) -> list[Referrer]:
        """See Source."""
        asked = ReferrersOf(repository=self._repository, subject=str(subject), artifact_type=artifact_type)
        return parse_referrers((await self.ask("Referrers", asked, Attached)).listed)

    def statistics(self) -> Traffic:
        """Nothing: what it costs is counted where the registry is asked."""
        return Traffic()

    async def ask(
        self, method: str, params: Struct, result: type[T], take: Callable[[Data], Awaitable[None]] | None = None
    ) -> T:
        """Call over the line; once more over another where it breaks before anything was taken."""
        line = await self._connect()
        try:
            return await line.call(method, params, result, take, Data)
        except UnreachableError:
            if not line.is_closed or take is not None:
                raise
        return await (await self._connect()).call(method, params, result)


class RelayBlob:
    """A blob of such a repository; see `core.ports.Blob`."""

    def __init__(self, source: RelaySource, repository: str, descriptor: Descriptor) -> None:
        self._source = source
        self._repository = repository
        self._descriptor = descriptor
        self._route = Route()

    @property
    def digest(self) -> Digest:
        """See Blob."""
        return self._descriptor.digest

    @property
    def size(self) -> int:
        """See Blob."""
        return self._descriptor.size

    def route(self) -> Route:
        """What the other worker knew of its way when it last gave something."""
        return self._route

    async def fetch(self, offset: int, length: int) -> bytes:
        """See Blob."""
        pieces: list[bytes] = []

        async def keep(piece: bytes) -> None:
            pieces.append(piece)

        await self._receive("Fetch", offset, length, keep)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    @asynccontextmanager
    async def stream(self, offset: int = 0) -> AsyncIterator[AsyncIterator[bytes]]:
        """See Blob."""
        send, receive = trio.open_memory_channel[bytes](0)
        failures: list[NsfsError] = []

        async def pump() -> None:
            async with send:
                try:
                    await self._receive("Stream", offset, self.size - offset, send.send)
                except NsfsError as error:
                    failures.append(error)

        async def pieces() -> AsyncGenerator[bytes, None]:
            async for piece in receive:
                yield piece
            if failures:
                raise failures[0]

        async with open_tasks() as tasks, aclosing(pieces()) as given:
            tasks.start_soon(pump)
            yield given

    async def _receive(self, method: str, offset: int, length: int, give: Callable[[bytes], Awaitable[None]]) -> None:
        """Give exactly these bytes; a relay that broke is made anew, and goes on, unless nothing came of the last."""
        left = length

        async def take(data: Data) -> None:
            nonlocal left
            left -= len(data.data)
            _check_excess(left, self.digest)
            await give(data.data)

        while left:
            before = left
            try:
                sent = await self._source.ask(method, self._range(offset + length - left, left), Sent, take)
            except UnreachableError:
                if left == before:
                    raise
            else:
                self._route = sent.route
                if left:
                    raise UnreachableError(f"a relay gave {length - left} bytes instead of {length}: {self.digest}")

    def _range(self, offset: int, length: int) -> Range:
        digest = str(self.digest)
        return Range(repository=self._repository, digest=digest, size=self.size, offset=offset, length=length)


def relay_methods(blobs: Blobs) -> dict[str, tuple[type[Struct], Callable[[Any, Report], Awaitable[Struct | None]]]]:
    """What a domain of several owners may ask of this owner's own worker, by name."""

    async def manifest(asked: ManifestName, _report: Report) -> Manifest:
        source = await blobs.source(asked.repository)
        found = await source.manifest(asked.identifier)
        return Manifest(data=found.data, media_type=found.media_type, digest=str(found.digest))

    async def referrers(asked: ReferrersOf, _report: Report) -> Attached:
        source = await blobs.source(asked.repository)
        return Attached(listed=render_referrers(await source.referrers(Digest(asked.subject), asked.artifact_type)))

    async def fetch(asked: Range, report: Report) -> Sent:
        blob = await blobs.open(Digest(asked.digest), asked.size, Holder("", asked.repository))
        data = memoryview(await blob.fetch(asked.offset, asked.length))
        for start in range(0, len(data), _PIECE):
            await report(Data(bytes(data[start : start + _PIECE])))
        return Sent(route=_route_of(blob))

    async def stream(asked: Range, report: Report) -> Sent:
        blob = await blobs.open(Digest(asked.digest), asked.size, Holder("", asked.repository))
        async with blob.stream(asked.offset) as pieces:
            async for piece in pieces:
                await report(Data(piece))
        return Sent(route=_route_of(blob))

    return {
        "Manifest": (ManifestName, manifest),
        "Referrers": (ReferrersOf, referrers),
        "Fetch": (Range, fetch),
        "Stream": (Range, stream),
    }


def _route_of(blob: Blob) -> Route:
    return blob.route() if isinstance(blob, MeasuredBlob) else Route()


def check_document(answer: Manifest, identifier: str) -> Document:
    """What came over a line, as a document whose digest is right; raises CorruptError."""
    try:
        digest = Digest(identifier if ":" in identifier else answer.digest)
    except UsageError as error:
        raise CorruptError("a relay gives a malformed digest") from error
    _check_digest(answer.data, digest)
    return Document(answer.data, answer.media_type, digest)


def _check_digest(data: bytes, digest: Digest) -> None:
    if hashlib.new(digest.algorithm, data).hexdigest() != digest.hex:
        raise CorruptError(f"content does not match its digest: {digest}")


def _check_excess(left: int, digest: Digest) -> None:
    if left < 0:
        raise CorruptError(f"a relay gives more bytes than were asked for: {digest}")
