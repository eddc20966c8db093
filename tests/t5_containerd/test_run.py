"""Containers over nsfs, as a user runs them: both releases of containerd, runc and gVisor."""

from __future__ import annotations

import difflib
import io
import os
import subprocess
import tarfile
import time
from typing import TYPE_CHECKING

import pytest

import busybox
from containerd import RELEASES
from images import Image, file, gzip_layer, write_oci_layout
from nodes import Node, run_node
from registry import push_layout, run_registry

if TYPE_CHECKING:
    from collections.abc import Iterator

_LOOK = "find / -xdev ! -path / ! -path '/proc*' ! -path '/sys*' ! -path '/dev*' ! -path '/run*'"
LISTING = f"""
    {_LOOK} -type d -exec stat -c '%n %f %u %g' {{}} + | sort
    {_LOOK} ! -type d -exec stat -c '%n %f %u %g %s %h %Y %N' {{}} + | sort
    {_LOOK} -type f -exec sha256sum {{}} + | sort
"""
"""Every name of the rootfs with what stat tells of it, and the digest of every file.

Times of directories are those of the unpacking wherever that touched them, and the root is each container's own.
"""


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
    clear(node, name)
    assert directories(node) == set()


def clear(node: Node, namespace: str) -> None:
    ctr = node.containerd.ctr
    for container in ctr("containers", "ls", "-q", namespace=namespace).stdout.split():
        ctr("tasks", "rm", "--force", container, namespace=namespace, check=False)
        ctr("containers", "rm", container, namespace=namespace)
    for image in ctr("images", "ls", "-q", namespace=namespace).stdout.split():
        ctr("images", "rm", "--sync", image, namespace=namespace)


def directories(node: Node) -> set[str]:
    """Of snapshots, once a garbage collection that is under way has deleted what it will."""
    for _ in range(100):
        left = set(os.listdir(f"{node.daemon.root}/snapshots"))
        if not left:
            break
        time.sleep(0.05)
    return left


def test_shows_what_overlayfs_shows(node: Node, reference: str, namespace: str) -> None:
    node.pull(reference, "--snapshotter", "overlayfs", namespace=namespace)
    wanted = node.containerd.run(reference, "a", "/bin/sh", "-c", LISTING, namespace=namespace)
    node.pull(reference, namespace=namespace)
    seen = node.run(reference, "b", "/bin/sh", "-c", LISTING, namespace=namespace)
    assert "".join(difflib.unified_diff(wanted.splitlines(True), seen.splitlines(True), n=0)) == ""
    assert wanted.count("\n") > 20


def test_keeps_what_a_container_writes_to_itself(node: Node, reference: str, namespace: str) -> None:
    node.pull(reference, namespace=namespace)
    change = "echo new > /etc/motd; rm /data/words; echo x > /etc/x; sleep 1000"
    node.containerd.ctr(
        "run", "-d", "--snapshotter", "nsfs", reference, "a", "/bin/sh", "-c", change, namespace=namespace
    )
    assert wait_for_output(node, namespace, "a", "cat /etc/x") == "x\n"
    assert node.run(reference, "b", namespace=namespace) == "the second layer\n"
    names = committed_names(node, namespace, "a")
    assert {"etc/motd", "etc/x", "data/.wh.words"} <= names
    assert "bin/busybox" not in names


def wait_for_output(node: Node, namespace: str, container: str, script: str) -> str:
    for attempt in range(100):
        command = ("tasks", "exec", "--exec-id", f"e{attempt}", container, "/bin/sh", "-c", script)
        done = node.containerd.ctr(*command, namespace=namespace, check=False)
        if done.returncode == 0:
            return done.stdout
        time.sleep(0.05)
    raise AssertionError(done.stderr)


def committed_names(node: Node, namespace: str, container: str) -> set[str]:
    """What containerd's diff finds in a container: the layer that a commit of it would be."""
    server = node.containerd
    command = [*server.enter, f"{server.binaries}/ctr", "-a", server.socket, "-n", namespace]
    layer = subprocess.run(
        [*command, "snapshots", "--snapshotter", "nsfs", "diff", container], check=True, capture_output=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(layer)) as archive:
        return set(archive.getnames())


def test_runs_under_gvisor(node: Node, reference: str, namespace: str) -> None:
    node.pull(reference, namespace=namespace)
    script = "cat /etc/motd /proc/version; sha256sum /data/words; echo y > /etc/y; cat /etc/y"
    said = node.run(reference, "a", "/bin/sh", "-c", script, options=node.containerd.runsc(), namespace=namespace)
    assert said.startswith("the second layer\nLinux version 4.4.0 ")
    assert said.endswith("\ny\n")


def test_twenty_containers_at_once(node: Node, reference: str, namespace: str) -> None:
    node.pull(reference, namespace=namespace)
    for number in range(20):
        write = f"echo {number} > /etc/number; sleep 1000"
        node.containerd.ctr(
            "run", "-d", "--snapshotter", "nsfs", reference, f"c{number}", "/bin/sh", "-c", write, namespace=namespace
        )
    assert len(node.snapshots(namespace)) == 22
    for number in (0, 7, 19):
        assert wait_for_output(node, namespace, f"c{number}", "cat /etc/number") == f"{number}\n"


def test_what_a_living_container_needs_stays(node: Node, reference: str, namespace: str) -> None:
    node.pull(reference, namespace=namespace)
    ctr = node.containerd.ctr
    ctr("run", "-d", "--snapshotter", "nsfs", reference, "a", "/bin/sleep", "1000", namespace=namespace)
    ctr("images", "rm", "--sync", reference, namespace=namespace)
    assert len(node.snapshots(namespace)) == 3
    assert wait_for_output(node, namespace, "a", "cat /etc/motd") == "the second layer\n"


def test_a_namespace_goes_and_the_other_goes_on(node: Node, reference: str, namespace: str) -> None:
    other = f"{namespace}-other"
    node.pull(reference, namespace=namespace)
    node.pull(reference, namespace=other)
    assert node.snapshots(namespace) == node.snapshots(other)
    clear(node, namespace)
    assert node.snapshots(namespace) == []
    assert node.run(reference, "a", namespace=other) == "the second layer\n"
    clear(node, other)


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
def test_an_image_of_128_layers_runs_in_a_namespace_of_the_longest_name(node: Node, deep: str) -> None:
    assert len(DEEP) == 76
    node.pull(deep, namespace=DEEP)
    try:
        assert len(node.snapshots(DEEP)) == 128
        script = "cat /again /n/0 /n/123; ls /n | busybox wc -l"
        assert node.run(deep, "a", "/bin/busybox", "sh", "-c", script, namespace=DEEP) == "again\n0\n123\n124\n"
    finally:
        clear(node, DEEP)
    assert directories(node) == set()
