"""`nsfs mount --profile`: what one start read first is there before the next one asks."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from images import Image, file, gzip_layer
from meter import Meter
from nsfs_daemon import Daemon, run_daemon
from users import noise, push, read, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from registry import Registry

DRIVERS = ("erofs", "fuse")
SIZE = 300_000
FILES = 16


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
    """Also where the registry is away by the time of the reads; the rest of the image stays where it is."""
    layers = [contents(layer, random.Random(driver).randrange(1 << 40)) for layer in range(2)]
    image = Image(tuple(gzip_layer([file(*item) for item in files.items()]) for files in layers))
    push(image, registry, tmp_path, f"profiled-{driver}")
    first = {name: files[name] for files in layers for name in list(files)[5::9]}
    target, whole = str(arena / "mnt"), 2 * FILES * SIZE
    with Meter(registry.host) as meter:
        reference = f"{meter.host}/profiled-{driver}"
        options = ("--driver", driver, "--on-error", "eio")
        with daemon.mounted(reference, target, *options):
            wait_until(lambda: local(daemon) >= whole, "all is local")
        daemon.nsfs("evict", reference)
        with daemon.mounted(reference, target, *options, "--profile", "record"):
            assert {name: read(f"{target}/{name}") for name in first} == first
        daemon.nsfs("evict", reference)
        with daemon.mounted(reference, target, *options, "--profile", "off"):
            assert local(daemon) == 0
        with daemon.mounted(reference, target, *options):
            wait_until(lambda: logged(daemon, "prefetched") == 1 + DRIVERS.index(driver), "the prefetch")
            meter.down()
            assert {name: read(f"{target}/{name}") for name in first} == first
            assert len(first) * SIZE <= local(daemon) < whole


def logged(daemon: Daemon, words: str) -> int:
    """How often the daemon's log says that."""
    return read(daemon.log).count(words.encode())


def local(daemon: Daemon) -> int:
    """Bytes of the one mount's image that are there."""
    (mount,) = daemon.json("status")["mounts"]
    return int(mount["local"])
