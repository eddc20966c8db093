"""From a reference to an image: manifest, configuration, layers; all checked by digest.

Owns the decision which documents an image consists of, and the domain's memory of them, so that an image that was
resolved once can be named again while its registry is down. Refuses to fall back on that memory when a registry answers
and says no. The registry is asked each time a tag is named, as tags move; what a digest names is asked for once.
"""

from __future__ import annotations

import logging
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import msgspec
import trio

from nsfs.core.blobs import NOBODY
from nsfs.core.tasks import open_tasks
from nsfs.errors import CorruptError, NotFoundError, NsfsError, UnreachableError
from nsfs.format.artifact import ARTIFACT_TYPE, CREATED, parse_manifest, parse_promise
from nsfs.model import oci
from nsfs.model.digest import Digest
from nsfs.model.policy import TRUST_NONE, TRUST_REPOSITORY
from nsfs.model.pool import ImageRecord

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence

    from nsfs.core.ports import Source
    from nsfs.format.artifact import Artifact, ClaimedLayer, PromisedPack, StartupPack
    from nsfs.model.digest import DiffId
    from nsfs.model.pool import Access

log = logging.getLogger(__name__)

_MAX_NESTING = 3
"""Indexes within indexes; the image specification allows them and gives no limit."""
_MOST = 3
"""Artifacts beside one image that are looked at."""
_LOOK_AGAIN = 60.0
"""Seconds for which nothing is looked for beside an image where nothing was."""


@dataclass(frozen=True, slots=True)
class Claim:
    """How a layer is read, as an artifact beside the image says."""

    artifact: Digest
    """Its manifest."""
    layer: ClaimedLayer

    @property
    def index(self) -> str:
        """What a layer's index is called that is read so: `pool.LayerKey.index`."""
        return f"artifact-{self.artifact.hex}"


@dataclass(frozen=True, slots=True)
class ListedLayer:
    """A layer as a manifest lists it: enough to read it through."""

    descriptor: oci.Descriptor
    format: oci.LayerFormat
    access: Access = NOBODY
    """As whom its bytes are asked for."""

    @property
    def digest(self) -> Digest:
        """Of the blob."""
        return self.descriptor.digest


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of an image."""

    descriptor: oci.Descriptor
    diff_id: DiffId
    format: oci.LayerFormat
    access: Access = NOBODY
    """As whom its bytes are asked for."""
    claim: Claim | None = None
    """What an artifact that is believed says of it."""

    @property
    def digest(self) -> Digest:
        """Of the blob."""
        return self.descriptor.digest

    @property
    def listed(self) -> ListedLayer:
        """What the manifest says of it."""
        return ListedLayer(self.descriptor, self.format, self.access)


@dataclass(frozen=True, slots=True)
class Image:
    """A resolved image for one platform."""

    reference: str
    """Complete: registry, repository, and tag or digest."""
    repository: str
    """What `Sources.open` takes to reach the blobs again."""
    tag: str
    """By which it was named; "" if by digest alone."""
    digest: Digest
    """Of the manifest."""
    config: oci.ImageConfig
    layers: tuple[Layer, ...]
    """Lowest first."""
    access: Access = NOBODY
    """As whom it was resolved."""
    stale: str = ""
    """Why this comes from memory, where it does."""
    pack: StartupPack | None = None
    """What the artifact that is believed has of a start."""

    @property
    def size(self) -> int:
        """Sum of the layers' blobs."""
        return sum(layer.descriptor.size for layer in self.layers)


@dataclass(frozen=True, slots=True)
class Located:
    """A parsed reference and where it leads."""

    reference: str
    repository: str
    tag: str
    """"" if there is none."""
    version: str
    """Tag or digest."""
    source: Source
    access: Access = NOBODY
    """As whom that is; NOBODY in a domain that is one owner's."""

    def key(self, platform: oci.Platform) -> str:
        """Under which a domain remembers the image."""
        return " ".join(filter(None, (self.access.owner, self.reference, str(platform))))


class Sources(Protocol):
    """Registries and layouts, opened once each."""

    async def locate(self, reference: str, owner: str) -> Located:
        """Parse `reference` as a user types it, on behalf of `owner`; raises UsageError."""

    async def open(self, repository: str, owner: str) -> Source:
        """Where the blobs of a repository are, as `owner` sees it."""


class Ahead(Protocol):
    """Who begins with what an image will want before that is whole."""

    def expect(self, layers: Sequence[ListedLayer], repository: str) -> None:
        """These layers will be read."""

    def expect_pack(self, promised: PromisedPack, repository: str, access: Access) -> None:
        """An artifact that may be believed has this pack, as a list says."""


class ImageMemory(Protocol):
    """Where a domain keeps ImageRecords, durably, by complete reference and platform. Writing may block."""

    def image(self, key: str) -> ImageRecord | None:
        """The record, if there is one."""

    def put_image(self, key: str, record: ImageRecord) -> None:
        """Remember one."""


class Gate(Protocol):
    """Who may have which image, where several share a domain."""

    async def admit(self, image: Image) -> None:
        """Return if whoever asked for `image` may have all of it; raises NsfsError."""


class Images:
    """The service."""

    def __init__(self, sources: Sources, memory: ImageMemory, platform: oci.Platform, gate: Gate | None = None) -> None:
        self._sources = sources
        self._memory = memory
        self._platform = platform
        self._gate = gate
        self._without: dict[tuple[Digest, str, str], float] = {}
        """Until when nothing is looked for beside an image: by manifest, owner and trust."""

    async def resolve(
        self,
        reference: str,
        platform: str | None,
        owner: str = "",
        trust: str = TRUST_NONE,
        ahead: Ahead | None = None,
    ) -> Image:
        """The image that `reference` names now; from memory where its registry cannot be reached.

        Raises NotFoundError where there is none for `platform`. Without one the host's is chosen from an index, and a
        single image is taken as it is. `trust` says which artifact beside it is believed (`policy.parse_trust`).

        Where the manifest is new, and nobody else's leave is needed, `ahead` hears of its layers before its
        configuration is asked for; where something beside it may be believed instead, of the pack that a list names.
        """
        wanted = oci.Platform.parse(platform) if platform else self._platform
        located = await self._sources.locate(reference, owner)
        if platform or self._gate is not None:
            ahead = None
        async with self._looking(located, trust, ahead) as look:
            image = await self._recall(located, wanted, look)
            if platform:
                oci.check_platform(image.config.platform, wanted)
            return await self._with_claims(await self._admitted(image), located.key(wanted), look)

    @asynccontextmanager
    async def _looking(self, located: Located, trust: str, ahead: Ahead | None = None) -> AsyncIterator[_Look]:
        """What is looked for beside images while the block lasts."""
        async with open_tasks() as nursery:
            yield _Look(trust, located, ahead, self._look_beside, nursery)

    async def _with_claims(self, image: Image, key: str, look: _Look) -> Image:
        """The image with what the artifact says that is to be believed, if there is one."""
        record = self._memory.image(key)
        if look.trust == TRUST_NONE or record is None:
            return image
        if not record.artifact or look.trust not in {TRUST_REPOSITORY, record.artifact_digest}:
            found = await look.find(image.digest)
            if found is None:
                return image
            record = msgspec.structs.replace(record, artifact=found.data, artifact_digest=str(found.digest))
            await self._remember(key, record)
        return _claimed(image, Digest(record.artifact_digest), parse_manifest(record.artifact))

    async def _look_beside(self, look: _Look, image: Digest) -> oci.Document | None:
        """The artifact to be believed; where there is none, nobody looks again for a while."""
        located = look.located
        asked, now = (image, located.access.owner, look.trust), trio.current_time()
        if now < self._without.get(asked, 0):
            return None
        try:
            found = await find_artifact(located.source, image, look.trust, look.expect_pack)
        except NsfsError as error:
            log.warning("nothing beside %s is believed: %s", located.reference, error)
            found = None
        if found is None:
            self._without = {each: until for each, until in self._without.items() if now < until}
            self._without[asked] = now + _LOOK_AGAIN
        return found

    async def _admitted(self, image: Image) -> Image:
        if self._gate is not None:
            await self._gate.admit(image)
        return image

    async def _recall(self, located: Located, wanted: oci.Platform, look: _Look) -> Image:
        key = located.key(wanted)
        remembered = self._memory.image(key)
        if remembered is not None and remembered.manifest_digest == located.version:
            return _read(located, remembered)
        try:
            record = await _fetch(located, wanted, remembered, look)
        except UnreachableError as error:
            if remembered is None:
                raise
            log.warning("%s, going on with what %s was: %s", error, located.reference, remembered.manifest_digest)
            return _read(located, remembered, stale=str(error))
        if record != remembered:
            await self._remember(key, record)
        return _read(located, record)

    async def _remember(self, key: str, record: ImageRecord) -> None:
        """What cannot be written is asked for again."""
        try:
            await trio.to_thread.run_sync(self._memory.put_image, key, record)
        except NsfsError as error:
            log.warning("%s is not remembered: %s", record.reference or record.repository, error)

    async def remembered(self, reference: str, platform: str | None, owner: str = "") -> tuple[Image, ImageRecord]:
        """What `reference` was when it was resolved last; needs no network. Raises NotFoundError."""
        located = await self._sources.locate(reference, owner)
        wanted = oci.Platform.parse(platform) if platform else self._platform
        record = self._memory.image(located.key(wanted))
        if record is None:
            raise NotFoundError(f"nothing is known here of {located.reference} for {wanted}")
        return await self._admitted(_read(located, record)), record

    async def pinned(self, reference: str, owner: str = "", trust: str = TRUST_NONE) -> Image:
        """The image that `reference` names by its manifest's digest: what such a name means never changes.

        So it needs no network where it is remembered. Raises CorruptError for what has another digest.
        """
        located = await self._sources.locate(reference, owner)
        key = located.key(self._platform)
        record = self._memory.image(key)
        async with self._looking(located, trust) as look:
            if record is None or record.manifest_digest != located.version:
                record = await _fetch(located, self._platform, None, look)
                if record.manifest_digest != located.version:
                    raise CorruptError(f"not a manifest's digest: {located.version}")
                await self._remember(key, record)
            return await self._with_claims(await self._admitted(_read(located, record)), key, look)


class _Look:
    """Looks for what is to be believed beside the manifests that an image may have, as soon as each is named.

    Whoever begins ahead hears of what is found out before the image is.
    """

    def __init__(
        self,
        trust: str,
        located: Located,
        ahead: Ahead | None,
        ask: Callable[[_Look, Digest], Awaitable[oci.Document | None]],
        nursery: trio.Nursery,
    ) -> None:
        self.trust = trust
        self.located = located
        self._ahead = ahead
        self._ask = ask
        self._nursery = nursery
        self._found: dict[Digest, oci.Document | None] = {}
        self._ended: dict[Digest, trio.Event] = {}

    def begin(self, image: Digest) -> None:
        """Look, unless nothing is ever believed."""
        if self.trust != TRUST_NONE and image not in self._ended:
            self._ended[image] = trio.Event()
            self._nursery.start_soon(self._run, image)

    def expect(self, layers: Iterable[oci.Descriptor]) -> None:
        """A manifest has these; they are read whole where nothing beside it is believed."""
        if self._ahead is not None and self.trust == TRUST_NONE:
            listed = [_listed(each, self.located.access) for each in layers]
            self._ahead.expect(listed, self.located.repository)

    def expect_pack(self, promised: PromisedPack) -> None:
        """The artifact that is looked at is said to have this."""
        if self._ahead is not None:
            self._ahead.expect_pack(promised, self.located.repository, self.located.access)

    async def _run(self, image: Digest) -> None:
        self._found[image] = await self._ask(self, image)
        self._ended[image].set()

    async def find(self, image: Digest) -> oci.Document | None:
        """What lies beside a manifest, if anything; somebody is believed."""
        self.begin(image)
        await self._ended[image].wait()
        return self._found[image]


async def find_artifact(
    source: Source, image: Digest, trust: str, expect_pack: Callable[[PromisedPack], None]
) -> oci.Document | None:
    """The manifest of the artifact beside an image that `trust` means, the newest of several; raises NsfsError.

    `expect_pack` hears what the list says of that one's pack while the manifest is asked for.
    """
    if trust != TRUST_REPOSITORY:
        document = await source.manifest(trust)
        return document if parse_manifest(document.data).subject == image else None
    listed = await source.referrers(image, ARTIFACT_TYPE)
    newest = sorted(listed, key=lambda each: (each.annotations or {}).get(CREATED, ""), reverse=True)
    if newest and (promised := parse_promise(newest[0].annotations or {})) is not None:
        expect_pack(promised)
    for referrer in newest[:_MOST]:
        try:
            document = await source.manifest(str(referrer.digest))
            if parse_manifest(document.data).subject == image:
                return document
        except (CorruptError, NotFoundError) as error:
            log.warning("an artifact beside %s is not believed: %s", image, error)
    return None


def _claimed(image: Image, digest: Digest, artifact: Artifact) -> Image:
    """The image with what the artifact says of its plain layers."""
    claims = {layer.blob: Claim(digest, layer) for layer in artifact.layers}
    layers = (replace(each, claim=None if each.format.toc else claims.get(each.digest)) for each in image.layers)
    return replace(image, layers=tuple(layers), pack=artifact.pack)


async def _fetch(
    located: Located,
    wanted: oci.Platform,
    remembered: ImageRecord | None,
    look: _Look,
) -> ImageRecord:
    """The image's documents; a manifest that is `remembered` still has the configuration it had.

    What lies beside one that is not is looked for meanwhile, and who wants its layers hears of them.
    """
    if remembered is None and ":" in located.version:
        look.begin(Digest(located.version))
    document = await located.source.manifest(located.version)
    for _ in range(_MAX_NESTING):
        parsed = oci.parse_document(document)
        if isinstance(parsed, oci.Manifest):
            if remembered is not None and remembered.manifest == document.data:
                return msgspec.structs.replace(
                    remembered,
                    repository=located.repository,
                    digest=document.digest,
                    reference=located.reference,
                )
            look.begin(document.digest)
            look.expect(parsed.layers)
            config = await located.source.read_blob(parsed.config, oci.MAX_CONFIG)
            return ImageRecord(
                repository=located.repository,
                manifest=document.data,
                media_type=document.media_type,
                config=config,
                digest=document.digest,
                reference=located.reference,
            )
        document = await located.source.manifest(oci.choose_platform(parsed, wanted).digest)
    raise CorruptError(f"image indexes are nested too deeply: {located.reference}")


def _listed(descriptor: oci.Descriptor, access: Access) -> ListedLayer:
    return ListedLayer(descriptor, oci.layer_format(descriptor.media_type, descriptor.annotations), access)


def _read(located: Located, record: ImageRecord, stale: str = "") -> Image:
    document = oci.Document(record.manifest, record.media_type, record.manifest_digest)
    manifest = oci.parse_manifest(document)
    config = oci.parse_config(record.config, manifest)
    listed = (_listed(each, located.access) for each in manifest.layers)
    layers = tuple(
        Layer(each.descriptor, diff_id, each.format, each.access)
        for each, diff_id in zip(listed, config.diff_ids, strict=True)
    )
    return Image(
        located.reference,
        record.repository,
        located.tag,
        document.digest,
        config,
        layers,
        located.access,
        stale,
    )
