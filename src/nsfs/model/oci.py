"""Images as registries describe them: descriptors, manifests, indexes, configurations, platforms, layer formats.

Owns the parsing of these documents (OCI image specification 1.1 and Docker's image manifest version 2, schema 2), the
choice of a platform and the judgement of a layer's media type. Refuses what two readers could understand differently: a
media type that is not the one it was served as, a document that is manifest and index at once, another number of layers
than of diff IDs. `urls` of descriptors are not even read, so nobody can follow them. Sizes are bytes.

Every parse function takes bytes that were checked against a digest already and raises CorruptError for malformed ones,
UnsupportedError for what is well formed and not an image that can be shown.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence  # noqa: TC003  msgspec reads the annotations
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from nsfs.errors import CorruptError, NotFoundError, NsfsError, UnsupportedError, UsageError
from nsfs.model.digest import DiffId, Digest

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"

MANIFEST_TYPES = (OCI_MANIFEST, DOCKER_MANIFEST)
INDEX_TYPES = (OCI_INDEX, DOCKER_INDEX)
CONFIG_TYPES = (OCI_CONFIG, DOCKER_CONFIG)

MAX_MANIFEST = 4 << 20
"""Of a manifest or index (the distribution specification asks registries for at least this)."""
MAX_CONFIG = 8 << 20
MAX_LAYERS = 1_000

_SCHEMA_1 = (
    "application/vnd.docker.distribution.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v1+prettyjws",
)
_UNTYPED = ("", "application/json", "application/octet-stream", "text/plain")
_ESTARGZ_TOC = "containerd.io/snapshot/stargz/toc.digest"

Size = Annotated[int, Meta(ge=0, le=(1 << 53) - 1)]
Annotations = dict[str, str]


@dataclass(frozen=True, slots=True)
class Document:
    """A manifest or index as it was served, checked against `digest`."""

    data: bytes
    media_type: str
    """As served, without parameters; "" if the server did not say."""
    digest: Digest


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a source has cost so far."""

    requests: int = 0
    received: int = 0
    """Bytes of response bodies."""

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.requests + other.requests, self.received + other.received)


class Platform(Struct, frozen=True, omit_defaults=True):
    """What a manifest's programs run on, in Go's names. Compare `normal()` forms."""

    architecture: str
    os: str
    variant: str = ""

    @classmethod
    def parse(cls, text: str) -> Platform:
        """From os/architecture[/variant]; raises UsageError."""
        if _PLATFORM.fullmatch(text) is None:
            raise UsageError(
                f"not a platform: {text[:100]!r}", hint="a platform is os/architecture[/variant]: linux/arm64"
            )
        os, architecture, *variant = text.split("/")
        return cls(architecture, os, *variant).normal()

    def normal(self) -> Platform:
        """With the architecture's common name, and without the variant that is its default."""
        os, architecture, variant = self.os.lower(), self.architecture.lower(), self.variant.lower()
        architecture, implied = _ARCHITECTURES.get(architecture, (architecture, ""))
        variant = variant or implied
        if architecture in {"arm", "arm64"} and variant.isdigit():
            variant = "v" + variant
        return Platform(architecture, os, "" if variant == _DEFAULT_VARIANT.get(architecture) else variant)

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


_PLATFORM = re.compile(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?")
_ARCHITECTURES = {
    "x86_64": ("amd64", ""),
    "x86-64": ("amd64", ""),
    "aarch64": ("arm64", ""),
    "armhf": ("arm", "v7"),
    "armv7l": ("arm", "v7"),
    "armel": ("arm", "v6"),
    "armv6l": ("arm", "v6"),
    "i386": ("386", ""),
    "i686": ("386", ""),
}
_DEFAULT_VARIANT = {"amd64": "v1", "arm64": "v8", "arm": "v7"}


class Descriptor(Struct, frozen=True, kw_only=True, rename="camel"):
    """Names a blob or a document by digest (OCI image specification, descriptor.md)."""

    media_type: str
    digest: Digest
    size: Size
    annotations: Annotations | None = None
    platform: Platform | None = None

    @property
    def notes(self) -> Annotations:
        """The annotations, {} if it has none."""
        return self.annotations or {}


class Manifest(Struct, frozen=True, kw_only=True, rename="camel"):
    """One image for one platform: a configuration and layers, lowest first."""

    media_type: str = ""
    config: Descriptor
    layers: list[Descriptor]
    annotations: Annotations | None = None


class ImageIndex(Struct, frozen=True, kw_only=True, rename="camel"):
    """Manifests, usually of one image for several platforms."""

    media_type: str = ""
    manifests: list[Descriptor]
    annotations: Annotations | None = None


class Runtime(Struct, frozen=True, kw_only=True, rename="pascal"):
    """The part of a configuration that says how to run the image; None where it says nothing."""

    env: list[str] | None = None
    entrypoint: list[str] | None = None
    cmd: list[str] | None = None
    working_dir: str | None = None
    user: str | None = None
    labels: dict[str, str] | None = None


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """An image configuration, reduced to what is used."""

    platform: Platform
    diff_ids: tuple[DiffId, ...]
    runtime: Runtime
    config: dict[str, Any]
    """The `config` object as it stands, for people and for runtimes."""


class Compression(enum.Enum):
    """How a layer's tar is compressed."""

    NONE = "tar"
    GZIP = "tar+gzip"
    ZSTD = "tar+zstd"


@dataclass(frozen=True, slots=True)
class LayerFormat:
    """What a media type and the annotations beside it say of a layer."""

    compression: Compression
    refused: str = ""
    """Why the layer cannot be shown, in one sentence; "" if it can."""
    foreign: bool = False
    """Marked as not distributable: the registry may not have it, and its `urls` are never followed."""
    toc: Digest | None = None
    """Digest of the eStargz table of contents, where the annotation names one."""

    @property
    def name(self) -> str:
        """For people: estargz, tar+gzip, tar+zstd or tar."""
        return "estargz" if self.toc is not None else self.compression.value


def parse_document(document: Document) -> Manifest | ImageIndex:
    """Parse a manifest or an index, by its media type where it has one, else by its content."""
    served = "" if document.media_type in _UNTYPED else document.media_type
    if served in _SCHEMA_1:
        raise _schema_1()
    probe = decode(document.data, _Probe, "manifest")
    if probe.schema_version == 1 or probe.fs_layers is not msgspec.UNSET:
        raise _schema_1()
    media_type = _agreed_type(probe, served)
    is_index = media_type in INDEX_TYPES
    _refuse_ambiguous(probe, is_index=is_index)
    if is_index:
        return decode(document.data, ImageIndex, "image index")
    return _checked_manifest(decode(document.data, Manifest, "manifest"))


def parse_manifest(document: Document) -> Manifest:
    """Parse what must be a manifest."""
    parsed = parse_document(document)
    if not isinstance(parsed, Manifest):
        raise CorruptError(f"an image index where a manifest was promised: {document.digest}")
    return parsed


def parse_config(data: bytes, manifest: Manifest) -> ImageConfig:
    """Parse the configuration that `manifest` names."""
    raw = decode(data, _Config, "image configuration")
    diff_ids = raw.rootfs.diff_ids if raw.rootfs and raw.rootfs.diff_ids else []
    if len(diff_ids) != len(manifest.layers):
        raise CorruptError(
            f"manifest and configuration disagree: {len(manifest.layers)} layers, {len(diff_ids)} diff IDs"
        )
    platform = Platform(raw.architecture, raw.os, raw.variant or "").normal()
    return ImageConfig(platform, tuple(DiffId(diff_id) for diff_id in diff_ids), _runtime(raw.config), raw.config or {})


def choose_platform(index: ImageIndex, wanted: Platform) -> Descriptor:
    """The manifest (or nested index) of `index` for `wanted`; raises NotFoundError that lists what there is.

    The same variant wins, then the highest that the wanted one can run, then one without a platform if it is the only
    manifest; among equals the first, as the OCI image specification asks (image-index.md, `platform`). Attestations,
    which BuildKit marks as unknown/unknown, are no candidates.
    """
    candidates = [descriptor for descriptor in index.manifests if not _is_attestation(descriptor)]
    target = wanted.normal()
    ranked = [(_rank(descriptor.platform, target), descriptor) for descriptor in candidates if descriptor.platform]
    best = max(ranked, key=lambda pair: pair[0], default=(0, None))
    if best[0] > 0 and best[1] is not None:
        return best[1]
    if len(candidates) == 1 and candidates[0].platform is None:
        return candidates[0]
    raise NotFoundError(
        f"no image for platform {target}: there is {_listing(candidates)}", hint="choose one by --platform"
    )


def check_platform(offered: Platform, wanted: Platform) -> None:
    """Raise NotFoundError unless an image for platform `offered` is one for `wanted`."""
    if not _rank(offered, wanted.normal()):
        raise NotFoundError(f"no image for platform {wanted}: there is {offered}", hint="leave --platform away")


def layer_format(media_type: str, annotations: Annotations | None = None) -> LayerFormat:
    """What a layer's descriptor says of its format. Never raises: what cannot be shown is `refused`."""
    match = _LAYER.fullmatch(media_type)
    if match is None:
        return LayerFormat(Compression.NONE, refused=f"unknown media type of a layer: {media_type[:100]!r}")
    compression = _COMPRESSIONS[match["compression"] or ""]
    foreign = bool(match["foreign"] or match["docker_foreign"])
    if match["encrypted"]:
        return LayerFormat(
            compression, refused="the layer is encrypted, and decryption is not supported", foreign=foreign
        )
    return LayerFormat(compression, foreign=foreign, toc=_toc(compression, annotations or {}))


_LAYER = re.compile(
    r"application/vnd\.(?:"
    r"oci\.image\.layer\.(?P<foreign>nondistributable\.)?v1\.tar|"
    r"docker\.image\.rootfs\.(?P<docker_foreign>foreign\.)?diff\.tar)"
    r"(?:[+.](?P<compression>gzip|zstd))?(?P<encrypted>\+encrypted)?",
)
_COMPRESSIONS = {"": Compression.NONE, "gzip": Compression.GZIP, "zstd": Compression.ZSTD}


class _Probe(Struct, rename="camel"):
    """The members that tell one kind of document from another."""

    schema_version: int | None = None
    media_type: str = ""
    manifests: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    layers: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    config: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    fs_layers: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class _RootFs(Struct):
    type: str = "layers"
    diff_ids: list[Digest] | None = None


class _Config(Struct):
    architecture: str
    os: str
    variant: str | None = None
    rootfs: _RootFs | None = None
    config: dict[str, Any] | None = None


T = TypeVar("T")


def decode(data: bytes, kind: type[T], what: str) -> T:
    """JSON as `kind`, digests in it checked; raises CorruptError that says `what` is malformed."""
    try:
        return msgspec.json.decode(data, type=kind, dec_hook=_hook)
    except (msgspec.MsgspecError, NsfsError, ValueError, RecursionError) as error:
        raise CorruptError(f"malformed {what}: {error}") from None


def _hook(kind: type, value: Any) -> Any:  # noqa: ANN401  the type that msgspec asks for
    if kind is Digest and isinstance(value, str):
        return Digest(value)
    raise TypeError(kind)


def _schema_1() -> UnsupportedError:
    return UnsupportedError(
        "the image has a manifest of Docker's schema 1, which proves nothing about its layers",
        hint="push it again with a client of this decade",
    )


def _agreed_type(probe: _Probe, served: str) -> str:
    if served and probe.media_type and probe.media_type != served:
        raise CorruptError(f"a document says that it is {probe.media_type[:100]!r} and was served as {served[:100]!r}")
    media_type = served or probe.media_type or (OCI_INDEX if probe.manifests is not msgspec.UNSET else OCI_MANIFEST)
    if media_type not in MANIFEST_TYPES + INDEX_TYPES:
        raise UnsupportedError(f"not an image: media type {media_type[:100]!r}")
    return media_type


def _refuse_ambiguous(probe: _Probe, *, is_index: bool) -> None:
    if probe.schema_version != 2:
        raise CorruptError(f"malformed manifest: schemaVersion is {probe.schema_version}, not 2")
    has_manifests = probe.manifests is not msgspec.UNSET
    has_layers = probe.layers is not msgspec.UNSET or probe.config is not msgspec.UNSET
    if has_manifests and has_layers:
        raise CorruptError("a document claims to be manifest and image index at once")
    if has_manifests != is_index:
        raise CorruptError(
            f"a document's members are not those of its media type: {'index' if is_index else 'manifest'}"
        )


def _checked_manifest(manifest: Manifest) -> Manifest:
    if manifest.config.media_type not in CONFIG_TYPES:
        raise UnsupportedError(f"an artifact, not an image: its configuration is {manifest.config.media_type[:100]!r}")
    if len(manifest.layers) > MAX_LAYERS:
        raise UnsupportedError(f"too many layers: {len(manifest.layers)}, at most {MAX_LAYERS}")
    return manifest


def _runtime(config: dict[str, Any] | None) -> Runtime:
    try:
        return msgspec.convert(config or {}, Runtime)
    except msgspec.ValidationError as error:
        raise CorruptError(f"malformed image configuration: {error}") from None


def _is_attestation(descriptor: Descriptor) -> bool:
    platform = descriptor.platform
    return platform is not None and platform.os == "unknown" and platform.architecture == "unknown"


def _rank(offered: Platform | None, wanted: Platform) -> int:
    """0 if `wanted` cannot run it, else the higher the better."""
    if offered is None:
        return 0
    normal = offered.normal()
    if (normal.os, normal.architecture) != (wanted.os, wanted.architecture):
        return 0
    if normal.variant == wanted.variant:
        return 1_000
    have, need = _variant_number(normal), _variant_number(wanted)
    return have if 0 < have < need else 0


def _variant_number(platform: Platform) -> int:
    variant = platform.variant or _DEFAULT_VARIANT.get(platform.architecture, "")
    digits = variant.removeprefix("v").partition(".")[0]
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 3 else 0


def _listing(descriptors: Sequence[Descriptor]) -> str:
    names = sorted({str(descriptor.platform)[:100] for descriptor in descriptors if descriptor.platform})
    listing = ", ".join(names[:50]) or "none that names a platform"
    return "".join(character if character.isprintable() else "?" for character in listing)


def _toc(compression: Compression, annotations: Annotations) -> Digest | None:
    """A malformed digest proves nothing, so the layer is a plain one."""
    if compression is not Compression.GZIP or _ESTARGZ_TOC not in annotations:
        return None
    try:
        return Digest(annotations[_ESTARGZ_TOC])
    except UsageError:
        return None
