"""Spans: layers that were read through become fetchable by ranges.

Owns when and how checkpoints come to be: in a lull, behind the start for which the layer was read; at once where
somebody misses what was evicted; out of an artifact where one says them. A layer that cannot be decompressed in parts
is given its contents back whole. No layer is worked on twice at a time, and what is read again goes on from its spool.

Concurrency: whatever is begun runs in the worker's nursery and ends by itself; a caller who gives up cancels nobody.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

import trio
from msgspec import Struct

from nsfs.core.claimed import LayerMade
from nsfs.core.firstpass import CheckpointJob
from nsfs.core.flights import Flights
from nsfs.errors import CorruptError, NotFoundError, NsfsError
from nsfs.model import oci
from nsfs.model.pool import Access

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator

    from nsfs.core.blobs import Blobs, OriginBlob
    from nsfs.core.claimed import ClaimedLayers
    from nsfs.core.jobs import Jobs
    from nsfs.core.lulls import Lulls
    from nsfs.core.ports import Spool
    from nsfs.model.pool import LayerKey, LayerRecord

log = logging.getLogger(__name__)

T = TypeVar("T")


class Catalog(Protocol):
    """The domain's records."""

    def layer(self, key: LayerKey) -> LayerRecord | None:
        """A layer whose index is complete."""


class Files(Protocol):
    """A layer's files."""

    @property
    def path(self) -> str:
        """The domain's directory."""

    def spool(self, key: LayerKey) -> Spool:
        """Of the layer's blob."""


class SpanArgs(Struct, kw_only=True):
    """For `make_checkpoints`."""

    domain: str
    blob: str
    origin: str
    index: str
    compression: str


class Spanning:
    """The service."""

    def __init__(
        self,
        catalog: Catalog,
        files: Files,
        blobs: Blobs,
        jobs: Jobs,
        nursery: trio.Nursery,
        *,
        claimed: ClaimedLayers,
        lulls: Lulls,
    ) -> None:
        self._catalog = catalog
        self._files = files
        self._blobs = blobs
        self._jobs = jobs
        self._nursery = nursery
        self._claimed = claimed
        self._lulls = lulls
        self._running: Flights[LayerKey] = Flights(nursery)
        self._background = trio.CapacityLimiter(1)

    def is_spooled(self, record: LayerRecord) -> bool:
        """Whether the layer's checkpoints can be made without its registry."""
        return self._files.spool(record.key).size() >= record.blob_size

    @contextmanager
    def put_off(self) -> Iterator[None]:
        """While the block lasts, and for a while after, only what somebody asks for is made."""
        with self._lulls.disturbed():
            yield

    def begin(self, keys: Iterable[LayerKey], owner: str = "") -> None:
        """Make the spans of layers that were read through, in the background."""
        for key in keys:
            self._nursery.start_soon(self._make_in_a_lull, key, owner)

    async def _make_in_a_lull(self, key: LayerKey, owner: str) -> None:
        """Make checkpoints when no start is under way, one layer at a time."""
        begun = trio.current_time()
        try:
            async with self._background:
                await self._lulls.wait(begun)
                await self.ensure(key, owner)
        except NsfsError as error:
            log.warning("no checkpoints for layer %s, which cannot be evicted without: %s", key.blob.short, error)
        except Exception:
            log.exception("a bug: no checkpoints for layer %s, which cannot be evicted without", key.blob.short)

    async def ensure(self, key: LayerKey, owner: str = "") -> LayerRecord:
        """Make the layer's content fetchable by ranges; reads the whole blob again where it is no longer spooled.

        The record says then whether it is, or can only be had `whole`.
        """
        record = self._known(key)
        if record.has_spans or record.whole:
            return record
        work = partial(self._take if record.spans_blob else self._make, record, owner)
        await self._running.join(str(key), work, owner)
        return self._known(key)

    async def _take(self, record: LayerRecord, owner: str) -> LayerKey:
        await self._claimed.take_spans(record, owner)
        return record.key

    async def _make(self, record: LayerRecord, owner: str) -> LayerKey:
        blob = self._blob(record, owner)
        return await twice(blob, partial(self._make_checkpoints, record, blob))

    async def _make_checkpoints(self, record: LayerRecord, blob: OriginBlob) -> LayerKey:
        await _fill(self._files.spool(record.key), blob)
        args = SpanArgs(
            domain=self._files.path,
            blob=str(record.blob),
            origin=record.origin,
            index=record.index,
            compression=oci.layer_format(record.media_type).compression.value,
        )
        await self._jobs.run("nsfs.layer_jobs:make_checkpoints", args, [], LayerMade)
        return record.key

    async def refill(self, key: LayerKey, work: Callable[[CheckpointJob], None], owner: str = "") -> None:
        """Read the whole blob of a layer again, and have `work` done with it in a thread."""
        record = self._known(key)
        blob = self._blob(record, owner)
        job = CheckpointJob(
            key=key,
            blob_size=record.blob_size,
            stream_size=record.stream_size,
            compression=oci.layer_format(record.media_type).compression,
            spool=self._files.spool(record.key),
        )

        async def run() -> LayerKey:
            await _fill(job.spool, blob)
            await trio.to_thread.run_sync(work, job)
            job.spool.remove()
            return key

        await self._running.join(str(key), partial(twice, blob, run), owner)

    def _blob(self, record: LayerRecord, owner: str) -> OriginBlob:
        return self._blobs.blob(record.blob, record.blob_size, Access(owner, record.origin))

    def _known(self, key: LayerKey) -> LayerRecord:
        record = self._catalog.layer(key)
        if record is None:
            raise NotFoundError(f"no such layer in this domain: {key.blob.short}")
        return record


async def twice(blob: OriginBlob, work: Callable[[], Awaitable[T]]) -> T:
    """Do work on a spooled blob; once more from nothing where what was spooled turns out to be damaged."""
    try:
        return await work()
    except CorruptError as error:
        log.warning("what came of layer %s is given up, and all of it read again: %s", blob.digest.short, error)
    return await work()


async def _fill(spool: Spool, blob: OriginBlob) -> None:
    """Complete the spool, from wherever it ends."""
    have = spool.size()
    if have >= blob.size:
        return
    with spool.appending(have) as append:
        async with blob.stream(have) as pieces:
            async for piece in pieces:
                await trio.to_thread.run_sync(append, piece)
