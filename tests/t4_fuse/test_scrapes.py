"""Metrics of a real daemon, scraped while a registry says nothing and a worker does not answer."""

from __future__ import annotations

import http.client
import os
import random
import signal
import socket
import threading
import time
import urllib.request
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from prometheus_client.parser import text_string_to_metric_families

from fakes import FakeRegistry
from images import Image, file
from mounting import swept
from nsfs_daemon import Daemon, run_daemon
from published import estargz_layer, publish

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Figures = dict[tuple[str, ...], float]
DOMAIN = "ns/team"


def parse(text: bytes) -> Figures:
    """Values by name and the values of their labels, in the order of the labels' names."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def scrape_tcp(port: int) -> Figures:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        return parse(answer.read())


def scrape_unix(path: str) -> Figures:
    connection = http.client.HTTPConnection("nsfs", timeout=60)
    with socket.socket(socket.AF_UNIX) as connection.sock:
        connection.sock.connect(path)
        connection.request("GET", "/metrics")
        return parse(connection.getresponse().read())


def wait_for(figures: Callable[[], Figures], enough: Callable[[Figures], bool]) -> Figures:
    deadline = time.monotonic() + 30
    while not enough(found := figures()):
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
    return found


def read_one(path: str) -> None:
    with suppress(OSError), open(path, "rb") as opened:
        opened.read(4096)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def check_waits(daemon: Daemon, registry: FakeRegistry, scrape: Callable[[], Figures], target: str) -> None:
    """Reads that wait are seen by who scrapes and by who asks for the status."""
    layer = estargz_layer([file(f"f{number}", random.Random(number).randbytes(50_000)) for number in range(3)])
    reference = publish(registry, Image((layer,)), "stalled")
    os.mkdir(target)
    daemon.nsfs("mount", reference, target, "--namespace", "team", "--on-error", "wait")
    registry.faults_on, registry.script = layer.digest.hex, "T" * 100
    readers = [threading.Thread(target=read_one, args=(f"{target}/f{number}",)) for number in range(3)]
    for reader in readers:
        reader.start()
    try:
        found = wait_for(scrape, lambda figures: figures["nsfs_longest_wait_seconds", DOMAIN] > 1)
        assert found["nsfs_waiting_reads", DOMAIN] == 3
        (mount,) = daemon.json("status")["mounts"]
        assert (mount["waiting"], mount["longest"] > 1) == (3, True)
        assert layer.digest in mount["reason"]
        check_figures(scrape, daemon)
        check_silent_worker(scrape, daemon)
    finally:
        registry.script = ""
        daemon.nsfs("umount", "--force", target)
        for reader in readers:
            reader.join(60)
    assert not any(reader.is_alive() for reader in readers)


def check_figures(scrape: Callable[[], Figures], daemon: Daemon) -> None:
    daemon.nsfs("ns", "show", "team")  # has costs taken over at once
    daemon.nsfs("cache", "ls")  # has the pools measured at once
    found = scrape()
    costs = [(key[1:], value) for key, value in found.items() if key[0] == "nsfs_registry_requests_total"]
    assert [(key[0], key[1].rpartition(":")[0]) for key, value in costs if value] == [("team", "127.0.0.1")]
    assert found["nsfs_mounts", DOMAIN, "erofs", "team"] == 1
    assert found["nsfs_layers", DOMAIN] == 1
    assert found["nsfs_workers_up", DOMAIN] == found["nsfs_workers", DOMAIN] == 1
    assert found["nsfs_worker_bugs_total", DOMAIN] == found["nsfs_daemon_bugs_total",] == 0
    assert found["process_open_fds",] > 3
    assert 0 < found["nsfs_disk_bytes", DOMAIN] <= found["nsfs_pool_used_bytes",]


def check_silent_worker(scrape: Callable[[], Figures], daemon: Daemon) -> None:
    """It costs a scrape its second, and no more; and one that is killed is seen to follow."""
    pid = daemon.workers()[DOMAIN]
    os.kill(pid, signal.SIGSTOP)
    begun = time.monotonic()
    try:
        found = scrape()
    finally:
        os.kill(pid, signal.SIGCONT)
    assert time.monotonic() - begun < 30
    assert (found["nsfs_workers", DOMAIN], found["nsfs_workers_up", DOMAIN]) == (1, 0)
    assert ("nsfs_waiting_reads", DOMAIN) not in found
    os.kill(pid, signal.SIGKILL)
    wait_for(scrape, lambda figures: figures["nsfs_worker_restarts_total", DOMAIN] == 1)
    wait_for(scrape, lambda figures: figures["nsfs_workers_up", DOMAIN] == 1)


def test_a_stalled_registry_is_seen_over_tcp(tmp_path: Path) -> None:
    port = free_port()
    settings: dict[str, Any] = {"registry": {"read_timeout": "60s"}, "fetch": {"read_ahead": 0}}
    settings["metrics"] = {"listen": f"127.0.0.1:{port}"}
    with FakeRegistry() as registry, run_daemon(f"{tmp_path}/daemon", settings) as daemon, swept(tmp_path):
        check_waits(daemon, registry, lambda: scrape_tcp(port), f"{tmp_path}/mnt")


def test_the_socket_says_the_same_and_goes_with_the_daemon(tmp_path: Path) -> None:
    path = f"{tmp_path}/metrics.sock"
    with run_daemon(f"{tmp_path}/daemon", {"metrics": {"listen": f"unix:{path}"}}):
        assert os.stat(path).st_mode & 0o777 == 0o600
        found = scrape_unix(path)
        assert found["nsfs_daemon_bugs_total",] == 0
        assert found["nsfs_pool_cap_bytes",] > found["nsfs_pool_excess_bytes",]
    assert not os.path.exists(path)
