"""Layers as an artifact beside their image says that they are read: claims, until somebody reads all of the blob.

Owns how the two parts of a claim become a layer of the domain: its index at once, its spans when a read first wants
what the start-up pack did not bring. Such a layer has addresses of its own, which no content found elsewhere is ever
joined with. Refuses parts whose digests are not those that the artifact names.

Concurrency: what takes a part apart is a job; one of a kind at a time for a layer, as `core.layers` sees to.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from msgspec import Struct

from nsfs.errors import CorruptError
from nsfs.format.artifact import MAX_BLOB
from nsfs.model.digest import Digest
from nsfs.model.pool import Access

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nsfs.core.blobs import Blobs
    from nsfs.core.images import Claim, Image, Layer
    from nsfs.core.jobs import Jobs
    from nsfs.format.artifact import PromisedPack
    from nsfs.model.pool import LayerKey, LayerRecord


class ClaimArgs(Struct, kw_only=True):
    """For `read_artifact` and `read_spans`. One more descriptor: that blob of the artifact in a memfd."""

    domain: str
    blob: str
    origin: str
    index: str
    blob_size: int
    media_type: str
    spans_blob: str = ""
    spans_size: int = 0
    promised: str = ""
    """The layer's diff ID, as the image says."""


class ProofArgs(Struct, kw_only=True):
    """For `adopt_spans` and `compare_contents`."""

    domain: str
    blob: str
    origin: str
    index: str


class LayerMade(Struct, kw_only=True):
    """A layer was committed to the domain's index; these addresses' bits and bytes are to be made durable."""

    ranges: list[tuple[int, int]] = []


class MapMade(Struct, kw_only=True):
    """A map was written, unless it needs the layers below."""

    needs_lower: bool
    marks: bool = False
    opaque: bool = False
    borrowed: list[int] = []
    """Which of the maps below have addresses that this one uses."""


class Startups(Protocol):
    """What is known to be read first of images that an artifact says how to read."""

    def expect(self, promised: PromisedPack, repository: str, access: Access) -> None:
        """Ask for what a pack begins with that an image may turn out to have."""

    def begin(self, image: Image) -> None:
        """Begin to have it here, for layers as soon as they are ready."""

    async def take_head(self, image: Image, blob: Digest) -> bytes | None:
        """A blob of the artifact that what comes begins with; None where it does not."""

    def ready(self, key: LayerKey) -> None:
        """The layer can take bytes."""


class ClaimedLayers:
    """The service."""

    def __init__(self, directory: str, blobs: Blobs, jobs: Jobs, startups: Startups) -> None:
        self._directory = directory
        """The domain's."""
        self._blobs = blobs
        self._jobs = jobs
        self._startups = startups

    def expect(self, promised: PromisedPack, repository: str, access: Access) -> None:
        """What an artifact has of layers may soon be wanted."""
        self._startups.expect(promised, repository, access)

    async def index(self, image: Image, layer: Layer, claim: Claim, key: LayerKey) -> None:
        """Take the layer's index from the artifact, while what a start reads begins to come; raises NsfsError.

        Where its spans are is known by then.
        """
        self._startups.begin(image)
        data = await self._startups.take_head(image, claim.layer.index.digest)
        if data is None:
            source = await self._blobs.source(image.repository, layer.access.owner)
            data = await source.read_blob(claim.layer.index, MAX_BLOB)
        args = ClaimArgs(
            domain=self._directory,
            blob=str(key.blob),
            origin=key.origin,
            index=key.index,
            blob_size=layer.descriptor.size,
            media_type=layer.descriptor.media_type,
            spans_blob=str(claim.layer.spans.digest),
            spans_size=claim.layer.spans.size,
            promised=str(layer.diff_id),
        )
        with memory_file(data) as fd:
            await self._jobs.run("nsfs.layer_jobs:read_artifact", args, [fd], LayerMade)

    def ready(self, key: LayerKey) -> None:
        """The layer's index is complete: what its start reads can be kept."""
        self._startups.ready(key)

    async def adopt_spans(self, record: LayerRecord) -> None:
        """Have a layer that was read through by now read by the spans that were found, whatever is claimed.

        Raises CorruptError where another index is claimed than was found.
        """
        await self._jobs.run("nsfs.layer_jobs:adopt_spans", self._proof(record), [], LayerMade)

    async def compare_contents(self, record: LayerRecord) -> None:
        """Count the layer as proved if all that is kept of it is what was found; raises CorruptError."""
        await self._jobs.run("nsfs.layer_jobs:compare_contents", self._proof(record), [], LayerMade)

    def _proof(self, record: LayerRecord) -> ProofArgs:
        return ProofArgs(domain=self._directory, blob=str(record.blob), origin=record.origin, index=record.index)

    async def take_spans(self, record: LayerRecord, owner: str) -> None:
        """Take the layer's spans from the artifact; raises NsfsError."""
        named = Digest(record.spans_blob)
        blob = self._blobs.blob(named, record.spans_size, Access(owner, record.origin))
        data = await blob.fetch(0, blob.size)
        if Digest.of(data) != named:
            raise CorruptError(f"what an artifact has of a layer is not what it names: {named}")
        args = ClaimArgs(
            domain=self._directory,
            blob=str(record.blob),
            origin=record.origin,
            index=record.index,
            blob_size=record.blob_size,
            media_type=record.media_type,
        )
        with memory_file(data) as fd:
            await self._jobs.run("nsfs.layer_jobs:read_spans", args, [fd], LayerMade)


@contextmanager
def memory_file(data: bytes) -> Iterator[int]:
    """A descriptor with these bytes, at their beginning, while the block lasts."""
    fd = os.memfd_create("nsfs-layer", os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(data)
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)
