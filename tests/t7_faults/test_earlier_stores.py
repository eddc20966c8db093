"""What an earlier version wrote on disk is opened, read without its registry, and written to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import stores
from fakes import FakeRegistry
from images import Image, file, gzip_layer
from mounting import swept
from nsfs_daemon import run_daemon
from published import publish
from snapshots_api import Backend, mounted

if TYPE_CHECKING:
    from pathlib import Path

    from nsfs_daemon import Daemon


def read(root: Path, files: dict[str, bytes]) -> dict[str, bytes]:
    return {path: (root / path).read_bytes() for path in files}


@pytest.mark.parametrize("name", stores.names())
def test_a_store_of_an_earlier_version_opens(name: str, tmp_path: Path) -> None:
    about = stores.open_store(name, tmp_path / "daemon")
    target = tmp_path / "mnt"
    with swept(tmp_path), run_daemon(str(tmp_path / "daemon")) as daemon:
        check_image(daemon, about, target)
        check_container(daemon, about, target)
        write_more(daemon, target)
        assert "Traceback" not in daemon.tail()


def check_image(daemon: Daemon, about: stores.About, target: Path) -> None:
    assert daemon.json("offline", about.reference)["complete"]
    assert [kept["pinned"] for kept in daemon.json("cache", "ls")["images"]] == [about.pinned]
    with daemon.mounted(about.reference, str(target), "--driver", "fuse"):
        assert read(target, stores.FILES) == stores.FILES


def check_container(daemon: Daemon, about: stores.About, target: Path) -> None:
    with Backend(daemon.socket) as backend:
        with mounted(backend.mounts(about.container), target) as root:
            wanted = stores.FILES | stores.WRITTEN
            assert read(root, wanted) == wanted
        backend.remove(about.container)
        backend.cleanup()


def write_more(daemon: Daemon, target: Path) -> None:
    """What is new finds the contents that are there, and adds its own."""
    files = stores.PLAIN | {"d/new": b"new"}
    with FakeRegistry() as registry:
        layer = gzip_layer([file(path, data) for path, data in files.items()])
        reference = publish(registry, Image((layer,)), "new")
        with daemon.mounted(reference, str(target)):
            assert read(target, files) == files


def make_newer(path: Path) -> None:
    """Every header begins with eight bytes of magic and the version."""
    with path.open("r+b") as opened:
        opened.seek(8)
        opened.write((9).to_bytes(4, "little"))


@pytest.mark.parametrize(
    "newer", [("under-a-key", "keys/*"), ("before-keys", "domains/*/layers/*/*/segments")], ids=["key", "segments"]
)
def test_a_newer_domain_is_refused_and_hinders_no_other(tmp_path: Path, newer: tuple[str, str]) -> None:
    """Also where only the reads of an image that is known would meet it."""
    store, pattern = newer
    about = stores.open_store(store, tmp_path / "daemon")
    made_newer = list((tmp_path / "daemon/root").glob(pattern))
    for path in made_newer:
        make_newer(path)
    target = tmp_path / "mnt"
    target.mkdir()
    with swept(tmp_path), FakeRegistry() as registry, run_daemon(str(tmp_path / "daemon")) as daemon:
        refused = daemon.nsfs("mount", about.reference, str(target), check=False)
        assert refused.returncode == 9, refused.stderr
        assert "newer format" in refused.stderr
        assert "use the release that wrote it" in refused.stderr
        reference = publish(registry, Image((gzip_layer([file("a", b"a")]),)), "other")
        with daemon.mounted(reference, str(target), "--namespace", "other"):
            assert (target / "a").read_bytes() == b"a"
    assert made_newer
    assert all(path.exists() for path in made_newer)
