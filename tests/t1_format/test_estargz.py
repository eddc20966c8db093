from __future__ import annotations

import base64
import gzip
import hashlib
import io
import itertools
import json
import tarfile
import tracemalloc
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import goestargz
from nsfs.errors import CorruptError, NsfsError, UnsupportedError
from nsfs.format.estargz import (
    TAIL,
    TOC_MAX,
    TocLocation,
    parse_footer,
    parse_toc,
    plan_footer,
)
from nsfs.format.spans import decode_verified
from nsfs.model.digest import Digest
from nsfs.model.layer import Entry, Kind, LayerIndex, Segment, Spans

if TYPE_CHECKING:
    from collections.abc import Callable

NOISE = b"".join(hashlib.sha256(bytes([n])).digest() for n in range(250))
FILES: dict[str, bytes] = {
    "bin/tool": NOISE * 5,
    "etc/empty": b"",
    "etc/hosts": b"127.0.0.1 localhost\n",
    "etc/one": b"1",
    "usr/share/large": bytes(30_000) + NOISE + b"end",
    "usr/share/\u00e4 b": b"x" * 1000,
    ".wh.gone": b"",
}


def make_tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        _add(tar, "./etc/", tarfile.DIRTYPE, mode=0o1755, mtime=1_700_000_000)
        _add(tar, "bin", tarfile.DIRTYPE)
        for name, data in FILES.items():
            _add(tar, name, tarfile.REGTYPE, data, mode=0o4755, uid=1000, gid=70_000, mtime=1_600_000_000)
        xattrs = {"SCHILY.xattr.security.capability": "\x01\x00", "SCHILY.xattr.user.note": "n"}
        _add(tar, "etc/marked", tarfile.REGTYPE, b"marked", pax_headers=xattrs)
        _add(tar, "etc/link", tarfile.SYMTYPE, linkname="../bin/tool")
        _add(tar, "etc/hard", tarfile.LNKTYPE, linkname="./etc/hosts")
        _add(tar, "dev/null", tarfile.CHRTYPE, devmajor=1, devminor=3)
        _add(tar, "dev/sda", tarfile.BLKTYPE, devmajor=8, devminor=300)
        _add(tar, "dev/pipe", tarfile.FIFOTYPE)
    return out.getvalue()


def _add(tar: tarfile.TarFile, name: str, kind: bytes, data: bytes = b"", **fields: Any) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data))


def parse(made: goestargz.Estargz) -> tuple[LayerIndex, Spans]:
    offset, length = plan_footer(len(made.blob))
    tail = made.blob[offset : offset + length]
    location = parse_footer(tail, len(made.blob))
    member = location.cut(tail, offset)
    assert member is not None
    return parse_toc(member, location, Digest(made.toc_digest))


def stream_of(blob: bytes, spans: Spans) -> bytes:
    """The whole stream; spans of one member are decoded at once, as a fetcher does."""
    pieces: list[bytes] = []
    for (offset, length), members in itertools.groupby(spans.spans, key=lambda span: (span.offset, span.length)):
        pieces += decode_verified(spans.codec, spans.covers, list(members), blob[offset : offset + length])
    return b"".join(pieces)


def content(entry: Entry, stream: bytes) -> bytes:
    data = bytearray(entry.size)
    for segment in entry.segments:
        at = segment.stream_offset
        data[segment.file_offset : segment.file_offset + segment.length] = stream[at : at + segment.length]
    return bytes(data)


WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "chunks": {"chunk_size": 1000},
    "chunks in shared members": {"chunk_size": 3000, "min_chunk_size": 20_000},
    "files in shared members": {"min_chunk_size": 1_000_000},
    "prioritized": {"prioritized": ("etc/hosts", "bin/tool"), "chunk_size": 4000},
    "legacy footer": {"footer": "legacy", "chunk_size": 5000},
}
MADE = {way: goestargz.convert(make_tar(), **options) for way, options in WAYS.items()}


@pytest.mark.parametrize("way", WAYS)
def test_the_layer_is_what_the_tar_is(way: str) -> None:
    index, spans = parse(MADE[way])
    stream = stream_of(MADE[way].blob, spans)
    assert len(stream) == index.stream_size == sum(map(len, FILES.values())) + len(b"marked")
    entries = {entry.path: entry for entry in index.entries}
    for name, data in FILES.items():
        entry = entries[name.encode()]
        assert content(entry, stream) == data
        assert (entry.kind, entry.mode, entry.uid, entry.gid) == (Kind.REGULAR, 0o4755, 1000, 70_000)
        assert (entry.size, entry.mtime_ns) == (len(data), 1_600_000_000 * 10**9)
        assert entry.digest == b""
    assert (entries[b"etc"].kind, entries[b"etc"].mode) == (Kind.DIRECTORY, 0o1755)
    assert dict(entries[b"etc/marked"].xattrs) == {b"security.capability": b"\1\0", b"user.note": b"n"}
    assert (entries[b"etc/link"].kind, entries[b"etc/link"].link) == (Kind.SYMLINK, b"../bin/tool")
    assert (entries[b"etc/hard"].kind, entries[b"etc/hard"].link) == (Kind.HARDLINK, b"etc/hosts")
    assert (entries[b"dev/null"].kind, entries[b"dev/null"].device) == (Kind.CHARACTER, (1, 3))
    assert (entries[b"dev/sda"].kind, entries[b"dev/sda"].device) == (Kind.BLOCK, (8, 300))
    assert entries[b"dev/pipe"].kind is Kind.FIFO
    assert len(entries) == len(index.entries) == len(FILES) + 8


@pytest.mark.parametrize("way", WAYS)
def test_spans_cover_the_stream_once_and_stay_in_the_payload(way: str) -> None:
    made = MADE[way]
    index, spans = parse(made)
    position = 0
    for span in spans.spans:
        assert span.start == position
        position += span.size
        assert 0 <= span.offset < span.offset + span.length <= parse_footer(made.blob[-100:], len(made.blob)).offset
    assert position == index.stream_size
    if "shared" in way:
        assert len({span.offset for span in spans.spans}) < len(spans.spans)


@pytest.mark.parametrize("way", WAYS)
def test_the_blob_is_still_a_gzip_of_the_diff_id(way: str) -> None:
    assert MADE[way].diff_id == "sha256:" + hashlib.sha256(gzip.decompress(MADE[way].blob)).hexdigest()


def test_the_prefetch_landmark_is_hidden_and_says_how_much() -> None:
    index, spans = parse(MADE["prioritized"])
    assert not {entry.path for entry in index.entries} & {b".prefetch.landmark", b".no.prefetch.landmark"}
    first = sum(len(FILES[name]) for name in ("etc/hosts", "bin/tool"))
    assert [span.offset < index.prefetch_size for span in spans.spans] == [span.start < first for span in spans.spans]
    assert 0 < index.prefetch_size < len(MADE["prioritized"].blob)
    assert parse(MADE["default"])[0].prefetch_size == 0


def _end(segment: Segment) -> int:
    return segment.stream_offset + segment.length


@pytest.mark.parametrize("way", WAYS)
@given(data=st.data())
@settings(max_examples=25)
def test_any_read_of_any_file_equals_a_slice(way: str, data: st.DataObject) -> None:
    index, spans = parse(MADE[way])
    name, whole = data.draw(st.sampled_from([(name, whole) for name, whole in FILES.items() if whole]))
    start = data.draw(st.integers(0, len(whole) - 1))
    size = data.draw(st.integers(1, len(whole) - start))
    entry = next(entry for entry in index.entries if entry.path == name.encode())
    read = bytearray()
    for segment in entry.segments:
        low, high = max(start, segment.file_offset), min(start + size, segment.file_offset + segment.length)
        if low < high:
            shift = segment.stream_offset - segment.file_offset
            read += read_stream(MADE[way].blob, spans, low + shift, high + shift)
    assert bytes(read) == whole[start : start + size]


def read_stream(blob: bytes, spans: Spans, start: int, end: int) -> bytes:
    wanted = [span for span in spans.spans if span.start < end and start < span.start + span.size]
    if not wanted:
        return b""
    return stream_of(blob, Spans(spans.codec, spans.covers, wanted))[start - wanted[0].start : end - wanted[0].start]


@pytest.mark.parametrize("way", ["default", "legacy footer"])
def test_footers_of_every_cut_and_with_garbage_behind(way: str) -> None:
    blob = MADE[way].blob
    location = parse_footer(blob, len(blob))
    assert location == parse_footer(blob[-51:], len(blob))
    assert blob[location.offset : location.offset + 3] == b"\x1f\x8b\x08"
    for missing in range(1, 60):
        with pytest.raises(CorruptError, match="ends without a footer"):
            parse_footer(blob[-200:-missing], len(blob) - missing)
    for garbage in (b"\0", b"x" * 46, b"x" * 51):
        with pytest.raises(CorruptError):
            parse_footer(blob[-200:] + garbage, len(blob) + len(garbage))
    for short in range(47):
        with pytest.raises(CorruptError):
            parse_footer(blob[len(blob) - short :], short)


def test_a_footer_that_points_elsewhere_is_refused() -> None:
    footer = MADE["default"].blob[-51:]
    for offset in (b"%016x" % 1000, b"f" * 16, b"%016x" % 949, b"-00000000000001f"):
        with pytest.raises(CorruptError):
            parse_footer(footer[:16] + offset + footer[32:], 1000)
    with pytest.raises(CorruptError, match="points to no table"):
        parse_footer(footer[:16] + b"%016x" % 1 + footer[32:], TOC_MAX + 100)


def test_an_external_table_is_told_apart() -> None:
    made = goestargz.convert(make_tar(), footer="external")
    location = parse_footer(made.blob[-51:], len(made.blob))
    assert location == TocLocation(len(made.blob) - 46, 0)
    assert location.is_external
    index, spans = parse_toc(made.toc, location, Digest(made.toc_digest))
    assert len(stream_of(made.blob, spans)) == index.stream_size > 0


def test_the_table_is_found_in_the_tail_or_must_be_fetched() -> None:
    blob = MADE["default"].blob
    location = parse_footer(blob, len(blob))
    assert location.cut(blob, 0) == location.cut(blob[location.offset :], location.offset) is not None
    assert location.cut(blob[location.offset + 1 :], location.offset + 1) is None
    assert plan_footer(100) == (0, 100)
    assert plan_footer(65_536 + 7) == (7, 65_536)
    assert plan_footer(16 * 100_000) == (15 * 100_000, 100_000)
    assert plan_footer(100 * TAIL) == (99 * TAIL, TAIL)


def test_a_table_cut_off_or_damaged_anywhere_is_refused() -> None:
    made = MADE["default"]
    location = parse_footer(made.blob, len(made.blob))
    member = made.blob[location.offset : location.offset + location.size]
    digest = Digest(made.toc_digest)
    for end in range(len(member)):
        with pytest.raises(CorruptError):
            parse_toc(member[:end], location, digest)
    with pytest.raises(CorruptError):
        parse_toc(member + b"garbage", location, digest)
    with pytest.raises(CorruptError, match="does not have the digest"):
        parse_toc(member, location, Digest("sha256:" + "0" * 64))


def toc(
    entries: list[dict[str, Any]] | bytes, name: str = "stargz.index.json", **more: Any
) -> tuple[LayerIndex, Spans]:
    text = entries if isinstance(entries, bytes) else json.dumps({"version": 1, "entries": entries, **more}).encode()
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        _add(tar, name, tarfile.REGTYPE, text)
    return parse_toc(gzip.compress(out.getvalue()), TocLocation(10_000, 1), Digest.of(text))


SHA = "sha256:" + "ab" * 32


def reg(**fields: Any) -> dict[str, Any]:
    return {"name": "f", "type": "reg", "size": 100, "offset": 50, "digest": SHA, "chunkDigest": SHA, **fields}


def chunk(**fields: Any) -> dict[str, Any]:
    return {"type": "chunk", "name": "f", "chunkDigest": SHA, **fields}


HOSTILE: dict[str, list[dict[str, Any]]] = {
    "escaping name": [{"name": "../x", "type": "dir"}],
    "escaping link": [{"name": "x", "type": "hardlink", "linkName": "a/../../b"}],
    "long name": [{"name": "n" * 256, "type": "dir"}],
    "64 KiB name": [{"name": "n/" * 32768, "type": "dir"}],
    "NUL in a name": [{"name": "a\0b", "type": "dir"}],
    "unknown type": [{"name": "x", "type": "door"}],
    "negative size": [reg(size=-1)],
    "8 EiB": [reg(size=(1 << 63) - 1)],
    "more than 64 bits": [reg(size=1 << 70)],
    "negative offset": [reg(offset=-5)],
    "offset behind the payload": [reg(offset=10_000)],
    "absurd offset": [reg(offset=1 << 62)],
    "absurd inner offset": [reg(innerOffset=1 << 62)],
    "the same payload twice": [reg(), reg(name="g")],
    "overlap in a member": [reg(), reg(name="g", innerOffset=99)],
    "no digest": [reg(digest="", chunkDigest="")],
    "no chunk digest": [reg(chunkSize=60, chunkDigest=""), chunk(offset=90, chunkOffset=60)],
    "sha512": [reg(chunkDigest="sha512:" + "0" * 128)],
    "bad digest": [reg(chunkDigest="sha256:" + "G" * 64)],
    "chunks with a gap": [reg(chunkSize=50), chunk(offset=90, chunkOffset=60)],
    "chunks that overlap": [reg(chunkSize=50), chunk(offset=90, chunkOffset=40)],
    "chunks that are too short": [reg(chunkSize=50), chunk(offset=90, chunkOffset=50, chunkSize=10)],
    "chunks that are too long": [reg(chunkSize=50), chunk(offset=90, chunkOffset=50, chunkSize=51)],
    "a chunk of nothing": [reg(), chunk(offset=90, chunkOffset=100)],
    "a chunk over 128 MiB": [reg(size=(128 << 20) + 1)],
    "a chunk first": [chunk(offset=1)],
    "a chunk of a directory": [{"name": "d", "type": "dir"}, chunk(offset=1)],
    "uid over 32 bits": [reg(uid=1 << 32)],
    "bad time": [reg(modtime="yesterday")],
    "impossible time": [reg(modtime="2023-02-30T00:00:00Z")],
    "device": [{"name": "d", "type": "char", "devMajor": 1 << 12}],
    "xattr that is no base64": [reg(xattrs={"user.a": "%"})],
}


@pytest.mark.parametrize("entries", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_tables_are_refused(entries: list[dict[str, Any]]) -> None:
    with pytest.raises(NsfsError) as caught:
        toc(entries)
    assert isinstance(caught.value, CorruptError | UnsupportedError)


@pytest.mark.parametrize(
    "make",
    [
        lambda: toc([], version=2),
        lambda: toc([], name="other.json"),
        lambda: toc(b"[]"),
        lambda: toc(b"{"),
        lambda: toc(b""),
        lambda: toc(b"\xff"),
        lambda: toc(b'{"version": 1, "entries": [{"name": "\\ud800", "type": "dir"}]}'),
        lambda: toc(b'{"entries": ' + b"[" * 100_000),
        lambda: toc(b'{"unknown": ' + b"[" * 100_000),
        lambda: parse_toc(gzip.compress(b"no tar"), TocLocation(1, 1), Digest.of(b"")),
        lambda: parse_toc(gzip.compress(bytes(1024)), TocLocation(1, 1), Digest.of(b"")),
        lambda: parse_toc(b"", TocLocation(1, 1), Digest.of(b"")),
    ],
)
def test_tables_that_are_none_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises((CorruptError, UnsupportedError)):
        make()


def test_a_bomb_is_stopped_at_the_limit() -> None:
    bomb = gzip.compress(bytes(1 << 20)) * 400
    tracemalloc.start()
    with pytest.raises(CorruptError, match="larger than"):
        parse_toc(bomb, TocLocation(1, 1), Digest.of(b""))
    assert tracemalloc.get_traced_memory()[1] < 2 * TOC_MAX
    tracemalloc.stop()


def test_what_a_table_may_leave_out() -> None:
    index, spans = toc(
        [
            {"name": "./", "type": "dir", "mode": 0o40755},
            reg(name="/a//legacy", mode=0o100644, chunkDigest=""),
            reg(name="chunked", offset=300, size=25, chunkSize=10, modtime="2001-09-09T01:46:40.000000001+00:00"),
            chunk(offset=400, chunkOffset=10, chunkSize=10),
            chunk(offset=500, chunkOffset=20),
            {
                "name": "x",
                "type": "fifo",
                "xattrs": {"user.none": None, "user.some": base64.b64encode(b"\xff").decode()},
            },
            {"name": "chunked", "type": "symlink", "linkName": "later wins elsewhere"},
        ]
    )
    root, legacy, chunked, fifo, link = index.entries
    assert (root.path, root.mode) == (b"", 0o755)
    assert (legacy.path, legacy.mode, legacy.segments) == (b"a/legacy", 0o644, (Segment(0, 0, 100),))
    assert (chunked.segments, chunked.mtime_ns) == ((Segment(0, 100, 25),), 10**18 + 1)
    assert fifo.xattrs == ((b"user.none", b""), (b"user.some", b"\xff"))
    assert link.link == b"later wins elsewhere"
    assert [(span.offset, span.length, span.start, span.size) for span in spans.spans] == [
        (50, 250, 0, 100),
        (300, 100, 100, 10),
        (400, 100, 110, 10),
        (500, 9500, 120, 5),
    ]


def test_the_stream_follows_the_blob_not_the_table() -> None:
    entries = [reg(name="late", offset=900, innerOffset=600), reg(name="b", offset=900, innerOffset=100), reg(name="c")]
    index, spans = toc(entries)
    assert [entry.segments for entry in index.entries] == [(Segment(0, at, 100),) for at in (200, 100, 0)]
    assert [(span.offset, span.skip) for span in spans.spans] == [(50, 0), (900, 100), (900, 600)]


@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "name": st.sampled_from(["a", "b/c", "../d", ""]),
                "type": st.sampled_from(["reg", "chunk", "dir", "hardlink"]),
            },
            optional={
                "size": st.integers(0, 300),
                "offset": st.integers(0, 300),
                "innerOffset": st.integers(0, 300),
                "chunkOffset": st.integers(0, 300),
                "chunkSize": st.integers(0, 300),
                "digest": st.sampled_from([SHA, ""]),
                "chunkDigest": st.sampled_from([SHA, ""]),
                "linkName": st.sampled_from(["a", "/", ".."]),
            },
        ),
        max_size=6,
    )
)
@settings(max_examples=150)
def test_any_table_gives_spans_that_fit_or_an_error(entries: list[dict[str, Any]]) -> None:
    try:
        index, spans = toc(entries)
    except CorruptError:
        return
    assert [span.start for span in spans.spans] == [0, *itertools.accumulate(s.size for s in spans.spans)][
        : len(spans.spans)
    ]
    for entry in index.entries:
        assert sum(segment.length for segment in entry.segments) == entry.size
        assert all(_end(segment) <= index.stream_size for segment in entry.segments)
