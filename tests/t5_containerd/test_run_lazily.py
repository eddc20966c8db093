"""Images that containerd need not download: what is fetched, what is shared, what is seen, what goes again."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

import busybox
import goestargz
from containerd import RELEASES
from images import (
    MTIME_NS,
    TAR_GZIP,
    Image,
    Layer,
    directory,
    file,
    gzip_layer,
    sample_content,
    symlink,
    whiteout,
    write_oci_layout,
)
from meter import Meter
from nodes import Node, run_node, wait_until
from nsfs.model.digest import Digest
from nsfs_daemon import NSFS
from registry import Registry, push_layout, run_registry
from users import noise, read

if TYPE_CHECKING:
    from collections.abc import Iterator

LARGE = 3 << 19
UNUSED = os.urandom(24 << 20)
"""Most of the image, and more than a first miss brings around it: no command of these tests reads it."""
TOC = "containerd.io/snapshot/stargz/toc.digest"


def estargz(layer: Layer, toc_digest: str = "") -> Layer:
    """The same layer as eStargz; `toc_digest` is what is said of its table of contents, where not the truth."""
    made = goestargz.convert(layer.blob)
    return Layer(gzip.decompress(made.blob), made.blob, TAR_GZIP, {TOC: toc_digest or made.toc_digest})


def upper(finer: int = 0) -> Layer:
    """The layer with most of the bytes; files' times are `finer` nanoseconds beyond a whole second."""
    time_of_files = MTIME_NS + finer
    return gzip_layer(
        [
            *[file(f"data/{number}", sample_content(3000, number), mtime_ns=time_of_files) for number in range(50)],
            file("etc/motd", b"lazy\n"),
            whiteout("old/a"),
            directory("opt"),
            file("opt/unused", UNUSED, mtime_ns=time_of_files),
            symlink("opt/link", "unused"),
        ]
    )


@pytest.fixture(scope="module")
def images() -> dict[str, Image]:
    base, top = busybox.base(), upper()
    hanging = gzip_layer([file("etc/hanging", b"its directory is in a layer below\n")])
    standing = gzip_layer([directory("etc"), file("etc/standing", b"its directory is here\n")])
    return {
        "plain": Image((base, top)),
        "timed": Image((base, upper(finer=1))),
        "estargz": Image((estargz(base), estargz(top))),
        "profiled": Image((base, gzip_layer([file(f"data/{number}", noise(LARGE, number)) for number in range(8)]))),
        "mixed": Image((base, estargz(top, f"sha256:{'0' * 64}"), hanging, standing)),
    }


@pytest.fixture(scope="module")
def registry(images: dict[str, Image], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with run_registry() as registry:
        for name, image in images.items():
            push_layout(str(write_oci_layout(tmp_path_factory.mktemp(name), image)), registry, name)
        yield registry


@pytest.fixture
def meter(registry: Registry) -> Iterator[Meter]:
    with Meter(registry.host) as meter:
        yield meter


@pytest.fixture(scope="module", params=RELEASES)
def node(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with run_node(str(tmp_path_factory.mktemp("node")), request.param) as running:
        yield running


@pytest.fixture
def namespace(node: Node, request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace of the test's own, and so a domain; what is in it goes at the end, and every view with it."""
    name = "t-" + str(abs(hash(request.node.nodeid)))
    yield name
    node.clear(name)
    assert node.is_clean()


def pull(node: Node, reference: str, namespace: str, *options: str) -> list[str]:
    """`nsfs pull`; what it says became of each layer."""
    report = json.loads(node.pull(reference, "--json", *options, namespace=namespace).stdout)
    return [layer["how"] for layer in report["layers"]]


def blobs(node: Node, namespace: str) -> set[str]:
    return set(node.containerd.ctr("content", "ls", "-q", namespace=namespace).stdout.split())


def documents(image: Image) -> set[str]:
    return {image.digest, Digest.of(image.config_blob)}


def size(image: Image) -> int:
    return sum(len(layer.blob) for layer in image.layers)


def test_a_plain_image_is_read_once_and_shown_as_overlayfs_shows_it(
    node: Node, meter: Meter, images: dict[str, Image], namespace: str
) -> None:
    reference = f"{meter.host}/plain:latest"
    assert pull(node, reference, namespace) == ["lazy", "lazy"]
    assert blobs(node, namespace) == documents(images["plain"])
    assert sum(meter.served(layer.digest) for layer in images["plain"].layers) == size(images["plain"])
    before = meter.served()
    seen = node.run(reference, "a", "/bin/sh", "-c", busybox.LISTING, namespace=namespace)
    assert meter.served() == before
    assert pull(node, reference, namespace, "--snapshotter", "overlayfs") == ["unpacked", "unpacked"]
    assert seen == node.containerd.run(reference, "b", "/bin/sh", "-c", busybox.LISTING, namespace=namespace)
    assert seen.count("\n") > 100


@pytest.mark.parametrize("options", ["runc", "runsc"])
def test_an_estargz_image_costs_what_is_read(
    node: Node, meter: Meter, images: dict[str, Image], namespace: str, options: str
) -> None:
    reference = f"{meter.host}/estargz:latest"
    assert pull(node, reference, namespace) == ["lazy", "lazy"]
    runtime = node.containerd.runsc() if options == "runsc" else ()
    assert node.run(reference, "a", "/bin/cat", "/etc/motd", options=runtime, namespace=namespace) == "lazy\n"
    assert meter.served() < size(images["estargz"]) / 3, "a first miss brings what lies around it, and no more"


def test_an_evicted_image_comes_back_by_ranges(
    node: Node, meter: Meter, images: dict[str, Image], namespace: str
) -> None:
    reference = f"{meter.host}/plain:latest"
    pull(node, reference, namespace)
    node.daemon.nsfs("evict", reference, "--namespace", namespace)
    before = meter.served()
    assert node.run(reference, "a", "/bin/cat", "/etc/motd", namespace=namespace) == "lazy\n"
    assert 0 < meter.served() - before < size(images["plain"]) / 3


def test_layers_that_cannot_be_lazy_are_unpacked_between_lazy_ones(node: Node, meter: Meter, namespace: str) -> None:
    reference = f"{meter.host}/mixed:latest"
    assert pull(node, reference, namespace) == ["lazy", "unpacked", "unpacked", "lazy"]
    seen = node.run(reference, "a", "/bin/sh", "-c", busybox.LISTING, namespace=namespace)
    pull(node, reference, namespace, "--snapshotter", "overlayfs")
    assert seen == node.containerd.run(reference, "b", "/bin/sh", "-c", busybox.LISTING, namespace=namespace)


def test_ctr_of_containerd_2_pulls_lazily_by_itself(
    node: Node, meter: Meter, images: dict[str, Image], namespace: str
) -> None:
    reference = f"{meter.host}/estargz:latest"
    command = ("images", "pull", "--plain-http", "--snapshotter", "nsfs", reference)
    node.containerd.ctr(*command, namespace=namespace)
    lazy = node.containerd.major == 2
    assert (meter.served() < size(images["estargz"]) / 3) is lazy
    assert node.run(reference, "a", "/bin/cat", "/etc/motd", namespace=namespace) == "lazy\n"


def test_without_erofs_layers_are_trees_of_their_own(
    meter: Meter, images: dict[str, Image], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """On one release: what is between containerd and nsfs is as in the other tests."""
    reference = f"{meter.host}/plain:latest"
    with run_node(str(tmp_path_factory.mktemp("node")), RELEASES[-1], settings={"kernel": {"erofs": False}}) as node:
        assert pull(node, reference, "red") == ["lazy", "lazy"]
        node.daemon.nsfs("evict", reference, "--namespace", "red")
        before = meter.served()
        assert node.run(reference, "a", "/bin/cat", "/etc/motd", namespace="red") == "lazy\n"
        assert 0 < meter.served() - before < size(images["plain"]) / 3
        seen = node.run(reference, "b", "/bin/sh", "-c", busybox.LISTING, namespace="red")
        pull(node, reference, "red", "--snapshotter", "overlayfs")
        assert seen == node.containerd.run(reference, "c", "/bin/sh", "-c", busybox.LISTING, namespace="red")
        node.start(reference, "d", "echo new > /etc/motd; rm /data/0", "red")
        assert node.ask("d", "cat /etc/motd; ls /data | wc -l", "red") == "new\n49\n"
        assert node.commit("d", "red") == {"etc", "etc/motd", "data", "data/.wh.0"}
        node.clear("red")
        assert node.is_clean()


def test_with_pods_isolation_each_container_reads_for_itself(
    meter: Meter, images: dict[str, Image], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """On the release that does not say for whom it asks."""
    reference = f"{meter.host}/estargz:latest"
    with run_node(str(tmp_path_factory.mktemp("node")), RELEASES[0], settings={"isolation": "pod"}) as node:
        assert pull(node, reference, "red") == ["lazy", "lazy"]
        assert sum(meter.served(layer.digest) for layer in images["estargz"].layers) == 0
        for container in ("a", "b"):
            before = meter.served()
            node.start(reference, container, "cat /etc/motd > /etc/part; mv /etc/part /etc/copy", "red")
            copied = "until [ -e /etc/copy ]; do sleep 0.1; done; cat /etc/copy"
            assert node.ask(container, copied, "red") == "lazy\n"
            assert 0 < meter.served() - before < size(images["estargz"]) / 3
        assert len(node.daemon.workers()) == 2
        node.clear("red")
        assert node.is_clean()
        assert node.daemon.workers() == {}


def test_twenty_containers_share_the_views(node: Node, meter: Meter, namespace: str) -> None:
    reference = f"{meter.host}/plain:latest"
    pull(node, reference, namespace)
    for number in range(20):
        node.start(reference, f"c{number}", f"echo {number} > /etc/number; cat /etc/motd > /etc/copy", namespace)
    assert len(node.views()) == 4, "two of the first start, which is recorded, and two of all others"
    for number in (0, 19):
        said = node.ask(f"c{number}", "cat /etc/number /etc/copy", namespace)
        assert said == f"{number}\nlazy\n"


@pytest.mark.parametrize(("name", "least", "most"), [("plain", 0.5, 1.0), ("timed", 0.0, 0.1)])
def test_a_commit_fetches_what_containerds_diff_compares(
    node: Node, meter: Meter, images: dict[str, Image], namespace: str, name: str, least: float, most: float
) -> None:
    """That is every file whose times may have been cut to whole seconds (continuity, fs/diff.go), as tars cut them."""
    reference = f"{meter.host}/{name}:latest"
    pull(node, reference, namespace)
    node.daemon.nsfs("evict", reference, "--namespace", namespace)
    node.start(reference, "a", "echo new > /etc/motd; rm /data/0; echo x > /etc/x", namespace)
    node.ask("a", "cat /etc/x", namespace)
    before = meter.served()
    assert node.commit("a", namespace) == {"etc", "etc/motd", "etc/x", "data", "data/.wh.0"}
    assert least <= (meter.served() - before) / size(images[name]) <= most


def test_two_namespaces_pull_one_image_at_once_and_part(node: Node, meter: Meter, namespace: str) -> None:
    other = f"{namespace}-other"
    reference = f"{meter.host}/plain:latest"
    command = [*NSFS, "pull", "--containerd", node.containerd.socket, "--json", reference, "-n"]
    pulls = [subprocess.Popen([*command, each], stdout=subprocess.PIPE) for each in (namespace, other)]
    reports = [json.loads(process.communicate()[0]) for process in pulls]
    assert [[layer["how"] for layer in report["layers"]] for report in reports] == [["lazy", "lazy"]] * 2
    for each in (namespace, other):
        node.start(reference, "a", "true", each)
    assert len(node.views()) == 4
    node.clear(namespace)
    assert wait_until(lambda: len(node.views()) == 2)
    assert node.ask("a", "sha256sum /data/*; cat /etc/motd", other).endswith("lazy\n")
    node.clear(other)


def test_a_living_container_keeps_its_views(node: Node, meter: Meter, namespace: str) -> None:
    reference = f"{meter.host}/estargz:latest"
    pull(node, reference, namespace)
    node.containerd.ctr("run", "-d", "--snapshotter", "nsfs", reference, "a", "/bin/sleep", "1000", namespace=namespace)
    node.containerd.ctr("images", "rm", "--sync", reference, namespace=namespace)
    assert len(node.snapshots(namespace)) == 3
    assert node.ask("a", "sha256sum /opt/unused", namespace).startswith(hashlib.sha256(UNUSED).hexdigest())


def test_a_pull_indexes_before_containerd_is_asked(
    node: Node, meter: Meter, images: dict[str, Image], namespace: str
) -> None:
    """So containerd holds no lock while a slow registry drips, and whoever pulls sees how far each layer is."""
    top = images["plain"].layers[1]
    meter.hold_after = 1 << 20
    command = [*NSFS, "pull", "--containerd", node.containerd.socket, "-n", namespace, f"{meter.host}/plain:latest"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        meter.wait_served(top.digest, 1 << 20)
        time.sleep(0.5)
        assert node.snapshots(namespace) == []
        meter.hold_after = None
        said = process.communicate()[1]
        assert process.returncode == 0
    assert f"index {top.digest.hex[:12]}" in said
    assert "2 layers, 2 lazy" in said


def test_the_first_start_of_an_image_is_recorded_and_the_next_finds_its_bytes_there(
    node: Node, meter: Meter, images: dict[str, Image], namespace: str
) -> None:
    """By large ranges, before any of them is asked for."""
    reference, top = f"{meter.host}/profiled:latest", images["profiled"].layers[1].digest
    pull(node, reference, namespace)
    used = "cat /data/6 /data/1 /data/4 | sha256sum > /sum && mv /sum /sums"
    node.start(reference, "a", used, namespace)
    summed = node.ask("a", "cat /sums", namespace)
    known = logged(node, "kept a profile")
    node.containerd.ctr("tasks", "rm", "--force", "a", namespace=namespace)
    node.containerd.ctr("containers", "rm", "a", namespace=namespace)
    node.collect_garbage(namespace)
    assert wait_until(lambda: logged(node, "kept a profile") == known + 1, 60)
    node.daemon.nsfs("evict", reference, "--namespace", namespace)
    begun, ended = len(meter.blobs(top)), logged(node, "prefetched what a start")
    node.start(reference, "b", f"until [ -e /go ]; do sleep 0.1; done; {used}", namespace)
    assert wait_until(lambda: logged(node, "prefetched what a start") > ended, 60)
    ranges = meter.blobs(top)[begun:]
    sent = sum(one.sent for one in ranges)
    assert 3 * LARGE <= sent < 6 * LARGE
    assert sent / len(ranges) > 128 << 10, "the first start read pieces of an eighth of that"
    node.ask("b", "touch /go", namespace)
    assert node.ask("b", "cat /sums", namespace) == summed
    assert meter.blobs(top)[begun:] == ranges


def logged(node: Node, words: str) -> int:
    """How often the daemon's log says that."""
    return read(node.daemon.log).count(words.encode())
