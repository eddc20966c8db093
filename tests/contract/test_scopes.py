"""Scopes under containerd: plugin names, rules and labels decide where an image's bytes are, if anywhere."""

from __future__ import annotations

import base64
import json
import os
from typing import TYPE_CHECKING, Any

import grpc
import pytest

import published
from fakes import FakeRegistry
from images import Image, directory, file, gzip_layer
from nsfs_daemon import run_daemon
from snapshots_api import REF, Backend, mounted, offers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from nsfs.serve.proto import mount_pb2
    from nsfs_daemon import Daemon

LABEL = "containerd.io/snapshot/nsfs.isolation"
SECRET = b"no byte of this may be on the host " * 1000

RULES = """
[[rule]]
image = "*/public/*"
scope = "shared"
domain = "public"

[[rule]]
image = "*/guests/*"
scope = "guest"
"""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    path = tmp_path_factory.mktemp("daemon")
    (path / "policy.toml").write_text(RULES)
    with run_daemon(str(path / "d"), {"policy": str(path / "policy.toml"), "prepare_wait": "20s"}) as running:
        yield running


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as running:
        yield running


def image(content: bytes = SECRET) -> Image:
    base = gzip_layer([directory("etc"), file("etc/secret", content)])
    return Image((base, gzip_layer([file("etc/top", content[:100])])))


def denied(text: str) -> Any:
    def check(error: grpc.RpcError) -> bool:
        return error.code() is grpc.StatusCode.PERMISSION_DENIED and text in (error.details() or "")

    return pytest.raises(grpc.RpcError, check=check)


def volume(mount: mount_pb2.Mount) -> dict[str, Any]:
    """What the mount's last option says."""
    name, _, value = mount.options[-1].partition("=")
    assert name == "io.katacontainers.volume"
    said: dict[str, Any] = json.loads(base64.b64decode(value, validate=True))
    return said


def domains(daemon: Daemon) -> set[str]:
    found = os.path.join(daemon.root, "domains")
    return set(os.listdir(found)) if os.path.exists(found) else set()


def test_of_a_guests_image_nothing_is_on_the_host(daemon: Daemon, registry: FakeRegistry) -> None:
    made = image()
    reference = published.publish(registry, made, "app")
    before = domains(daemon)
    with Backend(daemon.socket, "nsfs-guest", "vms") as backend:
        names = backend.pull("vms", made, reference)
        key = backend.name("vms", "container")
        (mount,) = backend.prepare(key, names[-1])
        assert backend.mounts(key) == [mount]
        (view,) = backend.view(backend.name("vms", "view"), names[-1])
    assert registry.requests() == []
    assert domains(daemon) == before
    assert (mount.type, mount.source, mount.target) == ("fuse.nydus-overlayfs", "overlay", "")
    assert [option.partition("=")[0] for option in mount.options] == [
        "workdir",
        "upperdir",
        "lowerdir",
        "io.katacontainers.volume",
    ]
    assert [option.partition("=")[0] for option in view.options] == ["lowerdir", "io.katacontainers.volume"]
    assert volume(mount) == volume(view)
    metadata = (
        f'{{"containerd.io/snapshot/cri.image-ref":"{reference}",'
        f'"containerd.io/snapshot/cri.manifest-digest":"{made.digest}"}}'
    )
    said = (
        f'{{"volume_type":"image_guest_pull","source":"{reference}@{made.digest}",'
        f'"image_pull":{{"metadata":{metadata}}}}}'
    )
    assert mount.options[-1] == f"io.katacontainers.volume={base64.b64encode(said.encode()).decode()}"
    assert os.listdir(mount.options[1].partition("=")[2]) == os.listdir(mount.options[2].partition("=")[2]) == []


def test_containerd_may_not_unpack_for_a_guest(daemon: Daemon) -> None:
    with Backend(daemon.socket, "nsfs-guest", "vms") as backend:
        with denied("containerd would unpack it here"):
            backend.prepare(backend.name("vms", "extract-1-x sha256:ff"))
        with denied("containerd would unpack it here"):
            backend.prepare(backend.name("vms", "extract-2-x sha256:ff"), labels={REF: "sha256:ff"})


def test_a_rule_may_say_guest(daemon: Daemon, registry: FakeRegistry) -> None:
    made = image()
    before = domains(daemon)
    with Backend(daemon.socket, "nsfs", "vms") as backend:
        names = backend.pull("vms", made, published.publish(registry, made, "guests/app"))
        (mount,) = backend.prepare(backend.name("vms", "container"), names[-1])
    assert volume(mount)["volume_type"] == "image_guest_pull"
    assert (registry.requests(), domains(daemon)) == ([], before)


def test_a_label_tightens_one_container_and_loosens_none(
    daemon: Daemon, registry: FakeRegistry, tmp_path: Path
) -> None:
    made = image()
    with Backend(daemon.socket, "nsfs", "labels") as backend:
        names = backend.pull("labels", made, published.publish(registry, made, "app"))
        (guest,) = backend.prepare(backend.name("labels", "a"), names[-1], labels={LABEL: "guest"})
        assert volume(guest)["volume_type"] == "image_guest_pull"
        with denied("a label cannot loosen what is decided: shared instead of isolated"):
            backend.prepare(backend.name("labels", "b"), names[-1], labels={LABEL: "shared"})
        pod = backend.prepare(backend.name("labels", "c"), names[-1], labels={LABEL: "pod"})
        with mounted(pod, tmp_path / "mnt") as root:
            assert (root / "etc/secret").read_bytes() == SECRET
            assert {name.partition("/")[0] for name in daemon.workers()} >= {"pod", "ns"}


def test_what_an_image_says_of_itself_decides_nothing(daemon: Daemon, registry: FakeRegistry, tmp_path: Path) -> None:
    """Annotations of a layer's descriptor become labels of the layer, and of nothing else."""
    made = image(b"annotated" * 1000)
    reference = published.publish(registry, made, "annotated")
    with Backend(daemon.socket, "nsfs", "annotated") as backend:
        parent = ""
        for labels in offers(made, reference):
            assert backend.offer("annotated", parent, {**labels, LABEL: "guest"})
            (parent,) = backend.ask(labels[REF], parent)
        assert "ns/annotated" in daemon.workers()
        with mounted(backend.prepare(backend.name("annotated", "c"), parent), tmp_path / "mnt") as root:
            assert (root / "etc/secret").read_bytes() == b"annotated" * 1000


def test_tenants_of_one_namespace_are_told_apart_by_plugin_names(
    daemon: Daemon, registry: FakeRegistry, tmp_path: Path
) -> None:
    made = image(b"tenants" * 1000)
    reference = published.publish(registry, made, "tenants")
    for tenant in ("a", "b"):
        with Backend(daemon.socket, f"nsfs-team-{tenant}", "k8s.io") as backend:
            names = backend.pull("k8s.io", made, reference)
            given = backend.prepare(backend.name("k8s.io", "c"), names[-1])
            with mounted(given, tmp_path / tenant) as root:
                assert (root / "etc/secret").read_bytes() == b"tenants" * 1000
    assert {"ns/k8s.io/team-a", "ns/k8s.io/team-b"} <= set(daemon.workers())
    assert "ns/k8s.io" not in daemon.workers()
    assert len(registry.requests(path=made.layers[0].digest)) == 2


def test_public_images_of_several_namespaces_are_one(daemon: Daemon, registry: FakeRegistry, tmp_path: Path) -> None:
    made = image(b"public" * 1000)
    reference = published.publish(registry, made, "public/base")
    for namespace in ("red", "blue"):
        with Backend(daemon.socket, "nsfs", namespace) as backend:
            names = backend.pull(namespace, made, reference)
            given = backend.prepare(backend.name(namespace, "c"), names[-1])
            with mounted(given, tmp_path / namespace) as root:
                assert (root / "etc/secret").read_bytes() == b"public" * 1000
    layers = {domain["name"]: domain["layers"] for domain in daemon.json("status")["domains"]}
    assert layers["public"] > 0
    assert {layers["ns/red"], layers["ns/blue"]} == {0}
    asked = [each.headers.get("range") for each in registry.requests(path=made.layers[0].digest)]
    assert asked.count(None) == 1


def test_a_private_image_on_a_public_base_is_private(daemon: Daemon, registry: FakeRegistry, tmp_path: Path) -> None:
    """containerd has the base already, by the public image; the container's whole stack is private."""
    base = image(b"base" * 1000)
    private = Image((*base.layers, gzip_layer([file("etc/own", b"private")])))
    public = published.publish(registry, base, "public/python")
    with Backend(daemon.socket, "nsfs", "mixed") as backend:
        names = backend.pull("mixed", base, public)
        top = offers(private, published.publish(registry, private, "app"))[-1]
        assert backend.offer("mixed", names[-1], top)
        (name,) = backend.ask(top[REF], names[-1])
        given = backend.prepare(backend.name("mixed", "c"), name)
        with mounted(given, tmp_path / "mnt") as root:
            assert (root / "etc/own").read_bytes() == b"private"
            assert (root / "etc/secret").read_bytes() == b"base" * 1000
    assert "ns/mixed" in daemon.workers()


def test_strict_proves_what_no_pull_proved(registry: FakeRegistry, tmp_path: Path) -> None:
    """An image is pulled for a guest, by a rule; then the rule goes, and its layers are claims that nobody checked."""
    made = image()
    forged = published.estargz_layer([directory("etc"), file("etc/secret", b"forged")])
    lie = Image((type(forged)(made.layers[0].tar, forged.blob, forged.media_type, forged.annotations),))
    reference = published.publish(registry, lie, "guests/lie")
    policy = tmp_path / "policy.toml"
    policy.write_text(RULES)
    settings = {"policy": str(policy), "prepare": "strict", "prepare_wait": "20s"}
    with run_daemon(str(tmp_path / "d"), settings) as daemon, Backend(daemon.socket, "nsfs", "red") as backend:
        names = backend.pull("red", lie, reference)
    policy.write_text("")
    with (
        run_daemon(str(tmp_path / "d"), settings) as daemon,
        Backend(daemon.socket, "nsfs", "red") as backend,
        pytest.raises(grpc.RpcError, match="does not prove its diff ID"),
    ):
        backend.prepare(backend.name("red", "c"), names[-1])
