from __future__ import annotations

import hashlib
import os
import threading
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

import once
from images import (
    Item,
    Layer,
    directory,
    file,
    gzip_layer,
    hardlink,
    render_tar,
    sample_content,
    sparse,
    symlink,
    tar_layer,
    whiteout,
    zstd_layer,
)
from nsfs.core.firstpass import (
    CheckpointJob,
    FirstPassJob,
    FirstPassResult,
    check_spans,
    make_checkpoints,
    run_first_pass,
)
from nsfs.core.placing import Placer
from nsfs.core.views import Views
from nsfs.errors import CorruptError, NotFoundError, NsfsError, UnreachableError
from nsfs.format.gzip import inflate_deflate
from nsfs.format.tar import TarParser
from nsfs.format.zstd import inflate_frames
from nsfs.model.digest import Digest
from nsfs.model.layer import Codec, Kind, LayerIndex, Span, Spans
from nsfs.model.oci import layer_format
from nsfs.model.pool import Extent, LayerKey, MapRecord
from nsfs.store import layers
from nsfs.store.index import DomainIndex, open_index
from nsfs.store.layout import DomainLayout
from nsfs.store.poolfiles import create_bitmap
from nsfs.store.spool import Spool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from nsfs.store.pool import Pool

BLOCK = 4096
LARGE = sample_content(3 << 20, 1)
ITEMS = [
    directory("etc"),
    file("etc/motd", b"hello\n"),
    file("etc/copy", b"hello\n"),
    file("etc/block", sample_content(BLOCK)),
    file("empty"),
    hardlink("etc/link", "etc/motd"),
    symlink("etc/symlink", "motd"),
    file("large", LARGE),
    sparse("sparse", 1 << 20, [(10, b"begin"), (500_000, b"middle" * 1000)]),
    file("last", sample_content(100_000, 2)),
    whiteout("gone"),
]


@dataclass
class Files:
    """A layer's directory, without a map: only what is to be known of one."""

    path: str
    key: LayerKey

    def __post_init__(self) -> None:
        os.makedirs(self.path, exist_ok=True)

    def store_layer(
        self,
        index: LayerIndex,
        addresses: Sequence[int],
        rows: Iterable[layers.Row],
        extents: Iterable[tuple[int, int]],
    ) -> MapRecord | None:
        layers.store_layer(self.path, layers.render_layer(index, addresses, rows, extents))
        return MapRecord(
            id=self.key.blob.hex,
            blob=self.key.blob,
            index=self.key.index,
            path=str(addresses),
            needs_lower=False,
            marks=False,
        )

    def store_spans(self, spans: Spans) -> None:
        layers.store_spans(self.path, spans)


class Domain:
    """A real pool, under a key, and a real index, and the jobs as a worker runs them."""

    def __init__(self, path: Path) -> None:
        self.layout = DomainLayout(str(path / "domain"))
        keyed = DomainLayout(self.layout.path, once.KEY)
        bitmap = create_bitmap(keyed)
        self.pool: Pool = once.open_watched(keyed, bitmap)
        os.close(bitmap)
        self.index: DomainIndex = open_index(self.layout.index)
        self.progress: list[int] = []

    def close(self) -> None:
        self.index.close()
        self.pool.close()

    def job(self, layer: Layer, **more: Any) -> FirstPassJob:
        job = FirstPassJob(
            blob=layer.digest,
            blob_size=len(layer.blob),
            media_type=layer.media_type,
            compression=layer_format(layer.media_type).compression,
            diff_id=layer.diff_id,
            spool=Spool(self.layout.spool(key_of(layer)), self.layout.key),
        )
        return replace(job, **more)

    def files(self, layer: Layer) -> Files:
        return Files(self.layout.layer_dir(key_of(layer)), key_of(layer))

    def first_pass(self, layer: Layer, sent: bytes | None = None, catalog: Any = None, **more: Any) -> FirstPassResult:
        with source(layer.blob if sent is None else sent) as fd:
            return run_first_pass(
                self.job(layer, **more),
                source_fd=fd,
                disk=self.pool,
                catalog=catalog or self.index,
                files=self.files(layer),
                progress=self.progress.append,
            )

    def checkpoints(self, layer: Layer) -> Spans:
        job = CheckpointJob(
            key=key_of(layer),
            blob_size=len(layer.blob),
            stream_size=len(layer.tar),
            compression=layer_format(layer.media_type).compression,
            spool=Spool(self.layout.spool(key_of(layer)), self.layout.key),
        )
        return make_checkpoints(job, catalog=self.index, files=self.files(layer))

    def local(self) -> int:
        return self.pool.local_bytes([(1 << 30, 16 << 30)])

    def check_is_empty(self) -> None:
        """Nothing of a pass is left: no layer, no content, no address, no block."""
        assert self.index.layers() == []
        assert self.index.orphan_slabs() == []
        assert self.local() == 0
        assert os.stat(self.layout.disk).st_blocks * 512 <= 64 << 10


@pytest.fixture
def domain(tmp_path: Path) -> Iterator[Domain]:
    domain = Domain(tmp_path)
    yield domain
    domain.close()


@contextmanager
def source(data: bytes) -> Iterator[int]:
    """A pipe that gives `data`, as a worker feeds a job."""
    receive, send = os.pipe()

    def write() -> None:
        with open(send, "wb", buffering=0) as pipe:
            left = memoryview(data)
            while left:
                try:
                    left = left[pipe.write(left) :]
                except BrokenPipeError:
                    return

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield receive
    finally:
        os.close(receive)
        thread.join()


def key_of(layer: Layer) -> LayerKey:
    return LayerKey(layer.digest, "plain")


def expected_content(item: Item) -> bytes:
    if item.pieces is None:
        return item.content
    content = bytearray(item.size)
    for offset, data in item.pieces:
        content[offset : offset + len(data)] = data
    return bytes(content)


def check_layer(domain: Domain, layer: Layer, items: Sequence[Item], result: FirstPassResult) -> None:
    """Everything that the first pass of `layer` promises, seen from disk."""
    index, addresses = layers.load_index(domain.files(layer).path)
    assert (index, addresses) == (result.index, result.addresses)
    assert [entry.path for entry in index.entries] == [item.path.rstrip(b"/") for item in items]
    assert index.stream_size == len(layer.tar)
    table = layers.open_table(domain.files(layer).path)
    for item, entry, address in zip(items, index.entries, addresses, strict=True):
        if entry.kind is not Kind.REGULAR or not entry.size:
            assert address == 0
            continue
        content = expected_content(item)
        padded = content + bytes(-len(content) % BLOCK)
        assert address % BLOCK == 0
        assert domain.pool.read(address, len(padded)) == padded
        rebuilt = bytearray(len(padded))
        for at, length, stream_offset in table.segments(address, entry.size):
            rebuilt[at - address : at - address + length] = layer.tar[stream_offset : stream_offset + length]
        assert rebuilt == padded
        absent = domain.pool.missing(address, entry.size)
        assert all(not any(domain.pool.read(*run)) for run in absent)
        assert not absent or entry.path == b"sparse"
        assert domain.index.known(blake3(content).digest()) == Extent(address, len(content))
    record = domain.index.layer(key_of(layer))
    assert record == result.record
    assert record.stream_size == len(layer.tar)
    assert not record.has_spans
    drawn = domain.index.map(layer.digest.hex)
    assert drawn is not None
    assert drawn.path == str(addresses), "the map is of where contents are, and not of where they were first"
    assert domain.index.orphan_slabs() == []


@pytest.mark.parametrize("make", [gzip_layer, zstd_layer, tar_layer])
def test_a_layer_is_read_once_and_is_there(domain: Domain, make: Callable[[list[Item]], Layer]) -> None:
    layer = make(ITEMS)
    result = domain.first_pass(layer)
    check_layer(domain, layer, ITEMS, result)
    found = dict(zip((item.path for item in ITEMS), result.addresses, strict=True))
    assert found[b"etc/motd"] == found[b"etc/copy"]
    assert result.record.files == 8  # two of them the copy and the empty one, one the whiteout
    assert result.record.content_bytes == sum(entry.size for entry in result.index.entries)
    assert result.joined == len(b"hello\n")
    assert domain.progress[-1] == len(layer.blob)
    with open(domain.layout.spool(key_of(layer)), "rb") as spool:
        assert spool.read() == layer.blob


def test_holes_take_no_space(domain: Domain) -> None:
    items = [sparse("sparse", 1 << 30, [(0, b"a"), (512 << 20, b"b"), ((1 << 30) - 1, b"c")]), file("next", b"next")]
    layer = gzip_layer(items)
    result = domain.first_pass(layer)
    assert domain.local() == 4 * BLOCK
    address = result.addresses[0]
    assert domain.pool.read(address + (512 << 20), 2) == b"b\0"
    assert domain.pool.read(address + (1 << 30) - 2, 2) == b"\0c"
    assert domain.pool.read(result.addresses[1], 4) == b"next"


def test_a_layer_without_contents(domain: Domain) -> None:
    layer = gzip_layer([])
    result = domain.first_pass(layer)
    assert (result.addresses, result.record.slabs, result.record.files) == ([], (), 0)
    assert layers.open_table(domain.files(layer).path).ranges() == []


def test_what_follows_the_end_of_the_tar_counts_for_the_diff_id_only(domain: Domain) -> None:
    layer = gzip_layer(render_tar(ITEMS) + b"garbage" * 10_000)
    check_layer(domain, layer, ITEMS, domain.first_pass(layer))


def test_known_contents_are_joined_and_not_written_again(domain: Domain) -> None:
    first = domain.first_pass(gzip_layer(ITEMS))
    before = domain.local()
    layer = zstd_layer([*ITEMS, file("new", b"new")])
    second = domain.first_pass(layer)
    check_layer(domain, layer, [*ITEMS, file("new", b"new")], second)
    assert second.addresses[:-1] == first.addresses
    assert domain.local() == before + BLOCK
    assert second.joined == first.record.content_bytes


@pytest.mark.parametrize(("most", "reserved"), [(1 << 40, 200 << 20), (100 << 20, 100 << 20)])
def test_as_many_addresses_as_are_expected_are_reserved_at_once(domain: Domain, most: int, reserved: int) -> None:
    placer = Placer(domain.pool, domain.index, most, expected=200 << 20)
    placer.place(TarParser().feed(render_tar([file("f", b"x"), file("g", b"y")])))
    placer.finish()
    assert [slab.size for slab in placer.slabs] == [reserved]


def test_no_manifest_has_addresses_reserved_by_its_word_alone(domain: Domain) -> None:
    with pytest.raises(UnreachableError, match="ended early"):
        domain.first_pass(gzip_layer(ITEMS), blob_size=1 << 40)
    assert domain.index.reserved() <= 1 << 30


class Blinded:
    """A catalog whose other writer is always a moment ahead: contents become known only at the commit."""

    def __init__(self, index: DomainIndex) -> None:
        self._index = index

    def __getattr__(self, name: str) -> Any:
        return getattr(self._index, name)

    def contents_of(self, _digests: Iterable[bytes]) -> Mapping[bytes, Extent]:
        return {}


def test_contents_that_another_layer_brought_meanwhile(domain: Domain) -> None:
    first = domain.first_pass(gzip_layer(ITEMS))
    before = domain.local()
    layer = tar_layer(ITEMS)
    second = domain.first_pass(layer, catalog=Blinded(domain.index))
    check_layer(domain, layer, ITEMS, second)
    assert second.addresses == first.addresses
    assert domain.local() == before


def test_a_layer_whose_contents_another_brought_meanwhile_is_local(domain: Domain) -> None:
    """And is not where one of these is absent, or something else is."""
    items = [*ITEMS[:5], file("more", sample_content(BLOCK, 3))]
    first = domain.first_pass(gzip_layer(items))
    layer = tar_layer([*items, file("own", b"own")])
    second = domain.first_pass(layer, catalog=Blinded(domain.index))
    table = layers.open_table(domain.files(layer).path)
    anything: Any = None
    views = Views(domain.index, lambda _: table, anything, anything, domain.pool, anything, anything, anything)
    moved = [address for address in first.addresses if address]
    own = next(address for address in second.addresses if address and address not in moved)
    assert views.are_local([second.record.key])
    for address in (moved[0], own):
        data = domain.pool.read(address, BLOCK)
        domain.pool.evict(address, BLOCK)
        assert not views.are_local([second.record.key])
        domain.pool.write(address, data)
        assert views.are_local([second.record.key])


# What is refused


def test_a_wrong_diff_id_leaves_nothing(domain: Domain) -> None:
    layer = gzip_layer(ITEMS)
    claimed = Digest.of(b"something else")
    with pytest.raises(CorruptError, match=f"diff ID .*{layer.diff_id} instead of {claimed}"):
        domain.first_pass(layer, diff_id=claimed)
    domain.check_is_empty()
    assert not os.path.exists(domain.layout.spool(key_of(layer)))


def test_a_diff_id_that_nobody_says_is_found(domain: Domain) -> None:
    layer = gzip_layer(ITEMS)
    assert domain.first_pass(layer, diff_id=None).record.diff_id == layer.diff_id


def test_a_wrong_blob_leaves_nothing(domain: Domain) -> None:
    layer, other = gzip_layer(ITEMS), gzip_layer(ITEMS, level=1)
    claimed = replace(layer, blob=layer.blob[: len(other.blob)].ljust(len(other.blob), b"\0"))
    with pytest.raises(CorruptError, match=f"blob .*{other.digest} instead of {claimed.digest}"):
        domain.first_pass(claimed, sent=other.blob)
    domain.check_is_empty()


@pytest.mark.parametrize("make", [gzip_layer, zstd_layer, tar_layer])
def test_a_flipped_byte_leaves_nothing(domain: Domain, make: Callable[[list[Item]], Layer]) -> None:
    layer = make(ITEMS)
    bent = bytearray(layer.blob)
    bent[len(bent) // 2] ^= 1
    with pytest.raises(CorruptError):
        domain.first_pass(layer, sent=bytes(bent))
    domain.check_is_empty()
    check_layer(domain, layer, ITEMS, domain.first_pass(layer))


def test_a_blob_that_goes_on_is_refused(domain: Domain) -> None:
    layer = gzip_layer(ITEMS)
    with pytest.raises(CorruptError, match="longer than it is said to be"):
        domain.first_pass(layer, sent=layer.blob + b"\0")
    domain.check_is_empty()


def test_a_broken_tar_is_refused(domain: Domain) -> None:
    layer = gzip_layer(render_tar(ITEMS)[: 2 << 20])
    with pytest.raises(CorruptError, match="ends inside an entry"):
        domain.first_pass(layer)
    domain.check_is_empty()


def test_bombs_are_refused(domain: Domain) -> None:
    with pytest.raises(CorruptError, match="larger than allowed"):
        domain.first_pass(gzip_layer([file("bomb", bytes(32 << 20))]), max_stream=8 << 20)
    with pytest.raises(CorruptError, match="larger than allowed"):
        domain.first_pass(gzip_layer([sparse("bomb", 15 << 40, [])]))
    domain.check_is_empty()


@pytest.mark.parametrize("make", [tar_layer, gzip_layer, zstd_layer])
def test_what_makes_no_sense_is_read_to_its_end_to_say_whether_it_was_damaged(
    domain: Domain, make: Callable[..., Layer]
) -> None:
    """Not damaged, it is what somebody made; damaged, the error has both digests."""
    nonsense = make(sample_content(5 << 20))
    with pytest.raises(CorruptError, match="checksum"):
        domain.first_pass(nonsense)
    right = make([file("a", os.urandom(100)), file("b", sample_content(5 << 20)), file("c", os.urandom(5 << 20))])
    for at in (len(right.blob) // 20, len(right.blob) // 2, len(right.blob) - 700):
        damaged = right.blob[:at] + bytes(byte ^ 1 for byte in right.blob[at : at + 600]) + right.blob[at + 600 :]
        with pytest.raises(CorruptError, match=f"{Digest.of(damaged)} instead of {right.digest}"):
            domain.first_pass(right, sent=damaged)
    domain.check_is_empty()


# Interruptions


@pytest.mark.parametrize("cut", [0, 1, 1000, -1])
def test_a_pass_goes_on_where_it_was_interrupted(domain: Domain, cut: int) -> None:
    layer = gzip_layer(ITEMS)
    with pytest.raises(UnreachableError, match="ended early"):
        domain.first_pass(layer, sent=layer.blob[:cut])
    domain.check_is_empty()
    have = os.stat(domain.layout.spool(key_of(layer))).st_size
    assert have == len(layer.blob[:cut])
    check_layer(domain, layer, ITEMS, domain.first_pass(layer, sent=layer.blob[have:]))


def test_a_complete_spool_needs_nothing_more(domain: Domain) -> None:
    layer = gzip_layer(ITEMS)
    write_spool(domain, layer, layer.blob)
    check_layer(domain, layer, ITEMS, domain.first_pass(layer, sent=b""))


def test_a_spool_of_something_else_is_removed(domain: Domain) -> None:
    layer = gzip_layer(ITEMS)
    write_spool(domain, layer, b"\x1f\x8b something else")
    with pytest.raises(CorruptError):
        domain.first_pass(layer, sent=layer.blob[17:])
    check_layer(domain, layer, ITEMS, domain.first_pass(layer))


class Failing:
    """A catalog whose commit fails."""

    def __init__(self, index: DomainIndex) -> None:
        self._index = index

    def __getattr__(self, name: str) -> Any:
        return getattr(self._index, name)

    def commit_layer(self, *_: object) -> dict[int, int]:
        raise NsfsError("the power went")


def test_a_commit_that_fails_leaves_the_spool_and_nothing_else(domain: Domain) -> None:
    layer = gzip_layer(ITEMS)
    with pytest.raises(NsfsError, match="the power went"):
        domain.first_pass(layer, catalog=Failing(domain.index))
    domain.check_is_empty()
    check_layer(domain, layer, ITEMS, domain.first_pass(layer, sent=b""))


def write_spool(domain: Domain, layer: Layer, data: bytes) -> None:
    path = domain.layout.spool(key_of(layer))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as spool:
        spool.write(data)


# Checkpoints


def stream_of(span: Span, codec: Codec, blob: bytes) -> bytes:
    part = blob[span.offset : span.offset + span.length]
    assert hashlib.sha256(part).digest() == span.digest
    match codec:
        case Codec.NONE:
            return part
        case Codec.ZSTD:
            return inflate_frames(part, span.skip + span.size)[span.skip :]
    window = zlib.decompress(span.window) if span.window else b""
    return inflate_deflate(part, span.size, bits=span.bits, window=window)


@pytest.mark.parametrize(
    "layer",
    [gzip_layer(ITEMS), gzip_layer(ITEMS, members=3), zstd_layer(ITEMS, frames=5), tar_layer(ITEMS), gzip_layer([])],
    ids=["gzip", "members", "zstd", "tar", "nothing"],
)
def test_after_checkpoints_every_part_of_the_stream_can_be_had_from_the_blob(domain: Domain, layer: Layer) -> None:
    domain.first_pass(layer)
    spans = domain.checkpoints(layer)
    assert b"".join(stream_of(span, spans.codec, layer.blob) for span in spans.spans) == layer.tar
    record = domain.index.layer(key_of(layer))
    assert record is not None
    assert record.has_spans
    table = layers.open_table(domain.files(layer).path)
    assert [table.span(number) for number in table.spans(0, len(layer.tar))] == spans.spans
    assert not os.path.exists(domain.layout.spool(key_of(layer)))


def test_checkpoints_of_a_spool_that_changed_are_refused(domain: Domain) -> None:
    layer = tar_layer(ITEMS)
    domain.first_pass(layer)
    write_spool(domain, layer, layer.blob[:-1] + b"x")
    with pytest.raises(CorruptError, match="spool"):
        domain.checkpoints(layer)
    with pytest.raises(NotFoundError, match="not spooled"):
        domain.checkpoints(layer)
    record = domain.index.layer(key_of(layer))
    assert record is not None
    assert not record.has_spans


@pytest.mark.parametrize("sizes", [[(0, 5), (6, 4)], [(0, 5), (4, 6)], [(0, 5)], [(1, 9)], []])
def test_spans_that_are_not_the_stream_are_refused(sizes: list[tuple[int, int]]) -> None:
    with pytest.raises(CorruptError, match="spans"):
        check_spans([Span(start, size, start, size, 0, b"") for start, size in sizes], 10)


# Properties

contents = st.builds(sample_content, st.integers(0, 20_000), st.integers(0, 3))
any_files = st.lists(contents, max_size=12).map(lambda many: [file(f"f{at}", data) for at, data in enumerate(many)])


@settings(max_examples=15)
@given(items=any_files, make=st.sampled_from([gzip_layer, zstd_layer, tar_layer]))
def test_any_layer_into_a_pool_that_has_others(domain: Domain, items: list[Item], make: Callable[..., Layer]) -> None:
    layer = make(items)
    if domain.index.layer(key_of(layer)) is None:
        check_layer(domain, layer, items, domain.first_pass(layer))
