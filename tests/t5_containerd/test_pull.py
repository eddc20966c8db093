"""`nsfs pull` against `ctr images pull`, in real containerds of both releases, through containerd's own snapshotter."""

from __future__ import annotations

import glob
import json
import os
import re
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest

import busybox
from containerd import RELEASES, Containerd, run_containerd
from images import Image, Layer, file, gzip_layer, sample_content, tar_layer, write_oci_layout, zstd_layer
from meter import Meter
from nodes import wait_until
from nsfs.model.digest import Digest
from nsfs_daemon import NSFS
from registry import Registry, push_layout, run_registry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


FOREIGN = Image((gzip_layer([file("arm", b"arm")]),), architecture="arm64", variant="v8")


def _images() -> dict[str, tuple[Image, ...]]:
    base = busybox.base()
    mixed = Image((base, tar_layer([file("etc/a", b"a")]), zstd_layer([file("etc/b", b"b")]), base))
    lying = Image(
        (base, Layer(b"not its tar", tar_layer([file("c", b"c")]).blob, "application/vnd.oci.image.layer.v1.tar"))
    )
    return {
        "busybox": (busybox.image(),),
        "several": (busybox.image(), FOREIGN),
        "mixed": (mixed,),
        "lying": (lying,),
    }


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with run_registry() as registry:
        for name, images in _images().items():
            layout = write_oci_layout(tmp_path_factory.mktemp(name), *images)
            push_layout(str(layout), registry, name)
        yield registry


@pytest.fixture(scope="module", params=RELEASES)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containerd]:
    with run_containerd(str(tmp_path_factory.mktemp("containerd")), release=request.param) as running:
        yield running


@pytest.fixture
def namespace(server: Containerd, request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace of the test's own, whose images, blobs and snapshots go with it."""
    name = "t-" + str(abs(hash(request.node.nodeid)))
    yield name
    remove_images(server, name)


@pytest.fixture
def large(registry: Registry, tmp_path: Path) -> Layer:
    """The one layer of the image `large`, which no containerd has seen."""
    layer = gzip_layer([file("large", os.urandom(12 << 20))], level=1)
    push_layout(str(write_oci_layout(tmp_path / "large", Image((layer,)))), registry, "large")
    return layer


def ingested(server: Containerd) -> int:
    """Bytes of the largest blob that is being written."""
    names = glob.glob(f"{server.directory}/root/io.containerd.content.v1.content/ingest/*/data")
    return max((os.path.getsize(name) for name in names), default=0)


def remove_images(server: Containerd, namespace: str) -> None:
    for reference in server.ctr("images", "ls", "-q", namespace=namespace).stdout.split():
        server.ctr("images", "rm", "--sync", reference, namespace=namespace)


def nsfs_pull(server: Containerd, namespace: str, reference: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [*NSFS, "pull", "-n", namespace, "--containerd", server.socket, "--snapshotter", "overlayfs"]
    return subprocess.run([*command, *options, reference], check=False, capture_output=True, text=True)


def started_pull(server: Containerd, namespace: str, reference: str) -> subprocess.Popen[bytes]:
    command = [*NSFS, "pull", "-n", namespace, "--containerd", server.socket, "--snapshotter", "overlayfs"]
    return subprocess.Popen([*command, reference], stderr=subprocess.DEVNULL)


def contents(server: Containerd, namespace: str) -> dict[str, Any]:
    """What a namespace has, without ages."""
    blobs = {}
    for line in server.ctr("content", "ls", namespace=namespace).stdout.splitlines()[1:]:
        digest, size, _, labels = re.split(r"\t+", line)
        blobs[digest] = (size, sorted(re.split(r",(?=containerd\.io/)", labels)))
    return {
        "blobs": blobs,
        "images": server.ctr("images", "ls", namespace=namespace).stdout,
        "snapshots": sorted(server.ctr("snapshots", "ls", namespace=namespace).stdout.splitlines()),
        "leases": server.ctr("leases", "ls", "-q", namespace=namespace).stdout,
    }


@pytest.mark.parametrize("name", ["busybox", "several", "mixed"])
def test_leaves_what_containerds_own_pull_leaves(
    server: Containerd, registry: Registry, namespace: str, name: str
) -> None:
    reference = f"{registry.host}/{name}:latest"
    server.ctr("images", "pull", "--plain-http", "--platform=linux/amd64", reference, namespace=namespace)
    wanted = contents(server, namespace)
    remove_images(server, namespace)
    assert contents(server, namespace)["blobs"] == {}
    done = nsfs_pull(server, namespace, reference)
    assert done.returncode == 0, done.stderr
    for blob in (FOREIGN.manifest, FOREIGN.config_blob):  # containerd 2 reads about other platforms, too
        wanted["blobs"].pop(Digest.of(blob), None)
    assert contents(server, namespace) == wanted
    again = nsfs_pull(server, namespace, reference, "--json")
    assert again.returncode == 0, again.stderr
    assert {layer["how"] for layer in json.loads(again.stdout)["layers"]} == {"present"}
    assert contents(server, namespace) == wanted
    if name == "busybox":
        assert server.run(reference, "a", namespace=namespace) == "the second layer\n"


def test_labels_what_was_there_already(server: Containerd, registry: Registry, namespace: str) -> None:
    """Blobs that another image brought, or another namespace has, are given the labels of a pull of their own."""
    reference = f"{registry.host}/several:latest"
    server.ctr("images", "pull", "--plain-http", f"{registry.host}/busybox:latest", namespace=namespace)
    done = nsfs_pull(server, namespace, reference)
    assert done.returncode == 0, done.stderr
    _, labels = contents(server, namespace)["blobs"][Digest.of(busybox.image().config_blob)]
    assert "containerd.io/distribution.source.127.0.0.1=busybox,several" in labels
    server.ctr("images", "rm", "--sync", f"{registry.host}/busybox:latest", namespace=namespace)
    assert server.run(reference, "a", namespace=namespace) == "the second layer\n"


def test_goes_on_where_a_killed_pull_stopped(
    server: Containerd, registry: Registry, namespace: str, large: Layer
) -> None:
    half = len(large.blob) // 2
    with Meter(registry.host) as meter:
        meter.hold_after = half
        with started_pull(server, namespace, f"{meter.host}/large:latest") as process:
            meter.wait_served(large.digest, half)
            assert wait_until(lambda: ingested(server) >= half - (2 << 20))
            process.send_signal(signal.SIGKILL)
        meter.hold_after = None
        done = nsfs_pull(server, namespace, f"{meter.host}/large:latest")
        assert done.returncode == 0, done.stderr
        assert half <= meter.served(large.digest) < len(large.blob) + (3 << 20)


def test_ends_at_ctrl_c_with_nothing_left(server: Containerd, registry: Registry, namespace: str, large: Layer) -> None:
    with Meter(registry.host) as meter:
        meter.hold_after = 1 << 20
        with started_pull(server, namespace, f"{meter.host}/large:latest") as process:
            meter.wait_served(large.digest, 1 << 20)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
    left = contents(server, namespace)
    assert left["leases"] == ""
    assert left["images"].count("\n") == 1


def test_two_pulls_at_once_share_the_work(server: Containerd, registry: Registry, namespace: str, large: Layer) -> None:
    with Meter(registry.host) as meter:
        meter.hold_after = 1 << 20
        with started_pull(server, namespace, f"{meter.host}/large:latest") as first:
            meter.wait_served(large.digest, 1 << 20)
            with started_pull(server, namespace, f"{meter.host}/large:latest") as second:
                time.sleep(0.5)
                meter.hold_after = None
                assert (first.wait(60), second.wait(60)) == (0, 0)
        assert meter.served(large.digest) == len(large.blob)


def test_refuses_a_layer_that_is_not_what_the_configuration_says(
    server: Containerd, registry: Registry, namespace: str
) -> None:
    done = nsfs_pull(server, namespace, f"{registry.host}/lying:latest")
    assert done.returncode == 6
    assert "configuration lies" in done.stderr
    assert contents(server, namespace)["images"].count("\n") == 1


def test_refuses_a_damaged_blob_and_takes_it_once_it_is_whole(
    server: Containerd, registry: Registry, namespace: str, tmp_path: Path
) -> None:
    fresh = gzip_layer([file("fresh", sample_content(2 << 20, len(namespace) + hash(namespace)))])
    layout = write_oci_layout(tmp_path, Image((fresh,)))
    push_layout(str(layout), registry, "fresh")
    path = registry.blob_path(fresh.digest)
    with open(path, "r+b") as blob:
        blob.write(b"damage")
    assert nsfs_pull(server, namespace, f"{registry.host}/fresh:latest").returncode == 6
    with open(path, "wb") as blob:
        blob.write(fresh.blob)
    done = nsfs_pull(server, namespace, f"{registry.host}/fresh:latest")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("reference", "options", "code", "words"),
    [
        ("{host}/busybox", ("--snapshotter", "no-such"), 3, "no such snapshotter: no-such"),
        ("{host}/nothing", (), 3, "nothing"),
        ("{host}/several", ("--platform", "linux/riscv64"), 3, "no image for platform linux/riscv64"),
        ("oci:/tmp", (), 9, "containerd's images come from registries"),
        ("{host}/busybox", ("--containerd", "/no/such/sock"), 5, "/no/such/sock"),
    ],
)
def test_says_what_is_wrong(
    server: Containerd,
    registry: Registry,
    namespace: str,
    reference: str,
    options: tuple[str, ...],
    code: int,
    words: str,
) -> None:
    done = nsfs_pull(server, namespace, reference.format(host=registry.host), *options)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
