"""The long form: so many deaths, mounts and containers that what is rare happens and what leaks shows.

Figures are printed as JSON. The environment's SOAK scales all of it: 1 is a thousand kills and ten thousand cycles, an
hour on two idle cores.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import busybox
from containerd import run_containerd, shared_directory
from fakes import FakeRegistry
from images import Image, file
from nodes import Node, wait_until, write_snippet
from nsfs.serve import api
from nsfs.serve.client import Control, open_control
from nsfs_daemon import run_daemon
from published import estargz_layer, publish
from readers import Seen, reading

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

pytestmark = [pytest.mark.soak, pytest.mark.timeout(0)]

SCALE = float(os.environ.get("SOAK", "1"))
KILLS = max(4, int(1_000 * SCALE))
CYCLES = max(40, int(10_000 * SCALE))
PER_CONTAINER = 10
"""One cycle in so many starts and ends a container; the others mount and unmount."""
PER_EVICTION = 20
"""Kills between two evictions, after which everything is fetched again."""
PER_FAULT = 10
"""One mount in so many meets a registry that fails, or a reader that does not wait for it."""
CALL = 120.0
"""Seconds for the daemon to answer any call."""
NAMESPACE = "soak"
DOMAIN = f"ns/{NAMESPACE}"
DRIVERS = ("erofs", "fuse")
CONNECTIONS = 8
"""That the daemon may have to a registry: half of them for ranges."""
FILES = {f"d/{number}": random.Random(number).randbytes(400_000) for number in range(24)}
SUMS = "".join(f"{hashlib.sha256(data).hexdigest()}  /{name}\n" for name, data in FILES.items())


@dataclass
class Site:
    """A daemon and a containerd, an image, and a line to the daemon that costs no process."""

    node: Node
    control: Control
    registry: FakeRegistry
    reference: str
    numbers: Iterator[int] = field(default_factory=itertools.count)
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    def call(self, method: str, request: Any) -> Any:
        return self.threads.submit(self.control.call, method, request, api.METHODS[method][1]).result(CALL)

    def worker(self) -> int:
        """The worker that answers now; 0 while it is being started."""
        domains = self.call("Status", api.Empty()).domains
        return next((each.pid for each in domains if each.name == DOMAIN and each.state == "ready"), 0)

    @contextlib.contextmanager
    def mounted(self, target: str, driver: str) -> Iterator[str]:
        os.makedirs(target, exist_ok=True)
        wishes = api.MountRequest(reference=self.reference, namespace=NAMESPACE, target=target, driver=driver)
        self.call("Mount", wishes)
        try:
            yield target
        finally:
            self.call("Umount", api.UmountRequest(target=target))

    def evict(self) -> None:
        self.call("Evict", api.ImageRequest(reference=self.reference, namespace=NAMESPACE))

    def root_of(self, container: str) -> str:
        """A running container's root filesystem."""
        server = self.node.containerd
        return server.see(f"{server.directory}/state/io.containerd.runtime.v2.task/{NAMESPACE}/{container}/rootfs")

    def run_container(self, name: str) -> str:
        """Start one that reads a file; what it says of it."""
        said = self.node.run(
            self.reference, f"c{next(self.numbers)}", "/bin/sha256sum", f"/{name}", namespace=NAMESPACE
        )
        return said.split()[0]


@contextlib.contextmanager
def run_site(directory: str, settings: dict[str, Any]) -> Iterator[Site]:
    layer = estargz_layer(
        [file("sums", SUMS.encode()), *(file(name, data) for name, data in FILES.items())], chunk_size=1 << 17
    )
    with (
        shared_directory(directory),
        FakeRegistry() as registry,
        run_daemon(f"{directory}/nsfs", settings) as daemon,
        open_control(daemon.socket) as control,
    ):
        snippet = write_snippet(directory, "config-v2.toml", daemon.socket)
        with run_containerd(f"{directory}/containerd", imports=[snippet]) as server:
            node = Node(daemon, server)
            reference = publish(registry, Image((busybox.base(), layer)), "soak")
            node.pull(reference, namespace=NAMESPACE)
            yield Site(node, control, registry, reference)
            node.clear(NAMESPACE)
            assert node.is_clean()


# Kills


def kill_workers(site: Site, kills: int) -> list[float]:
    """Kill one worker after the other, up to 0.4 s after it came to answer; when."""
    chance = random.Random(kills)
    moments = []
    for number in range(kills):
        if number % PER_EVICTION == 0:
            site.evict()
        time.sleep(chance.uniform(0, 0.4))
        worker = wait_for_another(site, 0)
        moments.append(time.monotonic())
        os.kill(worker, signal.SIGKILL)
        wait_for_another(site, worker)
    return moments


def wait_for_another(site: Site, worker: int) -> int:
    """Another worker than that, once one answers."""
    found = 0

    def answers() -> bool:
        nonlocal found
        found = site.worker()
        return found not in {0, worker}

    assert wait_until(answers)
    return found


def leave_workers(site: Site, moments: Sequence[float]) -> list[float]:
    """Do at the same moments all but kill; when."""
    begun = time.monotonic()
    passed = []
    for number, moment in enumerate(moments):
        if number % PER_EVICTION == 0:
            site.evict()
        time.sleep(max(0.0, begun + moment - moments[0] - time.monotonic()))
        site.worker()
        passed.append(time.monotonic())
    return passed


def figures(seen: Seen, moments: Sequence[float]) -> dict[str, float]:
    """Milliseconds: of all reads; and of each moment the read that waited longest around it."""
    met = sorted(seen.longest_since(moments, 0.2))
    waits = {
        "p99 of reads": seen.slowest(0.99),
        "max of reads": seen.slowest(1),
        "median of moments": met[len(met) // 2],
        "p99 of moments": met[int(len(met) * 0.99)],
    }
    return {"reads": seen.reads, **{name: round(1000 * wait, 1) for name, wait in waits.items()}}


@pytest.mark.parametrize("erofs", [True, False], ids=["erofs", "fuse"])
def test_kills_of_workers_under_readers(tmp_path: Path, erofs: bool) -> None:
    kills = KILLS // 2
    with run_site(str(tmp_path / "site"), {"kernel": {"erofs": erofs}}) as site:
        checking = "while sha256sum -c -s /sums; do sleep 0.2; done; exit 1"
        site.node.start(site.reference, "checks", checking, NAMESPACE)
        with site.mounted(str(tmp_path / "tree"), "fuse") as tree:
            tops = (site.root_of("checks"), tree)
            files = {f"{top}/{name}": data for top in tops for name, data in FILES.items()}
            with reading(files) as killed:
                moments = kill_workers(site, kills)
            with reading(files) as control:
                passed = leave_workers(site, moments)
        said = {"killed": figures(killed, moments), "control": figures(control, passed)}
        print(json.dumps({"kills": kills, "views": "erofs" if erofs else "fuse", "milliseconds": said}))
        killed.check()
        control.check()
        assert "RUNNING" in site.node.containerd.ctr("tasks", "ls", namespace=NAMESPACE).stdout
        assert killed.slowest(0.99) - control.slowest(0.99) <= 0.1


# Cycles


def cycle(site: Site, number: int, target: str) -> None:
    """A container, or a mount, that reads one file which is not here."""
    name = f"d/{number % len(FILES)}"
    if number % PER_CONTAINER == 0:
        assert site.run_container(name) == hashlib.sha256(FILES[name]).hexdigest()
        return
    with site.mounted(target, DRIVERS[number % 2]):
        if number % PER_FAULT == 1:
            meet_fault(site, f"{target}/{name}", number // PER_FAULT)
        assert Path(target, name).read_bytes() == FILES[name]
    site.evict()


def meet_fault(site: Site, path: str, number: int) -> None:
    """The registry fails; or it is slow, and whoever reads is killed while he waits."""
    site.registry.script = "XESH"[number % 4]
    if site.registry.script != "H":
        return
    site.registry.go_on.clear()
    with subprocess.Popen(["cat", path], stdout=subprocess.DEVNULL) as reader:
        assert wait_until(lambda: site.registry.script == "")
        reader.kill()
    site.registry.go_on.set()


def processes(site: Site) -> dict[str, int]:
    """The daemon's and those that it started, the worker's and its fork server's, by name."""
    found = {"daemon": site.node.daemon.pid, "worker": wait_for_another(site, 0)}
    for child in children(found["daemon"]):
        command = Path(f"/proc/{child}/cmdline").read_text().split("\0")
        found[f"daemon's {next((word for word in command if word.startswith('nsfs.')), 'other')}"] = child
    for child in children(found["daemon's nsfs.serve.forkserver"]):
        if child != found["worker"] and uid_of(child) == uid_of(found["worker"]):
            found["worker's fork server"] = child
    return found


def uid_of(pid: int) -> int:
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("Uid:"))
    return int(line.split()[1])


def children(pid: int) -> list[int]:
    return [int(child) for each in Path(f"/proc/{pid}/task").glob("*/children") for child in each.read_text().split()]


def held(site: Site) -> dict[str, int]:
    """What must not grow, once the last container's views are gone: containerd cleans up when it likes."""
    daemon = site.node.daemon
    wait_until(lambda: count_mounts(site) == 1)
    found = {
        "mounts": count_mounts(site),
        "loop devices": len(list(Path("/sys/block").glob("loop*/loop"))),
        "LMDB KiB": sum(each.stat().st_size for each in Path(daemon.root).rglob("*.lmdb")) >> 10,
        "disk KiB": sum(each.stat().st_blocks for each in Path(daemon.root).rglob("*") if each.is_file()) >> 1,
        "pool slots": free_slots(site),
    }
    for name, pid in processes(site).items():
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        found |= {f"{name}: fds": len(os.listdir(f"/proc/{pid}/fd")), f"{name}: threads": int(status["Threads"])}
        found[f"{name}: KiB"] = int(status["RssAnon"].split()[0])
    return found


def count_mounts(site: Site) -> int:
    """Of the daemon's: one is the domain's."""
    return Path("/proc/self/mountinfo").read_text().count(site.node.daemon.run)


def free_slots(site: Site) -> int:
    """How many ranges the worker asks a registry for at a time: none of its places is lost."""
    registry = site.registry
    names = list(FILES)[:: len(FILES) // (CONNECTIONS + 1)]
    with site.mounted(f"{site.node.daemon.run}.slots", "erofs") as target:
        site.evict()
        registry.log.clear()
        registry.go_on.clear()
        registry.script = "H" * 2 * CONNECTIONS
        with contextlib.ExitStack() as stack:
            for name in names:
                reader = subprocess.Popen(["cat", f"{target}/{name}"], stdout=subprocess.DEVNULL)
                stack.enter_context(reader)
            wait_until(lambda: len(registry.requests(path="/blobs/")) >= CONNECTIONS, 2)
            found = len(registry.requests(path="/blobs/"))
            registry.script = ""
            registry.go_on.set()
    return found


def grown(before: dict[str, int], after: dict[str, int]) -> list[str]:
    """What was not flat."""

    def allowed(name: str) -> float:
        return 1.1 * before[name] + 2048 if name.endswith("KiB") else before[name] + 2

    slots = ["pool slots"] if after["pool slots"] != before["pool slots"] else []
    return slots + [name for name in before if name != "pool slots" and after.get(name, 0) > allowed(name)]


def test_cycles_of_mounts_and_containers_leave_nothing(tmp_path: Path) -> None:
    settings = {"fetch": {"read_ahead": 0}, "registry": {"connections": CONNECTIONS}}
    with run_site(str(tmp_path / "site"), settings) as site:
        marks = []
        begun = time.monotonic()
        for number in range(CYCLES):
            cycle(site, number, str(tmp_path / "mnt"))
            if number + 1 in {CYCLES // 10, CYCLES // 2, CYCLES}:
                marks.append(held(site))
                print(json.dumps({"cycles": number + 1, "seconds": round(time.monotonic() - begun), **marks[-1]}))
        assert grown(marks[0], marks[2]) == [], marks
        assert grown(marks[1], marks[2]) == [], marks
