"""A worker may die at any time: readers wait a moment, downloads go on from where they were."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest

from images import Image, file, gzip_layer, zstd_layer
from nsfs_daemon import Daemon, run_daemon
from users import drop_pages, estargz_layer, is_dead, noise, push, read, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from meter import Meter
    from registry import Registry

FILES = {f"f{number:02}": noise(200_000, 400 + number) for number in range(30)}
ITEMS = [file(name, data) for name, data in FILES.items()]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with run_daemon(str(tmp_path_factory.mktemp("daemon"))) as running:
        yield running


def kill_worker(daemon: Daemon, domain: str) -> int:
    """Kill the worker and wait for the next one; gives its process."""
    pid = daemon.workers()[domain]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: is_dead(pid), "the worker is dead")
    wait_until(lambda: daemon.workers().get(domain, pid) != pid, "the next worker runs")
    return daemon.workers()[domain]


class Readers(threading.Thread):
    """Reads every file again and again, past the page cache."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self.target = target
        self.failures: list[str] = []
        self.reads = 0
        self.longest = 0.0
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.is_set():
            for name, data in FILES.items():
                begun = time.monotonic()
                try:
                    drop_pages(f"{self.target}/{name}")
                    if read(f"{self.target}/{name}") != data:
                        self.failures.append(f"{name}: wrong bytes")
                except OSError as error:
                    self.failures.append(f"{name}: {error}")
                self.longest = max(self.longest, time.monotonic() - begun)
                self.reads += 1


@pytest.mark.parametrize("driver", ["erofs", "erofs-loop", "fuse"])
def test_readers_do_not_notice_that_workers_die(
    daemon: Daemon, registry: Registry, meter: Meter, arena: Path, driver: str
) -> None:
    layers = [gzip_layer(ITEMS[:10], level=1), zstd_layer(ITEMS[10:20], frames=4), estargz_layer(ITEMS[20:])]
    push(Image(layers), registry, arena, "killed-under")
    reference, target, names = f"{meter.host}/killed-under", str(arena / "mnt"), ("--namespace", f"killed-{driver}")
    with daemon.mounted(reference, target, "--driver", driver, *names):
        daemon.nsfs("evict", reference, *names)
        readers = [Readers(target), Readers(target)]
        for reader in readers:
            reader.start()
        try:
            for _ in range(3):
                time.sleep(0.3)
                kill_worker(daemon, f"ns/killed-{driver}")
        finally:
            for reader in readers:
                reader.stopped.set()
            for reader in readers:
                reader.join()
    assert [failure for reader in readers for failure in reader.failures] == []
    assert all(reader.reads >= len(FILES) for reader in readers)
    assert max(reader.longest for reader in readers) < 30


@pytest.mark.parametrize("kind", [gzip_layer, zstd_layer])
def test_a_first_pass_that_was_killed_goes_on_by_range(
    daemon: Daemon, registry: Registry, meter: Meter, arena: Path, kind: type
) -> None:
    layer = kind(ITEMS)
    name = f"halfway-{kind.__name__.replace('_', '-')}"
    push(Image((layer,)), registry, arena, name)
    reference, target, names = f"{meter.host}/{name}", str(arena / "mnt"), ("--namespace", name)
    os.mkdir(target)
    half = len(layer.blob) // 2
    meter.hold_after = half
    with daemon.started("mount", reference, target, *names) as mounting:
        meter.wait_served(layer.digest, half)
        time.sleep(0.3)
        kill_worker(daemon, f"ns/{name}")
        meter.hold_after = None
        said = mounting.communicate(timeout=90)[1]
    assert mounting.returncode in {0, 5}, said
    if mounting.returncode != 0:
        daemon.nsfs("mount", reference, target, *names)
    resumed = [one for one in meter.blobs(layer.digest) if one.first > 0]
    assert resumed
    assert resumed[0].first > half - 1_200_000
    assert meter.served(layer.digest) < len(layer.blob) + 1_500_000
    assert {name: read(f"{target}/{name}") for name in FILES} == FILES
    daemon.nsfs("umount", target)


def test_checkpoints_that_were_killed_are_made_again(
    daemon: Daemon, registry: Registry, meter: Meter, arena: Path
) -> None:
    layer = gzip_layer(ITEMS, level=1)
    push(Image((layer,)), registry, arena, "pointless")
    reference, target, names = f"{meter.host}/pointless", str(arena / "mnt"), ("--namespace", "pointless")
    with daemon.mounted(reference, target, *names):
        kill_worker(daemon, "ns/pointless")
        before = meter.served(layer.digest)
        assert daemon.json("evict", reference, *names)["freed"] >= sum(map(len, FILES.values()))
        assert meter.served(layer.digest) == before, "the spool was still there"
        assert read(f"{target}/f17") == FILES["f17"]
        assert 0 < meter.served(layer.digest) - before < len(layer.blob) / 2


def test_a_worker_that_was_killed_comes_back_without_being_asked(
    daemon: Daemon, registry: Registry, meter: Meter, arena: Path
) -> None:
    push(Image((gzip_layer(ITEMS[:3]),)), registry, arena, "back")
    with daemon.mounted(f"{meter.host}/back", str(arena / "mnt"), "--namespace", "back") as report:
        local = report["local"]
        meter.down()
        pid = kill_worker(daemon, "ns/back")
        (domain,) = [one for one in daemon.json("status")["domains"] if one["name"] == "ns/back"]
        assert (domain["pid"], domain["local"], domain["state"]) == (pid, local, "ready")
        assert read(arena / "mnt/f01") == FILES["f01"]
