"""Registries and a domain's memory, in memory: for services that resolve images and fetch blobs."""

from __future__ import annotations

import hashlib
import json
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any

import trio

from nsfs.core.blobs import NOBODY
from nsfs.core.images import Located
from nsfs.errors import CorruptError, NotFoundError, NsfsError
from nsfs.model.digest import Digest
from nsfs.model.oci import OCI_CONFIG, OCI_INDEX, OCI_MANIFEST, Descriptor, Document, Traffic

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Collection

    from nsfs.model.pool import Access, ImageRecord
    from nsfs.model.referrers import Referrer

LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"


def digest_of(data: bytes, algorithm: str = "sha256") -> Digest:
    return Digest(f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}")


class FakeBlob:
    """One blob; fails with `error` after `gives` bytes."""

    def __init__(self, source: FakeSource, descriptor: Descriptor) -> None:
        self._source = source
        self.digest = descriptor.digest
        self.size = descriptor.size

    def _data(self) -> bytes:
        if self._source.error is not None and not self._source.gives:
            raise self._source.error
        if self.digest not in self._source.blobs:
            raise NotFoundError(f"{self._source.name} has no such blob")
        return self._source.blobs[self.digest]

    async def fetch(self, offset: int, length: int) -> bytes:
        self._source.asked.append((offset, length))
        return self._data()[offset : offset + length]

    @asynccontextmanager
    async def stream(self, offset: int = 0) -> AsyncIterator[AsyncIterator[bytes]]:
        async def pieces() -> AsyncGenerator[bytes, None]:
            self._source.asked.append((offset, -1))
            data = self._data()[offset:]
            if self._source.error is None:
                yield data
                return
            yield data[: self._source.gives]
            raise self._source.error

        async with aclosing(pieces()) as opened:
            yield opened


class FakeLocalBlob(FakeBlob):
    """As of a layout."""

    directory = "/layout"


class FakeSource:
    """One repository."""

    def __init__(self, name: str, kind: type[FakeBlob] = FakeBlob) -> None:
        self.name = name
        self.kind = kind
        self.documents: dict[str, Document] = {}
        self.blobs: dict[Digest, bytes] = {}
        self.error: NsfsError | None = None
        self.delay = 0.0
        """Seconds that every answer about documents takes."""
        self.gives = 0
        self.asked: list[tuple[int, int]] = []
        self.read: list[Digest] = []
        self.attached: dict[Digest, list[Referrer]] = {}

    def add_blob(self, data: bytes, algorithm: str = "sha256", **more: Any) -> dict[str, Any]:
        digest = digest_of(data, algorithm)
        self.blobs[digest] = data
        return {"mediaType": LAYER, "digest": digest, "size": len(data), **more}

    def add_document(self, name: str, content: dict[str, Any], algorithm: str = "sha256") -> Digest:
        data = json.dumps({"schemaVersion": 2, **content}).encode()
        digest = digest_of(data, algorithm)
        self.documents[name] = self.documents[digest] = Document(data, content["mediaType"], digest)
        return digest

    def add_index(self, name: str, *manifests: dict[str, Any]) -> Digest:
        return self.add_document(name, {"mediaType": OCI_INDEX, "manifests": list(manifests)})

    def add_image(self, name: str, layers: list[bytes], algorithm: str = "sha256", machine: str = "amd64") -> Digest:
        diff_ids = [digest_of(b"stream of " + layer, algorithm) for layer in layers]
        config = {"architecture": machine, "os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids}}
        content = {
            "mediaType": OCI_MANIFEST,
            "config": self.add_blob(json.dumps(config).encode(), algorithm) | {"mediaType": OCI_CONFIG},
            "layers": [self.add_blob(layer, algorithm) for layer in layers],
        }
        return self.add_document(name, content, algorithm)

    async def manifest(self, identifier: str) -> Document:
        await trio.sleep(self.delay)
        if self.error is not None:
            raise self.error
        if identifier not in self.documents:
            raise NotFoundError(f"{self.name} has no such manifest")
        return self.documents[identifier]

    async def referrers(self, subject: Digest, artifact_type: str) -> list[Referrer]:
        await trio.sleep(self.delay)
        return [each for each in self.attached.get(subject, []) if each.artifact_type == artifact_type]

    def blob(self, descriptor: Descriptor) -> FakeBlob:
        return self.kind(self, descriptor)

    async def read_blob(self, descriptor: Descriptor, limit: int) -> bytes:
        self.read.append(descriptor.digest)
        if self.error is not None:
            raise self.error
        if descriptor.size > limit:
            raise CorruptError("too large")
        return self.blobs[descriptor.digest]

    def statistics(self) -> Traffic:
        return Traffic()


class FakeSources:
    """`core.images.Sources`: a reference is repository:tag or repository@digest."""

    def __init__(self, *sources: FakeSource) -> None:
        self.sources = {source.name: source for source in sources}
        self.opened: list[str] = []

    async def locate(self, reference: str, owner: str = "") -> Located:
        repository, mark, digest = reference.partition("@")
        tag = ""
        if not mark:
            repository, _, tag = reference.partition(":")
        return Located(reference, repository, tag, digest or tag, await self.open(repository, owner))

    async def open(self, repository: str, owner: str = "") -> FakeSource:
        self.opened.append(repository)
        return self.sources[repository]


class FakeMemory:
    """A domain's memory of images and of who has which blob."""

    def __init__(self) -> None:
        self.images: dict[str, ImageRecord] = {}
        self.puts = 0
        self.origin_puts: list[Collection[Digest]] = []
        self.known: dict[tuple[Digest, Access], list[str]] = {}

    def image(self, key: str) -> ImageRecord | None:
        return self.images.get(key)

    def put_image(self, key: str, record: ImageRecord) -> None:
        self.puts += 1
        self.images[key] = record

    def origins(self, blob: Digest, access: Access = NOBODY) -> list[tuple[str, str]]:
        return [
            (key.owner, name)
            for (known, key), names in self.known.items()
            if known == blob and key.origin == access.origin and access.owner in {"", key.owner}
            for name in names
        ]

    def put_origin(self, blobs: Collection[Digest], repository: str, access: Access = NOBODY) -> None:
        self.origin_puts.append(blobs)
        for blob in blobs:
            known = self.known.setdefault((blob, access), [])
            self.known[blob, access] = [repository, *(name for name in known if name != repository)]
