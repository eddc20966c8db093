"""What pulling an image into containerd amounts to: documents, labels, snapshots, an image record. Pure.

The names are containerd's: what garbage collection follows (docs/garbage-collection.md there), what its CRI plugin
tells snapshotters (pkg/snapshotters/annotations.go) and how its own pull calls half-written blobs, so that one that was
interrupted goes on whoever began it. The same from containerd 1.6 to 2.x.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from msgspec import Struct

from nsfs.model import oci
from nsfs.model.digest import chain_ids

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from nsfs.model.digest import ChainId, DiffId, Digest

MAX_LABEL = 4096
"""Of key and value together."""

UNCOMPRESSED = "containerd.io/uncompressed"
SNAPSHOT_REF = "containerd.io/snapshot.ref"
SNAPSHOT_PREFIX = "containerd.io/snapshot/"
"""Annotations of a layer that begin with it become labels of its snapshot."""

_CRI = SNAPSHOT_PREFIX + "cri."
_GC = "containerd.io/gc.ref."
_SOURCE = "containerd.io/distribution.source."
_LAYERS = ("application/vnd.oci.image.layer.", "application/vnd.docker.image.rootfs.")


@dataclass(frozen=True, slots=True)
class Content:
    """A blob or document for the content store."""

    digest: Digest
    size: int
    ref: str
    """Names it while it is being written."""
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class LayerStep:
    """One layer: its snapshot, and its blob should it be needed."""

    descriptor: oci.Descriptor
    diff_id: DiffId
    chain: ChainId
    """Names the snapshot."""
    parent: str
    """The chain below; "" for the lowest."""
    labels: Mapping[str, str]
    """Of the snapshot."""
    content: Content


@dataclass(frozen=True, slots=True)
class PullPlan:
    """All of it, in the order in which it happens."""

    name: str
    documents: tuple[tuple[Content, bytes], ...]
    """Index, manifest and configuration."""
    layers: tuple[LayerStep, ...]
    """Lowest first."""
    config: Digest
    config_labels: Mapping[str, str]
    """What the configuration is given when the snapshots are there."""
    target: oci.Descriptor
    """What the image record names."""


class PulledLayer(Struct, kw_only=True):
    """What became of a layer."""

    digest: str
    size: int
    how: str
    """present: there was such a snapshot; lazy: the snapshotter has it; unpacked: fetched, and unpacked into one."""


class PullReport(Struct, kw_only=True):
    """`nsfs pull`."""

    reference: str
    digest: str
    """Of what the image record names."""
    namespace: str
    snapshotter: str
    layers: list[PulledLayer]


def plan_pull(
    name: str, host: str, repository: str, snapshotter: str, documents: Sequence[oci.Document], config: bytes
) -> PullPlan:
    """Plan for `documents`, index first, manifest last; raises what parsing them raises.

    `host` and `repository` say where the blobs come from; containerd pulls and pushes of other images use that.
    """
    manifest_document = documents[-1]
    manifest = oci.parse_manifest(manifest_document)
    diff_ids = oci.parse_config(config, manifest).diff_ids
    source = {_SOURCE + _without_port(host): repository}
    chains = chain_ids(list(diff_ids))
    steps = tuple(
        LayerStep(
            descriptor=layer,
            diff_id=diff_id,
            chain=chain,
            parent=chains[number - 1] if number else "",
            labels=plan_snapshot_labels(name, manifest_document.digest, manifest.layers[number:], chain),
            content=Content(layer.digest, layer.size, f"layer-{layer.digest}", source),
        )
        for number, (layer, diff_id, chain) in enumerate(zip(manifest.layers, diff_ids, chains, strict=True))
    )
    stored = [(_document(document, source), document.data) for document in documents]
    stored.append((Content(manifest.config.digest, len(config), f"config-{manifest.config.digest}", source), config))
    return PullPlan(
        name=name,
        documents=tuple(stored),
        layers=steps,
        config=manifest.config.digest,
        config_labels={f"{_GC}snapshot.{snapshotter}": chains[-1]} if chains else {},
        target=_descriptor(documents[0]),
    )


def plan_snapshot_labels(
    name: str, manifest: Digest, layers: Sequence[oci.Descriptor], chain: ChainId
) -> dict[str, str]:
    """Labels of the snapshot of `layers[0]`; the others are those above it.

    What a label cannot hold is left out: from the list of layers its end, of annotations all of it.
    """
    said = {key: value for key, value in layers[0].notes.items() if key.startswith(SNAPSHOT_PREFIX)}
    ours = {
        f"{_CRI}image-ref": name,
        f"{_CRI}layer-digest": layers[0].digest,
        f"{_CRI}image-layers": _listed(f"{_CRI}image-layers", [layer.digest for layer in layers]),
        f"{_CRI}manifest-digest": manifest,
        SNAPSHOT_REF: chain,
    }
    return {key: value for key, value in (said | ours).items() if _fits(key, value)}


def plan_labels(wanted: Mapping[str, str], there: Mapping[str, str]) -> dict[str, str]:
    """What to change of the labels of a blob that is `there` already; its sources are added to, not replaced."""
    merged = {
        key: _joined(there.get(key, ""), value) if key.startswith(_SOURCE) else value for key, value in wanted.items()
    }
    return {key: value for key, value in merged.items() if there.get(key) != value}


def _joined(there: str, repository: str) -> str:
    repositories = sorted({*filter(None, there.split(",")), repository})
    return ",".join(repositories)


def _listed(key: str, digests: Sequence[str]) -> str:
    lists = itertools.accumulate(digests, "{},{}".format)
    return max((text for text in lists if _fits(key, text)), key=len)


def _fits(key: str, value: str) -> bool:
    return len(key.encode()) + len(value.encode()) <= MAX_LABEL


def _document(document: oci.Document, source: Mapping[str, str]) -> Content:
    parsed = oci.parse_document(document)
    if isinstance(parsed, oci.ImageIndex):
        return Content(
            document.digest, len(document.data), f"index-{document.digest}", {**_children(parsed.manifests), **source}
        )
    labels = _children([parsed.config, *parsed.layers])
    return Content(document.digest, len(document.data), f"manifest-{document.digest}", {**labels, **source})


def _children(descriptors: Sequence[oci.Descriptor]) -> dict[str, str]:
    """Labels by which garbage collection finds what a document names; absent blobs do no harm."""
    seen: Counter[str] = Counter()
    labels: dict[str, str] = {}
    for descriptor in descriptors:
        kind = _kind(descriptor.media_type)
        number = "" if kind == "config" else str(seen[kind])
        labels[f"{_GC}content.{kind}{number}"] = descriptor.digest
        seen[kind] += 1
    return labels


def _kind(media_type: str) -> str:
    if media_type in oci.CONFIG_TYPES:
        return "config"
    if media_type in oci.MANIFEST_TYPES:
        return "m."
    return "l." if media_type.startswith(_LAYERS) else ""


def _descriptor(document: oci.Document) -> oci.Descriptor:
    parsed = oci.parse_document(document)
    default = oci.OCI_INDEX if isinstance(parsed, oci.ImageIndex) else oci.OCI_MANIFEST
    media_type = parsed.media_type or document.media_type or default
    return oci.Descriptor(media_type=media_type, digest=document.digest, size=len(document.data))


def _without_port(host: str) -> str:
    return host.rpartition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
