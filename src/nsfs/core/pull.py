"""Pulling an image into containerd's own stores, so that it is an ordinary image there.

Owns the order of things: documents go into the content store, then each layer's snapshot is asked for with the labels
that let a remote snapshotter answer that it has it; only where it does not, the layer's blob is fetched and containerd
unpacks it. The image record comes last, when everything that it needs is there. Refuses a layer whose tar is not what
the configuration says.

Layers are done one after another, as snapshots stand on each other. Blobs are fetched at most `_FETCHES` at a time,
ahead of their turn from the moment on when one is needed at all.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NewType, Protocol

import trio

from nsfs.core.tasks import run_all, running
from nsfs.errors import CorruptError, ExistsError, NotFoundError, UnreachableError
from nsfs.model import oci
from nsfs.model.pull import UNCOMPRESSED, PulledLayer, PullReport, plan_labels, plan_pull
from nsfs.model.report import Progress

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from collections.abc import Set as AbstractSet
    from contextlib import AbstractAsyncContextManager

    from nsfs.core.ports import Source
    from nsfs.model.digest import Digest
    from nsfs.model.pull import Content, LayerStep, PullPlan

_FETCHES = 3
_PIECE = 1 << 20
"""Bytes of one message to containerd, whose limit is 16 MiB."""
_MAX_NESTING = 3
_ATTEMPTS = 3
"""Times that a layer is asked for whose snapshot vanishes between two questions."""

Mounts = NewType("Mounts", bytes)
"""How to reach an active snapshot; only containerd reads it."""


class Writer(Protocol):
    """A blob on its way into the content store."""

    @property
    def offset(self) -> int:
        """Bytes that the store has, perhaps from an earlier attempt."""

    async def write(self, data: bytes) -> None:
        """Append."""

    async def commit(self) -> None:
        """Keep it; raises CorruptError where size or digest are not as promised, ExistsError."""


class Containerd(Protocol):
    """One namespace of a containerd."""

    async def has_snapshotter(self, name: str) -> bool:
        """Whether there is a snapshotter of that name."""

    def lease(self) -> AbstractAsyncContextManager[None]:
        """Keep what is made meanwhile from garbage collection."""

    async def labels(self, digest: Digest) -> dict[str, str] | None:
        """Labels of a blob, None if there is no such blob."""

    async def set_labels(self, digest: Digest, labels: Mapping[str, str]) -> None:
        """Set these labels of a blob; others stay."""

    def writer(self, content: Content) -> AbstractAsyncContextManager[Writer]:
        """Write a blob; raises ExistsError where it is there."""

    async def has_snapshot(self, snapshotter: str, name: str) -> bool:
        """Whether there is a snapshot of that name."""

    async def prepare(self, snapshotter: str, key: str, parent: str, labels: Mapping[str, str]) -> Mounts:
        """Begin a snapshot; raises ExistsError where the snapshotter has what the labels name."""

    async def apply(self, descriptor: oci.Descriptor, mounts: Mounts) -> Digest:
        """Have a blob unpacked; gives the digest of its tar."""

    async def commit(self, snapshotter: str, name: str, key: str, labels: Mapping[str, str]) -> None:
        """Make an active snapshot a committed one; raises ExistsError."""

    async def remove(self, snapshotter: str, key: str) -> None:
        """Give up a snapshot, as well as it goes."""

    async def put_image(self, name: str, target: oci.Descriptor) -> None:
        """Have `name` stand for `target`."""


@dataclass(frozen=True, slots=True)
class PullWish:
    """What to pull."""

    name: str
    """Complete: registry, repository, tag or digest; containerd's name of the image."""
    registry: str
    repository: str
    identifier: str
    """Tag or digest."""
    platform: oci.Platform
    namespace: str
    snapshotter: str
    lazy: AbstractSet[Digest] = frozenset()
    """Blobs that the snapshotter is known to need no copy of; they are not fetched ahead of their turn."""


async def pull(
    wish: PullWish, source: Source, containerd: Containerd, report: Callable[[Progress], None]
) -> PullReport:
    """Pull what `wish` says; raises NsfsError with nothing left that a garbage collection would not take."""
    if not await containerd.has_snapshotter(wish.snapshotter):
        raise NotFoundError(
            f"containerd has no such snapshotter: {wish.snapshotter}",
            hint="its configuration needs [proxy_plugins.<name>]: ctr plugins ls shows what it has",
        )
    documents, config = await _fetch_documents(source, wish)
    plan = plan_pull(wish.name, wish.registry, wish.repository, wish.snapshotter, documents, config)
    async with containerd.lease():
        layers = await _Pull(wish, plan, source, containerd, report).run()
    return PullReport(
        reference=wish.name,
        digest=str(plan.target.digest),
        namespace=wish.namespace,
        snapshotter=wish.snapshotter,
        layers=layers,
    )


async def _fetch_documents(source: Source, wish: PullWish) -> tuple[list[oci.Document], bytes]:
    """Index (of index) and manifest, and the configuration."""
    documents = [await source.manifest(wish.identifier)]
    for _ in range(_MAX_NESTING):
        parsed = oci.parse_document(documents[-1])
        if isinstance(parsed, oci.Manifest):
            return documents, await source.read_blob(parsed.config, oci.MAX_CONFIG)
        documents.append(await source.manifest(oci.choose_platform(parsed, wish.platform).digest))
    raise CorruptError(f"image indexes are nested too deeply: {wish.name}")


class _Pull:
    def __init__(
        self,
        wish: PullWish,
        plan: PullPlan,
        source: Source,
        containerd: Containerd,
        report: Callable[[Progress], None],
    ) -> None:
        self._wish = wish
        self._plan = plan
        self._containerd = containerd
        self._report = report
        self._blobs = _Blobs(plan.layers, wish.lazy, source, containerd, report)

    async def run(self) -> list[PulledLayer]:
        for content, data in self._plan.documents:
            await _store(self._containerd, content, data)
        layers = []
        async with running(self._blobs.run):
            for step in self._plan.layers:
                how = await self._pull_layer(step)
                layers.append(PulledLayer(digest=str(step.descriptor.digest), size=step.descriptor.size, how=how))
        if self._plan.config_labels:
            await self._containerd.set_labels(self._plan.config, self._plan.config_labels)
        await self._containerd.put_image(self._plan.name, self._plan.target)
        return layers

    async def _pull_layer(self, step: LayerStep) -> str:
        snapshotter = self._wish.snapshotter
        was_there = await self._containerd.has_snapshot(snapshotter, step.chain)
        for _ in range(_ATTEMPTS):
            key = f"extract-{secrets.token_hex(8)} {step.chain}"
            try:
                mounts = await self._containerd.prepare(snapshotter, key, step.parent, step.labels)
            except ExistsError:
                if await self._containerd.has_snapshot(snapshotter, step.chain):
                    return "present" if was_there else "lazy"
                continue
            await self._unpack(step, key, mounts)
            return "unpacked"
        raise UnreachableError(f"the snapshotter has a layer and has it not: {step.descriptor.digest}")

    async def _unpack(self, step: LayerStep, key: str, mounts: Mounts) -> None:
        snapshotter = self._wish.snapshotter
        try:
            await self._blobs.fetch(step)
            await self._apply(step, mounts)
            await self._containerd.commit(snapshotter, step.chain, key, step.labels)
        except ExistsError:
            await self._containerd.remove(snapshotter, key)
        except BaseException:
            await self._containerd.remove(snapshotter, key)
            raise
        self._tell("unpack", step)

    async def _apply(self, step: LayerStep, mounts: Mounts) -> None:
        blob = step.descriptor
        diff_id = await self._containerd.apply(blob, mounts)
        if diff_id != step.diff_id:
            raise CorruptError(f"the image's configuration lies: layer {blob.digest} is {diff_id}, not {step.diff_id}")
        await self._containerd.set_labels(blob.digest, {UNCOMPRESSED: diff_id})

    def _tell(self, stage: str, step: LayerStep) -> None:
        size = step.descriptor.size
        self._report(Progress(stage=stage, what=_short(step.descriptor.digest), done=size, total=size))


class _Blobs:
    """The layers' blobs on their way into the content store."""

    def __init__(
        self,
        steps: Sequence[LayerStep],
        lazy: AbstractSet[Digest],
        source: Source,
        containerd: Containerd,
        report: Callable[[Progress], None],
    ) -> None:
        self._steps = {step.descriptor.digest: step for step in steps}
        self._lazy = lazy
        self._source = source
        self._containerd = containerd
        self._report = report
        self._needed = trio.Event()
        self._line = trio.CapacityLimiter(_FETCHES)
        self._locks = {digest: trio.Lock() for digest in self._steps}

    async def run(self) -> None:
        """Once a blob is needed, fetch also those that will be; lowest first, for that is the order of their turns."""
        await self._needed.wait()
        ahead = [step for digest, step in self._steps.items() if digest not in self._lazy]
        await run_all([partial(self._fetch, step) for step in ahead])
        await trio.sleep_forever()

    async def fetch(self, step: LayerStep) -> None:
        """Return when the layer's blob is in the content store."""
        self._needed.set()
        await self._fetch(step)

    async def _fetch(self, step: LayerStep) -> None:
        async with self._locks[step.descriptor.digest], self._line:
            try:
                async with self._containerd.writer(step.content) as writer:
                    await self._copy(step.descriptor, writer)
            except ExistsError:
                await _relabel(self._containerd, step.content)

    async def _copy(self, descriptor: oci.Descriptor, writer: Writer) -> None:
        size = descriptor.size
        self._tell(descriptor, writer.offset)
        if writer.offset < size:
            async with self._source.blob(descriptor).stream(writer.offset) as stream:
                async for piece in _pieces(stream):
                    await writer.write(piece)
                    self._tell(descriptor, writer.offset)
        await writer.commit()
        self._tell(descriptor, size)

    def _tell(self, descriptor: oci.Descriptor, done: int) -> None:
        self._report(Progress(stage="fetch", what=_short(descriptor.digest), done=done, total=descriptor.size))


async def _pieces(stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same bytes, in pieces that are worth a message."""
    waiting = bytearray()
    async for data in stream:
        waiting += data
        if len(waiting) >= _PIECE:
            yield bytes(waiting)
            waiting.clear()
    if waiting:
        yield bytes(waiting)


async def _store(containerd: Containerd, content: Content, data: bytes) -> None:
    try:
        async with containerd.writer(content) as writer:
            if writer.offset < len(data):
                await writer.write(data[writer.offset :])
            await writer.commit()
    except ExistsError:
        await _relabel(containerd, content)


async def _relabel(containerd: Containerd, content: Content) -> None:
    """Give a blob that was there already the labels that we would have written it with."""
    there = await containerd.labels(content.digest)
    if changes := plan_labels(content.labels, there or {}):
        await containerd.set_labels(content.digest, changes)


def _short(digest: Digest) -> str:
    return digest.hex[:12]
