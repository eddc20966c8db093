"""Snapshots whose layers are resolved in a domain of their own, which begins and ends with each of them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import grpc
import pytest

import published
from fakes import FakeRegistry
from images import Image, Layer, directory, file, gzip_layer, sample_content
from nodes import wait_until
from nsfs_daemon import run_daemon
from snapshots_api import Backend, mounted, offers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from nsfs_daemon import Daemon

MB = 1_000_000
SETTINGS = {"isolation": "pod", "prepare_wait": "30s"}
"""So a Prepare gives the mounts themselves."""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with run_daemon(str(tmp_path_factory.mktemp("daemon")), SETTINGS) as running:
        yield running


@pytest.fixture
def backend(daemon: Daemon) -> Iterator[Backend]:
    with Backend(daemon.socket) as opened:
        yield opened


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as running:
        yield running


def image(name: str) -> Image:
    base = gzip_layer([directory("etc"), file("etc/base", name.encode()), file("big", sample_content(MB, len(name)))])
    return Image((base, gzip_layer([file("etc/top", b"top")])))


def domains(daemon: Daemon) -> list[str]:
    """Pools on disk."""
    folder = f"{daemon.root}/domains"
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def test_each_container_reads_its_image_in_a_domain_of_its_own(
    daemon: Daemon, registry: FakeRegistry, backend: Backend, tmp_path: Path
) -> None:
    made = image("pods")
    names = backend.pull("red", made, published.publish(registry, made, "pods"))
    assert daemon.workers() == {}
    assert domains(daemon) == []
    keys = [backend.name("red", f"c{number}") for number in range(2)]
    for key in keys:
        with mounted(backend.prepare(key, names[-1]), tmp_path / "mnt") as root:
            assert (root / "big").read_bytes() == sample_content(MB, 4)
            assert (root / "etc/top").read_bytes() == b"top"
    assert len(daemon.workers()) == len(domains(daemon)) == 2
    assert all(name.startswith("pod/snapshot-") for name in daemon.workers())
    backend.remove(keys[0])
    backend.cleanup()
    assert len(daemon.workers()) == len(domains(daemon)) == 1
    with mounted(backend.mounts(keys[1]), tmp_path / "mnt") as root:
        assert (root / "etc/base").read_bytes() == b"pods"
    for name in (keys[1], *reversed(names)):
        backend.remove(name)
    backend.cleanup()
    assert daemon.workers() == {}
    assert domains(daemon) == []


def test_an_image_is_served_as_a_whole_or_not_at_all(daemon: Daemon, registry: FakeRegistry, backend: Backend) -> None:
    made = image("partly")
    odd = Image((*made.layers, Layer(b"", b"not for us", "application/x-unknown")))
    assert not backend.offer("red", "", offers(odd, published.publish(registry, odd, "partly"))[0])
    (left,) = backend.select()
    backend.remove(left.name)
    assert domains(daemon) == []


def test_what_is_not_what_its_image_says_is_never_shown(
    daemon: Daemon, registry: FakeRegistry, backend: Backend
) -> None:
    layer = gzip_layer([file("a", b"a")])
    forged = Image((Layer(gzip_layer([file("a", b"b")]).tar, layer.blob, layer.media_type),))
    forged_reference = published.publish(registry, forged, "forged")
    (name,) = backend.pull("red", forged, forged_reference)
    with pytest.raises(grpc.RpcError, match="the diff ID is not what it is said to be") as refused:
        backend.prepare(backend.name("red", "c"), name)
    assert refused.value.code() is grpc.StatusCode.DATA_LOSS
    assert str(layer.digest) in str(refused.value.details())
    assert wait_until(lambda: "is fenced off" in daemon.tail())
    assert not backend.offer("red", "", offers(forged, forged_reference)[0])
    for info in sorted(backend.select(), key=lambda info: info.kind, reverse=True):
        backend.remove(info.name)
    backend.cleanup()
    assert domains(daemon) == []


def test_a_restart_begins_a_new_domain(tmp_path: Path, registry: FakeRegistry) -> None:
    made = image("restart")
    with run_daemon(str(tmp_path / "d"), SETTINGS) as daemon, Backend(daemon.socket) as backend:
        names = backend.pull("red", made, published.publish(registry, made, "restart"))
        key = backend.name("red", "c")
        backend.prepare(key, names[-1])
    with run_daemon(str(tmp_path / "d"), SETTINGS) as daemon, Backend(daemon.socket) as backend:
        assert domains(daemon) == []
        with mounted(backend.mounts(key), tmp_path / "mnt") as root:
            assert (root / "etc/base").read_bytes() == b"restart"
        assert len(domains(daemon)) == 1
