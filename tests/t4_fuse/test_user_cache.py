"""A cap on what pools take, what is pinned, and what runs without a registry."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from images import Image, file, gzip_layer
from nodes import wait_until
from nsfs_daemon import Daemon, run_daemon
from users import estargz_layer, noise, push, read

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from meter import Meter
    from registry import Registry

SIZE = 3 << 20
CAP = 12 << 20
UNREACHABLE = 5


def capped(tmp_path: Path, most: int) -> AbstractContextManager[Daemon]:
    pool = {"max_bytes": most, "reserve": 0, "low": 0.6}
    return run_daemon(str(tmp_path / "daemon"), {"pool": pool, "namespace.small": {"quota": 2 * SIZE}})


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with capped(tmp_path, CAP) as running:
        yield running


def use(daemon: Daemon, reference: str, arena: Path, namespace: str = "default") -> None:
    """Mount an image, and read it."""
    with daemon.mounted(reference, str(arena / "mnt"), "--namespace", namespace):
        assert len(read(f"{arena}/mnt/f")) == SIZE


def made(registry: Registry, meter: Meter, arena: Path, number: int) -> str:
    push(Image((gzip_layer([file("f", noise(SIZE, number))], level=1),)), registry, arena, f"cache-{number}")
    return f"{meter.host}/cache-{number}:latest"


def local(daemon: Daemon) -> dict[str, int]:
    """Bytes of each image in the pools."""
    return {image["reference"]: image["local"] for image in daemon.json("cache", "ls")["images"]}


def settled(daemon: Daemon, most: int) -> dict[str, Any]:
    assert wait_until(lambda: daemon.json("cache", "ls")["used"] <= most)
    found = daemon.json("cache", "ls")
    assert found["state"] == "ready"
    return dict(found)


def test_what_was_used_long_ago_goes_and_comes_back(
    daemon: Daemon, registry: Registry, meter: Meter, arena: Path
) -> None:
    images = [made(registry, meter, arena, number) for number in range(5)]
    for image in images:
        use(daemon, image, arena)
    assert settled(daemon, CAP)["cap"] == CAP
    found = local(daemon)
    assert found[images[0]] == 0
    assert found[images[-1]] >= SIZE
    with daemon.mounted(images[0], str(arena / "mnt")):
        assert read(f"{arena}/mnt/f") == noise(SIZE, 0)


def test_what_is_pinned_or_mounted_stays(registry: Registry, meter: Meter, arena: Path, tmp_path: Path) -> None:
    """While idle ones are enough, with what is being read, and spooled, beside them."""
    pinned, mounted, *others = (made(registry, meter, arena, number) for number in range(10, 19))
    (arena / "held").mkdir()
    with capped(tmp_path, 2 * CAP) as daemon:
        use(daemon, pinned, arena)
        daemon.nsfs("pin", pinned)
        refused = daemon.nsfs("evict", pinned, check=False)
        assert refused.returncode == 8
        assert "pinned" in refused.stderr
        with daemon.mounted(mounted, str(arena / "held")):
            for image in others:
                use(daemon, image, arena)
            settled(daemon, 2 * CAP)
            found = local(daemon)
            assert min(found[pinned], found[mounted]) >= SIZE
            assert found[others[0]] == 0
        assert {i["reference"]: i["pinned"] for i in daemon.json("cache", "ls")["images"]}[pinned]
        daemon.nsfs("unpin", pinned)
        assert daemon.json("evict", pinned)["freed"] >= SIZE
        assert daemon.nsfs("unpin", pinned, check=False).returncode == 3


def test_a_namespace_has_its_quota(daemon: Daemon, registry: Registry, meter: Meter, arena: Path) -> None:
    images = [made(registry, meter, arena, number) for number in range(20, 22)]
    use(daemon, images[0], arena)
    for image in images:
        use(daemon, image, arena, "small")
    daemon.json("cache", "ls")
    found = [(i["domain"], i["local"] > 0) for i in daemon.json("cache", "ls")["images"] if i["reference"] in images]
    assert ("ns/default", True) in found
    assert daemon.json("ns", "show", "small")["quota"] == 2 * SIZE
    assert sorted(found) == [("ns/default", True), ("ns/small", False), ("ns/small", True)]


def test_an_image_larger_than_the_cap_mounts_and_says_so(
    daemon: Daemon, registry: Registry, meter: Meter, arena: Path
) -> None:
    files = {f"f{number}": noise(SIZE, 50 + number) for number in range(5)}
    layers = tuple(gzip_layer([file(name, data)], level=1) for name, data in files.items())
    push(Image(layers), registry, arena, "large")
    reference = f"{meter.host}/large:latest"
    (arena / "mnt").mkdir()
    said = daemon.nsfs("mount", reference, str(arena / "mnt")).stderr
    assert "larger than what pools may take, and whole here only if pinned: 15.0 MiB of 12.0 MiB" in said
    for name, data in files.items():
        assert read(f"{arena}/mnt/{name}") == data
    settled(daemon, CAP)
    for name, data in files.items():
        assert read(f"{arena}/mnt/{name}") == data
    daemon.nsfs("umount", str(arena / "mnt"))


def test_pruning_says_what_would_go_and_spares_what_was_used(
    daemon: Daemon, registry: Registry, meter: Meter, arena: Path
) -> None:
    image = made(registry, meter, arena, 30)
    use(daemon, image, arena)
    assert daemon.json("cache", "prune", "--older", "1d") == {"layers": 0, "freed": 0}
    assert daemon.json("cache", "prune", "--dry-run")["freed"] >= SIZE
    assert local(daemon)[image] >= SIZE
    assert daemon.json("cache", "prune")["freed"] >= SIZE
    assert local(daemon)[image] == 0
    wrong = daemon.nsfs("cache", "prune", "--older", "soon", check=False)
    assert (wrong.returncode, "not a duration" in wrong.stderr) == (2, True)


def test_a_pinned_image_becomes_complete_and_needs_no_registry(
    tmp_path: Path, registry: Registry, meter: Meter, arena: Path
) -> None:
    push(Image((estargz_layer([file("f", noise(SIZE, 40))]),)), registry, arena, "pinned")
    reference = f"{meter.host}/pinned:latest"
    with run_daemon(str(tmp_path / "d")) as daemon:
        unknown = daemon.nsfs("offline", reference, check=False)
        assert (unknown.returncode, "nothing is known" in unknown.stdout) == (UNREACHABLE, True)
        with daemon.mounted(reference, str(arena / "mnt")):
            lacking = daemon.nsfs("offline", reference, "--json", check=False)
            assert lacking.returncode == UNREACHABLE
            assert f'"absent": {SIZE}' in lacking.stdout
        assert daemon.json("pin", reference)["absent"] == SIZE
        assert wait_until(lambda: daemon.nsfs("offline", reference, check=False).returncode == 0)
        meter.down()
    assert os.path.exists(f"{tmp_path}/d/root/domains/ns%2Fdefault/CACHEDIR.TAG")
    with run_daemon(str(tmp_path / "d")) as daemon, daemon.mounted(reference, str(arena / "mnt")):
        assert read(f"{arena}/mnt/f") == noise(SIZE, 40)
        assert daemon.json("offline", reference)["complete"] is True


def test_what_is_in_use_becomes_complete_behind_whoever_reads(
    tmp_path: Path, registry: Registry, meter: Meter, arena: Path
) -> None:
    push(Image((estargz_layer([file("f", noise(SIZE, 50))]),)), registry, arena, "used")
    reference, target = f"{meter.host}/used:latest", str(arena / "mnt")
    with run_daemon(str(tmp_path / "d"), {"fetch": {"complete": True}}) as daemon, daemon.mounted(reference, target):
        assert wait_until(lambda: local(daemon)[reference] >= SIZE, 60)
        meter.down()
        assert read(f"{target}/f") == noise(SIZE, 50)
        assert daemon.json("evict", reference)["freed"] >= SIZE
        (mount,) = daemon.json("status")["mounts"]
        assert (mount["completing"], mount["local"]) == (False, 0)
