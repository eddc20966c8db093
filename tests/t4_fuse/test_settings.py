"""Keys of the configuration that only a whole daemon can show to have their effect."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from fakes import FakeRegistry
from images import Image, file
from mounting import swept
from nsfs_daemon import Daemon, run_daemon
from published import estargz_layer, publish
from users import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DOMAIN = "ns/default"


@contextlib.contextmanager
def reading(path: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that reads the beginning of a file, whatever becomes of it."""
    reader = subprocess.Popen([sys.executable, "-c", f"open({path!r}, 'rb').read(4096)"], stderr=subprocess.DEVNULL)
    try:
        yield reader
    finally:
        reader.kill()
        reader.wait(60)


def wait_for_stalls(registry: FakeRegistry, count: int) -> None:
    deadline = time.monotonic() + 60
    while len([each for each in registry.requests() if each.fault == "T"]) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def replace_worker(daemon: Daemon) -> None:
    """Kill it, and wait for the next."""
    before = daemon.workers()[DOMAIN]
    os.kill(before, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while daemon.workers().get(DOMAIN) in {None, before}:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("resend", [True, False])
def test_resend(tmp_path: Path, resend: bool) -> None:
    """With it a read survives the worker that took it; without it the read fails, at most once."""
    files = {name: random.Random(f"{name} {resend}").randbytes(3_000_000) for name in ("one", "two")}
    layer = estargz_layer([file(name, data) for name, data in files.items()], chunk_size=1 << 20)
    target = str(tmp_path / "mnt")
    settings = {"kernel": {"resend": resend}, "fetch": {"read_ahead": 0}}
    with (
        swept(tmp_path),
        FakeRegistry() as registry,
        run_daemon(str(tmp_path / "daemon"), settings) as daemon,
    ):
        os.mkdir(target)
        daemon.nsfs("mount", publish(registry, Image((layer,)), "resend"), target)
        registry.faults_on, registry.script = layer.digest.hex, "T"
        with reading(f"{target}/one") as reader:
            wait_for_stalls(registry, 1)
            replace_worker(daemon)
            with open(f"{target}/two", "rb") as opened:
                assert opened.read() == files["two"]
            status = reader.wait(60)
            assert status == 0 or not resend
            with open(f"{target}/one", "rb") as opened:
                assert opened.read() == files["one"]


@pytest.mark.parametrize("read_ahead", [0, 4 << 20])
def test_read_ahead(tmp_path: Path, read_ahead: int) -> None:
    """What is fetched beyond what a sequential reader asks for."""
    content = random.Random(5).randbytes(16 << 20)
    layer = estargz_layer([file("large", content)], chunk_size=1 << 18)
    with FakeRegistry() as registry, run_daemon(str(tmp_path / "d"), {"fetch": {"read_ahead": read_ahead}}) as daemon:
        reference = publish(registry, Image((layer,)), "ahead")
        with daemon.mounted(reference, str(tmp_path / "mnt"), "--driver", "fuse"):
            with open(tmp_path / "mnt/large", "rb", buffering=0) as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
                assert b"".join(opened.read(1 << 18) for _ in range(16)) == content[: 4 << 20]

            def ahead() -> int:
                return sum(each.sent for each in registry.requests(path=layer.digest.hex)[1:]) - (4 << 20)

            wait_until(lambda: not read_ahead or ahead() > 1 << 20, "more is read ahead")
            time.sleep(1)
            assert ahead() < (9 << 20 if read_ahead else 1 << 19)


def test_connections(tmp_path: Path) -> None:
    """Of two connections one is for ranges: while it is silent no other range is asked for."""
    files = {f"f{n}": random.Random(n).randbytes(300_000) for n in range(6)}
    layer = estargz_layer([file(name, data) for name, data in files.items()], chunk_size=1 << 17)
    target = str(tmp_path / "mnt")
    settings = {"registry": {"connections": 2, "read_timeout": "60s"}, "fetch": {"read_ahead": 0}}
    with (
        swept(tmp_path),
        FakeRegistry() as registry,
        run_daemon(str(tmp_path / "daemon"), settings) as daemon,
        contextlib.ExitStack() as readers,
    ):
        os.mkdir(target)
        daemon.nsfs("mount", publish(registry, Image((layer,)), "connections"), target)
        registry.faults_on, registry.script = layer.digest.hex, "T" * 100
        for name in ("f0", "f2", "f4"):
            readers.enter_context(reading(f"{target}/{name}"))
        wait_for_stalls(registry, 1)
        time.sleep(1)
        assert len([each for each in registry.requests() if each.fault == "T"]) == 1
        registry.script = ""
        daemon.nsfs("umount", "--force", target)
