"""What a domain remembers of its layers and maps: records that outlive every process."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

from msgspec import Struct

from nsfs.model.digest import Digest


class Extent(NamedTuple):
    """One content's addresses: `size` bytes from `address`, which is a multiple of 4,096."""

    address: int
    size: int


class Slab(NamedTuple):
    """Addresses given out to one layer."""

    address: int
    size: int


@dataclass(frozen=True, slots=True)
class Access:
    """As whom a layer's bytes are asked for, and of which registry; both empty in a domain that is one owner's."""

    owner: str = ""
    """`policy.owner_name`; empty for anybody who was let in."""
    origin: str = ""
    """`origin_of` the registry."""


def origin_of(registry: str, network: str = "") -> str:
    """How a domain of several owners tells registries apart: 16 hexadecimal digits.

    `network` is where the name means that registry, for one that does not prove by TLS who it is.
    """
    return hashlib.sha256(f"{registry} {network}".encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, order=True)
class LayerKey:
    """A layer of a domain: a blob, and the index that its content is read by.

    `index` is "plain", or "estargz-" and the hex digits of the TOC's digest, or "artifact-" and those of an artifact's
    manifest: what is read by an index that is only claimed has addresses that no other index has. In a domain of
    several owners a layer is also one registry's, its `origin`: what another says that it has, it must give itself.
    """

    blob: Digest
    index: str
    origin: str = ""


class LayerRecord(Struct, frozen=True, kw_only=True):
    """What is known of a layer whose index is complete."""

    blob: Digest
    index: str
    origin: str = ""
    blob_size: int
    media_type: str
    diff_id: Digest | None
    """Where it was verified; None where it is only claimed."""
    verified: str
    """Against what the index was verified: "diff-id", "toc"; "" where an artifact claims it, and nothing was."""
    stream_size: int
    files: int
    """Regular files."""
    content_bytes: int
    """Their sizes added up."""
    slabs: tuple[Slab, ...]
    has_spans: bool = False
    """Whether absent content can be fetched by ranges."""
    whole: bool = False
    """It never can be: a frame or block is too large to be decompressed in memory. Content comes back all at once."""
    spans_blob: str = ""
    """Of an index that an artifact claims: the blob of the artifact that has the spans, by digest; they come later."""
    spans_size: int = 0
    """Bytes of that blob."""
    promised: Digest | None = None
    """The diff ID that the image's configuration says, of such a layer."""
    fenced: str = ""
    """Why nothing more is read by this index: it was found not to be the blob's."""
    no_toc: str = ""
    """Why the layer is read by this index, where its manifest promises a table of contents that was not found."""
    fetched: int = 0
    """Bytes of blob that the first pass read; 0 for a layer by its table of contents. Nothing reads it yet."""
    prefetch_size: int = 0
    """Bytes of blob that the image's builder wants fetched first (eStargz landmark)."""
    last_used: float = 0.0
    """When a mount that stands on it began or ended last, or its first pass did, in seconds since the epoch."""

    @property
    def is_claimed(self) -> bool:
        """An artifact says how it is read, and nobody has proved that."""
        return bool(self.spans_blob) and not self.verified

    @property
    def key(self) -> LayerKey:
        """What it is stored under."""
        return LayerKey(self.blob, self.index, self.origin)


class MapRecord(Struct, frozen=True, kw_only=True):
    """A layer's map, or the finding that it cannot be made without the layers below."""

    id: str
    blob: Digest
    index: str
    origin: str = ""
    path: str
    needs_lower: bool
    """There is no file: the map depends on the layers below, and is made under another ID for each stack of them."""
    marks: bool
    """Has whiteouts or opaque marks."""
    opaque: bool = False
    """Its root hides all layers below, which overlay does not understand: leave them out."""
    lowers: tuple[LayerKey, ...] = ()
    """The layers below, top first, where the map may have addresses of theirs."""

    @property
    def key(self) -> LayerKey:
        """The layer whose tree it is."""
        return LayerKey(self.blob, self.index, self.origin)


class GrantRecord(Struct, frozen=True, kw_only=True):
    """That an owner may have a blob of a repository: proved at a time, for a time; seconds since the epoch."""

    owner: str
    repository: str
    blob: Digest
    proved: float
    expires: float

    def holds(self, now: float) -> bool:
        """Whether it still does; not where the clock was set back behind it."""
        return self.proved <= now < self.expires


class ImageRecord(Struct, frozen=True, kw_only=True):
    """A resolved image as a domain remembers it: its documents, as they were served."""

    repository: str
    manifest: bytes
    media_type: str
    config: bytes
    digest: str = ""
    """Of the manifest, as it was asked for: an index or a user may name it by sha512. Empty: its sha256."""
    reference: str = ""
    """As it was named, complete; empty in records of an earlier release."""
    pinned: bool = False
    """Its contents are to be complete, and stay."""
    owner: str = ""
    """Who pinned it, where several share the domain."""
    artifact: bytes = b""
    """Manifest of an artifact beside the image, where one was believed; the same is taken again."""
    artifact_digest: str = ""

    @property
    def manifest_digest(self) -> Digest:
        """By which the manifest is known."""
        return Digest(self.digest) if self.digest else Digest.of(self.manifest)
