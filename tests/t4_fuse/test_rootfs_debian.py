"""A real image, made of Debian packages with links into lower layers, against the oracle; takes a minute or two."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest
from bench import images

import oracle
from nsfs_daemon import run_daemon
from registry import push_layout, run_registry

if TYPE_CHECKING:
    from pathlib import Path


def prepare() -> None:
    """See prepared."""
    images.make_layers(images.DEMO)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_debian_image_equals_what_unpacking_gives(tmp_path: Path) -> None:
    built = images.build(images.DEMO)
    scratch = tmp_path / "oracle"
    scratch.mkdir()
    wanted = oracle.expected_tree(oracle.find_layers(built.layout), str(scratch))
    target = str(tmp_path / "mnt")
    with run_registry() as registry, run_daemon(str(tmp_path / "daemon")) as daemon:
        push_layout(built.layout, registry, "debian")
        reference = f"{registry.host}/debian:latest"
        for driver in ("erofs", "erofs-loop", "fuse"):
            with daemon.mounted(reference, target, "--driver", driver):
                said = subprocess.run(["chroot", target, *built.recipe.command], check=True, capture_output=True)
                assert said.stdout.startswith(b"hello from python")
                assert oracle.difference(wanted, oracle.snapshot(target)) == "", driver
            daemon.nsfs("evict", reference)
    assert os.listdir(target) == []
