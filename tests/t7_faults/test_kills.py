"""Whatever of nsfs is killed, whoever reads through EROFS or FUSE notices nothing but a pause."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import nsfs
from fakes import FakeRegistry
from images import Image, file, gzip_layer
from mounting import swept
from nodes import wait_until
from nsfs.serve.client import probe
from nsfs.serve.mounts import load_mounts
from nsfs_daemon import Daemon, mortal_daemons
from published import estargz_layer, publish
from readers import reading

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DOMAIN = "ns/default"
DRIVERS = ("erofs", "erofs-loop", "fuse")
FILES = {f"d/{number}": random.Random(number).randbytes(400_000 + number) for number in range(24)}


@dataclass
class Site:
    """Daemons one after the other, and an image mounted by each driver."""

    start: Callable[[], Daemon]
    registry: FakeRegistry
    reference: str
    top: str
    daemon: Daemon

    def mount(self) -> dict[str, bytes]:
        """Mount it thrice; the contents of all files by path."""
        for driver in DRIVERS:
            os.mkdir(f"{self.top}/{driver}")
            self.daemon.nsfs("mount", self.reference, f"{self.top}/{driver}", "--driver", driver)
        return {f"{self.top}/{driver}/{name}": data for driver in DRIVERS for name, data in FILES.items()}

    def worker(self) -> int:
        """The worker that answers now; one that has just been killed may still be listed, and then none."""
        seen: list[int] = []

        def look() -> bool:
            seen.extend(pid for domain, pid in self.daemon.workers().items() if domain == DOMAIN)
            return bool(seen)

        assert wait_until(look)
        return seen[0]

    def kill_daemon(self) -> None:
        os.kill(self.daemon.pid, signal.SIGKILL)

    def follow(self) -> None:
        """Start the next daemon."""
        self.daemon = self.start()

    def child(self, module: str) -> int:
        """The process of the daemon that runs `module`."""
        (found,) = self.children(module)
        return found

    def children(self, module: str) -> list[int]:
        lists = [path.read_text().split() for path in Path(f"/proc/{self.daemon.pid}/task").glob("*/children")]
        return [int(pid) for pids in lists for pid in pids if module in _command(int(pid))]

    def take_away(self) -> None:
        """Unmount; nothing is left."""
        for driver in DRIVERS:
            self.daemon.nsfs("umount", f"{self.top}/{driver}")
        assert self.daemon.json("status")["mounts"] == []
        assert [each.target for each in load_mounts() if each.target.startswith(f"{self.daemon.run}/l/")] == []


def _has_ended(pid: int) -> bool:
    """Whether or not somebody has reaped it."""
    try:
        return "(zombie)" in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def _descriptors(pid: int) -> int:
    """How many are open in a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def _command(pid: int) -> str:
    with open(f"/proc/{pid}/cmdline") as file:
        return file.read()


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package that daemons and commands run from; tests that want one ask for it before a daemon runs."""
    copy = tmp_path / "installed"
    shutil.copytree(os.path.dirname(nsfs.__file__), copy / "nsfs", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setenv("PYTHONPATH", str(copy))
    return copy


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    layer = estargz_layer([file(name, data) for name, data in FILES.items()], chunk_size=1 << 17)
    with swept(tmp_path), FakeRegistry() as registry, mortal_daemons(str(tmp_path / "daemon")) as start:
        reference = publish(registry, Image((layer,)), "kills")
        yield Site(start, registry, reference, str(tmp_path), start())


def test_whatever_is_killed_readers_go_on(site: Site) -> None:
    with reading(site.mount()) as seen:
        worker = site.worker()

        site.kill_daemon()
        time.sleep(0.3)
        site.follow()
        assert site.worker() == worker

        os.kill(worker, signal.SIGKILL)
        assert wait_until(lambda: site.worker() != worker)

        worker = site.worker()
        site.kill_daemon()
        time.sleep(0.3)
        assert not _has_ended(worker)
        site.follow()
        assert site.worker() == worker

        os.kill(site.child("nsfs.serve.forkserver"), signal.SIGKILL)
        assert wait_until(lambda: "another one follows" in site.daemon.tail())
        assert site.worker() == worker

        site.kill_daemon()
        os.kill(worker, signal.SIGKILL)
        time.sleep(0.3)
        site.follow()
        assert site.worker() != worker

        assert len(site.daemon.json("status")["mounts"]) == len(DRIVERS)
    seen.check(50)
    site.take_away()


def test_a_holder_that_is_killed_is_followed_by_one_that_has_everything(site: Site) -> None:
    with reading(site.mount()) as seen:
        worker = site.worker()
        held = _descriptors(site.child("nsfs.serve.holder"))
        os.kill(site.child("nsfs.serve.holder"), signal.SIGKILL)
        assert wait_until(lambda: "another one follows" in site.daemon.tail())
        assert wait_until(lambda: os.path.exists(f"{site.daemon.run}/holder.sock"))
        assert wait_until(lambda: len(site.children("nsfs.serve.holder")) == 1)
        assert wait_until(lambda: _descriptors(site.child("nsfs.serve.holder")) >= held)
        site.kill_daemon()
        site.follow()
        assert site.worker() == worker
    seen.check(50)
    site.take_away()


def test_a_daemon_that_is_stopped_leaves_its_mounts_serving(site: Site) -> None:
    with reading(site.mount()) as seen:
        worker = site.worker()
        os.kill(site.daemon.pid, signal.SIGTERM)
        assert wait_until(lambda: _has_ended(site.daemon.pid))
        time.sleep(0.3)
        site.follow()
        assert site.worker() == worker
    seen.check(50)
    site.take_away()


def test_where_nobody_is_left_who_has_the_descriptors_the_next_daemon_clears_up(site: Site) -> None:
    """What was mounted cannot be gone on with, and is no hindrance."""
    site.mount()
    worker = site.worker()
    os.kill(site.daemon.pid, signal.SIGSTOP)
    os.kill(site.child("nsfs.serve.holder"), signal.SIGKILL)
    site.kill_daemon()
    site.follow()
    assert site.daemon.json("status")["mounts"] == []
    assert wait_until(lambda: _has_ended(worker))
    for driver in DRIVERS:
        os.rmdir(f"{site.top}/{driver}")
    for path, data in site.mount().items():
        assert Path(path).read_bytes() == data
    site.take_away()


def test_an_upgrade_replaces_daemon_and_worker_while_readers_read(installed: Path, site: Site) -> None:
    with reading(site.mount()) as seen:
        worker = site.worker()
        (installed / "nsfs/newer.py").write_text('"""Newer."""\n')
        said = site.daemon.json("upgrade")
        assert said["was"] != said["build"]
        assert os.path.exists(f"/proc/{site.daemon.pid}")
        assert site.worker() != worker
        assert wait_until(lambda: _has_ended(worker))

        worker = site.worker()
        (installed / "nsfs/newest.py").write_text('"""Newest."""\n')
        os.kill(site.daemon.pid, signal.SIGHUP)
        os.kill(site.daemon.pid, signal.SIGHUP)
        assert wait_until(lambda: _has_ended(worker))
        assert os.path.exists(f"/proc/{site.daemon.pid}")
    seen.check(50)
    site.take_away()


def test_an_upgrade_to_the_same_code_ends_once_the_next_daemon_serves_and_shuts_nobody_out(site: Site) -> None:
    site.mount()
    ended = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        knocking = threads.submit(knock_until, ended, site.daemon.socket)
        try:
            said = site.daemon.json("upgrade")
            assert site.daemon.tail().count(" serves at ") == 2
        finally:
            ended.set()
        assert said["was"] == said["build"]
        assert knocking.result() > 0
    assert len(site.daemon.json("status")["mounts"]) == len(DRIVERS)
    site.take_away()


def test_a_mount_that_is_under_way_at_an_upgrade_is_made(site: Site) -> None:
    """It is waited for; or, where that would take long, asked of the next daemon."""
    site.mount()
    layer = gzip_layer([file("late", b"late" * 10_000)])
    reference = publish(site.registry, Image((layer,)), "late")
    site.registry.faults_on, site.registry.script = layer.digest.hex, "H"
    target = Path(site.top, "late")
    target.mkdir()
    with site.daemon.started("mount", reference, str(target)) as mounting:
        assert wait_until(lambda: site.registry.script == "")
        with site.daemon.started("upgrade") as upgrading:
            assert wait_until(lambda: "calls that are under way are waited for" in site.daemon.tail(), 60)
            site.registry.go_on.set()
            assert mounting.wait(60) == 0, mounting.communicate()
            assert upgrading.wait(60) == 0, upgrading.communicate()
    assert (target / "late").read_bytes() == b"late" * 10_000
    site.daemon.nsfs("umount", str(target))
    site.take_away()


def knock_until(ended: threading.Event, path: str) -> int:
    """How often somebody was there at the socket; raises UnreachableError where nobody was."""
    found = 0
    while not ended.wait(0.1):
        probe(path)
        found += 1
    return found


def test_an_upgrade_to_code_that_does_not_start_is_refused(installed: Path, site: Site) -> None:
    (installed / "nsfs/daemon.py").write_text("raise RuntimeError('broken')\n")
    refused = site.daemon.nsfs("upgrade", check=False)
    assert refused.returncode == 1
    assert "broken" in refused.stderr
    assert site.daemon.json("status")["mounts"] == []


def test_an_upgrade_to_a_configuration_that_is_wrong_is_refused_and_says_what_is(site: Site) -> None:
    with open(f"{site.top}/daemon/config.toml", "a") as file:
        file.write("nonsense = 1\n")
    refused = site.daemon.nsfs("upgrade", check=False)
    assert refused.returncode == 1
    assert "nonsense" in refused.stderr
    assert site.daemon.json("status")["mounts"] == []


def test_where_a_new_worker_does_not_answer_the_old_one_goes_on(installed: Path, site: Site) -> None:
    with reading(site.mount()) as seen:
        worker = site.worker()
        path = installed / "nsfs/worker.py"
        path.write_text(
            path.read_text().replace("def main(", "def unused(") + "\n\ndef main(args, fds):\n    return 1\n"
        )
        refused = site.daemon.nsfs("upgrade", check=False)
        assert refused.returncode == 1
        assert DOMAIN in refused.stderr
        assert site.worker() == worker
    seen.check(50)
    site.take_away()


def test_a_drain_takes_all_mounts_away_and_refuses_while_one_is_used(site: Site) -> None:
    files = site.mount()
    with Path(next(iter(files))).open("rb"):
        refused = site.daemon.nsfs("drain", check=False)
        assert refused.returncode == 8
    site.daemon.nsfs("drain")
    assert wait_until(lambda: _has_ended(site.daemon.pid))
    assert [each.target for each in load_mounts() if each.target.startswith(site.top)] == []
    assert not os.path.exists(f"{site.daemon.run}/holder.sock")
