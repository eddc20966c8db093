"""`nsfs uninstall`: nothing of a daemon is left, and nothing goes unasked."""

from __future__ import annotations

import os
import pty
import subprocess
from typing import TYPE_CHECKING

import pytest

from images import Image, file, gzip_layer
from nsfs.serve.mounts import load_mounts
from nsfs_daemon import NSFS, Daemon, mortal_daemons
from users import noise, push, read

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from meter import Meter
    from registry import Registry

BUSY, NOT_FOUND, USAGE, INTERRUPTED = 8, 3, 2, 130


@pytest.fixture
def daemon(tmp_path: Path, registry: Registry, meter: Meter, arena: Path) -> Iterator[Daemon]:
    """One that has an image mounted."""
    push(Image((gzip_layer([file("f", noise(50_000, 1))]),)), registry, arena, "uninstalled")
    with mortal_daemons(str(tmp_path / "d")) as start:
        daemon = start()
        (arena / "mnt").mkdir()
        daemon.nsfs("mount", f"{meter.host}/uninstalled", str(arena / "mnt"))
        yield daemon


def config(daemon: Daemon) -> tuple[str, str]:
    return "--config", f"{os.path.dirname(daemon.root)}/config.toml"


def asked(daemon: Daemon, answer: str) -> int:
    """How a purge ends that asks at a terminal."""
    ours, theirs = pty.openpty()
    try:
        with subprocess.Popen([*NSFS, "uninstall", "--purge", *config(daemon)], stdin=theirs) as process:
            os.write(ours, f"{answer}\n".encode())
            return process.wait(60)
    finally:
        os.close(ours)
        os.close(theirs)


def test_what_a_daemon_made_goes_and_its_store_only_when_asked(daemon: Daemon, tmp_path: Path, arena: Path) -> None:
    with open(arena / "mnt/f", "rb"):
        refused = daemon.nsfs("uninstall", *config(daemon), check=False)
        assert refused.returncode == BUSY, refused.stderr
        assert len(read(arena / "mnt/f")) == 50_000
    done = daemon.nsfs("uninstall", *config(daemon))
    assert f"but for {daemon.root}" in done.stderr
    assert not os.path.exists(daemon.run)
    assert os.path.exists(f"{daemon.root}/meta.lmdb")
    assert [mount.target for mount in load_mounts() if str(tmp_path) in mount.target] == []
    unsure = daemon.nsfs("uninstall", "--purge", *config(daemon), check=False)
    assert unsure.returncode == USAGE, unsure.stderr
    assert "--yes" in unsure.stderr
    assert asked(daemon, "n") == INTERRUPTED
    assert os.path.exists(f"{daemon.root}/meta.lmdb")
    daemon.nsfs("uninstall", "--purge", "--yes", *config(daemon))
    assert not os.path.exists(daemon.root)
    done = daemon.nsfs("uninstall", *config(daemon))
    assert "but for" not in done.stderr


def test_what_is_no_daemons_or_holds_snapshots_stays(daemon: Daemon, tmp_path: Path) -> None:
    os.makedirs(f"{daemon.root}/snapshots/7/fs")
    refused = daemon.nsfs("uninstall", "--purge", "--yes", *config(daemon), check=False)
    assert (refused.returncode, "1 snapshot" in refused.stderr) == (BUSY, True)
    assert os.path.exists(f"{daemon.root}/meta.lmdb")
    (tmp_path / "mine").mkdir()
    (tmp_path / "other.toml").write_text(f'root = "{tmp_path}/mine"\nrun = "{tmp_path}/r"\n')
    wrong = daemon.nsfs("uninstall", "--purge", "--yes", "--config", f"{tmp_path}/other.toml", check=False)
    assert wrong.returncode == NOT_FOUND, wrong.stderr
    assert (tmp_path / "mine").exists()
