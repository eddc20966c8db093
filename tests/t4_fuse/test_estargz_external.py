"""eStargz layers whose table of contents lies in an image of its own, as the reference implementation makes them."""

from __future__ import annotations

import gzip
import random
from typing import TYPE_CHECKING, Any

import pytest

import goestargz
from fakes import FakeRegistry
from images import OCI_MANIFEST, TAR_GZIP, Image, Layer, file, render_tar
from nsfs_daemon import Daemon, run_daemon
from published import TOC_DIGEST, publish

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LAYER_DIGEST = "containerd.io/snapshot/stargz/layer.digest"
EMPTY_CONFIG = b"{}"


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with run_daemon(str(tmp_path_factory.mktemp("daemon"))) as running:
        yield running


@pytest.fixture(scope="module")
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as running:
        yield running


def make(seed: str) -> tuple[dict[str, bytes], Layer, bytes]:
    """Files, the layer that has them, and its table."""
    files = {f"d/{n}": random.Random(f"{seed} {n}").randbytes(600_000) for n in range(6)}
    made = goestargz.convert(
        render_tar([file(name, data) for name, data in files.items()]), chunk_size=1 << 19, footer="external"
    )
    return files, Layer(gzip.decompress(made.blob), made.blob, TAR_GZIP, {TOC_DIGEST: made.toc_digest}), made.toc


def publish_table(registry: FakeRegistry, name: str, layer: Layer, toc: bytes, **annotations: str) -> None:
    notes = {LAYER_DIGEST: str(layer.digest)} | annotations
    config = {**registry.add_blob(EMPTY_CONFIG), "mediaType": "application/vnd.oci.image.config.v1+json"}
    layers = [registry.add_blob(toc) | {"annotations": notes}]
    document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": layers}
    registry.add_document(name, "latest-esgztoc", document, OCI_MANIFEST)


def report_of(daemon: Daemon, reference: str) -> dict[str, Any]:
    (layer,) = daemon.json("inspect", reference)["layers"]
    return dict(layer)


def read(path: str) -> bytes:
    with open(path, "rb") as opened:
        return opened.read()


@pytest.mark.parametrize("driver", ["erofs", "fuse"])
def test_a_table_in_another_image_makes_the_layer_lazy(
    daemon: Daemon, registry: FakeRegistry, tmp_path: Path, driver: str
) -> None:
    files, layer, toc = make(driver)
    reference = publish(registry, Image((layer,)), f"external/{driver}")
    publish_table(registry, f"external/{driver}", layer, toc)
    target = str(tmp_path / "mnt")
    with daemon.mounted(reference, target, "--driver", driver):
        assert read(f"{target}/d/3") == files["d/3"]
        (mount,) = daemon.json("status")["mounts"]
        assert mount["fetched"] < len(layer.blob) * 2 // 3
        assert {name: read(f"{target}/{name}") for name in files} == files
    report = report_of(daemon, reference)
    assert report["lazy"]
    assert report["format"] == "estargz"
    assert "table of contents" in report["verified"]


def test_without_the_table_the_layer_is_a_plain_one(daemon: Daemon, registry: FakeRegistry, tmp_path: Path) -> None:
    files, layer, toc = make("missing")
    reference = publish(registry, Image((layer,)), "missing")
    target = str(tmp_path / "mnt")
    with daemon.mounted(reference, target):
        assert {name: read(f"{target}/{name}") for name in files} == files
    report = report_of(daemon, reference)
    assert "missing" not in report["verified"]
    assert "diff ID" in report["verified"]
    assert "latest-esgztoc" in report["why"]
    daemon.nsfs("evict", reference)
    assert report_of(daemon, reference)["lazy"]
    publish_table(registry, "missing", layer, toc)
    with daemon.mounted(reference, target):
        assert read(f"{target}/d/1") == files["d/1"]


def test_an_image_that_no_tag_names_has_no_table(daemon: Daemon, registry: FakeRegistry, tmp_path: Path) -> None:
    files, layer, toc = make("untagged")
    image = Image((layer,))
    publish(registry, image, "untagged")
    publish_table(registry, "untagged", layer, toc)
    reference = f"{registry.host}/untagged@{image.digest}"
    with daemon.mounted(reference, str(tmp_path / "mnt")):
        assert read(f"{tmp_path}/mnt/d/5") == files["d/5"]
    assert "no tag" in report_of(daemon, reference)["why"]


def test_a_table_of_something_else_is_not_believed(daemon: Daemon, registry: FakeRegistry, tmp_path: Path) -> None:
    _, layer, _ = make("wrong")
    _, _, other = make("other")
    reference = publish(registry, Image((layer,)), "wrong")
    publish_table(registry, "wrong", layer, other)
    (tmp_path / "mnt").mkdir()
    refused = daemon.nsfs("mount", reference, str(tmp_path / "mnt"), check=False)
    assert refused.returncode == 6
    assert layer.annotations[TOC_DIGEST] in refused.stderr


def test_a_table_that_cannot_be_asked_for_is_no_missing_one(
    daemon: Daemon, registry: FakeRegistry, tmp_path: Path
) -> None:
    files, layer, toc = make("down")
    reference = publish(registry, Image((layer,)), "down")
    publish_table(registry, "down", layer, toc)
    registry.faults_on, registry.script = "esgztoc", "E" * 100
    (tmp_path / "mnt").mkdir()
    assert daemon.nsfs("mount", reference, str(tmp_path / "mnt"), check=False).returncode == 5
    registry.script = ""
    with daemon.mounted(reference, str(tmp_path / "mnt")):
        assert read(f"{tmp_path}/mnt/d/0") == files["d/0"]
    assert report_of(daemon, reference)["lazy"]
