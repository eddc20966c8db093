"""Proving what an artifact says of a layer, once all of the layer is wanted here: the layer is read through.

Owns the comparison: of the index that the artifact claims with the one that was found, and of every byte that was kept
by it with the byte that belongs there. Until then new reads are led to the spans that were found, and what is under way
by others has landed. What holds is as good as read through itself; what does not is fenced off: nothing more is read by
that index, and whoever has it mounted hears why. New mounts go by what was found.

Concurrency: one layer at a time, as it is completed. A worker that dies leaves it unproved, to be proved anew.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

import msgspec
import trio

from nsfs.core.fetchplan import subtract
from nsfs.core.ports import BLOCK
from nsfs.errors import CorruptError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from nsfs.core.claimed import ClaimedLayers
    from nsfs.core.layers import Layers
    from nsfs.model.layer import Entry, LayerIndex
    from nsfs.model.pool import LayerKey, LayerRecord

log = logging.getLogger(__name__)

_PIECE: Final = 1 << 20


class Catalog(Protocol):
    """The domain's records. Writing may block."""

    def layer(self, key: LayerKey) -> LayerRecord | None:
        """A layer whose index is complete."""

    def update_layer(self, key: LayerKey, change: Callable[[LayerRecord], LayerRecord]) -> LayerRecord:
        """Replace a layer's record."""


class Contents(Protocol):
    """Layers' contents, and who reads them."""

    async def complete(self, key: LayerKey, owner: str) -> None:
        """Have all of a layer in the pool; raises NsfsError."""

    def quiet_for(self) -> float:
        """Seconds since a reader last waited for absent bytes; 0 while one does."""

    async def renew(self, key: LayerKey) -> None:
        """Read a layer by its tables as they are now; return when nothing by earlier ones is under way."""

    async def fence(self, key: LayerKey) -> None:
        """Fail whoever reads a layer, which is fenced, and drop its contents."""


class Packs(Protocol):
    """Packs that are under way."""

    async def wait_over(self, key: LayerKey) -> None:
        """Return when none brings anything of this layer."""


class Proofs:
    """The service: completes layers as `core.completing` wishes, and proves those that are only claimed."""

    def __init__(
        self, catalog: Catalog, layers: Layers, claimed: ClaimedLayers, contents: Contents, packs: Packs
    ) -> None:
        self._catalog = catalog
        self._layers = layers
        self._claimed = claimed
        self._contents = contents
        self._packs = packs

    def quiet_for(self) -> float:
        """See core.completing.Contents."""
        return self._contents.quiet_for()

    async def complete(self, key: LayerKey, owner: str) -> None:
        """Have all of a layer in the pool, proved; raises NsfsError, CorruptError where its index is fenced."""
        record = self._catalog.layer(key)
        if record is not None and record.fenced:
            return
        if record is not None and record.is_claimed:
            await self._prove(record, owner)
        await self._contents.complete(key, owner)

    async def _prove(self, record: LayerRecord, owner: str) -> None:
        try:
            await self._compare(record, owner)
        except CorruptError as error:
            await self._fence(record.key, error.message)
            raise
        log.info("layer %s is what its artifact says", record.blob)

    async def _compare(self, record: LayerRecord, owner: str) -> None:
        await self._layers.read_through(record, owner)
        await self._claimed.adopt_spans(record)
        await self._packs.wait_over(record.key)
        await self._contents.renew(record.key)
        await self._claimed.compare_contents(record)

    async def _fence(self, key: LayerKey, why: str) -> None:
        note = partial(msgspec.structs.replace, fenced=why)
        await trio.to_thread.run_sync(self._catalog.update_layer, key, note)
        await self._contents.fence(key)
        log.error("layer %s is fenced off: %s", key.blob, why)


# What jobs compare


def check_index(claimed: LayerIndex, found: LayerIndex, addresses: Sequence[int]) -> None:
    """Raise CorruptError unless an artifact claims what was found in the layer.

    `addresses` are those of the claimed entries, of which two have one where they were claimed to be the same.
    """
    if claimed.stream_size != found.stream_size or len(claimed.entries) != len(found.entries):
        raise CorruptError(
            "an artifact claims another layer: "
            f"{len(claimed.entries)} entries in {claimed.stream_size} bytes, "
            f"not {len(found.entries)} in {found.stream_size}"
        )
    for ours, theirs in zip(found.entries, claimed.entries, strict=True):
        if msgspec.structs.replace(ours, digest=b"") != theirs:
            raise CorruptError(f"an artifact claims what is not so of a file: {ours.path[:200]!r}")
    contents: dict[int, bytes] = {}
    for ours, address in zip(found.entries, addresses, strict=True):
        if address and contents.setdefault(address, ours.digest) != ours.digest:
            raise CorruptError(f"an artifact claims that a file is the same as another: {ours.path[:200]!r}")


class Pool(Protocol):
    """The domain's."""

    def missing(self, address: int, size: int) -> list[tuple[int, int]]:
        """The absent runs of blocks."""

    def read_present(self, address: int, size: int) -> bytes | memoryview | None:
        """The bytes, if all of them are there."""

    def evict(self, address: int, size: int) -> int:
        """Drop blocks."""


def check_contents(pool: Pool, files: Iterable[tuple[Entry, int, int]]) -> None:
    """Compare what is in the pool of files (with their addresses, and those of the same files as they were found).

    Raises CorruptError where bytes differ; gives up what cannot be compared, as the file's own is not there.
    """
    for entry, at, found in files:
        for start in range(0, -(-entry.size // BLOCK) * BLOCK, _PIECE):
            size = min(_PIECE, -(-entry.size // BLOCK) * BLOCK - start)
            part = (at + start, size)
            for address, length in subtract([part], pool.missing(*part)):
                _check_run(pool, entry, (address, length), address - at + found)


def _check_run(pool: Pool, entry: Entry, run: tuple[int, int], found: int) -> None:
    data = pool.read_present(*run)
    kept = None if data is None else bytes(data)
    ours = pool.read_present(found, run[1])
    if ours is None:
        pool.evict(*run)
    elif kept is not None and kept != ours:
        raise CorruptError(f"an artifact has other bytes than the layer: {entry.path[:200]!r}")
