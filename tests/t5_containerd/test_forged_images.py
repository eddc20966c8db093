"""An image whose configuration lies, pulled before anybody could know: what its user sees, and what is left of it.

containerd takes a layer's diff ID from the configuration, and does not check it where a snapshotter has the layer. So a
forged image may claim the chain ID of an honest one; once it is found out, the honest one must be to be had.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

import busybox
import published
from containerd import NEWER
from fakes import FakeRegistry
from images import OCI_INDEX, Image, Layer, file, gzip_layer, image_index, sample_content
from nodes import Node, run_node, wait_until
from nsfs.model.digest import DiffId, chain_ids

if TYPE_CHECKING:
    from collections.abc import Iterator

HONEST = gzip_layer([file("etc/motd", b"honest\n"), file("big", sample_content(300_000))])
FORGERY = gzip_layer([file("etc/motd", b"forged\n"), file("big", sample_content(300_000, 1))])
FORGED = Layer(HONEST.tar, FORGERY.blob, FORGERY.media_type)
"""The bytes of one, the diff ID of the other."""

ONLY_WHEN_ASKED = """
[plugins."io.containerd.gc.v1.scheduler"]
  pause_threshold = 0.00001
"""
"""Garbage collection: by itself containerd does no other in the minutes after its first.

With its defaults it soon does one after most deletions, and none after one that fell into the end of another.
"""


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as running:
        yield running
        running.go_on.set()


@pytest.fixture
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    directory = str(tmp_path_factory.mktemp("node"))
    settings = {"prepare_wait": "0s", "containerd": {"address": f"{directory}/containerd/sock"}}
    with run_node(directory, NEWER, more=ONLY_WHEN_ASKED, settings=settings) as running:
        yield running
        running.clear("red")
        assert running.is_clean()


def pull(node: Node, reference: str, *, check: bool = True) -> str:
    command = ("images", "pull", "--plain-http", "--snapshotter", "nsfs", reference)
    return node.containerd.ctr(*command, namespace="red", check=check).stderr


def start(node: Node, reference: str, name: str) -> str:
    """Why a container cannot be started."""
    command = ("run", "--rm", "--snapshotter", "nsfs", reference, name, "/bin/cat", "/etc/motd")
    done = node.containerd.ctr(*command, namespace="red", check=False)
    assert done.returncode != 0
    return done.stderr


def images(node: Node) -> list[str]:
    return node.containerd.ctr("images", "ls", "-q", namespace="red").stdout.split()


def test_a_forged_image_is_refused_by_name_taken_back_and_in_nobodys_way(node: Node, registry: FakeRegistry) -> None:
    forged = published.publish(registry, Image((busybox.base(), FORGED)), "forged")
    honest = published.publish(registry, Image((busybox.base(), HONEST)), "honest")
    registry.script, registry.faults_on = "H", str(FORGED.digest)
    pull(node, forged)
    assert (images(node), len(node.snapshots("red"))) == ([forged], 2)
    registry.go_on.set()
    said = start(node, forged, "a")
    assert "diff ID" in said or "not found" in said, said
    assert wait_until(lambda: images(node) == node.snapshots("red") == []), node.daemon.tail()
    assert f"image {forged} is deleted from containerd, namespace red" in node.daemon.tail()
    assert "not found" in start(node, forged, "b")
    assert "wrong diff id" in pull(node, forged, check=False)
    pull(node, honest)
    assert node.run(honest, "c", "/bin/cat", "/etc/motd", namespace="red") == "honest\n"


def test_who_starts_it_while_it_is_read_is_told_what_is_wrong(node: Node, registry: FakeRegistry) -> None:
    """Meanwhile the container's snapshot stands on it, so it is taken back only after; here from behind an index."""
    platforms = [Image((busybox.base(), FORGED)), Image((busybox.base(),), architecture="arm64")]
    for image in platforms:
        published.publish(registry, image, "forged", image.architecture)
    registry.add_document("forged", "latest", image_index(platforms), OCI_INDEX)
    forged = f"{registry.host}/forged:latest"
    registry.script, registry.faults_on = "H", str(FORGED.digest)
    pull(node, forged)
    node.containerd.ctr("images", "tag", forged, "another:name", namespace="red")
    with ThreadPoolExecutor(1) as pool:
        started = pool.submit(start, node, forged, "a")
        assert wait_until(lambda: len(node.snapshots("red")) == 3)
        registry.go_on.set()
        said = started.result()
    assert str(FORGED.digest) in said
    assert "the diff ID is not what it is said to be" in said
    assert wait_until(lambda: images(node) == node.snapshots("red") == []), node.daemon.tail()


def test_it_is_taken_back_though_containerd_counts_a_child_that_is_gone(node: Node, registry: FakeRegistry) -> None:
    """A garbage collection that finds the image in use removes what a failed start left, and not its mark."""
    forged = published.publish(registry, Image((busybox.base(), FORGED)), "forged")
    registry.script, registry.faults_on = "H", str(FORGED.digest)
    pull(node, forged)
    before = node.snapshots("red")
    snapshots = ("snapshots", "--snapshotter", "nsfs")
    top = chain_ids([DiffId(busybox.base().diff_id), DiffId(FORGED.diff_id)])[-1]
    node.containerd.ctr(*snapshots, "prepare", "left", top, namespace="red")
    node.containerd.ctr(*snapshots, "label", "left", "containerd.io/gc.root=", namespace="red")
    node.collect_garbage("red")
    assert node.snapshots("red") == before
    registry.go_on.set()
    assert wait_until(lambda: images(node) == node.snapshots("red") == []), node.daemon.tail()
