"""Containers over snapshots that containerd unpacked, as a user runs them: both releases, runc and gVisor."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

import pytest

import busybox
from containerd import RELEASES
from images import Image, file, gzip_layer, write_oci_layout
from nodes import Node, run_node
from registry import push_layout, run_registry

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    layout = write_oci_layout(tmp_path_factory.mktemp("layout"), busybox.image())
    with run_registry() as registry:
        push_layout(str(layout), registry, "busybox")
        yield f"{registry.host}/busybox:latest"


@pytest.fixture(scope="module", params=RELEASES)
def node(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with run_node(str(tmp_path_factory.mktemp("node")), request.param) as running:
        yield running


@pytest.fixture
def namespace(node: Node, request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace of the test's own; what is in it goes at the end, and nsfs must have forgotten all of it."""
    name = "t-" + str(abs(hash(request.node.nodeid)))
    yield name
    node.clear(name)
    assert node.is_clean()


def test_shows_what_overlayfs_shows(node: Node, reference: str, namespace: str) -> None:
    node.pull(reference, "--snapshotter", "overlayfs", namespace=namespace)
    wanted = node.containerd.run(reference, "a", "/bin/sh", "-c", busybox.LISTING, namespace=namespace)
    node.unpack(reference, namespace)
    seen = node.run(reference, "b", "/bin/sh", "-c", busybox.LISTING, namespace=namespace)
    assert "".join(difflib.unified_diff(wanted.splitlines(True), seen.splitlines(True), n=0)) == ""
    assert wanted.count("\n") > 20


def test_keeps_what_a_container_writes_to_itself(node: Node, reference: str, namespace: str) -> None:
    node.unpack(reference, namespace)
    node.start(reference, "a", "echo new > /etc/motd; rm /data/words; echo x > /etc/x", namespace)
    assert node.ask("a", "cat /etc/x", namespace) == "x\n"
    assert node.run(reference, "b", namespace=namespace) == "the second layer\n"
    names = node.commit("a", namespace)
    assert {"etc/motd", "etc/x", "data/.wh.words"} <= names
    assert "bin/busybox" not in names


def test_runs_under_gvisor(node: Node, reference: str, namespace: str) -> None:
    node.unpack(reference, namespace)
    script = "cat /etc/motd /proc/version; sha256sum /data/words; echo y > /etc/y; cat /etc/y"
    said = node.run(reference, "a", "/bin/sh", "-c", script, options=node.containerd.runsc(), namespace=namespace)
    assert said.startswith("the second layer\nLinux version 4.4.0 ")
    assert said.endswith("\ny\n")


def test_twenty_containers_at_once(node: Node, reference: str, namespace: str) -> None:
    node.unpack(reference, namespace)
    for number in range(20):
        node.start(reference, f"c{number}", f"echo {number} > /etc/number", namespace)
    assert len(node.snapshots(namespace)) == 22
    for number in (0, 7, 19):
        assert node.ask(f"c{number}", "cat /etc/number", namespace) == f"{number}\n"


def test_what_a_living_container_needs_stays(node: Node, reference: str, namespace: str) -> None:
    node.unpack(reference, namespace)
    node.start(reference, "a", "true", namespace)
    node.containerd.ctr("images", "rm", "--sync", reference, namespace=namespace)
    assert len(node.snapshots(namespace)) == 3
    assert node.ask("a", "cat /etc/motd", namespace) == "the second layer\n"


def test_a_namespace_goes_and_the_other_goes_on(node: Node, reference: str, namespace: str) -> None:
    other = f"{namespace}-other"
    node.unpack(reference, namespace)
    node.unpack(reference, other)
    assert node.snapshots(namespace) == node.snapshots(other)
    node.clear(namespace)
    assert node.snapshots(namespace) == []
    assert node.run(reference, "a", namespace=other) == "the second layer\n"
    node.clear(other)


DEEP = "".join("deep-" * 15) + "x"
"""A namespace of 76 characters, containerd's longest."""


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An image of 128 layers, of which one comes three times: containerd's overlayfs takes as many."""
    twice = gzip_layer([file("again", b"again\n")])
    layers = [busybox.base(), twice, *(gzip_layer([file(f"n/{number}", b"%d\n" % number)]) for number in range(124))]
    layout = write_oci_layout(tmp_path_factory.mktemp("deep"), Image([*layers[:60], twice, *layers[60:], twice]))
    with run_registry() as registry:
        push_layout(str(layout), registry, "deep")
        yield f"{registry.host}/deep:latest"


@pytest.mark.slow
@pytest.mark.parametrize("lazy", [False, True], ids=["unpacked", "lazy"])
def test_an_image_of_128_layers_runs_in_a_namespace_of_the_longest_name(node: Node, deep: str, lazy: bool) -> None:
    assert len(DEEP) == 76
    try:
        node.pull(deep, namespace=DEEP) if lazy else node.unpack(deep, DEEP)
        assert len(node.snapshots(DEEP)) == 128
        script = "cat /again /n/0 /n/123; ls /n | busybox wc -l"
        assert node.run(deep, "a", "/bin/busybox", "sh", "-c", script, namespace=DEEP) == "again\n0\n123\n124\n"
    finally:
        node.clear(DEEP)
    assert node.is_clean()
