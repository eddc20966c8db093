"""Our units under a real systemd, beside containerd's: what systemd does to the daemon, containers do not notice."""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING

import pytest

import busybox
from booted import NAMESPACE, Machine, booted, make_tree
from fakes import FakeRegistry
from images import Image, file
from nodes import wait_until
from published import estargz_layer, publish

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FILES = {f"data/{number}": random.Random(number).randbytes(300_000) for number in range(8)}


prepare = make_tree
"""See prepared."""


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    with booted(str(tmp_path)) as machine:
        yield machine


class Container:
    """One that lives; each look at it reads a file that nobody has read yet."""

    def __init__(self, machine: Machine, reference: str) -> None:
        self.machine = machine
        self.unread = list(FILES)
        machine.run("nsfs", "pull", "-n", NAMESPACE, reference)
        command = ("run", "--detach", "--snapshotter", "nsfs", reference, "lives", "/bin/sleep", "1000")
        machine.run("ctr", "-n", NAMESPACE, *command)

    def check(self) -> None:
        name = self.unread.pop()
        command = ("tasks", "exec", "--exec-id", f"look{len(self.unread)}", "lives", "/bin/sha256sum", f"/{name}")
        said = self.machine.run("ctr", "-n", NAMESPACE, *command).stdout
        assert said.startswith(hashlib.sha256(FILES[name]).hexdigest())


def holders(machine: Machine) -> int:
    return len(machine.run("pgrep", "--full", "nsfs.serve.holder", check=False).stdout.split())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_containers_notice_nothing_of_what_systemd_does_to_the_daemon(machine: Machine) -> None:
    layer = estargz_layer([file(name, data) for name, data in FILES.items()], chunk_size=1 << 17)
    with FakeRegistry() as registry:
        container = Container(machine, publish(registry, Image((busybox.base(), layer)), "units"))
        container.check()

        machine.run("systemctl", "restart", "nsfs")
        container.check()

        machine.run("systemctl", "reload", "nsfs")
        assert wait_until(lambda: machine.is_active("nsfs"))
        container.check()

        machine.run("systemctl", "stop", "nsfs")
        container.check()
        machine.run("systemctl", "start", "nsfs")
        container.check()

        killed = machine.main_pid("nsfs")
        machine.run("kill", "-KILL", killed)
        assert wait_until(lambda: machine.main_pid("nsfs") not in {killed, "0"})
        assert wait_until(lambda: machine.is_active("nsfs"))
        container.check()
        assert "a worker goes on with a new daemon" in machine.journal()


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_systemd_keeps_the_descriptors_where_it_says_so(machine: Machine) -> None:
    """Since systemd 254 it says so by itself."""
    machine.set_up("nsfs", "[Service]\nEnvironment=FDSTORE=8192\n")
    machine.run("systemctl", "restart", "nsfs")
    assert wait_until(lambda: holders(machine) == 0)
    layer = estargz_layer([file(name, data) for name, data in FILES.items()], chunk_size=1 << 17)
    with FakeRegistry() as registry:
        container = Container(machine, publish(registry, Image((busybox.base(), layer)), "units"))
        container.check()
        assert int(machine.run("systemctl", "show", "--property=NFileDescriptorStore", "--value", "nsfs").stdout) == 5
        for _ in range(2):
            machine.run("systemctl", "restart", "nsfs")
            container.check()
        machine.run("nsfs", "upgrade")
        container.check()
        assert holders(machine) == 0
        assert machine.journal().count("a worker goes on with a new daemon") == 3
