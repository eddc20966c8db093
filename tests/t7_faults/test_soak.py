"""The long form: so many deaths and mounts that what is rare happens and what leaks shows; prints figures as JSON.

The environment's SOAK scales it: 1 is a thousand kills and ten thousand mounts.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fakes import FakeRegistry
from images import Image, file
from mounting import swept
from nodes import wait_until
from nsfs_daemon import Daemon, run_daemon
from published import estargz_layer, publish
from readers import Seen, reading

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.soak, pytest.mark.timeout(0)]

SCALE = float(os.environ.get("SOAK", "1"))
KILLS = max(2, int(1_000 * SCALE))
CYCLES = max(4, int(10_000 * SCALE))
DOMAIN = "ns/default"
DRIVERS = ("erofs", "fuse")
FILES = {f"d/{number}": random.Random(number).randbytes(400_000) for number in range(24)}
_EVERY = 0.2
"""Seconds between kills, and so that long the control run is."""


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with swept(tmp_path), run_daemon(str(tmp_path / "daemon")) as running:
        yield running


@pytest.fixture
def reference() -> Iterator[str]:
    layer = estargz_layer([file(name, data) for name, data in FILES.items()], chunk_size=1 << 17)
    with FakeRegistry() as registry:
        yield publish(registry, Image((layer,)), "soak")


def figures(seen: Seen) -> dict[str, float]:
    waits = {"p99": seen.slowest(0.99), "p999": seen.slowest(0.999), "max": seen.slowest(1)}
    return {"reads": len(seen.waits), **{name: round(1000 * wait, 1) for name, wait in waits.items()}}


def kill_worker(daemon: Daemon) -> None:
    worker = daemon.workers()[DOMAIN]
    os.kill(worker, signal.SIGKILL)
    assert wait_until(lambda: daemon.workers().get(DOMAIN, worker) != worker, 30)


def test_kills_of_workers_under_readers(daemon: Daemon, reference: str, tmp_path: Path) -> None:
    for driver in DRIVERS:
        (tmp_path / driver).mkdir()
        daemon.nsfs("mount", reference, str(tmp_path / driver), "--driver", driver)
    files = {str(tmp_path / driver / name): data for driver in DRIVERS for name, data in FILES.items()}
    begun = time.monotonic()
    with reading(files) as killed:
        for _ in range(KILLS):
            kill_worker(daemon)
            time.sleep(_EVERY)
    took = time.monotonic() - begun
    with reading(files) as control:
        time.sleep(took)
    print(json.dumps({"kills": KILLS, "milliseconds": {"killed": figures(killed), "control": figures(control)}}))
    killed.check()
    control.check()


def held(daemon: Daemon) -> dict[str, int]:
    """What must not grow, of daemon and worker."""
    found = {"mounts": Path("/proc/self/mountinfo").read_text().count(daemon.run)}
    for name, pid in (("daemon", daemon.pid), ("worker", daemon.workers()[DOMAIN])):
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        found |= {f"{name} fds": len(os.listdir(f"/proc/{pid}/fd")), f"{name} threads": int(status["Threads"])}
        found[f"{name} KiB"] = int(status["VmRSS"].split()[0])
    found["LMDB bytes"] = sum(each.stat().st_size for each in Path(daemon.root).rglob("*.mdb"))
    return found


def test_cycles_of_mounts_leave_nothing(daemon: Daemon, reference: str, tmp_path: Path) -> None:
    target = str(tmp_path / "mnt")
    marks = []
    for cycle in range(CYCLES):
        with daemon.mounted(reference, target, "--driver", DRIVERS[cycle % 2]):
            assert Path(target, "d/1").read_bytes() == FILES["d/1"]
        if cycle in {CYCLES // 2, CYCLES - 1}:
            marks.append(held(daemon))
    print(json.dumps({"cycles": CYCLES, "half": marks[0], "end": marks[1]}))
    for name, before in marks[0].items():
        allowed = 1.1 * before + 4096 if name.endswith("KiB") else before + 4
        assert marks[1][name] <= allowed or name == "LMDB bytes", (name, marks)
