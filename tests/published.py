"""Images in a registry that fails by script, and eStargz layers for them.

with FakeRegistry() as registry:
    reference = publish(registry, Image((estargz_layer([file("a", b"a")]),)), "some/name")
"""

from __future__ import annotations

import gzip
import hashlib
import json
from typing import TYPE_CHECKING, Any

import goestargz
from images import BLOCK, OCI_CONFIG, OCI_MANIFEST, TAR_GZIP, Image, Item, Layer, header, padded, render_tar

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from fakes import FakeRegistry

TOC_DIGEST = "containerd.io/snapshot/stargz/toc.digest"
TOC_NAME = b"stargz.index.json"


def publish(registry: FakeRegistry, image: Image, name: str, tag: str = "latest") -> str:
    """Put an image into `registry`; returns its reference."""
    for blob in image.blobs():
        registry.add_blob(blob)
    registry.add_document(name, tag, image.manifest, OCI_MANIFEST)
    return f"{registry.host}/{name}:{tag}"


def publish_manifest(
    registry: FakeRegistry,
    name: str,
    layers: Sequence[Mapping[str, Any]],
    diff_ids: Sequence[str],
    *,
    config: Mapping[str, Any] | None = None,
) -> str:
    """Put a manifest that says just this into `registry`, whether or not it makes sense; returns its reference."""
    document = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": list(diff_ids)}}
    described = {**registry.add_blob(json.dumps(document).encode()), "mediaType": OCI_CONFIG, **(config or {})}
    manifest = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": described, "layers": list(layers)}
    registry.add_document(name, "latest", manifest, OCI_MANIFEST)
    return f"{registry.host}/{name}:latest"


def estargz_layer(items: Iterable[Item], *, chunk_size: int = 0, footer: str = "estargz") -> Layer:
    """A layer that the reference implementation made eStargz of."""
    made = goestargz.convert(render_tar(items), chunk_size=chunk_size, footer=footer)
    return Layer(gzip.decompress(made.blob), made.blob, TAR_GZIP, {TOC_DIGEST: made.toc_digest})


def hand_made_estargz(rows: Sequence[Mapping[str, Any]], payload: bytes = b"", **table: Any) -> Layer:
    """A layer whose blob is `payload` (gzip members) with a table of contents that has just these rows."""
    text = json.dumps({"version": 1, "entries": list(rows), **table}).encode()
    tar = header(TOC_NAME, b"0", size=len(text)) + padded(text) + bytes(2 * BLOCK)
    blob = payload + gzip.compress(tar, 1, mtime=0) + footer(len(payload))
    digest = "sha256:" + hashlib.sha256(text).hexdigest()
    return Layer(b"never looked at", blob, TAR_GZIP, {TOC_DIGEST: digest})


def footer(toc_offset: int) -> bytes:
    """51 bytes: an empty gzip member whose extra field says where the table begins."""
    extra = b"SG" + (22).to_bytes(2, "little") + b"%016xSTARGZ" % toc_offset
    body = b"\x01\0\0\xff\xff" + bytes(8)
    return b"\x1f\x8b\x08\x04" + bytes(6) + len(extra).to_bytes(2, "little") + extra + body
