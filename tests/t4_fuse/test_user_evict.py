"""`nsfs evict`: content goes, comes back by ranges, and is never wrong in between."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from images import Image, file, gzip_layer, tar_layer, zstd_layer
from nsfs_daemon import Daemon, run_daemon
from users import cat, drop_pages, estargz_layer, noise, push, read

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from meter import Meter
    from registry import Registry

FILES = {f"f{number:02}": noise(150_000, 100 + number) for number in range(40)}
FILES["f20-small"] = noise(5_000, 99)
ITEMS = [file(name, data) for name, data in sorted(FILES.items())]
SIZE = sum(map(len, FILES.values()))
LAYERS = {
    "tar": lambda: tar_layer(ITEMS),
    "gzip": lambda: gzip_layer(ITEMS, level=1),
    "zstd-frames": lambda: zstd_layer(ITEMS, frames=12),
    "estargz": lambda: estargz_layer(ITEMS),
}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with run_daemon(str(tmp_path_factory.mktemp("daemon")), {"fetch": {"read_ahead": 0}}) as running:
        yield running


@pytest.mark.parametrize(("kind", "driver"), [*((kind, "erofs") for kind in LAYERS), ("gzip", "fuse")])
def test_a_file_comes_back_alone_and_then_all_of_them(
    daemon: Daemon, registry: Registry, meter: Meter, arena: Path, kind: str, driver: str
) -> None:
    layer = LAYERS[kind]()
    push(Image((layer,)), registry, arena, f"evicted-{kind}")
    reference, target = f"{meter.host}/evicted-{kind}", str(arena / "mnt")
    names = ("--namespace", f"evicted-{kind}-{driver}")
    with daemon.mounted(reference, target, *names):
        assert read(f"{target}/f00") == FILES["f00"]
    evicted = daemon.json("evict", reference, *names)
    assert evicted["layers"] == 1
    assert evicted["freed"] > (0 if kind == "estargz" else SIZE)
    before = meter.served(layer.digest)
    with daemon.mounted(reference, target, "--driver", driver, *names) as report:
        assert report["local"] == 0
        assert read(f"{target}/f20-small") == FILES["f20-small"]
        assert 0 < meter.served(layer.digest) - before < len(layer.blob) / 3
        assert {name: read(f"{target}/{name}") for name in sorted(FILES)} == FILES
        (mount,) = [one for one in daemon.json("status")["mounts"] if one["target"] == target]
        assert SIZE < mount["local"] < SIZE + 4096 * len(FILES)
    assert meter.served(layer.digest) - before < 1.5 * len(layer.blob)


@pytest.mark.parametrize("driver", ["erofs", "fuse"])
def test_evicting_under_readers_never_gives_them_wrong_bytes(
    daemon: Daemon, registry: Registry, meter: Meter, arena: Path, driver: str
) -> None:
    layers = [gzip_layer(ITEMS[:20], level=1), zstd_layer(ITEMS[20:], frames=5)]
    push(Image(layers), registry, arena, "busy")
    reference, target, names = f"{meter.host}/busy", str(arena / "mnt"), ("--namespace", f"busy-{driver}")
    stop, wrong, passes = threading.Event(), list[str](), [0]

    def read_on() -> None:
        while not stop.is_set():
            for name, data in FILES.items():
                drop_pages(f"{target}/{name}")
                if read(f"{target}/{name}") != data:
                    wrong.append(name)
            passes[0] += 1

    with daemon.mounted(reference, target, "--driver", driver, *names):
        reader = threading.Thread(target=read_on)
        reader.start()
        try:
            freed = sum(daemon.json("evict", reference, *names)["freed"] for _ in range(4))
        finally:
            stop.set()
            reader.join()
    assert wrong == []
    assert passes[0] >= 1
    assert freed > SIZE


def test_evicting_what_is_not_here_frees_nothing(daemon: Daemon, registry: Registry, meter: Meter, arena: Path) -> None:
    layer = gzip_layer([file("a", noise(100_000, 1))])
    push(Image((layer,)), registry, arena, "unknown")
    done = daemon.nsfs("evict", f"{meter.host}/unknown", "--namespace", "unknown")
    assert done.stderr == "freed 0 B of 0 layers\n"
    assert meter.served(layer.digest) == 0
    missing = daemon.nsfs("evict", f"{meter.host}/missing", check=False)
    assert missing.returncode == 3


def test_evicting_while_the_registry_is_gone_is_clear(
    daemon: Daemon, registry: Registry, meter: Meter, arena: Path
) -> None:
    layer = gzip_layer([file("a", noise(300_000, 2))])
    push(Image((layer,)), registry, arena, "gone")
    names = ("--namespace", "gone")
    with daemon.mounted(f"{meter.host}/gone", str(arena / "mnt"), *names):
        pass
    daemon.nsfs("evict", f"{meter.host}/gone", *names)  # waits for checkpoints
    assert cat(daemon, f"{meter.host}/gone:/a", *names) == noise(300_000, 2)
    meter.down()
    done = daemon.nsfs("evict", f"{meter.host}/gone", *names)
    assert "of 1 layer" in done.stderr
    lost = daemon.nsfs("cat", f"{meter.host}/gone:/a", *names, check=False)
    assert (lost.returncode, lost.stdout) == (5, "")
    assert "the registry does not answer" in lost.stderr
    never = daemon.nsfs("evict", f"{meter.host}/never", *names, check=False)
    assert never.returncode == 5
    meter.up()
    assert daemon.nsfs("ls", f"{meter.host}/gone:/", *names).stdout == "a\n"
