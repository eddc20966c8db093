"""A real image, Debian's python3: what a start costs lazily, and whether all of it is as containerd unpacks it."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

import pytest
from bench import estargz, images

import busybox
from containerd import RELEASES
from meter import Meter
from nodes import Node, run_node
from registry import push_layout, run_registry

if TYPE_CHECKING:
    from pathlib import Path


def prepare() -> None:
    """See prepared."""
    for layer in images.make_layers(images.PYTHON):
        estargz.convert_layer(layer)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("release", RELEASES)
def test_python_starts_from_less_than_a_third(tmp_path: Path, release: str) -> None:
    built = images.build(images.PYTHON)
    with run_registry() as registry, run_node(str(tmp_path / "node"), release) as node, Meter(registry.host) as meter:
        push_layout(built.layout, registry, "plain")
        push_layout(estargz.convert(built), registry, "estargz")
        node.pull(f"{meter.host}/estargz:latest", namespace="estargz")
        assert _run_python(node, meter, "estargz") < built.size / 3
        node.pull(f"{meter.host}/plain:latest", namespace="plain")
        node.daemon.nsfs("evict", f"{meter.host}/plain:latest", "--namespace", "plain")
        meter.log.clear()
        assert 0 < _run_python(node, meter, "plain") < built.size / 3
        _compare(node, f"{meter.host}/plain:latest", "plain")


def _run_python(node: Node, meter: Meter, name: str) -> int:
    """Bytes of blobs that the registry has served since its log was empty."""
    assert node.run(f"{meter.host}/{name}:latest", "a", "python3", "-c", "print(1)", namespace=name) == "1\n"
    return meter.served()


def _compare(node: Node, reference: str, namespace: str) -> None:
    """With a container over containerd's own overlayfs. (An eStargz's table of contents rounds times to seconds.)"""
    look = ("/bin/sh", "-c", busybox.LISTING)
    seen = node.run(reference, "b", *look, namespace=namespace).splitlines()
    node.pull(reference, "--snapshotter", "overlayfs", namespace=namespace)
    wanted = node.containerd.run(reference, "c", *look, namespace=namespace).splitlines()
    assert len(wanted) > 5000
    assert "\n".join(difflib.unified_diff(wanted, seen, n=0, lineterm="")) == ""
