"""Snapshots where the kernel has no EROFS, or is not to use it: overlay over FUSE trees of one layer each."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING

import pytest

import oracle
import published
import rich_images
from fakes import FakeRegistry
from images import write_oci_layout
from nsfs_daemon import run_daemon
from snapshots_api import Backend, mounted

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from images import Image
    from nsfs_daemon import Daemon


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with run_daemon(
        str(tmp_path_factory.mktemp("fuse")), {"kernel": {"erofs": False}, "prepare_wait": "30s"}
    ) as running:
        yield running


@pytest.fixture(scope="module")
def erofs_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with run_daemon(str(tmp_path_factory.mktemp("erofs")), {"prepare_wait": "30s"}) as running:
        yield running


@pytest.fixture(scope="module")
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as running:
        yield running


def lowers(daemon: Daemon) -> dict[str, str]:
    """Where layers are mounted, and as what."""
    with open("/proc/self/mountinfo") as file:
        mounts = [line.split() for line in file]
    return {mount[4]: mount[mount.index("-") + 1] for mount in mounts if mount[4].startswith(f"{daemon.run}/l/")}


@contextlib.contextmanager
def chain(daemon: Daemon, registry: FakeRegistry, image: Image, name: str) -> Iterator[tuple[Backend, str]]:
    """The image as snapshots of nsfs; its topmost one."""
    with Backend(daemon.socket) as backend:
        names = backend.pull("red", image, published.publish(registry, image, name))
        try:
            yield backend, names[-1]
        finally:
            for left in reversed(names):
                backend.remove(left)
            backend.cleanup()
    assert lowers(daemon) == {}


@contextlib.contextmanager
def shown(backend: Backend, name: str, target: Path) -> Iterator[Path]:
    """What a View of a snapshot shows."""
    key = backend.name("red", "view")
    given = backend.view(key, name)
    try:
        with mounted(given, target) as root:
            yield root
    finally:
        backend.remove(key)


@pytest.mark.parametrize("name", rich_images.IMAGES)
def test_stacked_they_are_what_unpacking_gives(
    daemon: Daemon, registry: FakeRegistry, tmp_path: Path, name: str
) -> None:
    image = rich_images.IMAGES[name]()
    scratch = tmp_path / "oracle"
    scratch.mkdir()
    wanted = oracle.expected_tree(oracle.find_layers(str(write_oci_layout(tmp_path / "layout", image))), str(scratch))
    with (
        chain(daemon, registry, image, f"rich/{name}") as (backend, top),
        shown(backend, top, tmp_path / "mnt") as root,
    ):
        assert set(lowers(daemon).values()) == {"fuse.nsfs"}
        assert oracle.difference(wanted, oracle.snapshot(str(root))) == ""


def test_each_by_itself_is_what_erofs_shows(
    daemon: Daemon, erofs_daemon: Daemon, registry: FakeRegistry, tmp_path: Path
) -> None:
    """Whiteouts, overlay's own attributes and link counts, to the byte."""
    trees = []
    for number, each in enumerate((daemon, erofs_daemon)):
        with (
            chain(each, registry, rich_images.changes(), "alike") as (backend, top),
            shown(backend, top, tmp_path / f"mnt{number}"),
        ):
            trees.append([oracle.snapshot(path) for path in sorted(lowers(each))])
    for fuse, erofs in zip(*trees, strict=True):
        assert oracle.difference(erofs, fuse) == ""
    xattrs = {name for tree in trees[0] for file in tree.values() for name, _ in file.xattrs}
    assert {"trusted.overlay.opaque", "trusted.overlay.origin"} <= xattrs
    assert any(file.kind == "character" and file.device == (0, 0) for tree in trees[0] for file in tree.values())


def test_a_container_writes_over_them(daemon: Daemon, registry: FakeRegistry, tmp_path: Path) -> None:
    with chain(daemon, registry, rich_images.changes(), "written") as (backend, top):
        key = backend.name("red", "container")
        with mounted(backend.prepare(key, top), tmp_path / "mnt") as root:
            (root / "etc/keep").write_bytes(b"changed")
            (root / "etc/gone").unlink()
            (root / "trio/one").chmod(0o600)
            (root / "merged/new").write_bytes(b"new")
        with mounted(backend.mounts(key), tmp_path / "mnt") as root:
            assert (root / "etc/keep").read_bytes() == b"changed"
            assert not (root / "etc/gone").exists()
            assert (root / "merged/below").read_bytes() == b"below"
            assert sorted(os.listdir(root / "merged")) == ["above", "below", "linked-up-too", "new"]
        backend.remove(key)


def test_set_user_ids_and_devices_work(daemon: Daemon, registry: FakeRegistry, tmp_path: Path) -> None:
    """They would not below a mount with nosuid or nodev, as a domain's FUSE filesystem is."""
    image = rich_images.everything()
    with (
        chain(daemon, registry, image, "devices") as (backend, top),
        shown(backend, top, tmp_path / "mnt") as root,
    ):
        assert os.statvfs(root).f_flag & (os.ST_NOSUID | os.ST_NODEV) == 0
        with open(root / "dev/null", "wb") as null:
            assert null.write(b"x") == 1


def test_readers_outlive_their_worker(daemon: Daemon, registry: FakeRegistry, tmp_path: Path) -> None:
    with (
        chain(daemon, registry, rich_images.changes(), "survive") as (backend, top),
        shown(backend, top, tmp_path / "mnt") as root,
        open(root / "etc/keep", "rb") as held,
    ):
        wanted = oracle.snapshot(str(root))
        os.kill(daemon.workers()["ns/red"], signal.SIGKILL)
        with open("/proc/sys/vm/drop_caches", "w") as drop:
            drop.write("2")  # names and inodes; for all pages it waits for every filesystem of the machine
        assert oracle.difference(wanted, oracle.snapshot(str(root))) == ""
        assert held.read() == b"keep"
