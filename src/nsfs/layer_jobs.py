"""The jobs of `core.layers`: entry points of short-lived processes, where services meet the store.

Owns the composition of one job: which files, pool and index it opens, and in which order what it made becomes visible.
Each function is started by a fork server as "nsfs.layer_jobs:<name>", with descriptors of the live bitmap, of the
domain's key, and of what else it needs; it opens everything anew, as nothing that LMDB or
a memory map made may cross a fork. What a job leaves behind when it is killed is cleared at the worker's next start.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Final

import msgspec

from nsfs.core import firstpass
from nsfs.core.claimed import ClaimArgs, LayerMade, MapMade, ProofArgs
from nsfs.core.jobs import run_job
from nsfs.core.layers import (
    PLAIN,
    MapArgs,
    PlainArgs,
    RenderArgs,
    Rendered,
    TocArgs,
    map_id_of,
    map_record,
)
from nsfs.core.maps import Maps
from nsfs.core.proving import check_contents, check_index
from nsfs.core.spanning import SpanArgs
from nsfs.core.union import LowerTree
from nsfs.errors import CorruptError, NsfsError
from nsfs.format import estargz
from nsfs.format.artifact import CODECS, parse_index, parse_spans, render_index, render_spans
from nsfs.format.erofs import render_erofs
from nsfs.model import oci
from nsfs.model.digest import Digest
from nsfs.model.layer import Kind, Spans
from nsfs.model.oci import Compression
from nsfs.model.pool import LayerKey, LayerRecord
from nsfs.model.profile import stream_of
from nsfs.model.tree import plan_tree
from nsfs.serve.beside import beside
from nsfs.store import layers as files
from nsfs.store.crypt import load_key
from nsfs.store.index import END_ADDRESS, open_index
from nsfs.store.layout import DomainLayout
from nsfs.store.pool import open_pool
from nsfs.store.poolfiles import BLOCK
from nsfs.store.profiles import Profiles
from nsfs.store.recovery import working
from nsfs.store.sealed import load_content, store_files
from nsfs.store.spool import Spool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from nsfs.core.jobs import Channel
    from nsfs.model.layer import Entry, LayerIndex
    from nsfs.model.pool import MapRecord
    from nsfs.store.index import DomainIndex
    from nsfs.store.pool import Pool


_MANY: Final = 1 << 15
"""Entries of a layer from which on a process more pays: that one takes 15 to 30 ms of both, and each 1.2 us."""
_NICE: Final = 10
"""Of making checkpoints: nobody waits for them, mostly."""

# include malloc.h of glibc
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT: Final = 256 << 20
_ALLOCATED: Final = 32 << 20


def first_pass(args: bytes, fds: list[int]) -> int:
    """Read a plain layer once: digests, index, contents, and its map where that depends on no other layer."""
    return run_job(PlainArgs, _first_pass, args, fds)


def read_toc(args: bytes, fds: list[int]) -> int:
    """Index an eStargz layer by its table of contents; its contents come when they are read."""
    return run_job(TocArgs, _read_toc, args, fds)


def read_artifact(args: bytes, fds: list[int]) -> int:
    """Index a plain layer as an artifact says it is read; its contents come when they are read."""
    return run_job(ClaimArgs, _read_artifact, args, fds)


def read_spans(args: bytes, fds: list[int]) -> int:
    """Take a layer's spans from the artifact that says how it is read."""
    return run_job(ClaimArgs, _read_spans, args, fds)


def adopt_spans(args: bytes, fds: list[int]) -> int:
    """Compare a layer's claimed index with the one that was found, and read it by the spans that were."""
    return run_job(ProofArgs, _adopt_spans, args, fds)


def compare_contents(args: bytes, fds: list[int]) -> int:
    """Compare what is kept of a layer by a claimed index with what was found, and count it as proved."""
    return run_job(ProofArgs, _compare_contents, args, fds)


def make_checkpoints(args: bytes, fds: list[int]) -> int:
    """Make a plain layer's spans from its spooled blob, and drop the spool."""
    return run_job(SpanArgs, _make_checkpoints, args, fds)


def build_map(args: bytes, fds: list[int]) -> int:
    """Write a layer's EROFS image from its index and, where it needs them, the maps below."""
    return run_job(MapArgs, _build_map, args, fds)


def render_layer(args: bytes, fds: list[int]) -> int:
    """Write what an artifact says of a plain layer: its index and its spans."""
    return run_job(RenderArgs, _render_layer, args, fds)


class _Files:
    """One layer's directory, as the first pass writes it."""

    def __init__(self, layout: DomainLayout, key: LayerKey) -> None:
        self._layout = layout
        self._key = key
        self._directory = layout.layer_dir(key)
        os.makedirs(self._directory, 0o700, exist_ok=True)

    def store_layer(
        self,
        index: LayerIndex,
        addresses: Sequence[int],
        rows: Iterable[tuple[int, int, int]],
        extents: Iterable[tuple[int, int]],
    ) -> MapRecord | None:
        map_id = map_id_of(self._key)
        path = self._layout.map(self._key, map_id)
        drawn, maps = None, {}
        with _rendering(partial(files.render_layer, index, addresses, rows, extents), len(addresses)) as rendered:
            with suppress(NsfsError):  # whoever wants the map hears what is wrong with it
                made, image = _draw_map(self._layout, map_id, index.entries, addresses, None)
                drawn, maps = map_record(self._key, map_id, path, made), {path: [image]} if image else {}
            files.store_layer(self._directory, rendered(), self._layout.key, maps)
        return drawn

    def store_spans(self, spans: Spans) -> None:
        files.store_spans(self._directory, spans, self._layout.key)


def _rendering(work: Callable[[], list[bytes]], entries: int) -> AbstractContextManager[Callable[[], list[bytes]]]:
    """What gives a layer's tables: of many entries they are worked out beside the map."""
    return beside(work) if entries >= _MANY else nullcontext(work)


def _layout(domain: str, fds: Sequence[int]) -> DomainLayout:
    return DomainLayout(domain, load_key(fds[1]))


@contextmanager
def _opened_pool(layout: DomainLayout, bitmap: int, salt: bytes) -> Iterator[Pool]:
    pool = open_pool(layout, bitmap, salt)
    try:
        yield pool
    finally:
        pool.close()


def _first_pass(args: PlainArgs, fds: Sequence[int], channel: Channel) -> LayerMade:
    os.nice(args.nice)
    _keep_freed_memory()
    layout = _layout(args.domain, fds)
    key = LayerKey(Digest(args.blob), "plain", args.origin)
    job = firstpass.FirstPassJob(
        blob=key.blob,
        origin=key.origin,
        blob_size=args.blob_size,
        media_type=args.media_type,
        compression=Compression(args.compression),
        diff_id=Digest(args.diff_id) if args.diff_id else None,
        spool=Spool(layout.spool(key), layout.key),
        max_stream=firstpass.plan_max_stream(args.blob_size),
    )
    with (
        working(layout),
        open_index(layout.index, layout.key) as index,
        _opened_pool(layout, fds[0], index.salt) as pool,
    ):
        result = firstpass.run_first_pass(
            job, source_fd=fds[2], disk=pool, catalog=index, files=_Files(layout, key), progress=channel.progress
        )
    return LayerMade(ranges=list(result.written))


def _keep_freed_memory() -> None:
    """Have malloc give back nothing: pieces of the stream come and go, and fresh pages cost more than to fill them."""
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, _ALLOCATED)
    libc.mallopt(_M_TRIM_THRESHOLD, _KEPT)


def _leave(value: object) -> None:
    """Have it never be freed: the process ends soon, and would go through all of a layer's values before it says so.

    That takes 23 ms for 126,776 entries, and 29 ms for their tree.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))


def _read_toc(args: TocArgs, fds: Sequence[int], _channel: Channel) -> LayerMade:
    layout = _layout(args.domain, fds)
    toc = Digest(args.toc_digest)
    key = LayerKey(Digest(args.blob), f"estargz-{toc.hex}", args.origin)
    with open(fds[2], "rb", closefd=False) as file:
        index, spans = estargz.parse_toc(file.read(), estargz.TocLocation(args.toc_offset, args.toc_size), toc)
    _leave(index)
    with working(layout), open_index(layout.index, layout.key) as catalog:
        record = _plan_claimed(args, key, index)
        record = msgspec.structs.replace(record, verified="toc", has_spans=True)
        return _commit_claimed(layout, catalog, record, index, spans, {})


def _read_artifact(args: ClaimArgs, fds: Sequence[int], _channel: Channel) -> LayerMade:
    layout = _layout(args.domain, fds)
    key = LayerKey(Digest(args.blob), args.index, args.origin)
    with open(fds[2], "rb", closefd=False) as file:
        index, twins = parse_index(file.read())
    _leave(index)
    with working(layout), open_index(layout.index, layout.key) as catalog:
        record = _plan_claimed(args, key, index)
        promise = {"promised": Digest(args.promised), "spans_blob": args.spans_blob, "spans_size": args.spans_size}
        record = msgspec.structs.replace(record, **promise)
        return _commit_claimed(layout, catalog, record, index, None, twins)


def _plan_claimed(args: TocArgs | ClaimArgs, key: LayerKey, index: LayerIndex) -> LayerRecord:
    """The record of a layer whose contents come when they are read; without addresses."""
    regular = [entry for entry in index.entries if entry.kind is Kind.REGULAR]
    return LayerRecord(
        blob=key.blob,
        index=key.index,
        origin=key.origin,
        blob_size=args.blob_size,
        media_type=args.media_type,
        diff_id=None,
        verified="",
        stream_size=index.stream_size,
        files=len(regular),
        content_bytes=sum(entry.size for entry in regular),
        slabs=(),
        prefetch_size=index.prefetch_size,
    )


def _commit_claimed(
    layout: DomainLayout,
    catalog: DomainIndex,
    record: LayerRecord,
    index: LayerIndex,
    spans: Spans | None,
    twins: Mapping[int, int],
) -> LayerMade:
    """Give out addresses that are this layer's alone, and write its tables and its map."""
    room = sum(-(-entry.size // BLOCK) * BLOCK for entry in index.entries)
    if room > firstpass.MAX_ADDRESSES:
        raise CorruptError(f"the contents of the layer are larger than allowed: {room} bytes")
    slab = catalog.reserve(room)
    addresses = _give_out(index.entries, slab.address, twins)
    directory = _Files(layout, record.key)
    drawn = directory.store_layer(index, addresses, *firstpass.plan_tables(index.entries, addresses))
    if spans is not None:
        directory.store_spans(spans)
    catalog.commit_layer(msgspec.structs.replace(record, slabs=(slab,)), [], drawn)
    return LayerMade()


def _read_spans(args: ClaimArgs, fds: Sequence[int], _channel: Channel) -> LayerMade:
    layout = _layout(args.domain, fds)
    key = LayerKey(Digest(args.blob), args.index, args.origin)
    with working(layout), open_index(layout.index, layout.key) as catalog:
        record = catalog.layer(key)
        assert record is not None, "only layers that were committed get spans"
        codec = CODECS[oci.layer_format(record.media_type).compression]
        with open(fds[2], "rb", closefd=False) as file:
            spans = parse_spans(file.read(), codec, record.stream_size, record.blob_size)
        _Files(layout, key).store_spans(spans)
        catalog.update_layer(key, lambda record: msgspec.structs.replace(record, has_spans=True))
    return LayerMade()


def _adopt_spans(args: ProofArgs, fds: Sequence[int], _channel: Channel) -> LayerMade:
    layout, claimed, found = _proof(args, fds)
    theirs, addresses = files.load_index(layout.layer_dir(claimed), layout.key)
    ours, _ = files.load_index(layout.layer_dir(found), layout.key)
    check_index(theirs, ours, addresses)
    with working(layout), open_index(layout.index, layout.key) as catalog:
        _Files(layout, claimed).store_spans(_load_spans(layout, found))
        catalog.update_layer(claimed, lambda record: msgspec.structs.replace(record, has_spans=True))
    return LayerMade()


def _compare_contents(args: ProofArgs, fds: Sequence[int], _channel: Channel) -> LayerMade:
    os.nice(_NICE)
    layout, claimed, found = _proof(args, fds)
    index, addresses = files.load_index(layout.layer_dir(claimed), layout.key)
    _, ours = files.load_index(layout.layer_dir(found), layout.key)
    with (
        working(layout),
        open_index(layout.index, layout.key) as catalog,
        _opened_pool(layout, fds[0], catalog.salt) as pool,
    ):
        check_contents(pool, zip(index.entries, addresses, ours, strict=True))
        catalog.update_layer(
            claimed, lambda record: msgspec.structs.replace(record, verified="diff-id", diff_id=record.promised)
        )
    return LayerMade()


def _proof(args: ProofArgs, fds: Sequence[int]) -> tuple[DomainLayout, LayerKey, LayerKey]:
    """Where it is, and the layer as it is claimed and as it was found."""
    blob = Digest(args.blob)
    return (
        _layout(args.domain, fds),
        LayerKey(blob, args.index, args.origin),
        LayerKey(blob, PLAIN, args.origin),
    )


def _load_spans(layout: DomainLayout, key: LayerKey) -> Spans:
    table = files.open_table(layout.layer_dir(key), layout.key)
    return Spans(table.codec, table.covers, [table.span(number) for number in range(len(table))])


def _give_out(entries: Sequence[Entry], address: int, twins: Mapping[int, int]) -> list[int]:
    """An address for the content of each entry, from `address` on; that of its twin, if it has one; 0 for none."""
    addresses: list[int] = []
    for number, entry in enumerate(entries):
        if number in twins:
            addresses.append(addresses[twins[number]])
            continue
        addresses.append(address if entry.size else 0)
        address += -(-entry.size // BLOCK) * BLOCK
    return addresses


def _make_checkpoints(args: SpanArgs, fds: Sequence[int], _channel: Channel) -> LayerMade:
    os.nice(_NICE)
    layout = _layout(args.domain, fds)
    key = LayerKey(Digest(args.blob), args.index, args.origin)
    with working(layout), open_index(layout.index, layout.key) as index:
        record = index.layer(key)
        assert record is not None, "only layers that were committed get checkpoints"
        job = firstpass.CheckpointJob(
            key=key,
            blob_size=record.blob_size,
            stream_size=record.stream_size,
            compression=Compression(args.compression),
            spool=Spool(layout.spool(key), layout.key),
            wanted=_wanted(layout, key),
        )
        firstpass.make_checkpoints(job, catalog=index, files=_Files(layout, key))
    return LayerMade()


def _wanted(layout: DomainLayout, key: LayerKey) -> list[tuple[int, int]]:
    """What starts are known to read of a layer; where several owners share the domain, nobody's decide for others."""
    if key.origin:
        return []
    runs = Profiles(layout).runs_of(key.blob, stream_of(key.index))
    return [(run.start, run.start + run.length) for run in runs]


def _render_layer(args: RenderArgs, fds: Sequence[int], _channel: Channel) -> Rendered:
    os.nice(_NICE)
    layout = _layout(args.domain, fds)
    key = LayerKey(Digest(args.blob), args.index, args.origin)
    index, _ = files.load_index(layout.layer_dir(key), layout.key)
    spans = _load_spans(layout, key)
    for fd, data in zip(fds[2:4], (render_index(index), render_spans(spans)), strict=True):
        with open(fd, "wb", closefd=False) as file:
            file.write(data)
    return Rendered(files=len(index.entries))


def _build_map(args: MapArgs, fds: Sequence[int], _channel: Channel) -> MapMade:
    layout = _layout(args.domain, fds)
    key = LayerKey(Digest(args.blob), args.index, args.origin)
    index, addresses = files.load_index(layout.layer_dir(key), layout.key)
    made, image = _draw_map(layout, args.map_id, index.entries, addresses, args.lowers)
    if image:
        store_files({layout.map(key, args.map_id): [image]}, layout.key)
    return made


def _draw_map(
    layout: DomainLayout, map_id: str, entries: Sequence[Entry], addresses: Sequence[int], lowers: Sequence[str] | None
) -> tuple[MapMade, bytearray | None]:
    """A map, and its file where it has one; `lowers` are the maps below, top first, None where they are not known."""
    with ExitStack() as stack:
        maps = Maps(partial(load_content, key=layout.key))
        images = [stack.enter_context(maps.opened(path)) for path in lowers or ()]
        planned = plan_tree(entries, addresses, None if lowers is None else LowerTree(images))
    _leave(planned)
    if planned.needs_lower and lowers is None:
        return MapMade(needs_lower=True), None
    image = render_erofs(
        planned.root, disk_blocks=END_ADDRESS // BLOCK, uuid=bytes.fromhex(map_id), volume=planned.volume
    )
    made = MapMade(needs_lower=False, marks=planned.marks, opaque=planned.opaque, borrowed=sorted(planned.borrowed))
    return made, image
