"""Mounts of domains under a key: read over the death of workers and daemons, and not without the host's key."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

from fakes import FakeRegistry
from images import Image, file, gzip_layer, sparse
from nsfs.errors import UnsupportedError
from nsfs.model.encryption import Encrypt
from nsfs.model.mounts import Host
from nsfs.serve.config import Config
from nsfs.store.layout import Layout
from nsfs_daemon import run_daemon, stored_domain
from published import publish
from users import drop_pages, is_dead, noise, read, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DENIED = 4
DATA, HOLES = noise(3 << 20, 7), [(5, b"five"), (700_000, b"late")]


@pytest.fixture
def reference() -> Iterator[str]:
    layer = gzip_layer([file("data", DATA), sparse("holes", 12 << 20, HOLES), file("zeros", bytes(9 << 20))])
    with FakeRegistry() as registry:
        yield publish(registry, Image((layer,)), "kept")


def check(target: str) -> None:
    for name in ("data", "holes", "zeros"):
        drop_pages(f"{target}/{name}")
    assert read(f"{target}/data") == DATA
    holes = bytearray(12 << 20)
    for offset, piece in HOLES:
        holes[offset : offset + len(piece)] = piece
    assert read(f"{target}/holes") == holes
    assert not any(read(f"{target}/zeros"))


@pytest.mark.parametrize("driver", ["erofs", "fuse"])
def test_what_is_under_a_key_is_read_over_deaths_and_restarts(tmp_path: Path, reference: str, driver: str) -> None:
    (tmp_path / "key").write_bytes(os.urandom(32))
    settings = {"encrypt": "all", "key_file": str(tmp_path / "key")}
    target = str(tmp_path / "mnt")
    options = ("--isolation", "shared", "--driver", driver)
    with run_daemon(str(tmp_path / "d"), settings) as daemon, daemon.mounted(reference, target, *options):
        check(target)
        pid = daemon.workers()["shared"]
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: is_dead(pid), "the worker is dead")
        check(target)
        with open(f"{daemon.root}/domains/shared/disk", "rb") as disk:
            assert os.fstat(disk.fileno()).st_blocks * 512 < 8 << 20, "zeros take no space"
            disk.seek(1 << 30)
            assert DATA[:64] not in disk.read(16 << 20)
    with run_daemon(str(tmp_path / "d"), settings) as daemon, daemon.mounted(reference, target, *options):
        check(target)


def test_without_the_hosts_key_nothing_is_shown_and_nothing_is_lost(tmp_path: Path, reference: str) -> None:
    (tmp_path / "key").write_bytes(os.urandom(32))
    (tmp_path / "other").write_bytes(os.urandom(32))
    settings, target = {"key_file": str(tmp_path / "key")}, str(tmp_path / "mnt")
    with run_daemon(str(tmp_path / "d"), settings) as daemon, daemon.mounted(reference, target):
        local = daemon.json("status")["domains"][0]["local"]
    for other in ({}, {"key_file": str(tmp_path / "other")}):
        with run_daemon(str(tmp_path / "d"), other) as daemon:
            refused = daemon.nsfs("mount", reference, target, check=False)
            assert refused.returncode == DENIED, refused.stderr
            assert "the key of domain ns/default" in refused.stderr
    with run_daemon(str(tmp_path / "d"), settings) as daemon, daemon.mounted(reference, target):
        assert daemon.json("status")["domains"][0]["local"] == local > len(DATA)
        check(target)


def test_a_domain_that_was_begun_without_a_key_goes_on_without(tmp_path: Path, reference: str) -> None:
    target = str(tmp_path / "mnt")
    with run_daemon(str(tmp_path / "d"), {"encrypt": "off"}) as daemon, daemon.mounted(reference, target):
        check(target)
    os.unlink(stored_domain(str(tmp_path / "d/root")).disk)
    with run_daemon(str(tmp_path / "d")) as daemon:
        with daemon.mounted(reference, target):
            check(target)
        assert "stays unencrypted until it is deleted" in daemon.tail()
        daemon.nsfs("ns", "rm", "default")
        with daemon.mounted(reference, target):
            check(target)
            assert daemon.layout().key is not None


def test_who_is_not_root_is_told_that_nothing_would_be_encrypted() -> None:
    from nsfs.daemon import _open_store  # noqa: PLC0415  it brings all that a daemon needs

    layout, host = Layout("/r", "/r"), Host(root=False, erofs=False, file_backed=False)
    with pytest.raises(UnsupportedError, match="needs root"):
        _open_store(Config(encrypt=Encrypt.ALL), layout, host)
