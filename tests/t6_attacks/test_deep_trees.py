"""Directories within directories, further than a path reaches: by a container, and by a worker that was taken over."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from deep import DEPTH, dig, is_too_deep
from fakes import FakeRegistry
from images import Image, directory, file, gzip_layer
from mounting import arena
from nsfs_daemon import mortal_daemons
from published import publish
from snapshots_api import Backend, mounted

if TYPE_CHECKING:
    from nsfs_daemon import Daemon

__all__ = ["arena"]


def test_a_daemon_counts_and_deletes_them_and_starts_again(arena: Path) -> None:
    image = Image((gzip_layer([directory("etc"), file("etc/f", b"x")]),))
    with FakeRegistry() as registry, mortal_daemons(str(arena / "d"), {"prepare_wait": "20s"}) as start:
        daemon = start()
        with Backend(daemon.socket) as backend:
            (name,) = backend.pull("tenant", image, publish(registry, image, "x"))
            with mounted(backend.prepare("tenant/9/c", name), arena / "container") as root:
                dig(root)
            usage = backend.usage("tenant/9/c")
            assert usage.inodes > DEPTH
            own = Path(daemon.layout("ns/tenant").path)
            dig(own)
            assert is_too_deep(own)
            (upper,) = (Path(daemon.root) / "snapshots").glob("*/fs")
            assert is_too_deep(upper)
            assert daemon.json("ns", "show", "tenant")["own"] > 0
            os.kill(daemon.pid, 9)
        daemon = start()
        looked(daemon)
        with Backend(daemon.socket) as backend:
            backend.remove("tenant/9/c")
            backend.cleanup()
        assert not any((Path(daemon.root) / "snapshots").iterdir())
        assert json.loads(daemon.nsfs("ns", "rm", "tenant", "--json").stdout)["domains"] == ["ns/tenant"]
        assert not own.exists()


def looked(daemon: Daemon) -> None:
    """The daemon has measured what pools take, and lives."""
    deadline = time.monotonic() + 60
    while not daemon.json("status")["pools"]["used"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert daemon.json("ns", "show", "tenant")["own"] > 0
