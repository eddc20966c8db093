"""What tenants write into labels, annotations, keys and namespaces: names of others, scopes, owners, URLs, secrets."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import grpc
import pytest

import busybox
from containerd import NEWER
from fakes import FakeRegistry
from images import Image, Layer, file, gzip_layer
from nodes import Node, run_node
from nsfs_daemon import Daemon, run_daemon
from published import publish
from snapshots_api import Backend, mounted, offers
from worlds import Tenants

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SECRET = b"private to a"
SEATS = {"a": ("team-a", "nsfs"), "b": ("team-b", "nsfs")}
SHIFT = {"containerd.io/snapshot/uidmapping": "0:1000:65536", "containerd.io/snapshot/gidmapping": "0:1000:65536"}


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as running:
        yield running


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with run_node(str(tmp_path_factory.mktemp("node")), NEWER) as running:
        yield running


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with run_daemon(str(tmp_path_factory.mktemp("daemon"))) as running:
        yield running


def annotated(canary: FakeRegistry, private: str, content: bytes) -> Image:
    """An image whose layer says all that a tenant could wish for; containerd makes labels of it."""
    wishes = {
        "containerd.io/namespace": "team-a",
        "containerd.io/snapshot/nsfs.namespace": "team-a",
        "containerd.io/snapshot/nsfs.isolation": "shared",
        "containerd.io/snapshot/nsfs.domain": "ns/team-a",
        "containerd.io/snapshot/cri.image-ref": private,
        "containerd.io/snapshot/remote/stargz.reference": private,
        "containerd.io/snapshot/remote/urls": f"http://{canary.host}/blob",
        "containerd.io/snapshot/pullusername": "ann",
        "containerd.io/snapshot/pullsecret": "correct horse",
        **SHIFT,
    }
    layer = gzip_layer([file("secret", content)])
    return Image((busybox.base(), Layer(layer.tar, layer.blob, layer.media_type, wishes)))


def test_annotations_are_wishes_that_nobody_grants(node: Node, registry: FakeRegistry) -> None:
    world = Tenants(node.containerd, SEATS)
    private = publish(registry, Image((busybox.base(), gzip_layer([file("secret", SECRET)]))), "private")
    world.pull("a", private)
    with FakeRegistry() as canary:
        wishing = publish(registry, annotated(canary, private, b"b's own"), "wishing")
        world.pull("b", wishing)
        assert world.read("b", wishing, "/secret") == b"b's own"
        owner = node.run(wishing, "owner", "/bin/stat", "-c", "%u %g", "/secret", namespace="team-b")
        assert owner == "0 0\n"
        assert canary.log == []
    assert set(node.daemon.workers()) == {"ns/team-a", "ns/team-b"}
    assert world.read("a", private, "/secret") == SECRET
    node.daemon.nsfs("cat", f"{private}:/secret", "--isolation", "shared")
    assert "shared" in node.daemon.workers(), "who may choose a scope gets it"


def test_a_layer_is_not_shifted_by_what_it_says(daemon: Daemon, registry: FakeRegistry, tmp_path: Path) -> None:
    """The labels that shift a container's owners mean nothing in an image; on a container they do."""
    made = Image((gzip_layer([file("f", b"f")]),))
    (labels,) = offers(made, publish(registry, made, "shifted"))
    with Backend(daemon.socket, namespace="red") as backend:
        assert backend.offer("red", "", labels | SHIFT)
        (name,) = backend.ask(labels["containerd.io/snapshot.ref"], "")
        for shift, owner in (({}, 0), (SHIFT, 1000)):
            given = backend.prepare(backend.name("red", "c"), name, labels=shift)
            with mounted(given, tmp_path / "mnt") as root:
                assert (root / "f").stat().st_uid == owner


KEYS = [
    "../../../../tmp/nsfs-escaped",
    "red/1/../../../../../tmp/nsfs-escaped",
    "/tmp/nsfs-escaped",
    "red/1/a,lowerdir=/,upperdir=/etc",
    "red/1/a:b\\:c",
    "red/1/\n\t\x01\x7f",
    "red/1/\N{RIGHT-TO-LEFT OVERRIDE}\N{SNOWMAN}",
    "red/1/$(touch /tmp/nsfs-escaped)",
    "red/1/" + "k" * 100_000,
    "." * 3,
    " ",
]


@pytest.mark.parametrize("key", KEYS, ids=lambda key: ascii(key)[:40])
def test_a_key_is_no_path(daemon: Daemon, key: str, tmp_path: Path) -> None:
    before = _paths(daemon)
    with Backend(daemon.socket) as backend:
        given = backend.prepare(key)
        (number,) = _paths(daemon) - before
        assert number.isdigit()
        with mounted(given, tmp_path / "mnt") as root:
            (root / "f").write_bytes(b"f")
        assert backend.stat(key).name == key
        backend.commit(f"{key[:200]}-done", key)
        child = backend.prepare("red/2/child" if key.startswith("red/") else "child", f"{key[:200]}-done")
        with mounted(child, tmp_path / "mnt") as root:
            assert (root / "f").read_bytes() == b"f"
        for name in ("red/2/child" if key.startswith("red/") else "child", f"{key[:200]}-done"):
            backend.remove(name)
        backend.cleanup()
    assert _paths(daemon) == before
    assert not os.path.exists("/tmp/nsfs-escaped")


def _paths(daemon: Daemon) -> set[str]:
    found = f"{daemon.root}/snapshots"
    return set(os.listdir(found)) if os.path.exists(found) else set()


NAMESPACES = ["..", "a/b", "/etc", "a b", "a..b", "-a", "a" * 77, "a%2f..", "a,b", "a\\b", "shared/", "ns/team-a"]


def test_a_namespace_is_an_identifier(daemon: Daemon, registry: FakeRegistry) -> None:
    """Else it could name another domain, or a directory: its own name is what a domain's is made of."""
    made = Image((gzip_layer([file("f", b"f")]),))
    (labels,) = offers(made, publish(registry, made, "named"))
    before = daemon.workers()
    for namespace in NAMESPACES:
        with Backend(daemon.socket, namespace=namespace) as backend:
            for key in ("key", f"{namespace}/1/extract-1-x sha256:ff"):
                with pytest.raises(grpc.RpcError) as refused:
                    backend.prepare(key, labels=labels)
                assert refused.value.code() in {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED}
    assert daemon.workers() == before
    done = daemon.nsfs("cat", f"{registry.host}/named:/f", "--namespace", "ns/team-a", check=False)
    assert done.returncode == 2, done.stderr


def test_sockets_and_directories_are_the_daemons_alone(daemon: Daemon) -> None:
    for path, mode in ((daemon.socket, 0o600), (daemon.root, 0o700), (daemon.run, 0o700)):
        found = os.stat(path)
        assert (stat.S_IMODE(found.st_mode), found.st_uid) == (mode, os.getuid()), path
