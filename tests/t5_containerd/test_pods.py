"""A pod as a kubelet runs it, over the CRI: sandbox and container from images that nobody downloaded, and their end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import busybox
from containerd import RELEASES
from cri import Cri
from images import Image, write_oci_layout
from nodes import Node, run_node, wait_until
from nsfs.model.digest import Digest
from registry import Registry, push_layout, run_registry

if TYPE_CHECKING:
    from pathlib import Path

PAUSE = Image((busybox.base(),), {"Entrypoint": ["/bin/sleep", "1000000"]})
NAMESPACE = "k8s.io"


@pytest.mark.parametrize("release", RELEASES)
def test_a_pod_runs_from_images_that_nobody_downloaded(tmp_path: Path, release: str) -> None:
    with run_registry() as registry:
        app, pause = (_publish(tmp_path, registry, *each) for each in (("app", busybox.image()), ("pause", PAUSE)))
        with (
            run_node(str(tmp_path / "node"), release, cri=True, pause=pause) as node,
            Cri(node.containerd.socket) as cri,
        ):
            cri.pull(app)
            with cri.pod("a", str(tmp_path)) as pod:
                container = pod.start(app, "c", "/bin/sh", "-c", "cat /etc/motd; sleep 1000")
                assert wait_until(lambda: pod.log("c") == "the second layer\n")
                pod.ask(container, "/bin/sh", "-c", "echo x > /etc/x")
                assert pod.ask(container, "/bin/sh", "-c", "cat /etc/x /data/words") == f"x\n{busybox.WORDS.decode()}"
                assert len(node.views()) == 3, "each first start, of the sandbox and of the container, has its own"
                assert _blobs(node) == _documents(busybox.image()) | _documents(PAUSE)
            for reference in (app, pause):
                cri.remove_image(reference)
            assert node.is_clean()
            assert node.snapshots(NAMESPACE) == []


def _publish(directory: Path, registry: Registry, name: str, image: Image) -> str:
    push_layout(str(write_oci_layout(directory / name, image)), registry, name)
    return f"{registry.host}/{name}:latest"


def _blobs(node: Node) -> set[str]:
    return set(node.containerd.ctr("content", "ls", "-q", namespace=NAMESPACE).stdout.split())


def _documents(image: Image) -> set[str]:
    return {image.digest, Digest.of(image.config_blob)}
