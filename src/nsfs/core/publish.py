"""What lies beside an image in its registry: put there, shown, taken away.

Owns the order: blobs first, then the manifest that names them. The image itself is never changed, and what is attached
already stays until somebody takes it away; the same is not put there twice. What is attached is a claim, whoever made
it, until a node that reads the layers has verified it.

Concurrency: a few blobs are sent at a time. What is interrupted leaves blobs that no manifest names, which registries
collect.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

import trio
from msgspec import Struct

from nsfs.core.tasks import run_all
from nsfs.errors import CorruptError, NsfsError, UnsupportedError
from nsfs.format.artifact import ARTIFACT_TYPE, EMPTY, parse_manifest, plan_artifact, plan_notes, render_manifest
from nsfs.model import oci
from nsfs.model.digest import Digest
from nsfs.model.referrers import Referrer, Upload, upload_of
from nsfs.model.report import Progress

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable, Sequence

    from nsfs.core.ports import Source
    from nsfs.format.artifact import Artifact

_AT_ONCE: Final = 4
"""Blobs that are sent."""
_PIECE: Final = 1 << 20
_MAX_NESTING: Final = 3


class ArtifactReport(Struct, kw_only=True):
    """One artifact, as `nsfs index` shows it. Sizes are bytes."""

    digest: str
    """Of its manifest."""
    image: str
    """Digest of the image's manifest."""
    created: str
    size: int
    """Of all its blobs."""
    layers: list[str]
    """Digests of the blobs whose indexes it has."""
    pack: int
    """Of its start-up pack; 0 where it has none."""
    flaw: str = ""
    """Why it cannot be used."""


class IndexReport(Struct, kw_only=True):
    """`nsfs index show`, and what the others leave."""

    reference: str
    artifacts: list[ArtifactReport]


class Beside(Protocol):
    """What is attached to the images of a repository; raises NsfsError."""

    async def referrers(self, subject: Digest, artifact_type: str = "") -> list[Referrer]:
        """What is attached to `subject`."""

    async def put_blob(self, digest: Digest, upload: Upload) -> None:
        """Upload a blob, unless it is there."""

    async def attach(self, data: bytes, media_type: str, subject: Digest, referrer: Referrer) -> None:
        """Put a manifest there whose blobs are."""

    async def detach(self, subject: Digest, digest: Digest) -> None:
        """Take one away."""


@dataclass(frozen=True, slots=True)
class StoredPart:
    """A blob of an artifact, in a file."""

    media_type: str
    layer: str
    """Digest of the blob that it is about; "" for what is about the image."""
    digest: Digest
    size: int
    path: str

    @property
    def descriptor(self) -> oci.Descriptor:
        """As a manifest names it."""
        return oci.Descriptor(media_type=self.media_type, digest=self.digest, size=self.size)

    def upload(self) -> Upload:
        """Its bytes, to be sent."""

        async def pieces() -> AsyncGenerator[bytes, None]:
            async with await trio.open_file(self.path, "rb") as file:
                while piece := await file.read(_PIECE):
                    yield piece

        return Upload(self.size, pieces)


async def find_image(source: Source, identifier: str, platform: oci.Platform) -> oci.Descriptor:
    """The manifest of an image for that platform; raises NsfsError."""
    document = await source.manifest(identifier)
    for _ in range(_MAX_NESTING):
        parsed = oci.parse_document(document)
        if isinstance(parsed, oci.Manifest):
            media_type = document.media_type or parsed.media_type
            return oci.Descriptor(media_type=media_type, digest=document.digest, size=len(document.data))
        document = await source.manifest(oci.choose_platform(parsed, platform).digest)
    raise CorruptError(f"image indexes are nested too deeply: {identifier}")


async def publish(
    source: Source,
    beside: Beside,
    image: oci.Descriptor,
    parts: Iterable[StoredPart],
    created: str,
    report: Callable[[Progress], None],
) -> ArtifactReport:
    """Attach an artifact of these parts to the image, unless one of the same is there; raises NsfsError."""
    parts = list(parts)
    artifact = plan_artifact(image.digest, [(part.descriptor, part.layer) for part in parts], created)
    if not artifact.layers:
        raise UnsupportedError(
            f"nothing can lie beside this image: {image.digest}",
            hint="no layer is plain, and can be had by ranges",
        )
    for digest, found in await _attached(source, beside, image.digest):
        if not isinstance(found, NsfsError) and replace(found, created=created) == artifact:
            return _report(digest, image.digest, found)
    await _send(beside, parts, report)
    data = render_manifest(artifact, image)
    referrer = Referrer(
        media_type=oci.OCI_MANIFEST,
        digest=Digest.of(data),
        size=len(data),
        artifact_type=ARTIFACT_TYPE,
        annotations=plan_notes(artifact),
    )
    await beside.attach(data, oci.OCI_MANIFEST, image.digest, referrer)
    return _report(referrer.digest, image.digest, artifact)


async def _send(beside: Beside, parts: Sequence[StoredPart], report: Callable[[Progress], None]) -> None:
    limiter = trio.CapacityLimiter(_AT_ONCE)

    async def send(part: StoredPart) -> None:
        async with limiter:
            await beside.put_blob(part.digest, part.upload())
        report(Progress(stage="push", what=part.digest.hex[:12], done=part.size, total=part.size))

    await beside.put_blob(Digest.of(EMPTY), upload_of(EMPTY))
    await run_all(partial(send, part) for part in parts)


async def load(source: Source, beside: Beside, image: Digest) -> list[ArtifactReport]:
    """What is attached to an image, the newest first."""
    found = [_report(digest, image, each) for digest, each in await _attached(source, beside, image)]
    return sorted(found, key=lambda each: each.created, reverse=True)


async def remove(source: Source, beside: Beside, image: Digest, digest: Digest | None) -> list[ArtifactReport]:
    """Take away what is attached to an image: all of it, or the one with that digest; what that was."""
    found = [each for each in await load(source, beside, image) if digest in {None, each.digest}]
    for each in found:
        await beside.detach(image, Digest(each.digest))
    return found


async def _attached(source: Source, beside: Beside, image: Digest) -> list[tuple[Digest, Artifact | NsfsError]]:
    """Artifacts of an image by their digests, and what is wrong with those that are none."""
    found: list[tuple[Digest, Artifact | NsfsError]] = []
    for referrer in await beside.referrers(image, ARTIFACT_TYPE):
        try:
            found.append((referrer.digest, _read(await source.manifest(str(referrer.digest)), image)))
        except CorruptError as error:
            found.append((referrer.digest, error))
    return found


def _read(document: oci.Document, image: Digest) -> Artifact:
    artifact = parse_manifest(document.data)
    if artifact.subject != image:
        raise CorruptError(f"an artifact is about another image: {artifact.subject}")
    return artifact


def _report(digest: Digest, image: Digest, found: Artifact | NsfsError) -> ArtifactReport:
    if isinstance(found, NsfsError):
        return ArtifactReport(
            digest=str(digest), image=str(image), created="", size=0, layers=[], pack=0, flaw=found.message
        )
    return ArtifactReport(
        digest=str(digest),
        image=str(image),
        created=found.created,
        size=found.size,
        layers=[str(layer.blob) for layer in found.layers],
        pack=found.pack.pack.size if found.pack else 0,
    )
