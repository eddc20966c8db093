from __future__ import annotations

import hashlib
import json
import struct
import tracemalloc
import zlib
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

import strategies
from nsfs.errors import CorruptError, UnsupportedError
from nsfs.format.artifact import (
    ARTIFACT_TYPE,
    CREATED,
    INDEX_TYPE,
    LAYER,
    MAX_BLOB,
    PACK_TYPE,
    PROMISE,
    SPANS_TYPE,
    TABLE_TYPE,
    Artifact,
    ClaimedLayer,
    StartupPack,
    parse_index,
    parse_manifest,
    parse_promise,
    parse_spans,
    plan_notes,
    render_index,
    render_manifest,
    render_spans,
)
from nsfs.model import oci
from nsfs.model.digest import Digest
from nsfs.model.layer import Codec, Covers, Entry, Kind, LayerIndex, Segment, Span, Spans
from strategies import device, directory, hardlink, regular, symlink

if TYPE_CHECKING:
    from collections.abc import Callable

HEADER = struct.Struct("<8sIIQ")


def with_segments(entries: list[Entry]) -> LayerIndex:
    """Files behind each other, as in a tar."""
    at, placed = 0, []
    for entry in entries:
        segments = (Segment(0, at, entry.size),) if entry.size else ()
        placed.append(msgspec.structs.replace(entry, segments=segments))
        at += entry.size + 512
    return LayerIndex(placed, at)


INDEX = with_segments(
    [
        directory(b"", xattrs=((b"user.a", b"b"),)),
        regular(b"a/b", 5000, mtime_ns=-7),
        symlink(b"a/s", b"../b"),
        hardlink(b"a/h", b"a/b"),
        device(b"null", Kind.CHARACTER, (1, 3)),
        regular(b"a/.wh.c", 0),
        regular(b"z", 10),
    ]
)


def sha(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


SPANS = Spans(
    Codec.DEFLATE,
    Covers.COMPRESSED,
    [Span(10, 100, 0, 5000, 0, sha(b"a")), Span(109, 50, 5000, 700, 0, sha(b"b"), 3, zlib.compress(b"x" * 99))],
)


def boxed(magic: bytes, value: object, size: int | None = None, version: int = 1) -> bytes:
    packed = msgspec.msgpack.encode(value)
    header = HEADER.pack(magic, version, 0, len(packed) if size is None else size)
    return header + zstandard.ZstdCompressor().compress(packed)


def read_index(data: bytes) -> LayerIndex:
    return parse_index(data).layer


def read_spans(data: bytes) -> Spans:
    return parse_spans(data, Codec.DEFLATE, 5700, 159)


BLOBS = [(render_index(INDEX), read_index), (render_spans(SPANS), read_spans)]


@given(strategies.layers())
def test_an_index_says_what_it_was_rendered_of(entries: list[Entry]) -> None:
    index = with_segments(entries)
    assert parse_index(render_index(index)) == (index, {})


def test_digests_of_contents_are_nobody_elses_business() -> None:
    known = [msgspec.structs.replace(each, digest=sha(each.path)) for each in INDEX.entries]
    assert parse_index(render_index(LayerIndex(known, INDEX.stream_size))) == (INDEX, {})


def test_an_index_says_which_contents_are_the_same() -> None:
    index = with_segments(
        [regular(name, size) for name, size in [(b"a", 9), (b"b", 9), (b"c", 0), (b"d", 0), (b"e", 9)]]
    )
    known = [msgspec.structs.replace(each, digest=sha(b"%d" % each.size)) for each in index.entries]
    assert parse_index(render_index(LayerIndex(known, index.stream_size))) == (index, {1: 0, 4: 0})


def test_an_index_without_twins_is_read() -> None:
    data = boxed(b"nsfscidx", [INDEX.stream_size, INDEX.entries])
    assert parse_index(data) == (INDEX, {})


@pytest.mark.parametrize(
    "twins", [[(1, 1)], [(0, 1)], [(1, -1)], [(9, 1)], [(1, 2)], [(6, 1)], [(5, 2)], [(4, 1), (4, 1)], [(4, 1), (7, 4)]]
)
def test_files_that_cannot_be_the_same_are_refused(twins: list[tuple[int, int]]) -> None:
    sizes = [0, 5, 7, 5, 5, 0, 7, 5]
    index = with_segments([regular(b"%d" % number, size) for number, size in enumerate(sizes)])
    with pytest.raises(CorruptError):
        parse_index(boxed(b"nsfscidx", [index.stream_size, index.entries, twins]))


def test_spans_say_what_they_were_rendered_of() -> None:
    assert read_spans(render_spans(SPANS)) == SPANS


@pytest.mark.parametrize(("blob", "parse"), BLOBS, ids=["index", "spans"])
def test_what_is_cut_off_anywhere_is_refused(blob: bytes, parse: Callable[[bytes], object]) -> None:
    for end in range(len(blob)):
        with pytest.raises(CorruptError):
            parse(blob[:end])


@pytest.mark.parametrize(("blob", "parse"), BLOBS, ids=["index", "spans"])
@pytest.mark.parametrize("behind", [b"\0", b"garbage", zstandard.ZstdCompressor().compress(b"more")])
def test_garbage_behind_is_refused(blob: bytes, parse: Callable[[bytes], object], behind: bytes) -> None:
    with pytest.raises(CorruptError):
        parse(blob + behind)


@pytest.mark.parametrize(("blob", "parse"), BLOBS, ids=["index", "spans"])
@given(data=st.data())
def test_a_flipped_bit_is_an_error_or_a_sound_value(
    blob: bytes, parse: Callable[[bytes], object], data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(blob) - 1))
    broken = blob[:at] + bytes([blob[at] ^ 1 << data.draw(st.integers(0, 7))]) + blob[at + 1 :]
    with suppress(CorruptError, UnsupportedError):
        assert parse(broken) is not None


@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    for magic, parse in ((b"nsfscidx", read_index), (b"nsfscspn", read_spans)):
        with pytest.raises((CorruptError, UnsupportedError)):
            parse(magic + noise)


def test_a_newer_format_is_refused_by_its_name() -> None:
    with pytest.raises(UnsupportedError, match="another format: 2"):
        parse_index(boxed(b"nsfscidx", [0, []], version=2))


def test_a_bomb_takes_no_memory() -> None:
    zeros = zstandard.ZstdCompressor().compress(bytes(400 << 20))
    tracemalloc.start()
    for claimed in (400 << 20, 100):
        with pytest.raises(CorruptError):
            parse_index(HEADER.pack(b"nsfscidx", 1, 0, claimed) + zeros)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


FILE = regular(b"f", 10, segments=(Segment(0, 512, 10),))


@pytest.mark.parametrize(
    "entries",
    [
        [regular(b"../etc/passwd", 0)],
        [regular(b"/etc/passwd", 0)],
        [regular(b"a//b", 0)],
        [regular(b"a/./b", 0)],
        [regular(b"n" * 256, 0)],
        [regular(b"a\0b", 0)],
        [regular(b"f", 0, mode=0o10777)],
        [regular(b"f", 0, uid=1 << 32)],
        [regular(b"f", 0, uid=-1)],
        [regular(b"f", -1)],
        [regular(b"f", 1 << 63)],
        [regular(b"f", 0, digest=b"d" * 32)],
        [directory(b"d", size=4)],
        [directory(b"d", link=b"x")],
        [directory(b"d", device=(1, 1))],
        [device(b"d", Kind.BLOCK, (1 << 12, 0))],
        [device(b"d", Kind.BLOCK, (0, 1 << 20))],
        [hardlink(b"h", b"../x")],
        [symlink(b"s", b"x" * 5000)],
        [msgspec.structs.replace(FILE, segments=(Segment(0, 512, 11),))],
        [msgspec.structs.replace(FILE, segments=(Segment(0, 512, 0),))],
        [msgspec.structs.replace(FILE, segments=(Segment(-1, 512, 5),))],
        [msgspec.structs.replace(FILE, segments=(Segment(0, -1, 5),))],
        [msgspec.structs.replace(FILE, segments=(Segment(0, 512, 5), Segment(4, 600, 5)))],
        [msgspec.structs.replace(FILE, segments=(Segment(0, 512, 5), Segment(5, 516, 5)))],
        [FILE, FILE],
        [msgspec.structs.replace(FILE, segments=(Segment(0, 3999, 10),))],
    ],
)
def test_entries_that_no_parser_makes_are_refused(entries: list[Entry]) -> None:
    with pytest.raises(CorruptError):
        parse_index(boxed(b"nsfscidx", [4000, entries]))


@pytest.mark.parametrize("stream_size", [-1, (1 << 62) + 1])
def test_a_stream_of_a_size_that_cannot_be_is_refused(stream_size: int) -> None:
    with pytest.raises(CorruptError):
        parse_index(boxed(b"nsfscidx", [stream_size, []]))


GOOD = Span(0, 100, 0, 5700, 0, sha(b""))


@pytest.mark.parametrize(
    "spans",
    [
        [],
        [GOOD, GOOD],
        [Span(0, 100, 1, 5699, 0, sha(b""))],
        [Span(0, 100, 0, 5699, 0, sha(b""))],
        [Span(0, 160, 0, 5700, 0, sha(b""))],
        [Span(-1, 100, 0, 5700, 0, sha(b""))],
        [Span(0, 0, 0, 5700, 0, sha(b""))],
        [Span(0, 1 << 40, 0, 5700, 0, sha(b""))],
        [Span(0, 100, 0, 5700, 1, sha(b""))],
        [Span(0, 100, 0, 5700, 0, b"short")],
        [Span(0, 100, 0, 5700, 0, sha(b""), 8)],
        [Span(0, 100, 0, 5700, 0, sha(b""), -1)],
        [Span(0, 100, 0, 5700, 0, sha(b""), 0, b"w" * (40 << 10))],
        [Span(50, 100, 0, 5000, 0, sha(b"")), Span(0, 100, 5000, 700, 0, sha(b""))],
        [Span(0, 100, 0, 5000, 0, sha(b"")), Span(100, 50, 4999, 701, 0, sha(b""))],
        [Span(0, 100, 0, 0, 0, sha(b"")), GOOD],
    ],
)
def test_spans_that_are_not_the_layers_are_refused(spans: list[Span]) -> None:
    with pytest.raises(CorruptError):
        read_spans(boxed(b"nsfscspn", [2, spans]))


def test_spans_of_another_codec_are_refused() -> None:
    with pytest.raises(CorruptError, match="zstd"):
        read_spans(boxed(b"nsfscspn", [3, [GOOD]]))


# The manifest


def blob(name: str, media_type: str, **notes: str) -> oci.Descriptor:
    return oci.Descriptor(media_type=media_type, digest=Digest.of(name.encode()), size=7, annotations=notes or None)


def claimed(name: str) -> ClaimedLayer:
    notes = {LAYER: str(Digest.of(name.encode()))}
    return ClaimedLayer(
        Digest.of(name.encode()), blob(name + "i", INDEX_TYPE, **notes), blob(name + "s", SPANS_TYPE, **notes)
    )


SUBJECT = oci.Descriptor(media_type=oci.OCI_MANIFEST, digest=Digest.of(b"image"), size=99)
LAYERS = (claimed("one"), claimed("two"))
HEAD = (*(layer.index for layer in LAYERS), blob("table", TABLE_TYPE))
PACK = msgspec.structs.replace(blob("pack", PACK_TYPE), size=7 * len(HEAD) + 5)
ARTIFACT = Artifact(SUBJECT.digest, LAYERS, StartupPack(HEAD, PACK), "2026-11-21T12:00:00Z")


@pytest.mark.parametrize("artifact", [ARTIFACT, Artifact(SUBJECT.digest, (claimed("one"),))])
def test_a_manifest_says_what_it_was_rendered_of(artifact: Artifact) -> None:
    data = render_manifest(artifact, SUBJECT)
    assert parse_manifest(data) == artifact
    document = json.loads(data)
    assert (document["artifactType"], document["subject"]["digest"]) == (ARTIFACT_TYPE, str(SUBJECT.digest))
    assert "null" not in data.decode()


def test_a_pack_begins_with_what_is_wanted_before_it() -> None:
    found = parse_manifest(render_manifest(ARTIFACT, SUBJECT)).pack
    assert found is not None
    assert (found.table, found.size) == (HEAD[-1], 5)


def test_its_annotations_say_which_pack_it_has() -> None:
    notes = json.loads(render_manifest(ARTIFACT, SUBJECT))["annotations"]
    assert ARTIFACT.pack is not None
    assert notes == plan_notes(ARTIFACT)
    assert parse_promise(notes) == (ARTIFACT.pack.pack, ARTIFACT.pack.pack.size - ARTIFACT.pack.size)
    assert PROMISE not in plan_notes(replace(ARTIFACT, pack=None))


@pytest.mark.parametrize(
    "said",
    [
        "",
        "sha256:" + "a" * 64,
        "sha256:" + "a" * 64 + " 7",
        "sha256:" + "a" * 64 + " 7 8",
        "sha256:" + "a" * 64 + " -7 -8",
        "sha256:" + "a" * 64 + " 7 3 1",
        "sha256:" + "a" * 64 + " \u0667 \u0663",
        "sha256:" + "a" * 64 + f" {MAX_BLOB * 2} {MAX_BLOB + 1}",
        "sha256:" + "a" * 64 + f" {'7' * 13} 3",
        "sha256:../../etc 7 3",
    ],
)
def test_what_cannot_be_a_pack_is_not_promised(said: str) -> None:
    assert parse_promise({PROMISE: said}) is None
    assert parse_promise({PROMISE: "sha256:" + "a" * 64 + " 7 7"}) is not None


def test_a_manifest_is_cut_off_nowhere() -> None:
    data = render_manifest(ARTIFACT, SUBJECT)
    for end in range(len(data)):
        with pytest.raises(CorruptError):
            parse_manifest(data[:end])


def _changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    document = json.loads(render_manifest(ARTIFACT, SUBJECT))
    change(document)
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document.pop("subject"),
        lambda document: document.update(artifactType="application/vnd.other"),
        lambda document: document.update(schemaVersion=1),
        lambda document: document["layers"].pop(0),
        lambda document: document["layers"].pop(),
        lambda document: document["layers"].append(document["layers"][0]),
        lambda document: document["layers"].append(document["layers"][-1]),
        lambda document: document["layers"][0].pop("annotations"),
        lambda document: document["layers"][0]["annotations"].update({LAYER: "sha256:../../etc"}),
        lambda document: document["layers"][0].update(size=MAX_BLOB + 1),
        lambda document: document["layers"][-2].update(size=MAX_BLOB + 1),
        lambda document: document["layers"][-1].update(size=7 * len(HEAD) - 1),
        lambda document: document["layers"][-1].update(mediaType="application/vnd.nsfs.pack.v1"),
        lambda document: document["layers"].extend([document["config"]] * 2100),
        lambda document: document["layers"][0].update(digest="sha256:short"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(change: Callable[[dict[str, Any]], object]) -> None:
    with pytest.raises(CorruptError):
        parse_manifest(_changed(change))


def test_a_manifest_may_say_more() -> None:
    def add(document: dict[str, Any]) -> None:
        document["layers"].insert(0, {"mediaType": "text/plain", "digest": str(Digest.of(b"")), "size": 0})
        document["annotations"] = {CREATED: ARTIFACT.created, "other": "thing"}

    assert parse_manifest(_changed(add)) == ARTIFACT
