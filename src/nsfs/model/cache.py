"""What pools keep, and what they give up when room runs short: values, and pure decisions over them.

A layer is what goes: its contents leave the pool and come back by ranges when they are read. Refuses to give up what is
pinned, and what could not come back. What living mounts stand on goes last. Sizes are bytes, times seconds since the
epoch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from msgspec import Struct

from nsfs.model.report import Count  # noqa: TC001  msgspec looks it up when it decodes

if TYPE_CHECKING:
    from collections.abc import Iterable


class HeldLayer(Struct, frozen=True, kw_only=True):
    """One layer of a domain, and what of it is in the pool."""

    blob: str
    index: str
    origin: str = ""
    domain: str = ""
    local: Count
    """What it shares with another layer counts for both."""
    size: Count
    """Of all its contents, in whole blocks."""
    used: float
    """When a mount that stands on it began or ended last."""
    mounted: bool
    pinned: bool
    returns: bool
    """It can be fetched again by ranges, or by checkpoints that can be made of its spool."""

    @property
    def is_idle(self) -> bool:
        """Nobody would miss it."""
        return bool(self.local) and self.returns and not self.pinned and not self.mounted


class HeldImage(Struct, frozen=True, kw_only=True):
    """An image that a domain remembers."""

    reference: str
    digest: str
    blobs: list[str]
    pinned: bool
    domain: str = ""


class CachedImage(Struct, frozen=True, kw_only=True):
    """An image as `nsfs cache ls` shows it."""

    reference: str
    digest: str
    domain: str
    local: int
    """Layers that it shares with other images included."""
    size: int
    used: float
    mounted: bool
    pinned: bool


class Limits(NamedTuple):
    """How much pools may take together."""

    most: int
    reserve: int
    """Of the filesystem, which is left free."""
    high: float
    """Part of `most` beyond which contents go."""
    low: float
    """Part of it that is left then."""


def plan_room(used: int, free: int, limits: Limits) -> int:
    """How many bytes are to go, where pools take `used` and the filesystem has `free` left."""
    over = used - int(limits.most * limits.low) if used > limits.most * limits.high else 0
    return max(0, over, limits.reserve - free)


def plan_eviction(held: Iterable[HeldLayer], need: int) -> list[HeldLayer]:
    """The layers that go, so that `need` bytes are free or nothing is left that may: idle ones first, oldest first."""
    going: list[HeldLayer] = []
    candidates = [layer for layer in held if layer.local and layer.returns and not layer.pinned]
    for layer in sorted(candidates, key=lambda layer: (layer.mounted, layer.used)):
        if need <= 0:
            break
        going.append(layer)
        need -= layer.local
    return going


def plan_prune(held: Iterable[HeldLayer], before: float) -> list[HeldLayer]:
    """The idle layers that were used last before a time."""
    return [layer for layer in held if layer.is_idle and layer.used < before]


def plan_images(layers: Iterable[HeldLayer], images: Iterable[HeldImage]) -> list[CachedImage]:
    """What each image has in the pools, the one used last first; images that have nothing there are left out."""
    known: dict[tuple[str, str], list[HeldLayer]] = {}
    for layer in layers:
        known.setdefault((layer.domain, layer.blob), []).append(layer)
    found = []
    for image in images:
        parts = [part for blob in dict.fromkeys(image.blobs) for part in known.get((image.domain, blob), ())]
        if parts:
            found.append(_cached(image, parts))
    return sorted(found, key=lambda image: image.used, reverse=True)


def _cached(image: HeldImage, parts: list[HeldLayer]) -> CachedImage:
    return CachedImage(
        reference=image.reference,
        digest=image.digest,
        domain=image.domain,
        local=sum(part.local for part in parts),
        size=sum(part.size for part in parts),
        used=max(part.used for part in parts),
        mounted=all(part.mounted for part in parts),
        pinned=image.pinned,
    )
