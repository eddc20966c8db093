"""Layers that containerd need not download: what it says of them, what is remembered, under which names. Pure.

A client that allows it names, in the labels of a Prepare, the snapshot that it would commit in the end (its chain ID),
and the layer's blob, manifest and image. Labels are claims: descriptors' annotations flow into them. Nothing here is a
credential or a choice of scope, and a record is bound to its namespace, parent, image, blob and chain ID at once, so
that a claim never finds what another's claim made.
"""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from nsfs.errors import UsageError
from nsfs.model.digest import Digest
from nsfs.model.filters import Operator

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nsfs.model.filters import Filters

SNAPSHOT_REF: Final = "containerd.io/snapshot.ref"
_PREFIX: Final = "containerd.io/snapshot/cri."
_UNPACK: Final = "extract-"
"""How keys begin under which containerd unpacks layers (core/unpack, containerd 1.6 to 2.x)."""


class State(enum.StrEnum):
    """How far a layer is proved to be what its image says."""

    PENDING = "pending"
    """It is still being read for the first time."""
    UNREAD = "unread"
    """Each mount reads and proves it for itself: there is no domain that would outlive the pull."""
    READY = "ready"
    FENCED = "fenced"
    """It is not: nobody sees it."""


class LazyLayer(Struct, frozen=True, kw_only=True):
    """A layer by its names; a domain's worker serves it."""

    reference: str
    """The image, by its manifest's digest."""
    blob: str
    chain: str
    state: State = State.PENDING
    reason: str = ""
    """Why it is fenced."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """What containerd asks once, right after ALREADY_EXISTS: which snapshot it is."""

    target: str
    parent: str


def is_offered(labels: Mapping[str, str]) -> bool:
    """Whether the caller would take an existing snapshot instead of a new one."""
    return SNAPSHOT_REF in labels


def is_unpack(key: str) -> bool:
    """Whether the caller will write a layer, with the mounts that it gets, and not ask for mounts again.

    No container's name has a space (pkg/identifiers).
    """
    name = key.split("/", 2)[-1]
    return name.startswith(_UNPACK) and " " in name


def parse_offer(labels: Mapping[str, str]) -> LazyLayer:
    """The layer that labels name; raises UsageError with what is missing or malformed."""
    missing = [name for name in ("image-ref", "manifest-digest", "layer-digest") if not labels.get(_PREFIX + name)]
    if missing:
        raise UsageError(f"the client does not say which layer it is: no label {_PREFIX}{missing[0]}")
    image = labels[_PREFIX + "image-ref"]
    if image.startswith("oci:"):
        raise UsageError(f"no image of a registry: {image[:200]}")
    manifest = Digest(labels[_PREFIX + "manifest-digest"])
    return LazyLayer(
        reference=f"{image.partition('@')[0]}@{manifest}",
        blob=str(Digest(labels[_PREFIX + "layer-digest"])),
        chain=str(Digest(labels[SNAPSHOT_REF])),
    )


def image_of(labels: Mapping[str, str], layer: LazyLayer) -> tuple[str, str]:
    """Under which name the client pulled the image of `layer`, by its labels, and its manifest's digest."""
    name, _, manifest = layer.reference.rpartition("@")
    return labels.get(_PREFIX + "image-ref", name), manifest


def lazy_name(namespace: str, snapshotter: str, parent: str, layer: LazyLayer) -> str:
    """The name of the committed snapshot; garbage collection names no namespace, so the name says it."""
    bound = hashlib.sha256(f"{parent}\n{layer.blob}\n{layer.reference}".encode()).hexdigest()
    return f"{namespace}/lazy/{snapshotter}/{layer.chain}/{bound[:16]}"


def parse_exchange(filters: Filters) -> Exchange | None:
    """The question of an exchange; None for any other List (core/metadata/snapshot.go, containerd 1.6 to 2.x)."""
    match filters.alternatives:
        case [[ref, parent]] if ref.path == ("labels", SNAPSHOT_REF) and parent.path == ("parent",):
            if ref.operator is parent.operator is Operator.EQUAL:
                return Exchange(ref.value, parent.value)
    return None
