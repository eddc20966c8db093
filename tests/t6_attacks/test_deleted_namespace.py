"""Who gets the disk after a namespace was deleted: neither its contents nor its names are on it.

The root lies on a filesystem of its own, and what is searched is the block device below it: also blocks that are free,
the journal, and files that were replaced. The same search finds every canary where nothing is encrypted.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from fakes import FakeRegistry
from images import Image, Layer, file, gzip_layer, symlink, tar_layer
from mounting import swept
from nsfs.errors import NotFoundError
from nsfs.model.pool import LayerKey
from nsfs.store.layers import open_table
from nsfs.store.spool import Spool
from nsfs_daemon import Daemon, run_daemon
from published import estargz_layer, publish

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from nsfs.store.layers import LayerTable

DEADLINE = 60.0
CONTENT = b"canary: what is in the file, and nobody else's "
NAME, LINK, ATTRIBUTE = b"canary-name-of-a-file", b"/canary-target-of-a-link", b"canary-attribute"
VARIABLE = b"CANARY_VARIABLE=of-the-configuration"


def text(seed: str, size: int) -> bytes:
    """What compresses, so that its spans have windows, and says everywhere whose it is."""
    words = random.Random(seed)
    lines = (CONTENT + b"%016x\n" % words.getrandbits(64) for _ in range(size // 64 + 1))
    return b"".join(lines)[:size]


@dataclass(frozen=True)
class Site:
    """Images in a registry; `half` is one whose download stops half-way."""

    registry: FakeRegistry
    plain: Layer
    promised: Layer
    half: Layer

    @classmethod
    def fill(cls, registry: FakeRegistry) -> Site:
        name = NAME.decode()
        attributes = {"user.canary": ATTRIBUTE}
        plain = gzip_layer(
            [file(f"{name}-1", text("1", 5 << 20), xattrs=attributes), symlink("link", LINK), file("d/other", b"x")]
        )
        promised = estargz_layer([file(f"{name}-2", text("2", 1 << 20))])
        half = tar_layer([file(f"{name}-3", text("3", 6 << 20))])
        return cls(registry, plain, promised, half)

    def publish(self) -> tuple[str, str]:
        whole = publish(self.registry, Image((self.plain, self.promised), config={"Env": [VARIABLE.decode()]}), "whole")
        return whole, publish(self.registry, Image((self.half,)), "half")


def wait_for(ready: Callable[[], bool], what: str, daemon: Daemon) -> None:
    deadline = time.monotonic() + DEADLINE
    while not ready():
        assert time.monotonic() < deadline, f"{what}\n{daemon.tail()}"
        time.sleep(0.05)


def key_of(layer: Layer) -> LayerKey:
    return LayerKey(layer.digest, "plain")


def spans_of(daemon: Daemon, layer: Layer) -> LayerTable | None:
    """The layer's table, once checkpoints are made."""
    layout = daemon.layout("ns/doomed")
    try:
        table = open_table(layout.layer_dir(key_of(layer)), layout.key)
    except NotFoundError:
        return None
    return table if table.has_spans else None


def live(daemon: Daemon, site: Site, target: str) -> None:
    """All that a namespace does: has checkpoints made, mounts, reads and has that recorded, begins another image."""
    whole, half = site.publish()
    scope = ("--namespace", "doomed")
    with daemon.mounted(whole, target, *scope):
        pass
    daemon.nsfs("evict", whole, *scope)
    assert spans_of(daemon, site.plain) is not None
    with daemon.mounted(whole, target, *scope, "--profile", "record"):
        names = sorted(os.listdir(target))
        assert [name for name in names if "canary" in name] == [f"{NAME.decode()}-{n}" for n in (1, 2)]
        for name in names[:2]:
            with open(f"{target}/{name}", "rb") as opened:
                assert opened.read().startswith(CONTENT)
        assert os.fsencode(os.readlink(f"{target}/link")) == LINK
    site.registry.faults_on, site.registry.script = site.half.digest.hex, "H"
    with daemon.started("mount", half, target, *scope) as mount:
        wait_for(lambda: spooled(daemon, site.half) > len(site.half.blob) // 3, "the spool", daemon)
        mount.send_signal(signal.SIGINT)
        mount.wait(DEADLINE)


def spooled(daemon: Daemon, layer: Layer) -> int:
    layout = daemon.layout("ns/doomed")
    return Spool(layout.spool(key_of(layer)), layout.key).size()


def canaries(window: bytes, site: Site) -> dict[str, bytes]:
    """What is searched for; the blob's digest tells which image it was."""
    return {
        "content": CONTENT,
        "name": NAME,
        "target": LINK,
        "attribute": ATTRIBUTE,
        "configuration": VARIABLE,
        "window": window,
        "digest": site.half.digest.hex.encode(),
        "profile": b"nsfsprof",
        "table of contents": site.promised.digest.hex.encode(),
    }


@dataclass
class Disk:
    """A filesystem in a file."""

    image: str
    path: str

    def found(self, wanted: dict[str, bytes]) -> set[str]:
        """Which of `wanted` are anywhere on it, used or free."""
        subprocess.run(["sync", "-f", self.path], check=True)
        with open(self.image, "rb") as opened:
            data = opened.read()
        return {name for name, canary in wanted.items() if canary in data}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    image, path = tmp_path / "ext4", tmp_path / "disk"
    path.mkdir()
    with image.open("wb") as opened:
        opened.truncate(96 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-b", "4096", "-m", "0", image], check=True)
    with swept(tmp_path):
        subprocess.run(["mount", "-o", "loop", image, path], check=True)
        yield Disk(str(image), str(path))
        subprocess.run(["umount", path], check=True)


@pytest.fixture
def site() -> Iterator[Site]:
    with FakeRegistry() as registry:
        yield Site.fill(registry)


def window_of(daemon: Daemon, layer: Layer) -> bytes:
    """Some of what a window of the layer's is on disk where nothing is encrypted."""
    table = spans_of(daemon, layer)
    assert table is not None
    return max((table.span(number).window for number in range(len(table))), key=len)[8:40]


def test_the_search_finds_all_of_it_where_nothing_is_encrypted(disk: Disk, site: Site, tmp_path: Path) -> None:
    with run_daemon(f"{disk.path}/nsfs", {"encrypt": "off"}) as daemon:
        (tmp_path / "mnt").mkdir()
        live(daemon, site, str(tmp_path / "mnt"))
        wanted = canaries(window_of(daemon, site.plain), site)
        assert disk.found(wanted) == set(wanted)
        daemon.nsfs("ns", "rm", "doomed")
        assert not os.path.exists(daemon.layout("ns/doomed").path)
        assert disk.found(wanted) >= {"content", "name"}, "what was deleted is still in free blocks"


def test_nothing_of_a_deleted_namespace_is_on_its_disk(disk: Disk, site: Site, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    with run_daemon(f"{disk.path}/nsfs") as daemon:
        live(daemon, site, str(tmp_path / "mnt"))
        layout = daemon.layout("ns/doomed")
        assert layout.key is not None
        wanted = canaries(window_of(daemon, site.plain), site) | {"key": layout.key.secret}
        assert disk.found(wanted) == {"key"}, "while it lives"
        daemon.nsfs("ns", "rm", "doomed")
        assert not os.path.exists(layout.path)
        assert disk.found(wanted) == set()
    assert disk.found(wanted) == set()


def test_a_pod_leaves_nothing_and_its_key_is_never_on_disk(disk: Disk, site: Site, tmp_path: Path) -> None:
    whole, _ = site.publish()
    target = str(tmp_path / "mnt")
    with run_daemon(f"{disk.path}/nsfs") as daemon:
        with daemon.mounted(whole, target, "--isolation", "pod"):
            (name,) = [name for name in os.listdir(target) if name.endswith("-1")]
            with open(f"{target}/{name}", "rb") as opened:
                assert opened.read().startswith(CONTENT)
            assert not os.path.exists(f"{daemon.root}/keys")
            assert disk.found(canaries(CONTENT, site)) == set()
        assert disk.found(canaries(CONTENT, site)) == set()
