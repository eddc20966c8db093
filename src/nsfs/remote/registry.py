"""A repository of a registry as a source of documents and blobs.

Owns the order in which the registry's servers are asked (mirrors first, one that did not answer lately last), the
checks of what they answer (digest of documents, exact length of ranges), and resuming. Blob bytes are exactly as many
as asked for and otherwise unverified; documents and small blobs are verified by digest. One range per request, never
more.

Concurrency: every method may be called by any number of tasks and cancelled at any time. The server and the redirect
target that last had a blob are shared by its requests, and replaced when they fail.
"""

from __future__ import annotations

from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import TYPE_CHECKING

import trio

from nsfs.errors import CorruptError, NsfsError, UnreachableError, UsageError
from nsfs.model.digest import Digest
from nsfs.model.oci import INDEX_TYPES, MANIFEST_TYPES, MAX_MANIFEST, Descriptor, Document, Traffic
from nsfs.remote.attached import Attached
from nsfs.remote.client import Answer, Get, Meter, Patience, Server, first_of, pause, plan_delay, retrying
from nsfs.remote.documents import check_digest, check_document, matches
from nsfs.remote.hosts import PULL, RESOLVE
from nsfs.remote.response import Wanted, plan_skip

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence

    from nsfs.model.referrers import Referrer
    from nsfs.model.route import Route

MOST_SKIPPED = 16 << 20
"""Bytes that a fetch reads and drops to reach its range where a server ignores ranges; beyond that it gives up."""
_IGNORED_FOR = 60.0
"""Seconds for which a blob is known to be served without ranges. Proxy caches do so until they have all of it."""
_PROGRESS = 1 << 20
"""Bytes after which a stream that breaks has all its attempts again."""

_ACCEPT = ("Accept", ", ".join(MANIFEST_TYPES + INDEX_TYPES))


class RegistrySource:
    """One repository, as its servers show it to whoever the credentials belong to."""

    def __init__(self, servers: Sequence[Server], repository: str, patience: Patience) -> None:
        self._servers = servers
        self._repository = repository
        self._patience = patience
        self._meter = Meter()
        self.attached = Attached(self.servers, repository, patience, self._meter)
        """What lies beside its images."""

    async def referrers(self, subject: Digest, artifact_type: str) -> list[Referrer]:
        """What of that type is attached to a manifest; raises NsfsError."""
        return await self.attached.referrers(subject, artifact_type)

    async def manifest(self, identifier: str) -> Document:
        """The manifest or index of a tag or digest, verified; raises NsfsError."""
        digest = Digest(identifier) if ":" in identifier else None
        path = f"/{self._repository}/manifests/{identifier}"
        get = Get(path, self._repository, f"{self._repository}: {identifier}", headers=(_ACCEPT,))

        async def ask(server: Server) -> Document:
            async with server.open(get, self._meter) as answer:
                return check_document(answer, await answer.read(MAX_MANIFEST, get.what), digest)

        order = self.servers(RESOLVE if digest is None else PULL)
        return await retrying(self._patience, lambda: first_of(order, ask))

    def blob(self, descriptor: Descriptor) -> RegistryBlob:
        """The blob that `descriptor` names; nothing is asked before it is read."""
        return RegistryBlob(self, descriptor, self._repository, self._patience, self._meter)

    async def read_blob(self, descriptor: Descriptor, limit: int) -> bytes:
        """All of a small blob, verified; raises CorruptError if it is larger than `limit`."""
        return await read_verified(self.blob(descriptor), limit)

    def statistics(self) -> Traffic:
        """What this source has cost, token requests left out."""
        return self._meter.reading()

    def servers(self, capability: str, preferred: Server | None = None) -> list[Server]:
        """Whom to ask, in order; raises UsageError if the configuration allows nobody."""
        able = [server for server in self._servers if capability in server.endpoint.capabilities]
        if not able:
            raise UsageError(f"no server may be asked to {capability}: {self._repository}", hint="see hosts.toml")
        return sorted(able, key=lambda server: (server.is_down(), server is not preferred))


class RegistryBlob:
    """One blob of one repository; see `core.ports.Blob`."""

    def __init__(
        self, source: RegistrySource, descriptor: Descriptor, repository: str, patience: Patience, meter: Meter
    ) -> None:
        self._source = source
        self._descriptor = descriptor
        self._repository = repository
        self._patience = patience
        self._meter = meter
        self._server: Server | None = None
        self._target: str | None = None
        self._without_ranges_until = float("-inf")

    @property
    def digest(self) -> Digest:
        """What the manifest calls it."""
        return self._descriptor.digest

    @property
    def size(self) -> int:
        """In bytes, as the manifest says."""
        return self._descriptor.size

    def route(self) -> Route:
        """The way to the server that is asked first."""
        server = self._server or self._source.servers(PULL)[0]
        return server.meter.route(server.endpoint.host)

    async def fetch(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes at `offset`; unverified. Also UnreachableError where the registry ignores ranges."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise CorruptError(f"a range reaches beyond its blob: {offset}+{length} of {self.size}: {self.digest}")
        if length == 0:
            return b""
        return await retrying(self._patience, lambda: self._fetch(Wanted(offset, length, self.size)))

    @asynccontextmanager
    async def stream(self, offset: int = 0) -> AsyncIterator[AsyncIterator[bytes]]:
        """The blob's bytes from `offset` to its end, in pieces as they arrive; resumes by itself."""
        async with aclosing(self._pieces(offset)) as pieces:
            yield pieces

    async def _fetch(self, wanted: Wanted) -> bytes:
        if trio.current_time() < self._without_ranges_until:
            self._refuse_long_skip(wanted.offset)
        async with self._opened(wanted, stream=False) as part:
            self._refuse_long_skip(part.skip)
            return await part.read()

    async def _pieces(self, offset: int) -> AsyncGenerator[bytes, None]:
        position = reached = offset
        failures = 0
        while position < self.size:
            try:
                async with self._opened(Wanted(position, self.size - position, self.size), stream=True) as part:
                    while piece := await part.receive():
                        position += len(piece)
                        yield piece
            except (UnreachableError, CorruptError) as error:
                if position - reached >= _PROGRESS:
                    reached, failures = position, 0
                failures += 1
                delay = plan_delay(self._patience, failures, error)
                if delay is None:
                    raise
                await pause(delay)

    @asynccontextmanager
    async def _opened(self, wanted: Wanted, *, stream: bool) -> AsyncIterator[_Part]:
        async with AsyncExitStack() as stack:

            async def ask(server: Server) -> _Part:
                get = self._get(server, wanted, stream)
                try:
                    async with AsyncExitStack() as attempt:
                        answer = await attempt.enter_async_context(server.open(get, self._meter))
                        part = _Part(answer, wanted)
                        await stack.enter_async_context(attempt.pop_all())
                except NsfsError:
                    self._target = None
                    raise
                self._server, self._target = server, answer.target
                return part

            part = await first_of(self._source.servers(PULL, self._server), ask)
            if part.skip:
                self._without_ranges_until = trio.current_time() + _IGNORED_FOR
            yield part

    def _get(self, server: Server, wanted: Wanted, stream: bool) -> Get:  # noqa: FBT001  passed on
        return Get(
            f"/{self._repository}/blobs/{self.digest}",
            self._repository,
            f"{self._repository}: {self.digest}",
            headers=() if wanted.whole else (("Range", wanted.header),),
            target=self._target if server is self._server else None,
            stream=stream,
        )

    def _refuse_long_skip(self, skip: int) -> None:
        if skip > MOST_SKIPPED:
            raise UnreachableError(
                f"the registry ignores ranges, and {skip} bytes lie before the wanted ones: {self.digest}",
                retry_after=_IGNORED_FOR,
            )


class _Part:
    """The wanted bytes of an answer: exactly as many, or an error."""

    def __init__(self, answer: Answer, wanted: Wanted) -> None:
        response = answer.response
        self.skip = plan_skip(response.status_code, response.headers, wanted)
        self._answer = answer
        self._to_skip = self.skip
        self._left = wanted.length
        self._more_follows = response.status_code == 200 and not wanted.whole

    async def receive(self) -> bytes:
        """The next piece, b"" at the end."""
        while self._left:
            piece = await self._receive_some()
            if self._to_skip:
                dropped = min(self._to_skip, len(piece))
                self._to_skip -= dropped
                piece = piece[dropped:]
            if piece:
                piece = piece[: self._left] if self._more_follows else piece
                self._left -= len(piece)
                self._check_excess()
                return piece
        await self._finish()
        return b""

    async def read(self) -> bytes:
        """All of them."""
        pieces = []
        while piece := await self.receive():
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def _receive_some(self) -> bytes:
        piece = await self._answer.receive()
        if not piece:
            raise UnreachableError(f"the registry's answer ends {self._left} bytes early: {self._answer.host}")
        return piece

    async def _finish(self) -> None:
        """Read the end of the message, so that its connection can be used again."""
        if not self._more_follows and await self._answer.receive():
            self._left = -1
            self._check_excess()

    def _check_excess(self) -> None:
        if self._left < 0:
            raise CorruptError(f"the registry sends more bytes than were asked for: {self._answer.host}")


async def read_verified(blob: RegistryBlob, limit: int) -> bytes:
    """All of `blob`, checked against its digest; a damaged answer is asked for once more."""
    if blob.size > limit:
        raise CorruptError(f"too large: {blob.digest}: {blob.size} bytes, at most {limit}")
    data = await blob.fetch(0, blob.size)
    if not matches(data, blob.digest):
        data = await blob.fetch(0, blob.size)
    check_digest(data, blob.digest)
    return data
