"""The artifact beside an image that says how its unchanged layers are read: its manifest, and the blobs of each layer.

Owns the media types and the bytes (docs/artifact.md): an OCI manifest whose `subject` is the image's; per layer one
blob with its entries, and one with its spans and checkpoints, which are ten times as large and wanted much later.

Whoever may push to a repository may attach one, so all of it is a claim. Refused is what no parser of a layer would
have made: names that leave the root, files whose bytes lie outside of the stream, in each other or out of order, spans
that are not the whole stream or lie outside of the blob. Whether the claim is true, only the blob tells. Pure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import msgspec
from msgspec import Struct

from nsfs.errors import CorruptError, NsfsError
from nsfs.format.box import parse_box, render_box
from nsfs.format.paths import are_clean, clean_path
from nsfs.format.spans import is_decodable
from nsfs.format.tar import MAX_ENTRIES
from nsfs.model import oci
from nsfs.model.digest import Digest
from nsfs.model.layer import Codec, Covers, Entry, Kind, LayerIndex, Span, Spans
from nsfs.model.oci import Compression, Descriptor

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

ARTIFACT_TYPE: Final = "application/vnd.nsfs.index.v1"
INDEX_TYPE: Final = "application/vnd.nsfs.index.layer.v1+zstd"
SPANS_TYPE: Final = "application/vnd.nsfs.index.spans.v1+zstd"
TABLE_TYPE: Final = "application/vnd.nsfs.index.pack.v1+zstd"
PACK_TYPE: Final = "application/vnd.nsfs.pack.v2"
EMPTY: Final = b"{}"
"""An artifact's configuration, which says nothing but, as its media type, what it is: before `artifactType` there was
(OCI image specification 1.1, "Guidelines for Artifact Usage"), registries' lists were filtered by that."""
LAYER: Final = "dev.nsfs.layer"
"""The annotation that names the layer's blob which a blob of the artifact is about."""
CREATED: Final = "org.opencontainers.image.created"
PROMISE: Final = "dev.nsfs.pack"
"""The annotation that names the pack: digest, size, and bytes of what it begins with. Registries' lists have it (OCI
distribution specification 1.1, "Listing Referrers"): who reads one can ask for that beside the manifest."""

MAX_BLOB: Final = 64 << 20
"""Bytes of an index or of spans as they are sent. Checkpoints take 12 KiB for each MiB of stream: 5 GiB of it."""
_MAX_INDEX: Final = 256 << 20
_MAX_SPANS: Final = 128 << 20
_LEVEL: Final = 12
_INDEX_MAGIC: Final = b"nsfscidx"
_SPANS_MAGIC: Final = b"nsfscspn"
_MAX_SIZE: Final = 1 << 62
_MAX_WINDOW: Final = 33 << 10
"""Bytes of a checkpoint's window as zlib has it; 32 KiB that do not compress take a few more."""
_MAX_TEXT: Final = 200
_REGULAR: Final = Kind.REGULAR
_PROMISED: Final = re.compile(r"([^ ]{1,200}) ([0-9]{1,12}) ([0-9]{1,12})", re.ASCII)

CODECS: Final = {Compression.NONE: Codec.NONE, Compression.GZIP: Codec.DEFLATE, Compression.ZSTD: Codec.ZSTD}
"""How the spans of a layer's tar are compressed."""


# The manifest


@dataclass(frozen=True, slots=True)
class ClaimedLayer:
    """What an artifact has of one layer."""

    blob: Digest
    index: Descriptor
    spans: Descriptor


@dataclass(frozen=True, slots=True)
class StartupPack:
    """What a start of the image reads: where each piece of it is in the pack, and the pack."""

    head: tuple[Descriptor, ...]
    """Blobs that the pack begins with, as they are: what is wanted before its pieces. The last one is its table."""
    pack: Descriptor

    @property
    def table(self) -> Descriptor:
        """Where each piece is."""
        return self.head[-1]

    @property
    def size(self) -> int:
        """Bytes of its pieces."""
        return self.pack.size - sum(each.size for each in self.head)


@dataclass(frozen=True, slots=True)
class Artifact:
    """What a manifest says. Each layer is there once."""

    subject: Digest
    """The image's manifest."""
    layers: tuple[ClaimedLayer, ...]
    pack: StartupPack | None = None
    created: str = ""
    """RFC 3339; of no consequence but which of several is newer."""

    @property
    def size(self) -> int:
        """Bytes of all its blobs."""
        blobs = [each for layer in self.layers for each in (layer.index, layer.spans)]
        return sum(each.size for each in [*blobs, *((self.pack.table, self.pack.pack) if self.pack else ())])


def plan_artifact(subject: Digest, blobs: Iterable[tuple[Descriptor, str]], created: str) -> Artifact:
    """The artifact that these blobs make: each with the layer that it is about, "" for those about the image."""
    noted = [_noted(each, Digest(layer)) if layer else each for each, layer in blobs]
    return _artifact(subject, noted, created)


class _Manifest(Struct, kw_only=True, rename="camel", omit_defaults=True):
    schema_version: Literal[2]
    media_type: Literal["application/vnd.oci.image.manifest.v1+json"]
    artifact_type: Literal["application/vnd.nsfs.index.v1"]
    config: Descriptor
    layers: list[Descriptor]
    subject: Descriptor
    annotations: dict[str, str] = {}


def render_manifest(artifact: Artifact, subject: Descriptor) -> bytes:
    """The manifest of `artifact`, attached to `subject`."""
    blobs = [_noted(each, layer.blob) for layer in artifact.layers for each in (layer.index, layer.spans)]
    pack = [artifact.pack.table, artifact.pack.pack] if artifact.pack else []
    manifest = _Manifest(
        schema_version=2,
        media_type="application/vnd.oci.image.manifest.v1+json",
        artifact_type="application/vnd.nsfs.index.v1",
        config=Descriptor(media_type=ARTIFACT_TYPE, digest=Digest.of(EMPTY), size=len(EMPTY)),
        layers=[*blobs, *pack],
        subject=subject,
        annotations=plan_notes(artifact),
    )
    return msgspec.json.encode(_without_none(msgspec.to_builtins(manifest, enc_hook=str)), order="deterministic")


def plan_notes(artifact: Artifact) -> dict[str, str]:
    """The annotations of an artifact's manifest, and so of its entry in lists."""
    created = {CREATED: artifact.created} if artifact.created else {}
    return created if artifact.pack is None else created | {PROMISE: _render_promise(artifact.pack)}


def _render_promise(pack: StartupPack) -> str:
    return f"{pack.pack.digest} {pack.pack.size} {pack.pack.size - pack.size}"


class PromisedPack(NamedTuple):
    """What a list says of an artifact's pack."""

    pack: Descriptor
    head: int
    """Bytes that it begins with, before its pieces."""


def parse_promise(notes: Mapping[str, str]) -> PromisedPack | None:
    """The pack that an artifact with these annotations says it has; None where it says nothing that can be."""
    found = _PROMISED.fullmatch(notes.get(PROMISE, ""))
    if found is None:
        return None
    try:
        pack = Descriptor(media_type=PACK_TYPE, digest=Digest(found[1]), size=int(found[2]))
    except NsfsError:
        return None
    head = int(found[3])
    return PromisedPack(pack, head) if head <= min(pack.size, MAX_BLOB) else None


def _noted(descriptor: Descriptor, blob: Digest) -> Descriptor:
    return msgspec.structs.replace(descriptor, annotations={LAYER: str(blob)})


def _without_none(value: object) -> object:
    """JSON without members that are null, which the specification knows not."""
    if isinstance(value, dict):
        return {key: _without_none(each) for key, each in value.items() if each is not None}
    return [_without_none(each) for each in value] if isinstance(value, list) else value


def parse_manifest(data: bytes) -> Artifact:
    """What `render_manifest` wrote, or anybody; raises CorruptError."""
    if len(data) > oci.MAX_MANIFEST:
        raise CorruptError(f"an artifact's manifest is larger than allowed: {len(data)} bytes")
    manifest = oci.decode(data, _Manifest, "manifest of an artifact")
    if len(manifest.layers) > 2 * oci.MAX_LAYERS + 2:
        raise CorruptError(f"an artifact has too many blobs: {len(manifest.layers)}")
    return _artifact(manifest.subject.digest, manifest.layers, manifest.annotations.get(CREATED, "")[:_MAX_TEXT])


def _artifact(subject: Digest, blobs: Sequence[Descriptor], created: str) -> Artifact:
    indexes, spans = _by_layer(blobs, INDEX_TYPE), _by_layer(blobs, SPANS_TYPE)
    if indexes.keys() != spans.keys():
        raise CorruptError("an artifact has a layer's index without its spans, or spans alone")
    layers = tuple(ClaimedLayer(blob, index, spans[blob]) for blob, index in indexes.items())
    return Artifact(subject, layers, _find_pack(blobs), created)


def plan_head(media_types: Iterable[str]) -> list[int]:
    """Which of an artifact's blobs its pack begins with, and in which order: layers' indexes, then its table."""
    numbered = list(enumerate(media_types))
    return [number for kind in (INDEX_TYPE, TABLE_TYPE) for number, each in numbered if each == kind]


def _by_layer(blobs: Iterable[Descriptor], media_type: str) -> dict[Digest, Descriptor]:
    found: dict[Digest, Descriptor] = {}
    for each in blobs:
        if each.media_type != media_type:
            continue
        try:
            blob = Digest(each.notes.get(LAYER, ""))
        except NsfsError as error:
            raise CorruptError(f"a blob of an artifact is about no layer: {error}") from None
        if blob in found or each.size > MAX_BLOB:
            raise CorruptError(f"an artifact is about a layer twice, or has too much of it: {blob}")
        found[blob] = each
    return found


def _find_pack(blobs: Sequence[Descriptor]) -> StartupPack | None:
    tables = [each for each in blobs if each.media_type == TABLE_TYPE]
    packs = [each for each in blobs if each.media_type == PACK_TYPE]
    if len(tables) != len(packs) or len(tables) > 1:
        raise CorruptError(f"an artifact has {len(packs)} packs, and {len(tables)} tables of such")
    if tables and tables[0].size > MAX_BLOB:
        raise CorruptError(f"the table of a pack is larger than allowed: {tables[0].size} bytes")
    if not tables:
        return None
    found = StartupPack(tuple(blobs[number] for number in plan_head(each.media_type for each in blobs)), packs[0])
    if found.size < 0:
        raise CorruptError(f"a pack is smaller than what it begins with: {packs[0].size} bytes")
    return found


# A layer's index


class ClaimedIndex(NamedTuple):
    """A layer's index, as an artifact has it."""

    layer: LayerIndex
    twins: dict[int, int]
    """Numbers of entries that have the contents of an earlier one, which is none of them itself."""


class _Index(Struct, frozen=True, array_like=True):
    stream_size: int
    entries: list[Entry]
    twins: list[tuple[int, int]] = []


def render_index(index: LayerIndex) -> bytes:
    """A layer's entries, without the digests of their contents: nobody may believe these. But which are the same."""
    entries = [msgspec.structs.replace(entry, digest=b"") if entry.digest else entry for entry in index.entries]
    return render_box(_INDEX_MAGIC, _Index(index.stream_size, entries, _find_twins(index.entries)), _LEVEL)


def _find_twins(entries: Sequence[Entry]) -> list[tuple[int, int]]:
    first: dict[bytes, int] = {}
    known = [(number, entry.digest) for number, entry in enumerate(entries) if entry.digest and entry.size]
    return [(number, first[digest]) for number, digest in known if first.setdefault(digest, number) != number]


def parse_index(data: bytes) -> ClaimedIndex:
    """What `render_index` wrote, or anybody, with all invariants of `Entry`; raises CorruptError, UnsupportedError."""
    found = parse_box(data, _INDEX_MAGIC, _Index, _MAX_INDEX, "a layer's index")
    if not 0 <= found.stream_size <= _MAX_SIZE or len(found.entries) > MAX_ENTRIES:
        raise CorruptError(f"a layer's index is of too much: {len(found.entries)} entries, {found.stream_size} bytes")
    at = 0
    _check_paths(found.entries)
    for entry in found.entries:
        _check_entry(entry)
        at = _check_segments(entry, at)
    if at > found.stream_size:
        raise CorruptError(f"a file of a layer's index ends behind the stream: {at} of {found.stream_size} bytes")
    _check_twins(found)
    return ClaimedIndex(LayerIndex(found.entries, found.stream_size), dict(found.twins))


def _check_twins(found: _Index) -> None:
    """Such are files of one size, each named once."""
    twins, entries = dict(found.twins), found.entries
    for number, earlier in found.twins:
        if not 0 <= earlier < number < len(entries) or earlier in twins:
            raise CorruptError(f"a file of a layer's index is the same as what cannot be: {number} as {earlier}")
        if entries[earlier].size != entries[number].size or not entries[number].size:
            raise CorruptError(f"a file of a layer's index is no other's twin: {entries[number].path[:200]!r}")
    if len(twins) < len(found.twins):
        raise CorruptError("a file of a layer's index is the same as two others")


def _check_paths(entries: Sequence[Entry]) -> None:
    if not are_clean(entry.path for entry in entries):
        name = next(entry.path for entry in entries if clean_path(entry.path) != entry.path)
        raise CorruptError(f"a path of a layer's index is not clean: {name[:200]!r}")


def _check_entry(entry: Entry) -> None:
    kind, name = entry.kind, entry.path
    if entry.mode & ~0o7777 or not (0 <= entry.uid < 1 << 32 and 0 <= entry.gid < 1 << 32):
        raise CorruptError(f"an entry of a layer's index has a mode or an owner that cannot be: {name[:200]!r}")
    if not -_MAX_SIZE * 2 < entry.mtime_ns < _MAX_SIZE * 2 or entry.digest:
        raise CorruptError(f"an entry of a layer's index has a time that cannot be, or a digest: {name[:200]!r}")
    if kind is not _REGULAR and (entry.size or entry.segments):
        raise CorruptError(f"an entry of a layer's index has contents, and is no file: {name[:200]!r}")
    if kind is not _REGULAR or entry.link:
        _check_link(entry)
    if entry.device != (0, 0):
        _check_device(entry)


def _check_device(entry: Entry) -> None:
    name = entry.path
    if entry.kind not in (Kind.CHARACTER, Kind.BLOCK):
        raise CorruptError(f"an entry of a layer's index has a device's number, and is none: {name[:200]!r}")
    if not (0 <= entry.device[0] < 1 << 12 and 0 <= entry.device[1] < 1 << 20):
        raise CorruptError(f"a device of a layer's index has a number that cannot be: {name[:200]!r}")


def _check_link(entry: Entry) -> None:
    if entry.kind is Kind.HARDLINK:
        sound = clean_path(entry.link) == entry.link
    else:
        sound = len(entry.link) <= 4096 and (not entry.link or entry.kind is Kind.SYMLINK)
    if not sound:
        raise CorruptError(f"an entry of a layer's index leads nowhere: {entry.path[:200]!r}")


def _check_segments(entry: Entry, at: int) -> int:
    """Files lie in the stream in their order, without overlap, from `at` on; gives where this one ends."""
    if not 0 <= entry.size <= _MAX_SIZE:
        raise CorruptError(f"a file of a layer's index has a size that cannot be: {entry.path[:200]!r}")
    position = 0
    for segment in entry.segments:
        file_offset, stream_offset, length = segment.file_offset, segment.stream_offset, segment.length
        if length <= 0 or file_offset < position or stream_offset < at:
            raise CorruptError(f"the pieces of a file are not in order: {entry.path[:200]!r}")
        position, at = file_offset + length, stream_offset + length
    if position > entry.size or at > _MAX_SIZE:
        raise CorruptError(f"the pieces of a file are more than its size: {entry.path[:200]!r}")
    return at


# A layer's spans


class _Spans(Struct, frozen=True, array_like=True):
    codec: Codec
    spans: list[Span]


def render_spans(spans: Spans) -> bytes:
    """A plain layer's spans, with the windows of its checkpoints."""
    assert spans.covers is Covers.COMPRESSED, "of a plain layer"
    return render_box(_SPANS_MAGIC, _Spans(spans.codec, spans.spans), _LEVEL)


def parse_spans(data: bytes, codec: Codec, stream_size: int, blob_size: int) -> Spans:
    """What `render_spans` wrote, or anybody: spans of `codec` that are the whole stream, and inside of the blob.

    Raises CorruptError, UnsupportedError.
    """
    found = parse_box(data, _SPANS_MAGIC, _Spans, _MAX_SPANS, "the spans of a layer")
    if found.codec is not codec:
        raise CorruptError(f"the spans of a layer are compressed as it is not: {found.codec.name.lower()}")
    at = offset = 0
    for span in found.spans:
        if span.start != at or span.offset < offset:
            raise CorruptError(f"the spans of a layer are not in order: byte {span.start} of the stream after {at}")
        _check_span(span, blob_size)
        at, offset = at + span.size, span.offset
    if at != stream_size:
        raise CorruptError(f"the spans of a layer are not its stream: {at} of {stream_size} bytes")
    return Spans(codec, Covers.COMPRESSED, found.spans)


def _check_span(span: Span, blob_size: int) -> None:
    if not is_decodable(span) or span.length <= 0 or span.size <= 0 or span.skip:
        raise CorruptError(f"a span of a layer has a size that cannot be: byte {span.start} of the stream")
    if span.offset + span.length > blob_size:
        raise CorruptError(f"a span of a layer lies outside of its blob: byte {span.start} of the stream")
    if not 0 <= span.bits <= 7 or len(span.window) > _MAX_WINDOW or len(span.digest) != 32:
        raise CorruptError(f"a span of a layer cannot be restarted: byte {span.start} of the stream")
