"""Whole trees through everything: registry, daemon, pool, kernel, on each driver, against the oracle."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING

import pytest

import oracle
import rich_images
from images import Image, file, gzip_layer, sample_content, write_oci_layout
from nsfs_daemon import Daemon, run_daemon
from registry import Registry, push_layout, run_registry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DRIVERS = ("erofs", "erofs-loop", "fuse")


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    with run_registry() as running:
        yield running


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with run_daemon(str(tmp_path_factory.mktemp("daemon"))) as running:
        yield running


@pytest.fixture(scope="module")
def loop_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon on a kernel that mounts EROFS from block devices only."""
    with run_daemon(str(tmp_path_factory.mktemp("daemon")), {"kernel": {"file_backed": False}}) as running:
        yield running


def push(image: Image, registry: Registry, path: Path, name: str) -> tuple[str, str]:
    """Put an image into the registry; returns its reference and its OCI layout."""
    layout = str(write_oci_layout(path / f"layout-{name.replace('/', '-')}", image))
    push_layout(layout, registry, name)
    return f"{registry.host}/{name}:latest", layout


def expected(layout: str, path: Path) -> oracle.Tree:
    scratch = path / "oracle"
    scratch.mkdir()
    return oracle.expected_tree(oracle.find_layers(layout), str(scratch))


@pytest.mark.parametrize("name", rich_images.IMAGES)
def test_equals_what_unpacking_gives(daemon: Daemon, registry: Registry, tmp_path: Path, name: str) -> None:
    reference, layout = push(rich_images.IMAGES[name](), registry, tmp_path, f"rich/{name}")
    wanted = expected(layout, tmp_path)
    target = str(tmp_path / "mnt")
    for driver in DRIVERS:
        with daemon.mounted(reference, target, "--driver", driver) as report:
            assert report["driver"] == driver
            assert oracle.difference(wanted, oracle.snapshot(target)) == "", driver
        daemon.nsfs("evict", reference)


@pytest.mark.parametrize("name", ["everything", "changes"])
def test_without_file_backed_mounts_loop_devices_serve(
    loop_daemon: Daemon, registry: Registry, tmp_path: Path, name: str
) -> None:
    reference, layout = push(rich_images.IMAGES[name](), registry, tmp_path, f"loop/{name}")
    target = str(tmp_path / "mnt")
    with loop_daemon.mounted(reference, target) as report:
        assert report["driver"] == "erofs-loop"
        assert oracle.difference(expected(layout, tmp_path), oracle.snapshot(target)) == ""


@pytest.mark.parametrize("driver", DRIVERS)
def test_128_layers(daemon: Daemon, registry: Registry, tmp_path: Path, driver: str) -> None:
    reference, layout = push(rich_images.stack(128), registry, tmp_path, "stack/128")
    target = str(tmp_path / "mnt")
    with daemon.mounted(reference, target, "--driver", driver):
        assert oracle.difference(expected(layout, tmp_path), oracle.snapshot(target)) == ""


def test_an_oci_layout_needs_no_registry(daemon: Daemon, tmp_path: Path) -> None:
    layout = str(write_oci_layout(tmp_path / "layout", rich_images.changes()))
    target = str(tmp_path / "mnt")
    with daemon.mounted(f"oci:{layout}:latest", target):
        assert oracle.difference(expected(layout, tmp_path), oracle.snapshot(target)) == ""


def test_two_images_on_one_base_share_its_views(daemon: Daemon, registry: Registry, tmp_path: Path) -> None:
    base = gzip_layer([file("shared/base", sample_content(2_000_000, 50))])
    images = [Image((base, gzip_layer([file(f"own-{n}", b"%d" % n)]))) for n in range(2)]
    references = [push(image, registry, tmp_path, f"sharing/{n}")[0] for n, image in enumerate(images)]
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    with daemon.mounted(references[0], first):
        before = erofs_mounts(daemon)
        with daemon.mounted(references[1], second) as report:
            assert len(erofs_mounts(daemon)) == len(before) + 1
            assert report["local"] >= 2_000_000
            assert read(f"{first}/shared/base") == read(f"{second}/shared/base") == sample_content(2_000_000, 50)


def test_isolated_namespaces_share_nothing(daemon: Daemon, registry: Registry, tmp_path: Path) -> None:
    reference, _ = push(rich_images.stack(2, "apart"), registry, tmp_path, "apart")
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    with (
        daemon.mounted(reference, one, "--namespace", "red", "--isolation", "isolated") as red,
        daemon.mounted(reference, two, "--namespace", "blue", "--isolation", "isolated") as blue,
    ):
        assert red["domain"] != blue["domain"]
        workers = daemon.workers()
        assert workers[red["domain"]] != workers[blue["domain"]]
        assert oracle.difference(oracle.snapshot(one), oracle.snapshot(two)) == ""


@pytest.mark.parametrize("driver", DRIVERS)
def test_an_evicted_image_comes_back_by_ranges(daemon: Daemon, registry: Registry, tmp_path: Path, driver: str) -> None:
    """One small file of a large layer must not cost the layer."""
    seed = 1000 * (1 + DRIVERS.index(driver))  # content of its own: nothing is local or cached by another driver's turn
    content = {f"d/{n}": random.Random(seed + n).randbytes(400_000) for n in range(40)}
    image = Image((gzip_layer([file(name, data) for name, data in content.items()]),))
    reference, _ = push(image, registry, tmp_path, f"evicted/{driver}")
    target = str(tmp_path / "mnt")
    with daemon.mounted(reference, target, "--driver", driver):
        pass
    daemon.nsfs("evict", reference)
    with daemon.mounted(reference, target, "--driver", driver):
        before = fetched(daemon, reference)
        assert read(f"{target}/d/17") == content["d/17"]
        assert 0 < fetched(daemon, reference) - before < len(image.layers[0].blob) // 4
        assert {name: read(f"{target}/{name}") for name in content} == content


def test_a_writable_mount_keeps_the_image_as_it_is(daemon: Daemon, registry: Registry, tmp_path: Path) -> None:
    reference, layout = push(rich_images.changes(), registry, tmp_path, "writable")
    target = str(tmp_path / "mnt")
    with daemon.mounted(reference, target, "--rw"):
        with open(f"{target}/etc/keep", "ab") as changed:
            changed.write(b" and more")
        os.unlink(f"{target}/target")
        assert read(f"{target}/etc/keep") == b"keep and more"
    with daemon.mounted(reference, target):
        assert oracle.difference(expected(layout, tmp_path), oracle.snapshot(target)) == ""


def test_a_layer_that_leads_out_of_its_root_is_refused(daemon: Daemon, registry: Registry, tmp_path: Path) -> None:
    reference, _ = push(Image((gzip_layer([file("../../outside", b"x")]),)), registry, tmp_path, "hostile/outside")
    (tmp_path / "mnt").mkdir()
    refused = daemon.nsfs("mount", reference, str(tmp_path / "mnt"), check=False)
    assert refused.returncode == 6
    assert "leaves the root" in refused.stderr
    assert os.listdir(tmp_path / "mnt") == []


def erofs_mounts(daemon: Daemon) -> list[str]:
    with open("/proc/self/mountinfo") as mounts:
        return [line for line in mounts if f" {daemon.run}/" in line and " - erofs " in line]


def fetched(daemon: Daemon, reference: str) -> int:
    (mount,) = [mount for mount in daemon.json("status")["mounts"] if mount["reference"] == reference]
    return int(mount["fetched"])


def read(path: str) -> bytes:
    with open(path, "rb") as opened:
        return opened.read()
