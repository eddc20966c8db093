"""Layers that cannot be decompressed in parts: one frame, larger than what is decoded in memory."""

from __future__ import annotations

import os
import random
import time
from typing import TYPE_CHECKING

import pytest

from fakes import FakeRegistry
from images import Image, file, render_tar, sparse, zstd_layer
from nsfs.model.pool import LayerKey
from nsfs_daemon import Daemon, run_daemon
from published import publish

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with run_daemon(str(tmp_path / "daemon")) as running:
        yield running


def read(path: str) -> bytes:
    with open(path, "rb") as opened:
        return opened.read()


def test_what_cannot_come_in_parts_comes_back_whole(daemon: Daemon, tmp_path: Path) -> None:
    chance = random.Random(7)
    files = {f"d/{n}": chance.randbytes(chance.randint(1, 9000)) for n in range(300)}
    holes = sparse("holes", 1 << 20, [(5, b"five"), (700_000, b"late")])
    items = [file(name, data) for name, data in files.items()]
    layer = zstd_layer(render_tar([*items[:150], file("zeros", bytes(140 << 20)), holes, *items[150:]]))
    with FakeRegistry() as registry:
        reference = publish(registry, Image((layer,)), "whole")
        target = str(tmp_path / "mnt")
        with daemon.mounted(reference, target):
            assert read(f"{target}/d/7") == files["d/7"]
        assert daemon.json("evict", reference)["freed"] >= 140 << 20
        (report,) = daemon.json("inspect", reference)["layers"]
        assert not report["lazy"]
        assert "comes back all at once" in report["why"]
        assert report["local"] == 0
        with daemon.mounted(reference, target):
            before = len(registry.requests(path=layer.digest.hex))
            assert read(f"{target}/d/250") == files["d/250"]
            assert {name: read(f"{target}/{name}") for name in files} == files
            assert read(f"{target}/holes") == b"".join([bytes(5), b"five", bytes(699_991), b"late"]).ljust(
                1 << 20, b"\0"
            )
            with open(f"{target}/zeros", "rb") as zeros:
                assert not any(zeros.read(1 << 20))
            assert len(registry.requests(path=layer.digest.hex)) == before + 1
        assert not os.path.exists(daemon.layout().spool(LayerKey(layer.digest, "plain")))


def test_its_registry_may_fail_meanwhile(daemon: Daemon, tmp_path: Path) -> None:
    content = random.Random(8).randbytes(3 << 20)
    layer = zstd_layer([file("zeros", bytes(140 << 20)), file("f", content)])
    with FakeRegistry() as registry:
        reference = publish(registry, Image((layer,)), "whole")
        target = str(tmp_path / "mnt")
        with daemon.mounted(reference, target):
            pass
        daemon.nsfs("evict", reference)
        registry.faults_on, registry.script = layer.digest.hex, "CESX"
        with daemon.mounted(reference, target):
            begun = time.monotonic()
            assert read(f"{target}/f") == content
            assert time.monotonic() - begun < 30
