"""A registry that says nothing: who waits, who does not, and how to end it."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fakes import FakeRegistry
from images import Image, file, gzip_layer
from mounting import swept
from nsfs.errors import UnreachableError
from nsfs_daemon import Daemon, run_daemon
from private_user import private_user
from published import estargz_layer, publish

if TYPE_CHECKING:
    from collections.abc import Iterator

READERS = 200
FOR_EVER = 10_000
SETTINGS = {"registry": {"read_timeout": "60s"}, "fetch": {"read_ahead": 0}}

_READER = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
print("reads", flush=True)
try:
    os.pread(fd, 4096, 0)
except OSError as error:
    sys.exit(error.errno)
"""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with run_daemon(str(tmp_path_factory.mktemp("daemon")), SETTINGS) as running:
        yield running


@pytest.fixture(scope="module")
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as running:
        yield running


@contextlib.contextmanager
def reading(paths: list[str]) -> Iterator[list[threading.Thread]]:
    """A thread for each of `paths`, which reads its beginning and takes whatever comes."""

    def read(path: str) -> None:
        with contextlib.suppress(OSError), open(path, "rb") as opened:
            opened.read(4096)

    threads = [threading.Thread(target=read, args=(path,), daemon=True) for path in paths]
    for thread in threads:
        thread.start()
    yield threads
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


def drop_pages(path: str) -> None:
    """Have the next read of `path` ask the filesystem below."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def time_hits(path: str, count: int) -> list[float]:
    """Seconds that each of some reads of local bytes takes which the page cache does not have."""
    taken = []
    for _ in range(count):
        drop_pages(path)
        begun = time.monotonic()
        with open(path, "rb") as opened:
            assert opened.read(65536)
        taken.append(time.monotonic() - begun)
        time.sleep(0.01)
    return taken


def wait_until(what: object, daemon: Daemon, seconds: float = 60) -> dict[str, object]:
    """The status of the only domain, once `what` reads wait there."""
    deadline = time.monotonic() + seconds
    while True:
        (domain,) = daemon.json("status")["domains"]
        if domain["waiting"] == what:
            return dict(domain)
        assert time.monotonic() < deadline, domain
        time.sleep(0.1)


def test_200_stalled_misses_keep_nobody_else_waiting(daemon: Daemon, registry: FakeRegistry, tmp_path: Path) -> None:
    stalled = {f"f/{n:03}": random.Random(n).randbytes(5000) for n in range(READERS)}
    slow = estargz_layer([file(name, data) for name, data in stalled.items()])
    near = gzip_layer([file("near", random.Random(1).randbytes(1 << 20))], level=0)
    one = publish(registry, Image((slow,)), "stalled")
    other = publish(registry, Image((near,)), "near")
    third = publish(registry, Image((estargz_layer([file("f", b"third")]),)), "third")
    paths = [str(tmp_path / name) for name in ("stalled", "near", "third")]
    with swept(tmp_path), daemon.mounted(other, paths[1]) as report:
        os.mkdir(paths[0])
        daemon.nsfs("mount", one, paths[0], "--on-error", "wait")
        time_hits(f"{paths[1]}/near", 3)
        registry.faults_on, registry.script = slow.digest.hex, "T" * FOR_EVER
        with reading([f"{paths[0]}/{name}" for name in stalled]) as threads:
            waiting = wait_until(READERS, daemon)
            assert waiting["name"] == report["domain"]
            taken = time_hits(f"{paths[1]}/near", 100)
            p95 = statistics.quantiles(taken, n=20)[-1]
            print(f"hits beside {READERS} stalled misses: median {statistics.median(taken) * 1000:.1f} ms, "
                  f"p95 {p95 * 1000:.1f} ms, max {max(taken) * 1000:.1f} ms")  # fmt: skip
            assert p95 < 1
            states = {mount["target"]: mount["state"] for mount in daemon.json("status")["mounts"]}
            assert states[paths[1]] == "ready"
            assert f"{READERS} reads wait" in states[paths[0]]
            assert slow.digest in states[paths[0]]
            begun = time.monotonic()
            daemon.nsfs("umount", "--force", paths[0])
            for thread in threads:
                thread.join(60)
            assert not any(thread.is_alive() for thread in threads)
            assert time.monotonic() - begun < 60
            begun = time.monotonic()
            with daemon.mounted(third, paths[2]):
                assert Path(paths[2], "f").read_bytes() == b"third"
            assert time.monotonic() - begun < 25, "it waits for what nobody wants: that stalls for 30 s"
        wait_until(0, daemon)
        time_hits(f"{paths[1]}/near", 3)
        registry.script = ""


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("driver", ["erofs", "fuse"])
def test_a_forced_end_fails_readers_and_spares_the_neighbour(
    daemon: Daemon, registry: FakeRegistry, tmp_path: Path, driver: str, stopped: bool
) -> None:
    """Also where the domain's worker does nothing any more: then the next one fails them, and serves the neighbour."""
    name = f"{driver}/{stopped}".lower()
    content = random.Random(name).randbytes(100_000)
    lost = estargz_layer([file("f", content)])
    kept = estargz_layer([file("g", content[::-1])])
    targets = [str(tmp_path / each) for each in ("lost", "kept")]
    with swept(tmp_path), daemon.mounted(publish(registry, Image((kept,)), f"kept/{name}"), targets[1]):
        reference = publish(registry, Image((lost,)), f"lost/{name}")
        os.mkdir(targets[0])
        daemon.nsfs("mount", reference, targets[0], "--driver", driver, "--on-error", "wait")
        registry.faults_on, registry.script = lost.digest.hex, "T" * FOR_EVER
        reader = subprocess.Popen([sys.executable, "-c", _READER, f"{targets[0]}/f"], stdout=subprocess.PIPE)
        try:
            assert reader.stdout
            assert reader.stdout.readline()
            wait_until(1, daemon)
            worker = daemon.workers()["ns/default"]
            if stopped:
                os.kill(worker, signal.SIGSTOP)
            daemon.nsfs("umount", "--force", targets[0])
            assert reader.wait(60) in {errno.EIO, errno.ENOENT}
            assert not stopped or daemon.workers()["ns/default"] != worker
        finally:
            reader.kill()
            reader.communicate()
        with open(f"{targets[1]}/g", "rb") as opened:
            assert opened.read() == content[::-1]
        registry.script = ""


@pytest.mark.parametrize("fault", ["T", "O"], ids=["silent", "drips"])
@pytest.mark.parametrize("driver", ["erofs", "fuse"])
def test_patience_ends_when_it_was_said_and_others_are_served(
    daemon: Daemon, registry: FakeRegistry, tmp_path: Path, driver: str, fault: str
) -> None:
    """A registry that says nothing, or one byte a second."""
    content = random.Random(f"{driver} {fault}").randbytes(100_000)
    slow = estargz_layer([file("f", content)])
    quick = estargz_layer([file("g", content[::-1])])
    targets = [str(tmp_path / each) for each in ("slow", "quick")]
    with swept(tmp_path), daemon.mounted(publish(registry, Image((quick,)), f"quick/{driver}"), targets[1]):
        reference = publish(registry, Image((slow,)), f"patience/{driver}")
        with daemon.mounted(reference, targets[0], "--driver", driver, "--on-error", "wait:2s"):
            registry.faults_on, registry.script = slow.digest.hex, fault * FOR_EVER
            begun = time.monotonic()
            with reading([f"{targets[1]}/g"]), pytest.raises(OSError, match=r"Input/output|timed out") as caught:
                Path(targets[0], "f").read_bytes()
            assert 1.5 < time.monotonic() - begun < 60, caught.value
            assert Path(targets[1], "g").read_bytes() == content[::-1]
        registry.script = ""


def test_a_mount_from_a_registry_that_drips_fails_and_says_why(registry: FakeRegistry, tmp_path: Path) -> None:
    content = random.Random(7).randbytes(100_000)
    slow = publish(registry, Image((gzip_layer([file("f", content)]),)), "dripping")
    quick = publish(registry, Image((gzip_layer([file("g", content)]),)), "flowing")
    settings = {"registry": {"read_timeout": "1500ms"}}
    with swept(tmp_path), run_daemon(str(tmp_path / "daemon"), settings) as daemon:
        os.mkdir(tmp_path / "slow")
        registry.faults_on, registry.script = "/dripping/", "O" * FOR_EVER
        with daemon.started("mount", slow, str(tmp_path / "slow")) as mounting:
            with daemon.mounted(quick, str(tmp_path / "quick")):
                assert (tmp_path / "quick/g").read_bytes() == content
            _, said = mounting.communicate(timeout=60)
        assert mounting.returncode == UnreachableError.exit_code
        assert "the registry sends too slowly" in said
        assert registry.host in said
    registry.script = ""


def test_a_user_may_end_a_mount_that_waits(registry: FakeRegistry) -> None:
    layer = estargz_layer([file("f", random.Random(4).randbytes(100_000))])
    reference = publish(registry, Image((layer,)), "user")
    with private_user() as user:
        target = user.directory("mnt")
        user.nsfs("mount", reference, target, "--on-error", "wait")
        registry.faults_on, registry.script = layer.digest.hex, "T" * FOR_EVER
        reader = threading.Thread(target=user.run, args=("cat", f"{target}/f"), kwargs={"check": False})
        reader.start()
        deadline = time.monotonic() + 60
        while user.json("status")["domains"][0]["waiting"] == 0:
            assert time.monotonic() < deadline
        user.nsfs("umount", "--force", target)
        reader.join(60)
        assert not reader.is_alive()
        registry.script = ""
