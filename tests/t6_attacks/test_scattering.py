"""A registry that sends each request to a server of a name that was never seen: whose account that is has an end.

What requests cost is written down, for longer than workers live. Without an end a tenant's registry could fill the
records of all.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import fakes
from daemon_hooks import hooked
from fakes import FakeRegistry
from images import Image, file
from mounting import arena
from nsfs.model.report import OTHERS
from nsfs_daemon import run_daemon
from published import estargz_layer, publish
from users import noise

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

__all__ = ["arena"]

_MOST = """
    import nsfs.model.report
    nsfs.model.report.MAX_SERVERS = {}
"""
FEW, FILES = 16, 40


class Scattering(FakeRegistry):
    """Redirects each request to another of the addresses that are this machine (RFC 1122, 127/8), valid once."""

    sent = 0

    def location_of(self, digest: str) -> str:
        self._signature = self.sent = self.sent + 1
        port = self.host_of("storage").partition(":")[2]
        return f"http://127.1.{self.sent >> 8}.{self.sent & 255}:{port}/storage/{digest}?signature={self.sent}"

    def signature_is_valid(self, query: str) -> bool:
        if not super().signature_is_valid(query):
            return False
        self._signature = -1
        return True


def servers_of(arena: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """What is written down after so many requests of a namespace's, by server."""
    monkeypatch.setitem(fakes._ADDRESSES, "storage", "0.0.0.0")
    image = Image((estargz_layer([file(f"{number}", noise(5_000, number)) for number in range(FILES)]),))
    with ExitStack() as stack:
        registry = stack.enter_context(Scattering(redirect=True))
        daemon = stack.enter_context(run_daemon(str(arena / "d"), {"fetch": {"read_ahead": 0}}))
        stack.enter_context(daemon.mounted(publish(registry, image, "x"), str(arena / "m"), "--namespace", "a"))
        for number in range(FILES):
            assert (arena / "m" / f"{number}").read_bytes() == noise(5_000, number)
        asked = registry.requests("storage")
        costs = {cost["server"]: cost for cost in daemon.json("ns", "show", "a")["costs"]}
    redirected = [cost for server, cost in costs.items() if server != registry.host]
    assert sum(cost["requests"] for cost in redirected) == len(asked) >= FILES
    assert sum(cost["received"] for cost in redirected) == sum(entry.sent for entry in asked)
    return costs


def test_without_an_end_there_is_one_more_with_each_request(arena: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hooked(arena, _MOST.format(1 << 30)):
        assert len(servers_of(arena, monkeypatch)) > FILES


def test_servers_of_ever_new_names_are_one(arena: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hooked(arena, _MOST.format(FEW)):
        costs = servers_of(arena, monkeypatch)
    assert len(costs) == FEW + 1
    assert costs[OTHERS]["requests"] >= FILES - FEW
