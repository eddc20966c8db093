"""`nsfs mount --profile`: what one start read first is there before the next one asks."""

from __future__ import annotations

import pathlib
import random
import time
from typing import TYPE_CHECKING

import pytest

from images import Image, file, gzip_layer
from meter import Meter, Served
from nsfs_daemon import Daemon, run_daemon
from page_cache import cached_pages
from users import noise, push, read, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from registry import Registry

DRIVERS = ("erofs", "fuse")
SIZE = 600_000
FILES = 12
PAGES = 49
"""Of a third of it."""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with run_daemon(str(tmp_path_factory.mktemp("daemon"))) as running:
        yield running


def contents(layer: int, seed: int) -> dict[str, bytes]:
    """Files of one layer, none of which compresses."""
    return {f"d{layer}/{number}": noise(SIZE, seed + 100 * layer + number) for number in range(FILES)}


@pytest.mark.parametrize("driver", DRIVERS)
def test_what_a_recorded_start_read_is_prefetched(
    daemon: Daemon, registry: Registry, arena: Path, tmp_path: Path, driver: str
) -> None:
    """Also where the registry is away by then, and what another image has in memory; the rest stays where it is."""
    layers = [contents(layer, random.Random(driver).randrange(1 << 40)) for layer in range(2)]
    image = Image(tuple(gzip_layer([file(*item) for item in files.items()]) for files in layers))
    push(image, registry, tmp_path, f"profiled-{driver}")
    push(Image(image.layers[:1]), registry, tmp_path, f"base-{driver}")
    first = {name: files[name] for files in layers for name in list(files)[2::3]}
    target, whole = str(arena / "mnt"), 2 * FILES * SIZE
    with Meter(registry.host) as meter:
        reference = f"{meter.host}/profiled-{driver}"
        options = ("--driver", driver, "--on-error", "eio")
        with daemon.mounted(reference, target, *options):
            wait_until(lambda: local(daemon) >= whole, "all is local")
        daemon.nsfs("evict", reference)
        base = f"{meter.host}/base-{driver}"
        with (
            daemon.mounted(base, str(arena / "warm"), *options),
            daemon.mounted(reference, target, *options, "--profile", "record"),
        ):
            assert {name: read(arena / "warm" / name) for name in layers[0]} == layers[0]
            assert {name: read(f"{target}/{name}") for name in first} == first
        daemon.nsfs("evict", reference)
        with daemon.mounted(reference, target, *options, "--profile", "off"):
            assert local(daemon) == 0
        last, meter.hold_after = image.layers[1].digest, 1
        begun, before = len(meter.log), len(meter.blobs(last))
        with daemon.mounted(reference, target, *options):
            wait_until(lambda: len(meter.log) > begun + 1, "what was read first", 60)
            assert not any(covers(one, 11) for one in meter.blobs(last)[before:]), "what was read last comes last"
            meter.hold_after = None
            wait_until(lambda: logged(daemon, "prefetched") == 1 + DRIVERS.index(driver), "the prefetch")
            meter.down()
            assert {name: read(f"{target}/{name}") for name in first} == first
            assert len(first) * SIZE <= local(daemon) < whole


def test_what_is_known_of_a_start_is_shown(daemon: Daemon, registry: Registry, arena: Path, tmp_path: Path) -> None:
    push(Image((gzip_layer([file("one", noise(SIZE, 2))]),)), registry, tmp_path, "shown")
    reference, target = f"{registry.host}/shown", str(arena / "mnt")
    assert daemon.json("inspect", reference)["profile"] is None
    assert "not recorded" in daemon.nsfs("inspect", reference).stdout
    with daemon.mounted(reference, target, "--profile", "record"):
        read(f"{target}/one")
        (mount,) = daemon.json("status")["mounts"]
        assert mount["start"]["how"] == "recorded"
        assert mount["start"]["done"] >= SIZE
        assert "its start is recorded: " in daemon.nsfs("status").stdout
    known = daemon.json("inspect", reference)["profile"]
    assert known["size"] >= SIZE
    assert (known["flaw"], known["runs"]) == ("", 1)
    assert "; complete" in daemon.nsfs("inspect", reference).stdout


def test_a_profile_stays_in_its_namespace_and_ends_with_it(
    daemon: Daemon, registry: Registry, arena: Path, tmp_path: Path
) -> None:
    push(Image((gzip_layer([file("one", noise(SIZE, 1))]),)), registry, tmp_path, "alone")
    reference, target, before = f"{registry.host}/alone", str(arena / "mnt"), logged(daemon, "prefetched")
    with daemon.mounted(reference, target, "--namespace", "red", "--profile", "record"):
        read(f"{target}/one")
    assert [path.parent.parent.name for path in profiles(daemon)].count("ns%2Fred") == 1
    with daemon.mounted(reference, target, "--namespace", "blue"):
        read(f"{target}/one")
    assert logged(daemon, "prefetched") == before
    daemon.nsfs("ns", "rm", "red")
    assert "ns%2Fred" not in {path.parent.parent.name for path in profiles(daemon)}


def test_what_a_start_is_known_to_read_comes_into_memory(
    daemon: Daemon, registry: Registry, arena: Path, tmp_path: Path
) -> None:
    """Where all is local, by itself, and nothing else does; also when its files are known already."""
    files = {
        f"d{layer}/{number}": noise(SIZE // 3, 70_000 + 10 * layer + number) for layer in (0, 1) for number in range(5)
    }
    layers = [[file(*item) for item in files.items() if item[0].startswith(f"d{layer}")] for layer in (0, 1)]
    push(Image(tuple(map(gzip_layer, layers))), registry, tmp_path, "warm")
    reference, target, first = f"{registry.host}/warm", str(arena / "mnt"), ["d0/3", "d1/4", "d0/0"]
    with daemon.mounted(reference, target, "--profile", "record"):
        assert [read(f"{target}/{name}") for name in first] == [files[name] for name in first]
    for _ in range(2):
        wait_until(lambda: is_made_warm(daemon, reference, target, first), "a start that finds its files in memory", 60)


def is_made_warm(daemon: Daemon, reference: str, target: str, first: list[str]) -> bool:
    """Whether these files, and no others, come into memory with a mount; others may drop all caches any time."""
    with daemon.mounted(reference, target):
        deadline = time.monotonic() + 10
        while not all(cached(daemon, name) == PAGES for name in first):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        assert not any(cached(daemon, name) for name in ("d0/1", "d1/0", "d1/2"))
        return True


def cached(daemon: Daemon, name: str) -> int:
    """Pages of a file of some layer that are in memory, as its view has it."""
    (path,) = pathlib.Path(daemon.run).glob(f"l/*/{name}")
    return cached_pages(str(path), 0, SIZE)


def covers(one: Served, number: int) -> bool:
    """Whether what was asked for has that file of a layer."""
    return one.first // SIZE <= number < -(-(one.first + one.size) // SIZE)


def profiles(daemon: Daemon) -> list[Path]:
    """The files of all that are kept."""
    return list(pathlib.Path(daemon.root).glob("domains/*/profiles/*"))


def logged(daemon: Daemon, words: str) -> int:
    """How often the daemon's log says that."""
    return read(daemon.log).count(words.encode())


def local(daemon: Daemon) -> int:
    """Bytes of the one mount's image that are there."""
    (mount,) = daemon.json("status")["mounts"]
    return int(mount["local"])
