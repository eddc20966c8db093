"""Tenants of a Kubernetes node, all in one namespace, each with a runtime class: set up as docs/containerd.md says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

import busybox
from containerd import NEWER
from cri import Cri
from images import Image, file, gzip_layer, write_oci_layout
from nodes import Node, run_node
from published import estargz_layer
from registry import Registry, push_layout, run_registry
from worlds import RefusedError, pretending

if TYPE_CHECKING:
    from collections.abc import Iterator

DOCUMENT = Path(__file__).parents[2] / "docs/containerd.md"
SECRET, OWN = b"private to a", b"b's own"
GENUINE, POISON = b"as its publisher made it", b"as b would have it"
PAUSE = Image((busybox.base(),), {"Entrypoint": ["/bin/sleep", "1000000"]})


class Pods:
    """Tenants whose containers a kubelet starts, by the class of each."""

    def __init__(self, cri: Cri, logs: str, *, classes: bool) -> None:
        self._cri = cri
        self._logs = logs
        self._classes = classes

    def handler(self, tenant: str) -> str:
        return f"tenant-{tenant}" if self._classes else ""

    def pull(self, tenant: str, reference: str) -> None:
        try:
            self._cri.pull(reference, self.handler(tenant))
        except grpc.RpcError as error:
            raise RefusedError(str(error)) from error

    def read(self, tenant: str, reference: str, path: str) -> bytes:
        with self._cri.pod(tenant, self._logs, self.handler(tenant)) as pod:
            container = pod.start(reference, "c", "/bin/sleep", "1000")
            return pod.ask(container, "/bin/cat", path).encode()


def publish(registry: Registry, image: Image, name: str, directory: Path) -> str:
    """Its reference. (containerd's CRI tries TLS first, and then takes a real registry's refusal for what it is.)"""
    push_layout(str(write_oci_layout(directory / name, image)), registry, name)
    return f"{registry.host}/{name}:latest"


RUNC = """
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
"""


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    with run_registry() as running:
        yield running


@pytest.fixture(scope="module")
def pause(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> str:
    return publish(registry, PAUSE, "pause", tmp_path_factory.mktemp("pause"))


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, pause: str) -> Iterator[Node]:
    text = DOCUMENT.read_text()
    start = text.index('[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.tenant-a]')
    documented = text[start : text.index("```", start)]
    classes = documented + documented.replace("tenant-a", "tenant-b").replace("nsfs-a", "nsfs-b")
    directory = str(tmp_path_factory.mktemp("node"))
    names = ("nsfs-a", "nsfs-b")
    with run_node(directory, NEWER, cri=True, pause=pause, classes=RUNC + classes, plugins=names) as running:
        yield running


@pytest.mark.parametrize("classes", [False, True], ids=["one-class", "classes"])
def test_classes_tell_tenants_apart(node: Node, registry: Registry, pause: str, classes: bool, tmp_path: Path) -> None:
    """b's image lists a's diff IDs: with one class for all containerd shares, with one for each b sees its own."""
    with Cri(node.containerd.socket) as cri:
        pods = Pods(cri, str(tmp_path), classes=classes)
        for tenant in "ab":
            pods.pull(tenant, pause)
        private = Image((busybox.base(), gzip_layer([file("secret", SECRET), file("seed", b"%d" % classes)])))
        reference = publish(registry, private, f"private{classes:d}", tmp_path)
        pods.pull("a", reference)
        lie = pretending(private, estargz_layer([file("secret", OWN)]))
        forged = publish(registry, lie, f"forged{classes:d}", tmp_path)
        pods.pull("b", forged)
        assert pods.read("a", reference, "/secret") == SECRET
        assert pods.read("b", forged, "/secret") == (OWN if classes else SECRET)
    assert {"ns/k8s.io/a", "ns/k8s.io/b"} <= set(node.daemon.workers()) or not classes


@pytest.mark.parametrize("classes", [False, True], ids=["one-class", "classes"])
def test_classes_keep_poison_apart(node: Node, registry: Registry, pause: str, classes: bool, tmp_path: Path) -> None:
    """b is first with a public image's diff IDs over a blob of b's: with a class for each, a sees the real one."""
    with Cri(node.containerd.socket) as cri:
        pods = Pods(cri, str(tmp_path), classes=classes)
        pods.pull("a", pause)
        public = Image((busybox.base(), gzip_layer([file("tool", GENUINE), file("seed", b"%d" % classes)])))
        lie = pretending(public, estargz_layer([file("tool", POISON)]))
        pods.pull("b", publish(registry, lie, f"poison{classes:d}", tmp_path))
        genuine = publish(registry, public, f"public{classes:d}", tmp_path)
        pods.pull("a", genuine)
        assert pods.read("a", genuine, "/tool") == (GENUINE if classes else POISON)
