"""Recorded starts on a mock clock: the reads that one sent are put to a fetcher again, over a line that is simulated.

So a few percent of difference are seen on a busy machine, and the same start is compared with itself. A read begins
when the one whose answer it followed is answered, plus the time that was between them then. The bytes are the image's
own, and all is decompressed, verified and stored; but a thread's work takes no time of the clock except `_LANDING`.
"""

from __future__ import annotations

import contextlib
import math
import re
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar, cast

import trio
import trio.testing

from nsfs.core.fetcher import Fetcher, open_fetcher
from nsfs.core.fetchview import LayerSource, View
from nsfs.model.digest import Digest
from nsfs.model.route import RouteMeter
from nsfs.store.layers import open_table
from nsfs.store.layout import DomainLayout
from nsfs.store.pool import Pool, open_pool
from nsfs.store.poolfiles import create_bitmap

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from nsfs.bench.line import Shape
    from nsfs.core.ports import Blob
    from nsfs.store.crypt import DomainKey

T = TypeVar("T")

_PIECE = 16 << 10
_BUFFERED = 0.25
"""Seconds' worth of one answer's bytes that are under way: `nsfs.bench.line` has it so, too."""
_LANDING = 0.010
"""Seconds of a thread for each flight."""
_THREADS = 2
_LINE = re.compile(r"bench\.traced\S*: (read|served) (\S+) (\S+ \d+ \d+) ?(\S*)")


class Read(NamedTuple):
    """One that the kernel sent."""

    after: int
    """Number of the read whose answer it followed; -1 for the start itself."""
    seconds: float
    """Between that and this."""
    view: str
    address: int
    size: int
    layers: tuple[str, ...]
    """`<blob>/<index>` of those that the view asks, in their order."""


class Layer(NamedTuple):
    """What a layer is read by: the directory of its tables, which are under a key, and its blob."""

    directory: str
    blob: bytes
    key: DomainKey | None


class Replayed(NamedTuple):
    """What a start took."""

    seconds: float
    received: int
    """Bytes."""


def parse_reads(lines: Iterable[str]) -> list[Read]:
    """The reads in the log of a daemon of `bench.traced`."""
    reads: list[Read] = []
    latest: dict[str, int] = {}
    after, since = -1, math.inf
    for found in filter(None, map(_LINE.search, lines)):
        kind, time, place, layers = found.groups()
        at = float(time)
        if kind == "read":
            view, address, size = place.split()
            latest[place] = len(reads)
            reads.append(Read(after, max(0.0, at - since), view, int(address), int(size), tuple(layers.split(","))))
        else:
            after = latest[place]
        since = at if kind == "served" else min(since, at)
    return reads


def replay(reads: Sequence[Read], layers: Mapping[str, Layer], shape: Shape, directory: str) -> Replayed:
    """What they take with an empty pool in `directory`, which must be empty."""
    layout = DomainLayout(directory)
    bitmap = create_bitmap(layout)
    with open(bitmap, "rb"), contextlib.closing(open_pool(layout, bitmap)) as pool:
        return trio.run(_replay, reads, layers, shape, pool, clock=trio.testing.MockClock(autojump_threshold=0))


async def _replay(reads: Sequence[Read], layers: Mapping[str, Layer], shape: Shape, pool: Pool) -> Replayed:
    line, threads = _Line(shape), trio.Semaphore(_THREADS)

    async def run_in_thread(work: Callable[[], T], /) -> T:
        async with threads:
            await trio.sleep(_LANDING)
            return work()

    async with open_fetcher(pool, run_in_thread=run_in_thread, jitter=lambda: 1.0) as fetcher:
        sources = {key: _source(key, layer, line) for key, layer in layers.items()}
        began = trio.current_time()
        await _send(reads, fetcher, sources)
        return Replayed(trio.current_time() - began, line.received)


def _source(key: str, layer: Layer, line: _Line) -> LayerSource:
    table, route = open_table(layer.directory, layer.key), partial(line.meter.route, "line")
    blob = _Blob(Digest(key.partition("/")[0]), layer.blob, line)
    return LayerSource(key, table, cast("Blob", blob), route=route)


async def _send(reads: Sequence[Read], fetcher: Fetcher, sources: Mapping[str, LayerSource]) -> None:
    """All of them, each in its turn."""
    views = {read.view: View(read.view, [sources[key] for key in read.layers]) for read in reads}
    answered = [trio.Event() for _ in reads]

    async def send(number: int, read: Read) -> None:
        if read.after >= 0:
            await answered[read.after].wait()
        await trio.sleep(read.seconds)
        await fetcher.read(views[read.view], read.address, read.size, patience=60)
        answered[number].set()

    async with trio.open_nursery() as nursery:
        for number, read in enumerate(reads):
            nursery.start_soon(send, number, read)


class _Line:
    """`nsfs.bench.line` without a machine: one rate for all answers, a round trip for each, one more to connect."""

    def __init__(self, shape: Shape) -> None:
        self.received = 0
        self.meter = RouteMeter()
        self._shape = shape
        self._free = 0.0
        self._idle = 0
        """Connections that nobody uses."""

    async def answer(self, size: int) -> None:
        """Return when so many bytes that were asked for now are here."""
        if self._idle:
            self._idle -= 1
        else:
            await trio.sleep(self._shape.round_trip)
        asked = trio.current_time()
        await trio.sleep(self._shape.round_trip / 2)
        first = await self._pass(min(size, _PIECE))
        self.meter.answered(first - asked)
        self.meter.began(first)
        last = first
        for passed in range(_PIECE, size, _PIECE):
            last = await self._pass(min(size - passed, _PIECE))
        await trio.sleep_until(last)
        self.meter.received(last, size)
        self.meter.ended(last)
        self.received += size
        self._idle += 1

    async def _pass(self, size: int) -> float:
        """Have a piece leave; when it is here."""
        self._free = max(trio.current_time(), self._free) + size / self._shape.rate
        gone = self._free
        await trio.sleep(max(0.0, gone - trio.current_time() - _BUFFERED))
        return gone + self._shape.round_trip / 2


@dataclass(frozen=True, slots=True)
class _Blob:
    """A blob at the other end of the line."""

    digest: Digest
    data: bytes
    line: _Line

    @property
    def size(self) -> int:
        return len(self.data)

    async def fetch(self, offset: int, length: int) -> bytes:
        await self.line.answer(length)
        return self.data[offset : offset + length]
