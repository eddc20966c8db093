"""contrib/containerd as it stands, in the containerds that it is for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import busybox
from containerd import RELEASES
from cri import Cri
from images import write_oci_layout
from nodes import run_node
from nsfs.model.digest import Digest
from registry import push_layout, run_registry

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("release", RELEASES)
def test_the_snippets_make_nsfs_the_snapshotter_of_ctr_and_of_kubernetes(tmp_path: Path, release: str) -> None:
    layout = write_oci_layout(tmp_path / "layout", busybox.image())
    with run_registry() as registry, run_node(str(tmp_path / "node"), release, cri=True) as node:
        push_layout(str(layout), registry, "busybox")
        reference = f"{registry.host}/busybox:latest"
        node.containerd.ctr("images", "pull", "--plain-http", "--snapshotter", "nsfs", reference)
        assert len(node.snapshots()) == 2
        assert node.run(reference, "a") == "the second layer\n"
        with Cri(node.containerd.socket) as cri:
            identifier = cri.pull(reference)
            assert cri.names() == {reference}
        assert identifier == Digest.of(busybox.image().config_blob)
        assert len(node.snapshots("k8s.io")) == 2


@pytest.mark.parametrize("release", RELEASES)
def test_kubernetes_sees_what_nsfs_pulled(tmp_path: Path, release: str) -> None:
    layout = write_oci_layout(tmp_path / "layout", busybox.image())
    with run_registry() as registry, run_node(str(tmp_path / "node"), release, cri=True) as node:
        push_layout(str(layout), registry, "busybox")
        reference = f"{registry.host}/busybox:latest"
        node.pull(reference, namespace="k8s.io")
        with Cri(node.containerd.socket) as cri:
            cri.wait_for(reference)
            before = node.snapshots("k8s.io")
            assert cri.pull(reference) == Digest.of(busybox.image().config_blob)
            assert node.snapshots("k8s.io") == before
            cri.remove_image(reference)
            assert cri.names() == set()
