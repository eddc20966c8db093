"""`nsfs index`: what is put beside an image says truly how it is read, and nothing of the image changes."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio

from goregistry import run_go_registry
from images import Image, Layer, directory, file, gzip_layer, tar_layer
from meter import Meter
from nsfs.format.artifact import PACK_TYPE, parse_index, parse_manifest, parse_spans
from nsfs.format.pack import open_piece, parse_table
from nsfs.format.spans import decode_verified
from nsfs.model.digest import Digest
from nsfs.model.layer import Codec
from nsfs.remote.reference import parse_reference
from nsfs.remote.source import open_source
from nsfs_daemon import Daemon, run_daemon
from page_cache import cached_pages
from registry import run_registry
from users import noise, push, read, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nsfs.format.artifact import Artifact
    from nsfs.model.oci import Descriptor
    from registry import Registry

FILES = {f"f{number}": noise(700_000, number) for number in range(4)}
TEXT = b"".join(b"line %d\n" % number for number in range(400_000))
CODECS = (Codec.DEFLATE, Codec.NONE)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with run_daemon(str(tmp_path_factory.mktemp("daemon"))) as running:
        yield running


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A host that believes what lies beside an image."""
    with run_daemon(str(tmp_path_factory.mktemp("node")), {"trust_index": "same-repository"}) as running:
        yield running


@pytest.fixture(params=["api", "tags"])
def place(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A registry that lists referrers by itself, and one whose clients do."""
    with run_go_registry() if request.param == "api" else run_registry() as registry:
        yield registry


def image(name: str = "") -> Image:
    """One of that name alone."""
    files = {**FILES, "name": name.encode()} if name else FILES
    below = gzip_layer([file(*item) for item in files.items()])
    return Image((below, tar_layer([file("text", TEXT)])))


def fetched(reference: str, ask: Callable[[Any], Any]) -> Any:
    async def run() -> Any:
        async with open_source(parse_reference(reference)) as source:
            return await ask(source)

    return trio.run(run)


def attached(reference: str, report: dict[str, Any]) -> Artifact:
    document = fetched(reference, lambda source: source.manifest(report["digest"]))
    return parse_manifest(document.data)


def blob(reference: str, descriptor: Descriptor) -> bytes:
    return bytes(fetched(reference, lambda source: source.read_blob(descriptor, 1 << 30)))


def test_an_artifact_says_how_layers_are_read_and_what_a_start_reads(
    daemon: Daemon, place: Any, arena: Path, tmp_path: Path
) -> None:
    made = image(place.host)
    push(made, place, tmp_path, "shown")
    reference, target = f"{place.host}/shown", str(arena / "mnt")
    before = fetched(reference, lambda source: source.manifest("latest"))
    done = daemon.nsfs("index", "push", reference)
    assert "no start-up pack: no start was recorded" in done.stderr
    with daemon.mounted(reference, target, "--profile", "record"):
        start(target)
    report = daemon.json("index", "push", reference)
    assert daemon.json("index", "push", reference)["digest"] == report["digest"]
    shown = daemon.json("index", "show", reference)["artifacts"]
    assert {each["digest"] for each in shown} > {report["digest"]}
    assert all(each["image"] == before.digest and not each["flaw"] for each in shown)
    artifact = attached(reference, report)
    assert artifact.subject == before.digest
    assert [layer.blob for layer in artifact.layers] == [Digest.of(layer.blob) for layer in made.layers]
    check_layers(reference, artifact, made)
    check_pack(reference, artifact, made)
    assert fetched(reference, lambda source: source.manifest("latest")) == before
    gone = daemon.json("index", "rm", reference, "--digest", report["digest"])["artifacts"]
    assert [each["digest"] for each in gone] == [report["digest"]]
    refused = daemon.nsfs("index", "rm", reference, "--digest", report["digest"], check=False)
    assert (refused.returncode, "no such artifact" in refused.stderr) == (3, True)
    assert len(daemon.json("index", "rm", reference)["artifacts"]) == 1
    assert daemon.nsfs("index", "show", reference).stdout == "nothing lies beside it\n"


def start(target: str) -> None:
    """What a start of the image reads."""
    assert read(f"{target}/f3") == FILES["f3"]
    with open(f"{target}/text", "rb") as text:
        text.seek(2_000_000)
        assert text.read(100) == TEXT[2_000_000:2_000_100]


def test_a_layer_of_very_many_files_is_as_its_artifact_says(
    daemon: Daemon, node: Daemon, registry: Registry, arena: Path, tmp_path: Path
) -> None:
    """So many that its tables are worked out beside its map."""
    names = [f"{number:05x}" for number in range((1 << 15) + 1)]
    many = [directory("d"), *(file(f"d/{name}", name.encode()) for name in names)]
    push(Image((gzip_layer(many, level=1),)), registry, tmp_path, "many")
    daemon.nsfs("index", "push", f"{registry.host}/many")
    target = str(arena / "mnt")
    with node.mounted(f"{registry.host}/many", target, "--on-error", "eio"):
        assert all("artifact beside the image" in layer["why"] for layer in inspected(node, f"{registry.host}/many"))
        assert sorted(os.listdir(f"{target}/d")) == names
        assert all(read(f"{target}/d/{name}") == name.encode() for name in names[:: 1 << 12])


def test_a_node_that_never_saw_the_image_starts_from_its_pack(
    daemon: Daemon, node: Daemon, registry: Registry, arena: Path, tmp_path: Path
) -> None:
    """The rest comes by ranges. A node that believes nothing of it does not even ask."""
    made = image("packed")
    push(made, registry, tmp_path, "packed")
    target = str(arena / "mnt")
    with daemon.mounted(f"{registry.host}/packed", target, "--profile", "record"):
        start(target)
    report = daemon.json("index", "push", f"{registry.host}/packed")
    with Meter(registry.host) as meter:
        reference = f"{meter.host}/packed"
        daemon.nsfs("inspect", reference)
        assert not any("referrers" in served.path or report["digest"] in served.path for served in meter.log)
        assert all("artifact beside the image" in layer["why"] for layer in inspected(node, reference))
        wait_until(lambda: is_made_warm(node, reference, target), "what the pack brings comes into memory", 60)
        with node.mounted(reference, target, "--on-error", "eio"):
            wait_until(lambda: "has what it reads" in node.tail(), "the pack is here", 60)
            meter.down()
            start(target)
            with pytest.raises(OSError, match="Input/output error"):
                read(f"{target}/f1")
            meter.up()
            wait_until(lambda: readable(f"{target}/f1"), "the registry is tried again", 60)
            assert {name: read(f"{target}/{name}") for name in FILES} == FILES
            assert read(f"{target}/text") == TEXT
        assert all("artifact beside the image" in layer["why"] for layer in inspected(node, reference))
        ranges = [served for layer in made.layers for served in meter.blobs(Digest.of(layer.blob))]
        assert {served.status for served in ranges} == {206}


def is_made_warm(daemon: Daemon, reference: str, target: str) -> bool:
    """Whether what a start reads, and no other file, comes into memory with a mount; others may drop all caches."""
    with daemon.mounted(reference, target):
        (path,) = Path(daemon.run).glob("l/*/f3")
        deadline = time.monotonic() + 10
        while cached_pages(str(path), 0, len(FILES["f3"])) * 4096 < len(FILES["f3"]):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        assert not cached_pages(str(path.with_name("f1")), 0, len(FILES["f1"]))
        return True


def readable(path: str) -> bool:
    try:
        read(path)
    except OSError:
        return False
    return True


def inspected(daemon: Daemon, reference: str) -> Any:
    return daemon.json("inspect", reference)["layers"]


def check_layers(reference: str, artifact: Artifact, made: Image) -> None:
    """Entries and spans lead to what the tars have."""
    for claimed, layer, codec in zip(artifact.layers, made.layers, CODECS, strict=True):
        index, _ = parse_index(blob(reference, claimed.index))
        assert index.stream_size == len(layer.tar)
        for entry in (entry for entry in index.entries if entry.path != b"name"):
            (segment,) = entry.segments
            found = layer.tar[segment.stream_offset : segment.stream_offset + segment.length]
            assert found == {**FILES, "text": TEXT}[entry.path.decode()]
        spans = parse_spans(blob(reference, claimed.spans), codec, index.stream_size, len(layer.blob))
        assert b"".join(decoded(spans, layer)) == layer.tar


def decoded(spans: Any, layer: Layer) -> Iterator[bytes]:
    for span in spans.spans:
        compressed = layer.blob[span.offset : span.offset + span.length]
        yield from decode_verified(spans.codec, spans.covers, [span], compressed)


def check_pack(reference: str, artifact: Artifact, made: Image) -> None:
    """It has what was read, in that order, and little else."""
    assert artifact.pack is not None
    assert artifact.pack.pack.media_type == PACK_TYPE
    assert artifact.pack.head == (*(layer.index for layer in artifact.layers), artifact.pack.table)
    head = b"".join(blob(reference, each) for each in artifact.pack.head)
    pack = blob(reference, artifact.pack.pack)
    assert pack.startswith(head)
    pack = pack.removeprefix(head)
    table = parse_table(blob(reference, artifact.pack.table), artifact.pack.size)
    at, runs = 0, []
    for piece in table.pieces:
        for run, data in open_piece(piece, pack[at : at + piece.length]):
            layer = next(each for each in made.layers if Digest.of(each.blob) == table.layers[run.layer])
            assert layer.tar[run.start : run.start + run.length] == data
            runs.append((made.layers.index(layer), run))
        at += piece.length
    assert [number for number, _ in runs] == sorted(number for number, _ in runs), "the file below was read first"
    assert len(FILES["f3"]) < sum(run.length for _, run in runs) < len(FILES["f3"]) + 600_000
