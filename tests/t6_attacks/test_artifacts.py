"""One level below images: artifacts that lie about a public blob, or that name what is another's.

Whoever believes a lying artifact sees its lie: that is shown first. Nobody else does, in one and the same domain
neither, and where the layer is completed the lie ends.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace

from fakes import FakeRegistry
from images import MTIME_NS, Image, Layer, file, tar_layer
from nsfs.format.artifact import (
    ARTIFACT_TYPE,
    INDEX_TYPE,
    PACK_TYPE,
    SPANS_TYPE,
    TABLE_TYPE,
    plan_artifact,
    render_index,
    render_manifest,
    render_spans,
)
from nsfs.format.pack import PackWriter, render_table
from nsfs.model.digest import Digest
from nsfs.model.layer import Codec, Covers, Entry, Kind, LayerIndex, Segment, Span, Spans
from nsfs.model.oci import OCI_INDEX, OCI_MANIFEST, Descriptor
from nsfs.model.profile import Run
from nsfs.model.referrers import Referrer, plan_added, tag_of
from nsfs_daemon import Daemon, run_daemon
from published import publish, publish_manifest
from users import cat, noise, read, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

POLICY = """
[[rule]]
namespace = "naive-*"
scope = "isolated"
trust_index = "same-repository"

[[rule]]
namespace = "team-b"
scope = "shared"
domain = "public"
trust_index = "same-repository"

[[rule]]
namespace = "team-a"
scope = "shared"
domain = "public"
"""
TOOL, EVIL, SECRET = noise(300_000, 1), noise(300_000, 2), noise(300_000, 3)
MIB = 1 << 20


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    path = tmp_path_factory.mktemp("artifacts")
    (path / "policy.toml").write_text(POLICY)
    with run_daemon(str(path), {"policy": str(path / "policy.toml")}) as running:
        yield running


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as running:
        yield running


def entries_of(layer: Layer) -> list[Entry]:
    """What an honest index has of a layer of files alone."""
    with tarfile.open(fileobj=io.BytesIO(layer.tar)) as archive:
        return [
            Entry(
                member.name.encode(),
                Kind.REGULAR,
                member.mode,
                0,
                0,
                MTIME_NS,
                member.size,
                segments=(Segment(0, member.offset_data, member.size),),
            )
            for member in archive
        ]


def spans_of(layer: Layer) -> Spans:
    pieces = [(at, layer.tar[at : at + MIB]) for at in range(0, len(layer.tar), MIB)]
    digests = [hashlib.sha256(piece).digest() for _, piece in pieces]
    spans = [Span(at, len(data), at, len(data), 0, digest) for (at, data), digest in zip(pieces, digests, strict=True)]
    return Spans(Codec.NONE, Covers.COMPRESSED, spans)


def attach(
    registry: FakeRegistry,
    name: str,
    layer: Layer,
    entries: list[Entry],
    packed: tuple[Entry, bytes] | None = None,
) -> None:
    """Put an artifact beside the image `name`; `packed` is a file with what its pack says that it has."""
    blobs = [
        (INDEX_TYPE, str(layer.digest), render_index(LayerIndex(entries, len(layer.tar)))),
        (SPANS_TYPE, str(layer.digest), render_spans(spans_of(layer))),
    ]
    if packed is not None:
        writer = PackWriter([str(layer.digest)])
        (segment,) = packed[0].segments
        pack = writer.add(Run(0, segment.stream_offset, segment.length), packed[1])
        rest, table = writer.finish()
        head = [blobs[0][2], render_table(table)]
        blobs += [(TABLE_TYPE, "", head[1]), (PACK_TYPE, "", b"".join([*head, pack, rest]))]
    described = []
    for media_type, about, data in blobs:
        registry.add_blob(data)
        described.append((Descriptor(media_type=media_type, digest=Digest.of(data), size=len(data)), about))
    image, _ = registry.documents[f"/v2/{name}/manifests/latest"]
    subject = Descriptor(media_type=OCI_MANIFEST, digest=Digest.of(image), size=len(image))
    manifest = render_manifest(plan_artifact(subject.digest, described, "2026-01-01T00:00:00Z"), subject)
    digest = Digest(registry.add_document(name, "artifact", manifest, OCI_MANIFEST))
    listed = Referrer(media_type=OCI_MANIFEST, digest=digest, size=len(manifest), artifact_type=ARTIFACT_TYPE)
    registry.add_document(name, tag_of(subject.digest), plan_added(None, listed), OCI_INDEX)


def lie(registry: FakeRegistry, kind: str) -> str:
    """A public image with a tool, and beside it, by b, who may push there, an artifact that gives out another."""
    layer = tar_layer([file("evil", EVIL), file("tool", TOOL)])
    reference = publish(registry, Image((layer,)), f"public/{kind}")
    evil, tool = entries_of(layer)
    if kind == "pack":
        attach(registry, f"public/{kind}", layer, [evil, tool], (tool, EVIL))
    else:
        exchanged = [replace(evil, path=b"tool"), replace(tool, path=b"evil")]
        attach(registry, f"public/{kind}", layer, exchanged)
    return reference


def look(daemon: Daemon, namespace: str, path: str) -> bytes:
    """What a namespace reads there; raises CalledProcessError where it is refused."""
    return cat(daemon, path, "--namespace", namespace)


LIES = {"pack": "an artifact has other bytes than the layer", "index": "an artifact claims what is not so of a file"}


@pytest.mark.parametrize("kind", LIES)
def test_who_does_not_believe_an_artifact_never_sees_a_byte_of_it(
    daemon: Daemon, registry: FakeRegistry, kind: str
) -> None:
    """Nor where whoever does is there first, in the same domain."""
    tool = f"{lie(registry, kind)}:/tool"
    assert look(daemon, f"naive-{kind}", tool) == EVIL
    assert look(daemon, "team-b", tool) == EVIL
    assert look(daemon, "team-a", tool) == TOOL
    assert look(daemon, "team-b", tool) == TOOL, "what was read through here is read by what was found"


@pytest.mark.parametrize("kind", LIES)
def test_a_lie_ends_where_its_layer_is_completed(
    daemon: Daemon, registry: FakeRegistry, tmp_path: Path, kind: str
) -> None:
    reference, target = lie(registry, kind), str(tmp_path / "mnt")
    scope = ("--namespace", f"naive-{kind}-2")
    with daemon.mounted(reference, target, "--on-error", "eio", *scope):
        assert read(f"{target}/tool") == EVIL
        daemon.nsfs("pin", reference, *scope)
        wait_until(lambda: f"fenced off: {LIES[kind]}" in daemon.tail(), "the lie is found", 60)
        with pytest.raises(OSError, match="Input/output error"):
            read(f"{target}/evil")
    with daemon.mounted(reference, target, "--on-error", "eio", *scope):
        assert read(f"{target}/tool") == TOOL
        assert read(f"{target}/evil") == EVIL


def test_what_is_true_is_proved_while_it_is_read(daemon: Daemon, registry: FakeRegistry, tmp_path: Path) -> None:
    layer = tar_layer([file("evil", EVIL), file("tool", TOOL)])
    reference, target = publish(registry, Image((layer,)), "public/true"), str(tmp_path / "mnt")
    evil, tool = entries_of(layer)
    attach(registry, "public/true", layer, [evil, tool], (tool, TOOL))
    scope = ("--namespace", "naive-true")
    with daemon.mounted(reference, target, "--on-error", "eio", *scope):
        assert read(f"{target}/tool") == TOOL
        daemon.nsfs("pin", reference, *scope)
        wait_until(lambda: f"layer {layer.digest} is what its artifact says" in daemon.tail(), "the proof", 60)
        assert read(f"{target}/evil") == EVIL
        assert read(f"{target}/tool") == TOOL


def name_blob(daemon: Daemon, registry: FakeRegistry, seed: str, a: str, b: str) -> bytes:
    """b's image, at a registry of b's, lists a's private blob, which is not there; b's artifact says how to read it."""
    layer = tar_layer([file("secret", SECRET), file("seed", seed.encode())])
    private = publish(registry, Image((layer,)), f"private/{seed}")
    assert look(daemon, a, f"{private}:/secret") == SECRET
    with FakeRegistry() as other:
        named = {"mediaType": layer.media_type, "digest": layer.digest, "size": len(layer.blob)}
        forged = publish_manifest(other, f"b/{seed}", [named], [str(layer.diff_id)])
        attach(other, f"b/{seed}", layer, entries_of(layer))
        return look(daemon, b, f"{forged}:/secret")


def test_nobody_reads_a_blob_by_saying_how_it_is_read(daemon: Daemon, registry: FakeRegistry) -> None:
    """To one who is both it is no secret; among owners each gets his own registry's bytes alone."""
    assert name_blob(daemon, registry, "naive", "naive-both", "naive-both") == SECRET
    with pytest.raises(subprocess.CalledProcessError):
        name_blob(daemon, registry, "apart", "team-a", "team-b")
