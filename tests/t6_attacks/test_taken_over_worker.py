"""A worker that runs somebody else's code: a real one, of a real daemon, beside another domain's."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import attacks
import nsfs
from attacks import ATTACKS, Prey
from fakes import FakeRegistry
from images import Image, file, gzip_layer
from mounting import arena
from nsfs_daemon import run_daemon
from published import publish

if TYPE_CHECKING:
    import pytest

    from nsfs_daemon import Daemon

__all__ = ["arena"]

HOOK = """
import json, os, sys
import msgspec
import nsfs.worker
from attacks import Prey, try_all
from nsfs.serve.supervisor import WorkerArgs

def taken_over(args, fds, main=nsfs.worker.main):
    if msgspec.msgpack.decode(args, type=WorkerArgs).domain == "ns/attacker":
        with open(os.environ["NSFS_TEST_OWN"] + "/prey.json") as file:
            prey = Prey(**json.load(file))
        said = {"uid": os.getuid(), "attacks": try_all(prey)}
        sys.stderr.write(f"taken over: {json.dumps(said)}\\n")
    return main(args, fds)

nsfs.worker.main = taken_over
"""
"""Imported by every interpreter that is started with it on its path: by this test's daemon and zygote."""


def visit(daemon: Daemon, namespace: str) -> int:
    """Have the namespace's worker started; its process id."""
    daemon.nsfs("stat", "oci:/nonexistent:/x", "--namespace", namespace, check=False)
    return daemon.workers()[f"ns/{namespace}"]


def some_memory(pid: int) -> int:
    """Address of a process's first writable page."""
    with open(f"/proc/{pid}/maps") as maps:
        found = re.search(r"^([0-9a-f]+)-\S+ rw", maps.read(), re.MULTILINE)
    assert found is not None
    return int(found[1], 16)


def test_it_reaches_nothing_but_its_own_domain(arena: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (arena / "hook").mkdir()
    (arena / "hook" / "sitecustomize.py").write_text(HOOK)
    source, tests = Path(nsfs.__file__).parents[1], Path(attacks.__file__).parent
    monkeypatch.setenv("PYTHONPATH", f"{arena}/hook:{source}:{tests}")
    own = arena / "d/root/domains/ns%2Fattacker"
    monkeypatch.setenv("NSFS_TEST_OWN", str(own))
    with run_daemon(str(arena / "d")) as daemon:
        victim = visit(daemon, "victim")
        prey = Prey(
            own=str(own),
            other=f"{daemon.root}/domains/ns%2Fvictim/index.lmdb",
            open_to_all="/etc/passwd",
            socket=daemon.socket,
            victim=victim,
            secret=some_memory(victim),
        )
        own.mkdir()
        (own / "prey.json").write_text(json.dumps(dataclasses.asdict(prey)))
        attacker = visit(daemon, "attacker")
        assert attacker != victim
        said = json.loads(daemon.said("taken over: "))
        assert said["uid"] == os.stat(own).st_uid != os.stat(f"{daemon.root}/domains/ns%2Fvictim").st_uid
        assert said["attacks"].keys() == {attack.__name__ for attack in ATTACKS}
        assert [name for name, error in said["attacks"].items() if not error] == []
        assert daemon.workers()["ns/victim"] == victim


def test_it_inherits_nothing_of_its_daemon_also_of_one_that_was_replaced(arena: Path) -> None:
    """No listening socket, no record, and no file of another domain, in workers and what they fork."""
    image = Image((gzip_layer([file("f", b"x" * 5_000)]),))
    with FakeRegistry() as registry, run_daemon(str(arena / "d")) as daemon:
        reference = publish(registry, image, "x")
        daemon.nsfs("stat", f"{reference}:/f", "-n", "before")
        daemon.nsfs("upgrade")
        daemon.nsfs("stat", f"{reference}:/f", "-n", "after")
        assert {what for what, _ in foreign(daemon, daemon.pid, "ns/none")} == {"listens", "has"}
        for domain, pid in daemon.workers().items():
            processes = [pid, *same_user(pid)]
            assert len(processes) > 1, "the worker has a fork server for its jobs"
            assert [each for process in processes for each in foreign(daemon, process, domain)] == []


def same_user(pid: int) -> list[int]:
    """The other processes of a process's user, who has nothing else."""
    everybody = [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != pid]
    user = os.stat(f"/proc/{pid}").st_uid
    found = []
    for each in everybody:
        with suppress(FileNotFoundError):
            if os.stat(f"/proc/{each}").st_uid == user:
                found.append(each)
    return found


def descriptors(pid: int) -> list[str]:
    """Those of a process; none of a job that has said all and is gone."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return os.listdir(f"/proc/{pid}/fd")
    return []


def foreign(daemon: Daemon, pid: int, domain: str) -> list[tuple[str, str]]:
    """Descriptors of a process that are no business of its domain."""
    with open("/proc/net/unix") as sockets:  # proc_pid_net(5): flags in the fourth field, __SO_ACCEPTCON is 0x10000
        listening = {f"socket:[{line.split()[6]}]" for line in sockets if line.split()[3] == "00010000"}
    own = f"{daemon.root}/domains/{quote(domain, safe='')}/"
    found = []
    for name in descriptors(pid):
        with suppress(FileNotFoundError, ProcessLookupError):
            what = os.readlink(f"/proc/{pid}/fd/{name}")
            if what in listening:
                found.append(("listens", what))
            elif what.startswith((f"{daemon.root}/", f"{daemon.run}/")) and not what.startswith(own):
                found.append(("has", what))
    return found
