"""Tenants on real containerds: namespaces that are deleted there end here; images of guests are on no host."""

from __future__ import annotations

import base64
import json
import os
import re
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

import busybox
from containerd import NEWER, RELEASES, proxy_plugins, run_containerd, shared_directory
from images import write_oci_layout
from nodes import Node, run_node, wait_until
from nsfs.model.digest import chain_ids
from nsfs_daemon import run_daemon
from registry import push_layout, run_registry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from nsfs_daemon import Daemon

IMAGE = busybox.image()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    layout = write_oci_layout(tmp_path_factory.mktemp("layout"), IMAGE)
    with run_registry() as registry:
        push_layout(str(layout), registry, "busybox")
        yield f"{registry.host}/busybox:latest"


def remains(daemon: Daemon, namespace: str) -> list[str]:
    """What there is of a namespace in the daemon's state: directory and key of its domain."""
    places = [os.path.join(daemon.root, name) for name in ("domains", "keys")]
    found = [name for place in places if os.path.exists(place) for name in os.listdir(place)]
    return [name for name in found if namespace in name]


@pytest.mark.parametrize("release", RELEASES)
def test_a_namespace_that_containerd_deletes_ends_here(tmp_path: Path, release: str, reference: str) -> None:
    """At once, or at the next start; and none ends because containerd does not answer."""
    path = str(tmp_path / "node")
    settings = {"containerd": {"address": f"{path}/containerd/sock"}}
    with shared_directory(path), ExitStack() as daemons:
        daemon = daemons.enter_context(run_daemon(f"{path}/nsfs", settings))
        with run_containerd(f"{path}/containerd", release=release, more=proxy_plugins(daemon.socket, "nsfs")) as server:
            node = Node(daemon, server)
            for namespace in ("first", "second", "stays"):
                node.pull(reference, namespace=namespace)
                assert len(remains(daemon, namespace)) == 2
            assert node.run(reference, "c", namespace="first") == "the second layer\n"
            node.clear("first")
            server.ctr("namespaces", "rm", "first")
            assert wait_until(lambda: remains(daemon, "first") == [])
            assert daemon.workers().keys() == {"ns/second", "ns/stays"}
            node.clear("second")
            assert len(remains(daemon, "second")) == 2
            daemons.close()
            server.ctr("namespaces", "rm", "second")
            daemon = daemons.enter_context(run_daemon(f"{path}/nsfs", settings))
            assert wait_until(lambda: remains(daemon, "second") == [])
            before = warnings_of(daemon)
        assert wait_until(lambda: warnings_of(daemon) > before)
        assert len(remains(daemon, "stays")) == 2


def warnings_of(daemon: Daemon) -> int:
    """How often the daemon could not reach containerd."""
    with open(daemon.log) as log:
        return log.read().count("are not noticed now")


@pytest.mark.parametrize("release", RELEASES)
def test_of_a_guests_image_no_byte_is_on_the_host(tmp_path: Path, release: str, reference: str) -> None:
    with run_node(str(tmp_path / "node"), release, plugins=("nsfs-guest",)) as node:
        pulled = json.loads(node.pull(reference, "--json", "--snapshotter", "nsfs-guest", namespace="vms").stdout)
        assert [layer["how"] for layer in pulled["layers"]] == ["lazy"] * len(IMAGE.layers)
        if release == NEWER:
            command = ("images", "pull", "--plain-http", "--snapshotter", "nsfs-guest", reference)
            node.containerd.ctr(*command, namespace="others")
        for namespace in ("vms", "others")[: 2 if release == NEWER else 1]:
            blobs = set(node.containerd.ctr("content", "ls", "-q", namespace=namespace).stdout.split())
            assert blobs.isdisjoint(layer.digest for layer in IMAGE.layers)
            assert volume(mounts(node, namespace)) == {
                "volume_type": "image_guest_pull",
                "source": f"{reference}@{IMAGE.digest}",
                "image_pull": {
                    "metadata": {
                        "containerd.io/snapshot/cri.image-ref": reference,
                        "containerd.io/snapshot/cri.manifest-digest": str(IMAGE.digest),
                    }
                },
            }
        assert not os.path.exists(f"{node.daemon.root}/domains")
        refused = node.containerd.ctr(
            "images", "pull", *(("--local",) if release == NEWER else ()), "--plain-http", "--snapshotter",
            "nsfs-guest", reference, namespace="local", check=False,
        )  # fmt: skip
        assert refused.returncode != 0
        assert "containerd would unpack it here" in refused.stderr
        for namespace in ("vms", "others", "local"):
            node.clear(namespace)


def mounts(node: Node, namespace: str) -> str:
    """What containerd says of mounting a container's snapshot over the image."""
    top = chain_ids([layer.diff_id for layer in IMAGE.layers])[-1]  # type: ignore[misc]
    of = ("snapshots", "--snapshotter", "nsfs-guest")
    node.containerd.ctr(*of, "prepare", "container", str(top), namespace=namespace)
    said = node.containerd.ctr(*of, "mounts", "/target", "container", namespace=namespace).stdout
    node.containerd.ctr(*of, "rm", "container", namespace=namespace)
    return said


def volume(said: str) -> object:
    """The volume in a mount of the form that Kata Containers reads."""
    form = r"mount -t fuse\.nydus-overlayfs overlay /target -o workdir=\S+,upperdir=\S+,lowerdir=\S+,"
    found = re.fullmatch(form + r"io\.katacontainers\.volume=(\S+)\n", said)
    assert found is not None, said
    return json.loads(base64.b64decode(found[1], validate=True))
