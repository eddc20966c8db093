"""One level below images: tables of contents that name what is others', and tables for others' blobs.

Both tenants mount in one shared domain, where contents are stored once: that is where a claim could lead somewhere.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from typing import TYPE_CHECKING, Any

import pytest

import goestargz
from fakes import FakeRegistry
from images import OCI_MANIFEST, TAR_GZIP, Image, Layer, file, gzip_layer, render_tar
from nsfs_daemon import Daemon, run_daemon
from published import TOC_DIGEST, hand_made_estargz, publish
from worlds import Naive, RefusedError, World

if TYPE_CHECKING:
    from collections.abc import Iterator

SECRET = b"private to a " * 5000
TOOL, EVIL = b"the real tool " * 4000, b"something else that is in the image" * 4000


class Hands:
    """Tenants who look into images by hand, in the domain that all share."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def pull(self, tenant: str, reference: str) -> None:
        self._ask("tree", tenant, reference)

    def read(self, tenant: str, reference: str, path: str) -> bytes:
        return self._ask("cat", tenant, f"{reference}:{path}").encode()

    def _ask(self, command: str, tenant: str, what: str) -> str:
        scope = ("--namespace", tenant, "--isolation", "shared")
        done = self._daemon.nsfs(command, what, *scope, check=False)
        if done.returncode != 0:
            raise RefusedError(done.stderr)
        return done.stdout


@pytest.fixture(scope="module")
def hands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hands]:
    with run_daemon(str(tmp_path_factory.mktemp("daemon"))) as daemon:
        yield Hands(daemon)


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as running:
        yield running


def name_content(world: World, registry: FakeRegistry, kind: str) -> bytes:
    """b's table says that a file of b's has the digest of a's; b's blob has other bytes."""
    items = [file("secret", SECRET), file("kind", kind.encode())]
    layer = gzip_layer(items) if kind == "plain" else _estargz(goestargz.convert(render_tar(items)))
    mine = publish(registry, Image((layer,)), f"{kind}/private")
    world.pull("a", mine)
    assert world.read("a", mine, "/secret") == SECRET
    digest = "sha256:" + hashlib.sha256(SECRET).hexdigest()
    row = {"name": "f", "type": "reg", "size": len(SECRET), "digest": digest, "chunkDigest": digest, "offset": 0}
    forged = hand_made_estargz([row | {"mode": 0o644}], gzip.compress(bytes(len(SECRET)), mtime=0))
    theirs = publish(registry, Image((forged,)), f"{kind}/forged")
    world.pull("b", theirs)
    return world.read("b", theirs, "/f")


def attach_table(world: World, registry: FakeRegistry) -> bytes:
    """b is first with a public blob, with a table of its own for it, in which names are exchanged; then a comes."""
    made = goestargz.convert(render_tar([file("tool", TOOL), file("evil", EVIL)]), footer="external")
    table = _exchanged(made.toc)
    forged = Layer(gzip.decompress(made.blob), made.blob, TAR_GZIP, {TOC_DIGEST: _digest_of(table)})
    theirs = publish(registry, Image((forged,)), "b/public")
    _publish_table(registry, "b/public", forged, table)
    world.pull("b", theirs)
    assert world.read("b", theirs, "/tool") == EVIL
    genuine = publish(registry, Image((_estargz(made),)), "public")
    _publish_table(registry, "public", forged, made.toc)
    world.pull("a", genuine)
    return world.read("a", genuine, "/tool")


def _estargz(made: goestargz.Estargz) -> Layer:
    return Layer(gzip.decompress(made.blob), made.blob, TAR_GZIP, {TOC_DIGEST: made.toc_digest})


def _exchanged(table: bytes) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(table)) as archive:
        opened = archive.extractfile("stargz.index.json")
        assert opened is not None
        document = json.load(opened)
    other = {"tool": "evil", "evil": "tool"}
    for row in document["entries"]:
        row["name"] = other.get(row["name"], row["name"])
    return gzip.compress(render_tar([file("stargz.index.json", json.dumps(document).encode())]), mtime=0)


def _digest_of(table: bytes) -> str:
    with tarfile.open(fileobj=io.BytesIO(table)) as archive:
        opened = archive.extractfile("stargz.index.json")
        assert opened is not None
        return "sha256:" + hashlib.sha256(opened.read()).hexdigest()


def _publish_table(registry: FakeRegistry, name: str, layer: Layer, table: bytes) -> None:
    note = {"containerd.io/snapshot/stargz/layer.digest": str(layer.digest)}
    described: list[dict[str, Any]] = [registry.add_blob(table) | {"annotations": note}]
    config = {**registry.add_blob(b"{}"), "mediaType": "application/vnd.oci.image.config.v1+json"}
    document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": described}
    registry.add_document(name, "latest-esgztoc", document, OCI_MANIFEST)


@pytest.mark.parametrize("kind", ["plain", "estargz"])
def test_nobody_reads_contents_by_naming_them(hands: Hands, registry: FakeRegistry, kind: str) -> None:
    assert name_content(Naive([registry]), registry, kind) == SECRET
    with pytest.raises(RefusedError, match=r"digest"):
        name_content(hands, registry, kind)


def test_a_table_is_for_those_who_name_it(hands: Hands, registry: FakeRegistry) -> None:
    assert attach_table(Naive([registry]), registry) == EVIL
    assert attach_table(hands, registry) == TOOL
