"""Tiny deterministic layers and images: the currency of the tests.

Owns a tar writer of its own, so that parsers are never tested against themselves alone, and values for layers and
images whose digests are computed. Everything is a function of its arguments: no clock, no user names, no randomness.

    layer = gzip_layer([directory("etc"), file("etc/motd", b"hello\n"), whiteout("etc/issue")])
    write_oci_layout(path, Image((layer,)))
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zstandard

from nsfs.model.digest import Digest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

TAR = "application/vnd.oci.image.layer.v1.tar"
TAR_GZIP = TAR + "+gzip"
TAR_ZSTD = TAR + "+zstd"
DOCKER_TAR_GZIP = "application/vnd.docker.image.rootfs.diff.tar.gzip"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"

BLOCK = 512
MTIME_NS = 1_700_000_000 * 10**9
"""Of everything that names no other: a whole second, so that no PAX header is needed."""

REGULAR, HARDLINK, SYMLINK, CHARACTER, BLOCK_DEVICE, DIRECTORY, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"


@dataclass(frozen=True)
class Item:
    """One entry of a layer; made by the functions below."""

    path: bytes
    type: bytes = REGULAR
    content: bytes = b""
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime_ns: int = MTIME_NS
    link: bytes = b""
    device: tuple[int, int] = (0, 0)
    xattrs: Mapping[str, bytes] = field(default_factory=dict)
    records: tuple[tuple[bytes, bytes], ...] = ()
    """PAX records to add as they stand."""
    pieces: tuple[tuple[int, bytes], ...] | None = None
    """Of a sparse file: what lies where; `size` is then its length."""
    size: int = 0


def file(path: str | bytes, content: bytes = b"", mode: int = 0o644, **more: Any) -> Item:
    return Item(os.fsencode(path), REGULAR, content, mode, **more)


def directory(path: str | bytes, mode: int = 0o755, **more: Any) -> Item:
    return Item(os.fsencode(path).rstrip(b"/") + b"/", DIRECTORY, mode=mode, **more)


def symlink(path: str | bytes, target: str | bytes, **more: Any) -> Item:
    return Item(os.fsencode(path), SYMLINK, mode=0o777, link=os.fsencode(target), **more)


def hardlink(path: str | bytes, target: str | bytes, **more: Any) -> Item:
    return Item(os.fsencode(path), HARDLINK, link=os.fsencode(target), **more)


def character(path: str | bytes, major: int, minor: int, mode: int = 0o666, **more: Any) -> Item:
    return Item(os.fsencode(path), CHARACTER, mode=mode, device=(major, minor), **more)


def block_device(path: str | bytes, major: int, minor: int, mode: int = 0o660, **more: Any) -> Item:
    return Item(os.fsencode(path), BLOCK_DEVICE, mode=mode, device=(major, minor), **more)


def fifo(path: str | bytes, mode: int = 0o644, **more: Any) -> Item:
    return Item(os.fsencode(path), FIFO, mode=mode, **more)


def sparse(path: str | bytes, size: int, pieces: Iterable[tuple[int, bytes]], **more: Any) -> Item:
    """A file in GNU's PAX sparse format 1.0."""
    return Item(os.fsencode(path), size=size, pieces=tuple(pieces), **more)


def whiteout(path: str | bytes) -> Item:
    """What removes `path` of the layers below."""
    head, slash, name = os.fsencode(path).rpartition(b"/")
    return file(head + slash + b".wh." + name)


def opaque(path: str | bytes) -> Item:
    """What hides everything that the layers below have in the directory `path`."""
    return file(os.path.join(os.fsencode(path), b".wh..wh..opq"))


def render_tar(items: Iterable[Item], *, end: bytes = bytes(2 * BLOCK)) -> bytes:
    """The tar of `items`: ustar, with PAX headers only where ustar cannot say it."""
    return b"".join(_render_item(item) for item in items) + end


def _render_item(item: Item) -> bytes:
    if item.pieces is not None:
        item = _sparse_as_regular(item)
    records = _needed_records(item)
    extended = b""
    if records:
        body = b"".join(pax_record(key, value) for key, value in records)
        extended = header(b"PaxHeaders/x", b"x", size=len(body)) + padded(body)
    plain = header(
        item.path,
        item.type,
        size=len(item.content),
        mode=item.mode,
        uid=item.uid,
        gid=item.gid,
        mtime=max(0, item.mtime_ns // 10**9),
        link=item.link,
        device=item.device,
    )
    return extended + plain + padded(item.content)


def _needed_records(item: Item) -> list[tuple[bytes, bytes]]:
    records = list(item.records)
    if len(item.path) > 100:
        records.append((b"path", item.path))
    if len(item.link) > 100:
        records.append((b"linkpath", item.link))
    records += [(key, b"%d" % value) for key, value in ((b"uid", item.uid), (b"gid", item.gid)) if value > 0o7777777]
    if item.mtime_ns % 10**9 or item.mtime_ns < 0:
        records.append((b"mtime", _decimal_seconds(item.mtime_ns)))
    records += [(b"SCHILY.xattr." + name.encode(), value) for name, value in sorted(item.xattrs.items())]
    return records


def _decimal_seconds(nanoseconds: int) -> bytes:
    sign = b"-" if nanoseconds < 0 else b""
    seconds, rest = divmod(abs(nanoseconds), 10**9)
    return b"%s%d.%09d" % (sign, seconds, rest)


def _sparse_as_regular(item: Item) -> Item:
    assert item.pieces is not None
    numbers = [len(item.pieces), *(n for offset, data in item.pieces for n in (offset, len(data)))]
    payload = padded(b"".join(b"%d\n" % n for n in numbers)) + b"".join(data for _, data in item.pieces)
    records = (
        (b"GNU.sparse.major", b"1"),
        (b"GNU.sparse.minor", b"0"),
        (b"GNU.sparse.name", item.path),
        (b"GNU.sparse.realsize", b"%d" % item.size),
    )
    return replace(item, path=b"GNUSparseFile.0/x", content=payload, records=records, pieces=None)


def pax_record(key: bytes, value: bytes) -> bytes:
    """`length key=value\\n`, where the length counts itself."""
    length = len(key) + len(value) + 3
    while len(b"%d" % length) + len(key) + len(value) + 3 != length:
        length = len(b"%d" % length) + len(key) + len(value) + 3
    return b"%d %s=%s\n" % (length, key, value)


def header(
    path: bytes,
    kind: bytes,
    *,
    size: int = 0,
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    mtime: int = 0,
    link: bytes = b"",
    device: tuple[int, int] = (0, 0),
    magic: bytes = b"ustar\x0000",
    prefix: bytes = b"",
) -> bytes:
    """One 512-byte header block, for tests that build an archive by hand; long values are cut."""
    fields = [
        path[:100].ljust(100, b"\0"),
        *(b"%07o\0" % min(number, 0o7777777) for number in (mode, uid, gid)),
        b"%011o\0" % min(size, 0o77777777777),
        b"%011o\0" % mtime,
        b" " * 8,
        kind,
        link[:100].ljust(100, b"\0"),
        magic,
        bytes(64),
        *(b"%07o\0" % number for number in device),
        prefix.ljust(167, b"\0"),
    ]
    return checksummed(b"".join(fields))


def checksummed(block: bytes) -> bytes:
    """`block` with its header checksum put right, for tests that bend a field."""
    total = sum(block) - sum(block[148:156]) + 8 * 0x20
    return block[:148] + b"%06o\0 " % total + block[156:]


def padded(data: bytes) -> bytes:
    """`data` and zeros up to a whole number of 512-byte blocks."""
    return data + bytes(-len(data) % BLOCK)


@dataclass(frozen=True)
class Layer:
    """A layer: its tar and its blob."""

    tar: bytes
    blob: bytes
    media_type: str
    annotations: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> Digest:
        return Digest.of(self.blob)

    @property
    def diff_id(self) -> Digest:
        return Digest.of(self.tar)

    def descriptor(self) -> dict[str, Any]:
        return _descriptor(self.media_type, self.blob, self.annotations)


def tar_layer(items: Iterable[Item] | bytes) -> Layer:
    tar = items if isinstance(items, bytes) else render_tar(items)
    return Layer(tar, tar, TAR)


def gzip_layer(items: Iterable[Item] | bytes, *, level: int = 6, members: int = 1) -> Layer:
    """A tar+gzip layer, cut into so many members."""
    tar = items if isinstance(items, bytes) else render_tar(items)
    return Layer(tar, b"".join(gzip.compress(part, level, mtime=0) for part in _parts(tar, members)), TAR_GZIP)


def zstd_layer(items: Iterable[Item] | bytes, *, level: int = 3, frames: int = 1, skippable: bytes = b"") -> Layer:
    """A tar+zstd layer, cut into so many frames, each followed by a skippable frame of these bytes if there are any."""
    tar = items if isinstance(items, bytes) else render_tar(items)
    skip = b"\x50\x2a\x4d\x18" + len(skippable).to_bytes(4, "little") + skippable if skippable else b""
    compressor = zstandard.ZstdCompressor(level)
    return Layer(tar, b"".join(compressor.compress(part) + skip for part in _parts(tar, frames)), TAR_ZSTD)


def _parts(data: bytes, count: int) -> list[bytes]:
    size = max(1, -(-len(data) // count))
    return [data[start : start + size] for start in range(0, len(data), size)] or [b""]


@dataclass(frozen=True)
class Image:
    """An image for one platform."""

    layers: Sequence[Layer]
    config: Mapping[str, Any] = field(default_factory=lambda: {"Env": ["PATH=/usr/bin:/bin"], "Cmd": ["/bin/sh"]})
    architecture: str = "amd64"
    os: str = "linux"
    variant: str | None = None

    @property
    def platform(self) -> dict[str, str]:
        platform = {"architecture": self.architecture, "os": self.os}
        return platform | {"variant": self.variant} if self.variant else platform

    @property
    def config_blob(self) -> bytes:
        diff_ids = [layer.diff_id for layer in self.layers]
        return _json(self.platform | {"config": dict(self.config), "rootfs": {"type": "layers", "diff_ids": diff_ids}})

    @property
    def manifest(self) -> bytes:
        return _json(
            {
                "schemaVersion": 2,
                "mediaType": OCI_MANIFEST,
                "config": _descriptor(OCI_CONFIG, self.config_blob),
                "layers": [layer.descriptor() for layer in self.layers],
            }
        )

    @property
    def digest(self) -> Digest:
        return Digest.of(self.manifest)

    def descriptor(self) -> dict[str, Any]:
        return _descriptor(OCI_MANIFEST, self.manifest) | {"platform": self.platform}

    def blobs(self) -> list[bytes]:
        """All that a registry needs to have before the manifest."""
        return [*(layer.blob for layer in self.layers), self.config_blob]


def image_index(images: Iterable[Image]) -> bytes:
    """An OCI image index over `images`, one per platform."""
    manifests = [image.descriptor() for image in images]
    return _json({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests})


def write_oci_layout(path: str | Path, *images: Image, tag: str = "latest") -> Path:
    """Make, or add to, an OCI image layout. Several images become one index, under one tag."""
    root = Path(path)
    (root / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
    (root / "oci-layout").write_bytes(_json({"imageLayoutVersion": "1.0.0"}))
    for blob in [blob for image in images for blob in (*image.blobs(), image.manifest)]:
        _write_blob(root, blob)
    if len(images) == 1:
        top = images[0].descriptor()
    else:
        index = image_index(images)
        _write_blob(root, index)
        top = _descriptor(OCI_INDEX, index)
    _tag(root / "index.json", top, tag)
    return root


def _tag(path: Path, descriptor: dict[str, Any], tag: str) -> None:
    key = "org.opencontainers.image.ref.name"
    known = json.loads(path.read_bytes())["manifests"] if path.exists() else []
    others = [one for one in known if one.get("annotations", {}).get(key) != tag]
    manifests = [*others, descriptor | {"annotations": {key: tag}}]
    path.write_bytes(_json({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests}))


def _write_blob(root: Path, blob: bytes) -> None:
    (root / "blobs" / "sha256" / hashlib.sha256(blob).hexdigest()).write_bytes(blob)


def _descriptor(media_type: str, blob: bytes, annotations: Mapping[str, str] | None = None) -> dict[str, Any]:
    descriptor: dict[str, Any] = {"mediaType": media_type, "digest": Digest.of(blob), "size": len(blob)}
    return descriptor | {"annotations": dict(annotations)} if annotations else descriptor


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def sample_content(size: int, seed: int = 0) -> bytes:
    """`size` bytes that compress somewhat and differ everywhere: a stand-in for real files."""
    words = bytearray()
    state = zlib.crc32(b"%d" % seed)
    while len(words) < size:
        state = zlib.crc32(state.to_bytes(4, "little"))
        words += b"%08x %d\n" % (state, len(words))
    return bytes(words[:size])
