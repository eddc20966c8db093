"""Containers that containerd started, while daemons and workers die, and after a reboot without a network."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import signal
import time
from typing import TYPE_CHECKING

import pytest

import busybox
from containerd import run_containerd, shared_directory
from fakes import FakeRegistry
from images import Image, file
from nodes import Node, wait_until, write_snippet
from nsfs.store.layout import Layout
from nsfs_daemon import mortal_daemons, sweep
from published import estargz_layer, publish

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from containerd import Containerd
    from nsfs_daemon import Daemon

SETTINGS = {"fetch": {"read_ahead": 0}}
FILES = {f"data/{number}": random.Random(f"c{number}").randbytes(300_000) for number in range(12)}


class Mortal:
    """A node whose daemon is killed and started again; each look at a container reads a file that nobody read yet."""

    def __init__(
        self, start: Callable[[], Daemon], boot: Callable[[], Containerd], node: Node, registry: FakeRegistry
    ) -> None:
        self.start = start
        self.boot = boot
        self.node = node
        self.registry = registry
        self.unread = list(FILES)

    def publish(self, name: str) -> str:
        layer = estargz_layer([file(path, data) for path, data in FILES.items()], chunk_size=1 << 17)
        return publish(self.registry, Image((busybox.base(), layer)), name)

    def check(self, container: str, name: str, namespace: str) -> None:
        said = self.node.ask(container, f"sha256sum /{name}", namespace)
        assert said.startswith(hashlib.sha256(FILES[name]).hexdigest())

    def start_another(self, reference: str, namespace: str) -> str:
        """Its name. containerd 1.6 fails a call at first whose connection to the plugin has ended meanwhile."""
        names: list[str] = []

        def starts() -> bool:
            names.append(f"another{len(names)}")
            command = ("run", "--detach", "--snapshotter", "nsfs", reference, names[-1], "/bin/sleep", "1000")
            return self.node.containerd.ctr(*command, namespace=namespace, check=False).returncode == 0

        assert wait_until(starts)
        return names[-1]

    def kill(self, *, daemon: bool, worker: bool, namespace: str) -> None:
        pid = self.node.daemon.workers()[f"ns/{namespace}"]
        if daemon:
            os.kill(self.node.daemon.pid, signal.SIGKILL)
        if worker:
            os.kill(pid, signal.SIGKILL)

    def follow(self) -> None:
        self.node = Node(self.start(), self.node.containerd)


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[Mortal]:
    directory = str(tmp_path / "node")
    with (
        shared_directory(directory),
        FakeRegistry() as registry,
        mortal_daemons(f"{directory}/nsfs", SETTINGS) as start,
    ):
        daemon = start()
        snippet = write_snippet(directory, "config-v2.toml", daemon.socket)
        with contextlib.ExitStack() as containerds:

            def boot() -> Containerd:
                containerds.close()
                return containerds.enter_context(run_containerd(f"{directory}/containerd", imports=[snippet]))

            yield Mortal(start, boot, Node(daemon, boot()), registry)


def test_a_container_reads_on_while_daemon_and_worker_die(mortal: Mortal) -> None:
    reference = mortal.publish("lives")
    mortal.node.pull(reference, namespace="lives")
    mortal.node.start(reference, "a", "true", "lives")
    mortal.check("a", mortal.unread.pop(), "lives")

    mortal.kill(daemon=True, worker=False, namespace="lives")
    mortal.check("a", mortal.unread.pop(), "lives")
    mortal.follow()
    mortal.check("a", mortal.unread.pop(), "lives")

    assert wait_until(lambda: "ns/lives" in mortal.node.daemon.workers())
    mortal.kill(daemon=False, worker=True, namespace="lives")
    mortal.check("a", mortal.unread.pop(), "lives")

    assert wait_until(lambda: "ns/lives" in mortal.node.daemon.workers())
    mortal.kill(daemon=True, worker=True, namespace="lives")
    time.sleep(0.2)
    mortal.follow()
    mortal.check("a", mortal.unread.pop(), "lives")
    mortal.check(mortal.start_another(reference, "lives"), mortal.unread.pop(), "lives")
    assert len(mortal.node.views()) == 4, "two of each, since what the first one read was never kept"

    refused = mortal.node.daemon.nsfs("drain", check=False)
    assert refused.returncode == 8
    assert "lives/" in refused.stderr
    mortal.node.clear("lives")
    assert mortal.node.is_clean()


def test_containers_start_at_any_moment_of_an_upgrade(mortal: Mortal) -> None:
    reference = mortal.publish("moments")
    mortal.node.pull(reference, namespace="moments")
    mortal.node.start(reference, "first", "true", "moments")
    started = 0
    with mortal.node.daemon.started("upgrade") as upgrading:
        while upgrading.poll() is None:
            mortal.node.start(reference, f"during{started}", "true", "moments")
            started += 1
        assert upgrading.returncode == 0, upgrading.communicate()
    assert started > 0
    mortal.check(f"during{started - 1}", mortal.unread.pop(), "moments")
    mortal.node.clear("moments")
    assert mortal.node.is_clean()


def test_after_a_reboot_without_network_containers_start_from_what_is_local(mortal: Mortal) -> None:
    for namespace in ("whole", "broken"):
        reference = mortal.publish("reboot")
        mortal.node.pull(reference, namespace=namespace)
        mortal.node.start(reference, "a", "true", namespace)
        mortal.node.ask("a", "sha256sum /data/*", namespace)
        mortal.node.containerd.ctr("tasks", "rm", "--force", "a", namespace=namespace)
        mortal.node.containerd.ctr("containers", "rm", "a", namespace=namespace)
    os.kill(mortal.node.daemon.pid, signal.SIGKILL)
    mortal.registry.faults_on, mortal.registry.script = "/", "X" * 10_000
    daemon = mortal.node.daemon
    sweep(os.path.dirname(daemon.run))
    shutil.rmtree(daemon.run)
    with open(Layout(daemon.root, daemon.run).domain("ns/broken").index, "r+b") as index:
        index.write(bytes(1 << 16))

    mortal.node = Node(mortal.start(), mortal.boot())
    with mortal.node.daemon.started("ls", "--namespace", "broken", reference):
        assert wait_until(
            lambda: "cannot be started" in mortal.node.daemon.tail() or "died" in mortal.node.daemon.tail()
        )
        mortal.node.start(reference, "b", "true", "whole")
        for name in FILES:
            mortal.check("b", name, "whole")
    mortal.node.clear("whole")
    mortal.node.clear("broken")
    assert mortal.node.is_clean()
