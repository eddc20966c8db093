"""The two jobs that turn a plain layer's blob into a lazy layer: the first pass, and making checkpoints.

Owns the pipeline of the first pass: the blob is spooled and hashed, inflated and hashed, taken apart, hashed per file
and written to its addresses, all at once and only once. Refuses a layer whose blob digest or diff ID is not what was
claimed, one that is larger than allowed, and all that its formats refuse.

Concurrency: one job process, four threads (`core.ahead`), or one for a small layer; hashing, inflating and writing run
without the interpreter lock. Invariants: nothing is committed before both digests are right; until then every address
that was written is one that this job reserved, and a job that fails clears them all.
"""

from __future__ import annotations

import hashlib
import os
import select
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

import msgspec

from nsfs.core.ahead import Ahead
from nsfs.core.placing import Contents, Disk, Placer
from nsfs.errors import CorruptError, NsfsError, UnreachableError
from nsfs.format.checkpoints import SPACING, CheckpointScanner
from nsfs.format.gzip import GzipInflater
from nsfs.format.spans import is_decodable
from nsfs.format.tar import TarParser
from nsfs.format.zstd import FrameScanner, ZstdInflater
from nsfs.model.digest import Digest
from nsfs.model.layer import Codec, Covers, Entry, Kind, LayerIndex, Span, Spans
from nsfs.model.oci import Compression
from nsfs.model.pool import LayerKey, LayerRecord, MapRecord, Slab

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence

    from nsfs.core.ports import Spool

PIECE: Final = 1 << 20
"""Bytes that pass from thread to thread at once, about."""
_LEAST: Final = 256 << 10
"""Bytes of blob that are gathered before they are passed on: a pipe gives them in drops."""
MAX_ADDRESSES: Final = 1 << 40
"""Of one layer: a domain has 16 TiB of them, and gives none back."""
_SMALL: Final = 4 << 20
"""Bytes of a blob that one thread does as soon as several, which wait for each other."""
_USUAL_RATIO: Final = 3
"""Of contents to the blob, as most layers have or exceed it hardly."""
_MOST_EXPECTED: Final = 1 << 30
"""Bytes of contents that are expected whatever a manifest says: addresses that are given out are gone."""
_PROGRESS_EVERY: Final = 0.25
_POLL_MS: Final = 100

Row: TypeAlias = tuple[int, int, int]


class Catalog(Contents, Protocol):
    """What the domain knows of layers, and of their contents."""

    def commit_layer(
        self, record: LayerRecord, new_contents: list[tuple[bytes, int, int]], drawn: MapRecord | None
    ) -> dict[int, int]:
        """Register a layer, its contents and its map; where a content was known meanwhile, its address by that given.

        Then the map is not registered.
        """

    def put_map(self, record: MapRecord) -> None:
        """Register a map."""

    def update_layer(self, key: LayerKey, change: Callable[[LayerRecord], LayerRecord]) -> LayerRecord:
        """Replace a layer's record."""


class LayerFiles(Protocol):
    """The files of one layer's directory, each replaced whole."""

    def store_layer(
        self, index: LayerIndex, addresses: Sequence[int], rows: Iterable[Row], extents: Iterable[tuple[int, int]]
    ) -> MapRecord | None:
        """Where contents lie (address, length, stream offset), and their extents (address, size); then the entries.

        And the map of these, if there can be one, which is what is returned.
        """

    def store_spans(self, spans: Spans) -> None:
        """How the stream is had from the blob."""


@dataclass(frozen=True, slots=True)
class FirstPassJob:
    """A plain layer that nobody indexed yet. Sizes are bytes."""

    blob: Digest
    blob_size: int
    media_type: str
    compression: Compression
    diff_id: Digest | None
    """What it must be; None where nobody says yet: then it is found, by the algorithm of the blob's."""
    spool: Spool
    """Of the blob; what is in it already was received earlier."""
    max_stream: int = 1 << 40
    max_addresses: int = MAX_ADDRESSES
    """Of all contents together, sparse files with their holes."""
    origin: str = ""
    """Of the layer's key."""


@dataclass(frozen=True, slots=True)
class FirstPassResult:
    """A layer that was committed."""

    record: LayerRecord
    index: LayerIndex
    addresses: list[int]
    """Of each entry's content; 0 where it has none."""
    written: list[Slab]
    """What is to be made durable."""
    joined: int
    """Bytes of contents that the domain had already."""


def plan_max_stream(blob_size: int) -> int:
    """How long the stream of a blob may be: 200 times as long, but 16 GiB in any case and 1 TiB at most.

    Deflate reaches 1,032 to 1 and zstd 32,768 to 1, with zeros. Real layers stay below 20 to 1.
    """
    return min(max(16 << 30, 200 * blob_size), 1 << 40)


class Inflater(Protocol):
    """A format's decompressor."""

    def feed(self, data: bytes | memoryview) -> Iterable[bytes]:
        """What the next bytes of the blob add to the stream."""

    def finish(self) -> None:
        """Check that the blob may end here."""


class Scanner(Protocol):
    """A format's search for spans."""

    def feed(self, data: bytes) -> list[Span]:
        """Spans that are complete by now."""

    def finish(self) -> list[Span]:
        """The last ones."""


# The first pass


def run_first_pass(
    job: FirstPassJob,
    *,
    source_fd: int,
    disk: Disk,
    catalog: Catalog,
    files: LayerFiles,
    progress: Callable[[int], None] = lambda _: None,
) -> FirstPassResult:
    """Read the layer once, and commit it; `source_fd` gives the blob from the spool's end on, and then ends.

    `progress` is called with the bytes of blob so far, a few times a second, from another thread. Raises CorruptError
    (the spool is gone then), UnreachableError if the source ends early (the spool stays, to go on from), NoSpaceError.
    """
    placer = Placer(disk, catalog, job.max_addresses, min(_USUAL_RATIO * job.blob_size, _MOST_EXPECTED))
    with _cleared_on_error(job.spool, placer):
        record = _read_layer(job, source_fd, placer, progress)
        index = LayerIndex(placer.entries, record.stream_size)
        drawn = _store(files, index, placer.addresses)
        elsewhere = catalog.commit_layer(record, placer.new_contents(), drawn)
    if elsewhere:
        before = placer.addresses
        placer.move(elsewhere)
        drawn = _store(files, index, placer.addresses, before)
        if drawn is not None:
            catalog.put_map(drawn)
    placer.drop_unused()
    return FirstPassResult(record, index, placer.addresses, list(placer.slabs), placer.joined)


@contextmanager
def _cleared_on_error(spool: Spool, placer: Placer) -> Iterator[None]:
    try:
        with _removed_if_corrupt(spool):
            yield
    except BaseException:
        with suppress(NsfsError):
            placer.clear()
        raise


def _read_layer(job: FirstPassJob, source_fd: int, placer: Placer, progress: Callable[[int], None]) -> LayerRecord:
    blob, stream = _Hashed(job.blob), _Hashed(job.diff_id, job.blob.algorithm)
    parser = TarParser()
    refused = threading.Event()
    with Ahead(threaded=job.blob_size > _SMALL) as ahead:
        received = _spooled(job.spool, job.blob_size, _received(source_fd, ahead))
        compressed = ahead.run(_reported(blob.through(_exactly(received, job.blob_size)), progress))
        inflated = _at_most(_inflated(_INFLATERS[job.compression](), compressed, refused), job.max_stream)
        pieces = ahead.run(stream.through(ahead.run(_drained(inflated, compressed))))
        try:
            for piece in pieces:
                placer.place(parser.feed(piece))
            parser.close()
        except CorruptError:
            refused.set()
            with suppress(CorruptError):
                _exhaust(pieces)
            if blob.size == job.blob_size:
                blob.check("blob")
            raise
    blob.check("blob")
    stream.check("diff ID")
    placer.finish()
    return _plan_record(job, placer.entries, stream, tuple(placer.slabs))


def _plan_record(job: FirstPassJob, entries: Sequence[Entry], stream: _Hashed, slabs: tuple[Slab, ...]) -> LayerRecord:
    sizes = [entry.size for entry in entries if entry.kind is Kind.REGULAR]
    return LayerRecord(
        blob=job.blob,
        index="plain",
        origin=job.origin,
        blob_size=job.blob_size,
        media_type=job.media_type,
        diff_id=stream.digest,
        verified="diff-id",
        stream_size=stream.size,
        files=len(sizes),
        content_bytes=sum(sizes),
        slabs=slabs,
        fetched=job.blob_size,
        last_used=time.time(),
    )


def _store(
    files: LayerFiles, index: LayerIndex, addresses: Sequence[int], before: Sequence[int] | None = None
) -> MapRecord | None:
    """Store what was found in the layer, the segments first; gives its map.

    Where the layer is committed, whoever is killed between the two must not leave an index with addresses that no
    segment has: so the segments keep the addresses of `before`, too.
    """
    rows, extents = plan_tables(index.entries, addresses)
    if before is not None:
        more = plan_tables(index.entries, before)
        rows, extents = chain(rows, more[0]), chain(extents, more[1])
    return files.store_layer(index, addresses, rows, extents)


def plan_tables(entries: Sequence[Entry], addresses: Sequence[int]) -> tuple[Iterator[Row], Iterator[tuple[int, int]]]:
    """The rows of a layer's segment table, and the extents of its files; a content that occurs twice is there twice.

    Worked out by who goes through them.
    """
    rows = (
        (address + segment.file_offset, segment.length, segment.stream_offset)
        for entry, address in zip(entries, addresses, strict=True)
        for segment in entry.segments
    )
    extents = ((address, entry.size) for entry, address in zip(entries, addresses, strict=True) if address)
    return rows, extents


# Making checkpoints


@dataclass(frozen=True, slots=True)
class CheckpointJob:
    """A layer that was passed over, and whose spool is still there."""

    key: LayerKey
    blob_size: int
    stream_size: int
    compression: Compression
    spool: Spool
    wanted: Sequence[tuple[int, int]] = ()
    """Parts of the stream, (start, end), that are known to be read."""


def make_checkpoints(job: CheckpointJob, *, catalog: Catalog, files: LayerFiles) -> Spans:
    """Find where the blob can be read from the middle, store that, and remove the spool.

    Where a span would be too large to be decoded, nothing is stored but that the layer can only be had whole. Raises
    NotFoundError without a spool or layer, CorruptError (and removes the spool) if it is not the blob.
    """
    blob = _Hashed(job.key.blob)
    with _removed_if_corrupt(job.spool):
        spans = _scan(job, blob)
        blob.check("spool")
    check_spans(spans.spans, job.stream_size)
    if all(map(is_decodable, spans.spans)):
        files.store_spans(spans)
        catalog.update_layer(job.key, lambda record: msgspec.structs.replace(record, has_spans=True))
    else:
        catalog.update_layer(job.key, lambda record: msgspec.structs.replace(record, whole=True))
    job.spool.remove()
    return spans


def verify_spool(job: CheckpointJob) -> None:
    """Check that the spool is the whole blob.

    Raises NotFoundError without a spool, CorruptError (and removes the spool) if it is something else.
    """
    blob = _Hashed(job.key.blob)
    with _removed_if_corrupt(job.spool):
        for _ in blob.through(_exactly(job.spool.pieces(), job.blob_size)):
            pass
        blob.check("spool")


def open_inflated(job: CheckpointJob) -> Iterator[bytes]:
    """The layer's stream out of its spooled blob, in pieces of about 1 MiB."""
    return _inflated(_INFLATERS[job.compression](), job.spool.pieces())


@contextmanager
def _removed_if_corrupt(spool: Spool) -> Iterator[None]:
    try:
        yield
    except CorruptError:
        spool.remove()
        raise


def _scan(job: CheckpointJob, blob: _Hashed) -> Spans:
    codec, make = _SCANNERS[job.compression]
    scanner = make(job.wanted)
    found: list[Span] = []
    for piece in blob.through(_exactly(job.spool.pieces(), job.blob_size)):
        found += scanner.feed(piece)
    return Spans(codec, Covers.COMPRESSED, found + scanner.finish())


def check_spans(spans: Sequence[Span], stream_size: int) -> None:
    """Raise CorruptError unless `spans` are the whole stream, without a gap and without overlap."""
    at = 0
    for span in spans:
        if span.start != at:
            raise CorruptError(f"the spans of a layer do not meet: {span.start} after {at}")
        at += span.size
    if at != stream_size:
        raise CorruptError(f"the spans of a layer are not its stream: {at} of {stream_size} bytes")


class PlainInflater:
    """The stream of a blob that is not compressed."""

    def feed(self, data: bytes | memoryview) -> Iterable[bytes]:
        """Return `data`."""
        return (bytes(data),)

    def finish(self) -> None:
        """Nothing can be missing."""


class PlainScanner:
    """The spans (Codec.NONE) of a blob that is not compressed: `SPACING` bytes each."""

    def __init__(self) -> None:
        self._held = bytearray()
        self._at = 0

    def feed(self, data: bytes) -> list[Span]:
        """Spans that are complete by now."""
        self._held += data
        return [self._cut(SPACING) for _ in range(len(self._held) // SPACING)]

    def finish(self) -> list[Span]:
        """The last one, if any."""
        return [self._cut(len(self._held))] if self._held else []

    def _cut(self, size: int) -> Span:
        part = bytes(self._held[:size])
        del self._held[:size]
        span = Span(self._at, size, self._at, size, 0, hashlib.sha256(part).digest())
        self._at += size
        return span


_INFLATERS: Final[Mapping[Compression, Callable[[], Inflater]]] = {
    Compression.NONE: PlainInflater,
    Compression.GZIP: GzipInflater,
    Compression.ZSTD: ZstdInflater,
}
_SCANNERS: Final[Mapping[Compression, tuple[Codec, Callable[[Iterable[tuple[int, int]]], Scanner]]]] = {
    Compression.NONE: (Codec.NONE, lambda _wanted: PlainScanner()),
    Compression.GZIP: (Codec.DEFLATE, lambda wanted: CheckpointScanner(wanted=wanted)),
    Compression.ZSTD: (Codec.ZSTD, lambda _wanted: FrameScanner()),
}


# Pieces on their way


class _Hashed:
    """Counts and hashes what passes, to compare it with what was claimed, if anything was."""

    def __init__(self, claimed: Digest | None, usual: str = "sha256") -> None:
        self._claimed = claimed
        self._hash = hashlib.new(claimed.algorithm if claimed else usual)
        self.size = 0

    @property
    def digest(self) -> Digest:
        """Of what passed by now."""
        return Digest(f"{self._hash.name}:{self._hash.hexdigest()}")

    def through(self, pieces: Iterable[bytes]) -> Generator[bytes, None, None]:
        for piece in pieces:
            self.size += len(piece)
            self._hash.update(piece)
            yield piece

    def check(self, what: str) -> None:
        """Raise CorruptError if it is something else; both digests are in the message."""
        if self._claimed is not None and self.digest != self._claimed:
            raise CorruptError(f"the {what} is not what it is said to be: {self.digest} instead of {self._claimed}")


def _received(fd: int, ahead: Ahead) -> Iterator[bytes]:
    """What a pipe or file gives until its end, in pieces worth passing on."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    held: list[bytes] = []
    while not ahead.is_over:
        is_ready = bool(poll.poll(_POLL_MS))
        data = os.read(fd, PIECE) if is_ready else b""
        held += [data] if data else []
        if held and (not data or sum(map(len, held)) >= _LEAST):
            yield b"".join(held)
            held = []
        if is_ready and not data:
            return


def _spooled(spool: Spool, size: int, rest: Iterator[bytes]) -> Iterator[bytes]:
    """What the spool has, then the rest, which is added to it first."""
    with spool.appending(size) as append:
        yield from spool.pieces()
        for piece in rest:
            append(piece)
            yield piece


def _exactly(pieces: Iterable[bytes], size: int) -> Iterator[bytes]:
    at = 0
    for piece in pieces:
        at += len(piece)
        if at > size:
            raise CorruptError(f"the blob is longer than it is said to be: {size} bytes")
        yield piece
    if at < size:
        raise UnreachableError(f"the blob ended early: {at} of {size} bytes")


def _at_most(pieces: Iterable[bytes], size: int) -> Iterator[bytes]:
    at = 0
    for piece in pieces:
        at += len(piece)
        if at > size:
            raise CorruptError(f"the layer is larger than allowed: more than {size} bytes")
        yield piece


def _inflated(
    inflater: Inflater, pieces: Iterable[bytes], refused: threading.Event | None = None
) -> Generator[bytes, None, None]:
    """The stream, or no more of it once it is `refused`."""
    for piece in pieces:
        if refused is not None and refused.is_set():
            return
        yield from inflater.feed(piece)
    inflater.finish()


def _drained(pieces: Iterable[bytes], source: Iterable[bytes]) -> Generator[bytes, None, None]:
    """`pieces`, and then all of the `source` that they were made from, whatever became of them.

    A blob that makes no sense is read to its end: only its digest tells a damaged one from one that never did.
    """
    try:
        yield from pieces
    finally:
        _exhaust(source)


def _exhaust(pieces: Iterable[bytes]) -> None:
    for _ in pieces:
        pass


def _reported(pieces: Iterable[bytes], progress: Callable[[int], None]) -> Generator[bytes, None, None]:
    done, due = 0, 0.0
    for piece in pieces:
        done += len(piece)
        if (now := time.monotonic()) >= due:
            progress(done)
            due = now + _PROGRESS_EVERY
        yield piece
    progress(done)
