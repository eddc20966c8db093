"""Recall: what turned out not to be what its image says is taken back from containerd.

A layer that was answered for while it was pending, and then fenced off, has left its mark in containerd: a snapshot
under the chain ID that its image claims, which every later pull of that chain in the namespace would find and use. So
the image's records are deleted there, its garbage is collected, and the snapshots are removed that are left, from the
highest that stands on the layer down to the layer's own. What a container still holds cannot go: it is tried again,
with growing pauses, until it can.

Owns nothing: what containerd removes, its garbage collection tells us to remove. Refuses nothing; a containerd that
cannot be reached is asked again.

Concurrency: one task for each fenced layer, which ends when there is nothing left to take back.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Final, Protocol

import trio

from nsfs.errors import NsfsError
from nsfs.model.lazy import image_of
from nsfs.model.snapshot import plan_recall

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nsfs.core.ledger import Ledger
    from nsfs.model.snapshot import Record

log = logging.getLogger(__name__)

_FIRST_PAUSE: Final = 1.0
_LONGEST_PAUSE: Final = 60.0
"""Seconds between two attempts."""
_PULL: Final = 60.0
"""Seconds for which an image without a record may be one whose pull goes on: its record is made last."""


class Runtime(Protocol):
    """containerd, as far as things are taken back from it. Raises NsfsError."""

    async def delete_images(self, namespace: str, name: str, manifest: str) -> int:
        """Delete `name`, and what else stands for the same, if that is or lists `manifest`; how many that were."""

    async def remove_snapshots(self, namespace: str, snapshotter: str, keys: Sequence[str]) -> None:
        """Collect garbage, and remove those that are left, in order; raises BusyError where something stands on one.

        Garbage first: what a failed start left stands on a layer, and once containerd has collected a snapshot it still
        counts it as a child of its parent, which then goes by a collection alone (1.6 and 2.1; seen with `ctr leases
        delete --sync`, then `ctr snapshots rm`).
        """


class Recall:
    """The service."""

    def __init__(self, ledger: Ledger, runtime: Runtime, nursery: trio.Nursery) -> None:
        self._ledger = ledger
        self._runtime = runtime
        self._nursery = nursery

    def begin(self, fenced: Record) -> None:
        """Take back what stands on a fenced layer, and the layer, in the background."""
        self._nursery.start_soon(self._take_back, fenced)

    async def _take_back(self, fenced: Record) -> None:
        pause, told = _FIRST_PAUSE, ""
        patient_until = trio.current_time() + _PULL
        while self._is_known(fenced):
            try:
                if await self._delete_images(fenced):
                    patient_until = -math.inf
                if trio.current_time() >= patient_until:
                    await self._remove_snapshots(fenced)
                    return
            except NsfsError as error:
                if error.message != told:
                    log.warning("a fenced layer is not taken back from containerd yet: %s", error)
                told = error.message
            await trio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _delete_images(self, fenced: Record) -> bool:
        """Whether there were any."""
        assert fenced.layer is not None, "only lazy layers are fenced off"
        name, manifest = image_of(fenced.labels, fenced.layer)
        deleted = await self._runtime.delete_images(fenced.namespace, name, manifest)
        if deleted:
            log.warning("image %s is deleted from containerd, namespace %s: pull it again", name, fenced.namespace)
        return deleted > 0

    async def _remove_snapshots(self, fenced: Record) -> None:
        keys = plan_recall(self._ledger.table(fenced.snapshotter).records(), fenced)
        await self._runtime.remove_snapshots(fenced.namespace, fenced.snapshotter, keys)
        log.info("snapshots are taken back from containerd, namespace %s: %s", fenced.namespace, " ".join(keys))

    def _is_known(self, fenced: Record) -> bool:
        found = self._ledger.table(fenced.snapshotter).get(fenced.name)
        return found is not None and found.id == fenced.id
