"""Containers in user namespaces: owners as they are seen inside and outside, and that nothing is copied for it."""

from __future__ import annotations

import io
import os
import pathlib
import struct
import subprocess
import tarfile
import tempfile
from typing import TYPE_CHECKING

import pytest

import busybox
import nodes
import published
from containerd import INSTALLED, NEWER
from images import Image, Layer, directory, file, gzip_layer, sample_content, write_oci_layout
from nodes import Node, run_node, wait_until
from registry import push_layout, run_registry

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

ONE = ("--uidmap", "0:100000:65536", "--gidmap", "0:200000:65536")
SEVERAL = ("--uidmap", "0:1000:1", "--uidmap", "1:100000:65535", "--gidmap", "0:5:70000")
LARGE = sample_content(4_000_000)
BIND_PORTS = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)
"""CAP_NET_BIND_SERVICE, permitted and effective (struct vfs_cap_data, include/uapi/linux/capability.h)."""
LOOK = "stat -c '%u %g' / /etc/motd /middle /home/user/file"
INSIDE = "0 0\n0 0\n7 8\n1000 1001\n"
CHANGE = "echo x > /etc/x; echo y >> /home/user/file; rm /middle; sha256sum /data/large; "


def image() -> Image:
    """A layer that has to be unpacked, since its table of contents is not the one that is promised, between two that
    are shown on demand."""
    made = published.estargz_layer([file("middle", b"middle", uid=7, gid=8)])
    middle = Layer(made.tar, made.blob, made.media_type, {published.TOC_DIGEST: f"sha256:{'0' * 64}"})
    mine = {"uid": 1000, "gid": 1001}
    with open("/usr/bin/busybox", "rb") as program:
        capable = file("bin/busybox-capable", program.read(), 0o755, xattrs={"security.capability": BIND_PORTS})
    top = gzip_layer(
        [
            *(directory("data"), file("data/large", LARGE), directory("bin"), capable),
            *(directory("home"), directory("home/user", **mine), file("home/user/file", b"mine\n", **mine)),
        ]
    )
    return Image((busybox.base(), middle, top))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    layout = write_oci_layout(tmp_path_factory.mktemp("layout"), image())
    with run_registry() as registry:
        push_layout(str(layout), registry, "userns")
        yield f"{registry.host}/userns:latest"


ALIKE = {"containerd": {"profile": "use"}}
"""No start is recorded, so that none has views of its own."""


@pytest.fixture
def place() -> Iterator[str]:
    """A directory that also root of a user namespace can walk through."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="nsfs-userns-") as path:
        os.chmod(path, 0o711)
        yield path


def clones(node: Node) -> list[str]:
    return [view for view in node.views() if os.path.basename(view).startswith("i")]


def start(node: Node, reference: str, container: str, script: str, *maps: str) -> None:
    command = ("run", "--detach", "--snapshotter", "nsfs", "--remap-labels", *maps, reference, container)
    node.containerd.ctr(*command, "/bin/sh", "-c", f"{script} sleep 1000")


def written(node: Node) -> dict[str, os.stat_result]:
    """What is in the only upper directory that has an `etc/x`."""
    (top,) = (path.parent.parent for path in pathlib.Path(node.daemon.root).glob("snapshots/*/fs/etc/x"))
    return {str(path.relative_to(top)): path.lstat() for path in (top, *top.rglob("*"))}


def test_nothing_is_copied_and_owners_are_right_inside_and_outside(place: str, reference: str) -> None:
    with run_node(place, NEWER, settings=ALIKE) as node:
        assert '"how": "unpacked"' in node.pull(reference, "--json").stdout
        start(node, reference, "a", CHANGE, *ONE)
        assert node.ask("a", "stat -c '%u %g' /etc/x /home/user/file") == "0 0\n1000 1001\n"
        assert wait_until(lambda: "middle" in written(node))
        files = written(node)
        assert {name: (found.st_uid, found.st_gid) for name, found in files.items() if name != "middle"} == {
            **dict.fromkeys((".", "etc", "etc/x", "home"), (100000, 200000)),
            **dict.fromkeys(("home/user", "home/user/file"), (101000, 201001)),
        }
        assert sum(found.st_blocks * 512 for found in files.values()) < 100_000
        assert len(clones(node)) == 3
        assert node.run(reference, "b", "/bin/sh", "-c", LOOK, options=("--remap-labels", *ONE)) == INSIDE
        assert len(clones(node)) == 3
        options = ("--remap-labels", "--user", "1000", *ONE)
        look = ("/bin/busybox-capable", "grep", "CapEff", "/proc/self/status")
        assert node.run(reference, "e", *look, options=options) == "CapEff:\t0000000000000400\n"
        start(node, reference, "c", "", *SEVERAL)
        assert node.ask("c", LOOK) == INSIDE
        assert len(clones(node)) == 6
        assert node.run(reference, "d", "/bin/sh", "-c", LOOK) == INSIDE
        node.containerd.ctr("snapshots", "--snapshotter", "nsfs", "commit", "committed", "a")
        assert owners_in_difference(node, "committed") == {"etc/x": (0, 0), "home/user/file": (1000, 1001)}
        node.containerd.ctr("snapshots", "--snapshotter", "nsfs", "rm", "committed")
        node.clear("default")
        assert node.is_clean()


def owners_in_difference(node: Node, snapshot: str) -> dict[str, tuple[int, int]]:
    """Of the files in the layer that a snapshot would be."""
    server = node.containerd
    command = [*server.enter, f"{server.binaries}/ctr", "-a", server.socket, "snapshots", "--snapshotter", "nsfs"]
    layer = subprocess.run([*command, "diff", snapshot], check=True, stdout=subprocess.PIPE).stdout
    with tarfile.open(fileobj=io.BytesIO(layer)) as archive:
        return {each.name: (each.uid, each.gid) for each in archive if each.isreg() and ".wh." not in each.name}


def without_capability(directory: str) -> str:
    """Our snippets, but for the capability."""
    for name in os.listdir(nodes.SNIPPETS):
        text = (pathlib.Path(nodes.SNIPPETS) / name).read_text()
        (pathlib.Path(directory) / name).write_text(text.replace('capabilities = ["remap-ids"]', ""))
    return directory


@pytest.mark.parametrize(
    ("release", "capable", "settings"),
    [
        (INSTALLED, True, {}),
        (NEWER, True, {"kernel": {"file_backed": False}}),
        (NEWER, False, {"kernel": {"idmap": False}}),
    ],
    ids=["containerd 1.6", "loop devices", "a copy"],
)
def test_every_way_to_shift(
    place: str,
    reference: str,
    release: str,
    capable: bool,
    settings: Mapping[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
) -> None:
    """Where neither containerd nor we may shift, containerd's client copies the tree, and that is not shifted twice."""
    if not capable:
        monkeypatch.setattr(nodes, "SNIPPETS", without_capability(str(tmp_path)))
    with run_node(place, release, settings=settings) as node:
        node.pull(reference)
        options = ("--remap-labels", *ONE)
        assert node.run(reference, "a", "/bin/sh", "-c", LOOK, options=options).endswith(INSIDE)
        node.clear("default")
        assert node.is_clean()
