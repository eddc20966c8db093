"""From a reference to an image: manifest, configuration, layers; all checked by digest.

Owns the decision which documents an image consists of, and the domain's memory of them, so that an image that was
resolved once can be named again while its registry is down. Refuses to fall back on that memory when a registry answers
and says no. The registry is asked each time: tags move.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from nsfs.errors import CorruptError, UnreachableError
from nsfs.model import oci
from nsfs.model.digest import DiffId, Digest
from nsfs.model.pool import ImageRecord

if TYPE_CHECKING:
    from nsfs.core.ports import Source

log = logging.getLogger(__name__)

_MAX_NESTING = 3
"""Indexes within indexes; the image specification allows them and gives no limit."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of an image."""

    descriptor: oci.Descriptor
    diff_id: DiffId
    format: oci.LayerFormat

    @property
    def digest(self) -> Digest:
        """Of the blob."""
        return self.descriptor.digest


@dataclass(frozen=True, slots=True)
class Image:
    """A resolved image for one platform."""

    reference: str
    """Complete: registry, repository, and tag or digest."""
    repository: str
    """What `Sources.open` takes to reach the blobs again."""
    digest: Digest
    """Of the manifest."""
    config: oci.ImageConfig
    layers: tuple[Layer, ...]
    """Lowest first."""
    stale: str = ""
    """Why this comes from memory, where it does."""

    @property
    def size(self) -> int:
        """Sum of the layers' blobs."""
        return sum(layer.descriptor.size for layer in self.layers)


@dataclass(frozen=True, slots=True)
class Located:
    """A parsed reference and where it leads."""

    reference: str
    repository: str
    version: str
    """Tag or digest."""
    source: Source


class Sources(Protocol):
    """Registries and layouts, opened once each."""

    async def locate(self, reference: str) -> Located:
        """Parse `reference` as a user types it; raises UsageError."""

    async def open(self, repository: str) -> Source:
        """Where the blobs of a repository are."""


class ImageMemory(Protocol):
    """Where a domain keeps ImageRecords, durably, by complete reference and platform."""

    def image(self, key: str) -> ImageRecord | None:
        """The record, if there is one."""

    def put_image(self, key: str, record: ImageRecord) -> None:
        """Remember one."""


class Images:
    """The service."""

    def __init__(self, sources: Sources, memory: ImageMemory, platform: oci.Platform) -> None:
        self._sources = sources
        self._memory = memory
        self._platform = platform

    async def resolve(self, reference: str, platform: str | None) -> Image:
        """The image that `reference` names now; from memory where its registry cannot be reached."""
        wanted = oci.Platform.parse(platform) if platform else self._platform
        located = await self._sources.locate(reference)
        key = f"{located.reference} {wanted}"
        try:
            record = await _fetch(located, wanted)
        except UnreachableError as error:
            remembered = self._memory.image(key)
            if remembered is None:
                raise
            log.warning("%s, going on with what %s was: %s", error, located.reference, _digest_of(remembered))
            return _read(located.reference, remembered, stale=str(error))
        self._memory.put_image(key, record)
        return _read(located.reference, record)


async def _fetch(located: Located, wanted: oci.Platform) -> ImageRecord:
    document = await located.source.manifest(located.version)
    for _ in range(_MAX_NESTING):
        parsed = oci.parse_document(document)
        if isinstance(parsed, oci.Manifest):
            config = await located.source.read_blob(parsed.config, oci.MAX_CONFIG)
            return ImageRecord(
                repository=located.repository, manifest=document.data, media_type=document.media_type, config=config
            )
        document = await located.source.manifest(oci.choose_platform(parsed, wanted).digest)
    raise CorruptError(f"image indexes are nested too deeply: {located.reference}")


def _digest_of(record: ImageRecord) -> Digest:
    return Digest.of(record.manifest)


def _read(reference: str, record: ImageRecord, stale: str = "") -> Image:
    document = oci.Document(record.manifest, record.media_type, _digest_of(record))
    manifest = oci.parse_manifest(document)
    config = oci.parse_config(record.config, manifest)
    layers = tuple(
        Layer(descriptor, diff_id, oci.layer_format(descriptor.media_type, descriptor.annotations))
        for descriptor, diff_id in zip(manifest.layers, config.diff_ids, strict=True)
    )
    return Image(reference, record.repository, document.digest, config, layers, stale)
