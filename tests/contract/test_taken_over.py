"""What a daemon that takes over says of containers that an earlier one served."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import published
from fakes import FakeRegistry
from images import Image, directory, file, gzip_layer, sample_content
from mounting import swept
from nsfs_daemon import mortal_daemons
from snapshots_api import Backend, mounted

if TYPE_CHECKING:
    from pathlib import Path


def test_mounts_of_a_shared_domain_are_given_again_on_behalf_of_their_owner(tmp_path: Path) -> None:
    content = sample_content(3_000_000)
    made = Image((gzip_layer([directory("etc"), file("etc/base", content)]),))
    with (
        FakeRegistry() as registry,
        swept(tmp_path),
        mortal_daemons(str(tmp_path / "d"), {"prepare_wait": "20s"}) as start,
    ):
        reference = published.publish(registry, made, "app")
        first = start()
        with Backend(first.socket, "nsfs-shared", "red") as backend:
            names = backend.pull("red", made, reference)
            key = backend.name("red", "container")
            given = backend.prepare(key, names[-1])
        os.kill(first.pid, signal.SIGKILL)
        second = start()
        with Backend(second.socket, "nsfs-shared", "red") as backend:
            assert backend.mounts(key) == given
            with mounted(given, tmp_path / "mnt") as root:
                assert (root / "etc/base").read_bytes() == content
            backend.remove(key)
            for name in reversed(names):
                backend.remove(name)
            backend.cleanup()
