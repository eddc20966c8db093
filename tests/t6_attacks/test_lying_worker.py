"""A worker that was taken over answers its daemon whatever it likes: nobody else notices, nobody is taken for another.

The lies are told by real workers of a real daemon, whose answers a module of this test replaces. Each is first believed
by a daemon that does not look at what it is told (`naive`), which only a test can do.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from daemon_hooks import hooked
from fakes import FakeRegistry
from images import Image, file, gzip_layer
from mounting import arena
from nsfs_daemon import mortal_daemons, run_daemon
from published import publish

if TYPE_CHECKING:
    from nsfs_daemon import Daemon

__all__ = ["arena"]

_LYING = """
    import sys
    import msgspec
    import nsfs.core.worker_api
    import nsfs.serve.accounts, nsfs.serve.wire, nsfs.worker
    from nsfs.serve.relay import RelayMade, RelayRequest
    from nsfs.serve.wire import Peer, Result, render_frame
    from nsfs.serve.worker_args import WorkerArgs

    nsfs.serve.accounts._EVERY = 0.2
    MOST = 2**64 - 1

    def costs(*servers):
        return {"costs": [{"server": name, "requests": MOST, "received": MOST} for name in servers]}

    HELD = {"blob": "b", "index": "plain", "local": MOST, "size": MOST, "used": float("nan"),
            "mounted": False, "pinned": False, "returns": True}
    STATUS = {"layers": -1, "local": MOST, "fetched": MOST, "state": "ready", "bugs": MOST}
    LIES = {
        "ns/nothing": ("TakeCosts", None),
        "ns/numbers": ("TakeCosts", costs("a", "b")),
        "ns/names": ("TakeCosts", costs("a" * 1_000_000)),
        "ns/many": ("TakeCosts", costs(*map(str, range(100_000)))),
        "ns/status": ("Status", STATUS),
        "ns/held": ("Held", {"layers": [HELD, HELD], "images": []}),
    }
    HONEST = Peer._answer

    def main(args, fds, honest=nsfs.worker.main):
        domain = msgspec.msgpack.decode(args, type=WorkerArgs).domain
        if domain in LIES:
            Peer._answer = lying(*LIES[domain])
        elif domain == "ns/deep":
            Peer._answer = nested
        elif domain == "shared":
            Peer._answer = misreading
        return honest(args, fds)

    def lying(method, said):
        async def answer(self, request, served):
            honest = await HONEST(self, request, served)
            if request.method != method:
                return honest
            return render_frame(Result(request.id, msgspec.Raw(msgspec.msgpack.encode(said))))
        return answer

    async def nested(self, request, served):
        honest = await HONEST(self, request, served)
        if request.method != "TakeCosts":
            return honest
        return render_frame(Result(request.id, msgspec.Raw(b"\\x91" * 100_000 + b"\\xc0")))

    async def misreading(self, request, served):
        honest = await HONEST(self, request, served)
        if request.method in {"Prepare", "ShowViews"}:
            sys.stderr.write(f"as the victim, at {request.method}: {await reach(self)}\\n")
        if request.method != "Prepare":
            return honest
        said = msgspec.msgpack.decode(honest[4:])  # ["result", id, body]
        for each in said[2]["maps"]:
            each["reader"] = "victim"
        return render_frame(Result(said[1], msgspec.Raw(msgspec.msgpack.encode(said[2]))))

    async def reach(self):
        try:
            return repr(await self.call("Relay", RelayRequest(owner="victim"), RelayMade))
        except Exception as error:
            return f"refused: {error}"

    nsfs.worker.main = main
"""
_NAIVE = """
    nsfs.serve.wire.decode_body = lambda body, kind: msgspec.msgpack.decode(body, type=kind)
    nsfs.core.worker_api.check_maps = lambda answer, owner: None
"""
LIARS = ("nothing", "numbers", "names", "many", "deep", "status", "held")


def visit(daemon: Daemon, namespace: str) -> None:
    """Have the namespace's worker started."""
    daemon.nsfs("stat", "oci:/nonexistent:/x", "--namespace", namespace, check=False)


def test_a_daemon_that_believes_its_workers_ends_by_a_word_of_one(arena: Path) -> None:
    with mortal_daemons(str(arena / "d")) as start, hooked(arena, _LYING, _NAIVE):
        daemon = start()
        visit(daemon, "nothing")
        assert "Expected `object`, got `None`" in daemon.said("ValidationError: ")
        deadline = time.monotonic() + 30
        while daemon.nsfs("status", check=False).returncode == 0:
            assert time.monotonic() < deadline, daemon.tail()


def test_what_workers_say_ends_nobody_and_stays_what_can_be_said_on(arena: Path) -> None:
    with hooked(arena, _LYING), run_daemon(str(arena / "d")) as daemon:
        for liar in LIARS:
            visit(daemon, liar)
        visit(daemon, "honest")
        pid = daemon.workers()["ns/honest"]
        for liar in (*LIARS, "honest"):
            assert daemon.json("ns", "show", liar)
        for command in (["status"], ["ns", "ls"], ["cache", "ls"]):
            assert daemon.json(*command) is not None
        assert daemon.workers()["ns/honest"] == pid
        log = Path(daemon.log).read_text()
        assert "Traceback" not in log
        assert "a bug" not in log


def read_as_another(arena: Path) -> tuple[int, str]:
    """How a mount ends whose worker says that somebody else reads it; what that worker gets in that one's name."""
    image = Image((gzip_layer([file("f", b"x" * 5000)]),))
    with FakeRegistry() as registry, run_daemon(str(arena / "d")) as daemon:
        (arena / "m").mkdir()
        options = ("--isolation", "shared", "--namespace", "a")
        done = daemon.nsfs("mount", publish(registry, image, "x"), str(arena / "m"), *options, check=False)
        assert "nobody called" in daemon.said("as the victim, at Prepare: refused")
        return done.returncode, Path(daemon.log).read_text()


def test_a_daemon_that_believes_who_reads_lends_anybodys_worker(arena: Path) -> None:
    with hooked(arena, _LYING, _NAIVE):
        _, log = read_as_another(arena)
    assert "as the victim, at ShowViews: RelayMade" in log


def test_a_shared_worker_reads_for_nobody_who_did_not_ask(arena: Path) -> None:
    with hooked(arena, _LYING):
        code, log = read_as_another(arena)
    assert code == 6
    assert "RelayMade" not in log
