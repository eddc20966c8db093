"""First passes that are interrupted, by whoever can: what is left, what is said, and that the next attempt goes on."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from fakes import FakeRegistry
from images import Image, Layer, file, gzip_layer
from mounting import swept
from nsfs.model.pool import LayerKey
from nsfs.store.index import open_index
from nsfs.store.spool import Spool
from nsfs_daemon import NSFS, Daemon, run_daemon
from published import publish

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from nsfs.store.layout import DomainLayout

DOMAIN = "ns/default"
SIZE = 24 << 20
SETTINGS = {"registry": {"read_timeout": "60s"}, "fetch": {"read_ahead": 0}}


@dataclass(frozen=True)
class Passing:
    """An image of one large layer, whose download stops half-way for as long as it is told to."""

    registry: FakeRegistry
    reference: str
    layer: Layer
    content: bytes
    target: str

    def offsets(self) -> list[int]:
        """Where each request for the layer began, as far as it got bytes."""
        asked = [each for each in self.registry.requests(path=self.layer.digest.hex) if each.sent]
        return [int((re.findall(r"\d+", each.headers.get("range", "")) or ["0"])[0]) for each in asked]

    def check(self) -> None:
        with open(f"{self.target}/large", "rb") as opened:
            assert opened.read() == self.content


@pytest.fixture
def passing(tmp_path: Path) -> Iterator[Passing]:
    """The first request for the layer gets half of it and then silence."""
    content = random.Random(str(tmp_path)).randbytes(SIZE)
    layer = gzip_layer([file("large", content), file("small", b"small")], level=0)
    target = tmp_path / "mnt"
    target.mkdir()
    with swept(tmp_path), FakeRegistry() as registry:
        reference = publish(registry, Image((layer,)), "passing")
        registry.faults_on, registry.script = layer.digest.hex, "H"
        yield Passing(registry, reference, layer, content, str(target))


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with run_daemon(str(tmp_path / "daemon"), SETTINGS) as running:
        yield running


def start_mount(daemon: Daemon, passing: Passing) -> subprocess.Popen[str]:
    """`nsfs mount`, once half of the layer is there."""
    command = [*NSFS, "--socket", daemon.socket, "mount", passing.reference, passing.target]
    mount = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for_spool(daemon, passing)
    return mount


def spooled(layout: DomainLayout, layer: Layer) -> int:
    """Bytes of the layer's blob that are on disk; the domain may have no key yet, and its files other names then."""
    return Spool(layout.spool(LayerKey(layer.digest, "plain")), layout.key).size()


def wait_for_spool(daemon: Daemon, passing: Passing) -> None:
    deadline = time.monotonic() + 60
    while spooled(daemon.layout(), passing.layer) < len(passing.layer.blob) // 2 - (1 << 20):
        assert time.monotonic() < deadline, daemon.tail()
        time.sleep(0.05)


def finish(mount: subprocess.Popen[str]) -> tuple[int, str]:
    _, said = mount.communicate(timeout=200)
    return mount.returncode, said


def check_goes_on(daemon: Daemon, passing: Passing) -> None:
    """Nothing of the killed pass is in the pool, and the next one does not read again what was spooled."""
    layout = daemon.layout()
    passing.registry.script = ""
    with daemon.mounted(passing.reference, passing.target):
        passing.check()
        with open_index(layout.index, layout.key, readonly=True) as index:
            assert index.orphan_slabs() == []
        assert os.stat(layout.disk).st_blocks * 512 < SIZE + (2 << 20)
    assert [offset > len(passing.layer.blob) // 3 for offset in passing.offsets()] == [False, True]


def children_of(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def jobs_of(worker: int) -> list[int]:
    return children_of(fork_server_of(worker))


def fork_server_of(worker: int) -> int:
    """Forked by the zygote as the worker is, with the worker's uid."""
    others = [each for each in children_of(parent_of(worker)) if each != worker]
    (found,) = (each for each in others if uid_of(each) == uid_of(worker))
    return found


def uid_of(pid: int) -> int:
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Uid:"))


def parent_of(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])


def test_ctrl_c_leaves_the_pass_to_the_worker(daemon: Daemon, passing: Passing) -> None:
    mount = start_mount(daemon, passing)
    mount.send_signal(signal.SIGINT)
    status, said = finish(mount)
    assert status == 130, said
    assert "Traceback" not in said
    passing.registry.go_on.set()
    with daemon.mounted(passing.reference, passing.target):
        passing.check()
    assert sum(each.sent for each in passing.registry.requests(path=passing.layer.digest.hex)) < 1.1 * SIZE


def test_a_killed_job_is_a_clear_error_and_leaves_its_spool(daemon: Daemon, passing: Passing) -> None:
    mount = start_mount(daemon, passing)
    (job,) = jobs_of(daemon.workers()[DOMAIN])
    os.kill(job, signal.SIGKILL)
    status, said = finish(mount)
    assert status == 7, said
    assert "killed" in said
    worker = daemon.workers()[DOMAIN]
    os.kill(worker, signal.SIGKILL)
    wait_for_worker(daemon, worker)
    with open_index(daemon.layout().index, daemon.layout().key, readonly=True) as index:
        assert index.orphan_slabs() == []
    assert os.stat(daemon.layout().disk).st_blocks * 512 < 100_000
    check_goes_on(daemon, passing)


def wait_for_worker(daemon: Daemon, killed: int) -> None:
    """Until another follows the one that was killed."""
    deadline = time.monotonic() + 60
    while daemon.workers().get(DOMAIN, killed) == killed:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_job_that_was_killed_does_not_hinder_the_next_in_the_same_worker(daemon: Daemon, passing: Passing) -> None:
    mount = start_mount(daemon, passing)
    (job,) = jobs_of(daemon.workers()[DOMAIN])
    os.kill(job, signal.SIGKILL)
    assert finish(mount)[0] == 7
    passing.registry.script = ""
    with daemon.mounted(passing.reference, passing.target):
        passing.check()
    assert passing.offsets()[-1] > len(passing.layer.blob) // 3


def test_a_fork_server_that_was_killed_is_followed_by_another(daemon: Daemon, passing: Passing) -> None:
    mount = start_mount(daemon, passing)
    worker = daemon.workers()[DOMAIN]
    os.kill(fork_server_of(worker), signal.SIGKILL)
    status, said = finish(mount)
    assert status != 0
    assert "Traceback" not in said
    passing.registry.script = ""
    with daemon.mounted(passing.reference, passing.target):
        passing.check()
    assert daemon.workers()[DOMAIN] == worker


def test_the_worker_after_one_that_was_killed_goes_on_by_itself(daemon: Daemon, passing: Passing) -> None:
    mount = start_mount(daemon, passing)
    os.kill(daemon.workers()[DOMAIN], signal.SIGKILL)
    status, said = finish(mount)
    assert status == 0, said
    daemon.nsfs("umount", passing.target)
    check_goes_on(daemon, passing)


def test_a_killed_daemon_goes_on_when_it_is_started_again(tmp_path: Path, passing: Passing) -> None:
    directory = str(tmp_path / "daemon")
    with contextlib.suppress(RuntimeError), run_daemon(directory, SETTINGS) as first:
        mount = start_mount(first, passing)
        os.kill(first.pid, signal.SIGKILL)
        status, said = finish(mount)
    assert status == 5, said
    with run_daemon(directory, SETTINGS) as second:
        check_goes_on(second, passing)
