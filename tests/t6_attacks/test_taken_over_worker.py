"""A worker that runs somebody else's code: a real one, of a real daemon, beside another domain's."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import attacks
import nsfs
from attacks import ATTACKS, Prey
from mounting import arena
from nsfs_daemon import run_daemon

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
        said = json.loads(said_by(daemon))
        assert said["uid"] == os.stat(own).st_uid != os.stat(f"{daemon.root}/domains/ns%2Fvictim").st_uid
        assert said["attacks"].keys() == {attack.__name__ for attack in ATTACKS}
        assert [name for name, error in said["attacks"].items() if not error] == []
        assert daemon.workers()["ns/victim"] == victim


def said_by(daemon: Daemon) -> str:
    """What the code in the worker wrote."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found = re.search(r"taken over: (.*)", Path(daemon.log).read_text())
        if found is not None:
            return found[1]
        time.sleep(0.05)
    raise AssertionError(daemon.tail())
