"""A daemon that starts while every registry is gone and every credential has expired, and how its mounts heal."""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from fakes import FakeRegistry
from images import Image, file, gzip_layer
from mounting import swept
from nodes import wait_until
from nsfs.store.index import FIRST_ADDRESS
from nsfs.store.poolfiles import BLOCK
from nsfs_daemon import mortal_daemons, sweep
from published import estargz_layer, publish
from snapshots_api import Backend, mounted

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from nsfs_daemon import Daemon

NAME = "healing"
FOR_EVER = 100_000
HEALED = 60.0
"""Seconds until what failed is tried again at the latest, and more for a busy machine."""
PATIENCE = {"waits": "wait", "fails": "wait:1s"}
LOCAL = {"d/local": random.Random("local").randbytes(200_000), "etc/base": b"base"}
BLOCKS = sum(-(-len(data) // BLOCK) for data in LOCAL.values())
ABSENT = {f"d/absent{number}": random.Random(number).randbytes(200_000) for number in range(3)}


class Site:
    """A registry that asks who is there, and one daemon after the other."""

    def __init__(self, start: Callable[[], Daemon], registry: FakeRegistry, top: Path) -> None:
        self._start = start
        self.registry = registry
        self.top = top
        base = gzip_layer([file("etc/base", LOCAL["etc/base"])])
        files = {"d/local": LOCAL["d/local"], **ABSENT}
        layer = estargz_layer([file(path, data) for path, data in files.items()], chunk_size=1 << 17)
        self.image = Image((base, layer))
        self.reference = publish(registry, self.image, NAME)
        self.admit("old")
        self.daemon = start()

    def admit(self, password: str) -> None:
        """Nobody gets in from now on but by this password, and we know it."""
        said = f"ann:{password}"
        self.registry.rights = {said: {NAME}}
        auth = base64.b64encode(said.encode()).decode()
        (self.top / "config.new").write_text(json.dumps({"auths": {self.registry.host: {"auth": auth}}}))
        os.replace(self.top / "config.new", self.top / "config.json")

    def lose_everything(self, *, boots: bool) -> None:
        """No daemon, no worker, no registry; and no mounts, where the machine boots."""
        if boots:
            assert wait_until(lambda: self.durable_blocks() >= BLOCKS, HEALED)
        (worker,) = self.daemon.workers().values()
        os.kill(self.daemon.pid, signal.SIGKILL)
        os.kill(worker, signal.SIGKILL)
        self.registry.faults_on, self.registry.script = "/", "X" * FOR_EVER
        self.registry.rights = {"ann:new": {NAME}}
        if boots:
            sweep(str(self.top))
            shutil.rmtree(self.daemon.run)
        self.daemon = self._start()

    def mount(self) -> None:
        for name, patience in PATIENCE.items():
            os.makedirs(self.top / name, exist_ok=True)
            self.daemon.nsfs("mount", self.reference, str(self.top / name), "--on-error", patience)

    def durable_blocks(self) -> int:
        """That are there after a boot, too."""
        with open(self.daemon.layout().present, "rb") as present:
            present.seek(FIRST_ADDRESS // BLOCK // 8)
            return int.from_bytes(present.read(1 << 16), "little").bit_count()

    def waiting(self) -> int:
        return sum(domain["waiting"] for domain in self.daemon.json("status")["domains"])


def reads(root: Path, name: str) -> bool:
    """Whether the right bytes come, and not an error."""
    try:
        return (root / name).read_bytes() == ABSENT[name]
    except OSError:
        return False


@pytest.mark.parametrize(
    "boots", [pytest.param(False, marks=pytest.mark.soak, id="killed"), pytest.param(True, id="booted")]
)
def test_all_that_is_local_reads_and_the_rest_heals_by_itself(tmp_path: Path, boots: bool) -> None:
    settings = {"registry": {"docker_config": str(tmp_path / "config.json")}, "fetch": {"read_ahead": 0}}
    with ExitStack() as stack:
        stack.enter_context(swept(tmp_path))
        registry = stack.enter_context(FakeRegistry(auth="basic"))
        site = Site(stack.enter_context(mortal_daemons(str(tmp_path / "daemon"), settings)), registry, tmp_path)
        site.mount()
        with Backend(site.daemon.socket) as backend:
            container = backend.name("default", "container")
            backend.prepare(container, backend.pull("default", site.image, site.reference)[-1])
        for name, data in LOCAL.items():
            assert (tmp_path / "waits" / name).read_bytes() == data

        site.lose_everything(boots=boots)
        if boots:
            site.mount()
        assert len(site.daemon.json("status")["mounts"]) == len(PATIENCE)
        backend = stack.enter_context(Backend(site.daemon.socket))
        root = stack.enter_context(mounted(backend.mounts(container), tmp_path / "container"))
        for top in (*map(tmp_path.joinpath, PATIENCE), root):
            assert {name: (top / name).read_bytes() for name in LOCAL} == LOCAL
        with pytest.raises(OSError, match="Input/output error"):
            (tmp_path / "fails/d/absent0").read_bytes()

        threads = stack.enter_context(ThreadPoolExecutor(1))
        waiter = threads.submit((tmp_path / "waits/d/absent1").read_bytes)
        assert wait_until(lambda: site.waiting() > 0, HEALED)
        site.admit("new")
        registry.script = ""
        assert waiter.result(HEALED) == ABSENT["d/absent1"]
        assert wait_until(lambda: reads(tmp_path / "fails", "d/absent0"), HEALED)
        assert wait_until(lambda: reads(root, "d/absent2"), HEALED)
        assert "Traceback" not in site.daemon.tail()
