"""What each namespace's requests cost: it adds up to what the registry's log says, byte for byte."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import pytest

from fakes import PASSWORD, USER, FakeRegistry
from images import Image, file, gzip_layer
from nsfs_daemon import Daemon, run_daemon
from published import publish
from users import noise, wait_until

if TYPE_CHECKING:
    from pathlib import Path

DATA = noise(300_000, 700)
IMAGE = Image((gzip_layer([file("data", DATA)]), gzip_layer([file("more", noise(50_000, 701))])))


def costs(daemon: Daemon, namespace: str) -> dict[str, tuple[int, int]]:
    report: dict[str, Any] = daemon.json("ns", "show", namespace)
    return {each["server"]: (each["requests"], each["received"]) for each in report["costs"]}


def logged(registry: FakeRegistry, since: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Requests, and bytes of bodies, by server, of what was logged since."""
    found = {}
    for server in ("registry", "storage", "token"):
        entries = registry.requests(server)[since.get(server, 0) :]
        if entries:
            found[registry.host_of(server)] = (len(entries), sum(entry.sent for entry in entries))
    return found


def so_far(registry: FakeRegistry) -> dict[str, int]:
    return {server: len(registry.requests(server)) for server in ("registry", "storage", "token")}


@pytest.mark.parametrize("scope", ["isolated", "shared"])
def test_costs_are_what_the_registry_s_log_says(arena: Path, scope: str) -> None:
    with FakeRegistry(auth="token", redirect=True) as registry:
        reference = publish(registry, IMAGE, "team/app")
        auth = {"auth": base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()}
        (arena / "config.json").write_text(json.dumps({"auths": {registry.host: auth}}))
        host = {"docker_config": str(arena / "config.json"), "docker_config_for": "all"}
        with run_daemon(str(arena / "d"), {"registry": host}) as daemon:
            names = ("--namespace", "team-a", "--isolation", scope)
            with daemon.mounted(reference, str(arena / "a"), *names):
                daemon.nsfs("evict", reference, *names)
                assert (arena / "a/data").read_bytes() == DATA
                wait_until(lambda: costs(daemon, "team-a") == logged(registry, {}), "what a costs is in the log")
                before, of_a = so_far(registry), costs(daemon, "team-a")
                with daemon.mounted(reference, str(arena / "b"), "--namespace", "team-b", "--isolation", scope):
                    assert (arena / "b/data").read_bytes() == DATA
                    wait_until(lambda: costs(daemon, "team-b") == logged(registry, before), "so is what b costs")
                    assert costs(daemon, "team-a") == of_a
                    received = sum(each[1] for each in costs(daemon, "team-b").values())
                    if scope == "shared":
                        assert received < 20_000, "who reads what is there pays for manifests and proofs"
                    else:
                        assert received > len(DATA)
