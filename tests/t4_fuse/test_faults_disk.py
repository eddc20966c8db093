"""A pool's filesystem that is full, and processes that are killed while a pool is written."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import signal
import struct
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, BinaryIO

import pytest

from fakes import FakeRegistry
from images import Image, Layer, file, gzip_layer
from mounting import swept
from nodes import wait_until
from nsfs.model.pool import LayerKey
from nsfs.store.index import open_index
from nsfs.store.layers import open_table
from nsfs.store.pool import open_pool
from nsfs.store.poolfiles import create_bitmap
from nsfs.store.spool import Spool
from nsfs_daemon import Daemon, mortal_daemons, run_daemon, stored_domain
from published import publish

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from nsfs.store.layout import DomainLayout

SETTINGS = {"fetch": {"read_ahead": 0}, "pool": {"reserve": 0}}
NO_SPACE = 7
LOOP_SET_STATUS64, LOOP_GET_STATUS64 = 0x4C04, 0x4C05
LOOP_STATUS, LOOP_SIZE_LIMIT = 232, 32
"""Bytes of struct loop_info64, and where lo_sizelimit is in it."""
FLUSHED = 6.0
"""Seconds after which what was written is durable: a worker flushes every 5."""


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as running:
        yield running


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 filesystem of 128 MiB."""
    image, target = tmp_path / "ext4", tmp_path / "small"
    target.mkdir()
    with image.open("wb") as opened:
        opened.truncate(128 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-b", "4096", "-m", "0", image], check=True)
    with swept(tmp_path):
        subprocess.run(["mount", "-o", "loop,errors=remount-ro", image, target], check=True)
        yield target
        subprocess.run(["umount", target], check=True)


def make(seed: str, size: int = 1 << 20, count: int = 24) -> tuple[dict[str, bytes], Layer]:
    files = {f"d/{n}": random.Random(f"{seed} {n}").randbytes(size) for n in range(count)}
    return files, gzip_layer([file(name, data) for name, data in files.items()], level=0)


def read(path: str) -> bytes:
    with open(path, "rb") as opened:
        return opened.read()


@contextlib.contextmanager
def filled(path: Path, left: int) -> Iterator[None]:
    """Take all but `left` bytes of a filesystem."""
    filler = path / "filler"
    subprocess.run(["sync", "-f", path], check=True)
    free = os.statvfs(path).f_bavail * 4096
    with filler.open("wb") as opened, contextlib.suppress(*([] if left else [OSError])):  # others write meanwhile
        os.posix_fallocate(opened.fileno(), 0, free - left)
    with filler.open("ab") as opened, contextlib.suppress(OSError):
        while not left:
            os.write(opened.fileno(), bytes(4096))
    try:
        yield
    finally:
        filler.unlink()
        subprocess.run(["sync", "-f", path], check=True)  # ext4 gives freed blocks out again once that is committed


def test_a_first_pass_into_a_full_disk_is_no_space_and_goes_on_by_range(
    registry: FakeRegistry, small_disk: Path, tmp_path: Path
) -> None:
    files, layer = make("full")
    reference = publish(registry, Image((layer,)), "full")
    target = tmp_path / "mnt"
    target.mkdir()
    with run_daemon(str(small_disk / "d"), SETTINGS) as daemon:
        daemon.nsfs("inspect", reference)
        with filled(small_disk, 20 << 20):  # less than the blob
            refused = daemon.nsfs("mount", reference, str(target), check=False)
            assert refused.returncode == NO_SPACE, refused.stderr
            assert "No space left" in refused.stderr
            layout = daemon.layout()
            # Nothing of it is kept; its addresses may be until the next worker starts, as giving them up takes room.
            assert os.stat(layout.disk).st_blocks * 512 < 1 << 20
            spooled = Spool(layout.spool(LayerKey(layer.digest, "plain")), layout.key).size()
            assert spooled > 4 << 20
        with daemon.mounted(reference, str(target)):
            assert {name: read(f"{target}/{name}") for name in files} == files
        asked = [each.headers.get("range", "") for each in registry.requests(path=layer.digest.hex)]
        assert asked == ["", f"bytes={spooled}-{len(layer.blob) - 1}"]
    with run_daemon(str(small_disk / "d"), SETTINGS) as daemon:
        daemon.nsfs("inspect", reference)  # its worker gives up what the index had no room to give up
        with open_index(layout.index, layout.key, readonly=True) as index:
            assert index.orphan_slabs() == []


def test_a_full_disk_under_a_mount_costs_speed_alone(registry: FakeRegistry, small_disk: Path, tmp_path: Path) -> None:
    files, layer = make("reads")
    reference = publish(registry, Image((layer,)), "reads")
    target = str(tmp_path / "mnt")
    with run_daemon(str(small_disk / "d"), SETTINGS) as daemon:
        with daemon.mounted(reference, target):
            pass
        daemon.nsfs("evict", reference)
        with daemon.mounted(reference, target):
            workers = daemon.workers()
            with filled(small_disk, 0):
                half = list(files)[:12]
                for name in half:
                    assert read(f"{target}/{name}") == files[name]
                time.sleep(FLUSHED)
                for name in half:
                    assert read(f"{target}/{name}") == files[name]
                assert "No space" in unkept(daemon)
            for name in list(files)[12:]:
                assert read(f"{target}/{name}") == files[name]
            (mount,) = daemon.json("status")["mounts"]
            assert mount["local"] >= 11 << 20
            assert unkept(daemon) == ""
        assert daemon.workers() == workers
        assert "Traceback" not in daemon.tail()


def unkept(daemon: Daemon) -> str:
    """Why the one domain keeps nothing of what it fetches."""
    (domain,) = daemon.json("status")["domains"]
    return str(domain["unkept"])


def local(daemon: Daemon) -> int:
    return int(daemon.json("status")["mounts"][0]["local"])


def test_the_reserve_is_left_alone_and_what_is_read_is_kept_again_when_there_is_room(
    registry: FakeRegistry, small_disk: Path, tmp_path: Path
) -> None:
    files, layer = make("reserve", 1 << 20, 12)
    reference = publish(registry, Image((layer,)), "reserve")
    target = str(tmp_path / "mnt")
    settings = {**SETTINGS, "pool": {"reserve": 32 << 20}}
    with run_daemon(str(small_disk / "d"), settings) as daemon, daemon.mounted(reference, target):
        daemon.nsfs("evict", reference)
        with filled(small_disk, 24 << 20):
            assert "reserve" in daemon.json("cache", "ls")["state"]
            assert "reserve" in unkept(daemon)
            assert "keeps nothing more: the reserve" in daemon.nsfs("status").stdout
            for name in list(files)[:4]:
                assert read(f"{target}/{name}") == files[name]
            os.kill(daemon.workers()["ns/default"], signal.SIGKILL)
            assert wait_until(lambda: daemon.json("cache", "ls") and "reserve" in unkept(daemon))
            for name in list(files)[4:8]:
                assert read(f"{target}/{name}") == files[name]
            assert local(daemon) == 0
            assert daemon.json("status")["pools"]["free"] >= 20 << 20
        assert daemon.json("cache", "ls")["state"] == "ready"
        assert unkept(daemon) == ""
        assert read(f"{target}/d/9") == files["d/9"]
        assert local(daemon) >= 1 << 20
        assert "Traceback" not in daemon.tail()


def test_a_disk_that_becomes_read_only_is_read_past_and_is_used_again_when_it_is_mended(
    registry: FakeRegistry, small_disk: Path, tmp_path: Path
) -> None:
    files, layer = make("ro", 1 << 20, 12)
    reference = publish(registry, Image((layer,)), "ro")
    target = tmp_path / "mnt"
    target.mkdir()
    settings = {**SETTINGS, "root": str(small_disk / "root")}
    with mortal_daemons(str(tmp_path / "d"), settings) as start:
        daemon = start()
        daemon.nsfs("mount", reference, str(target))
        daemon.nsfs("evict", reference)
        assert read(f"{target}/d/0") == files["d/0"]
        turn_read_only(small_disk)
        for _ in range(2):
            assert {name: read(f"{target}/{name}") for name in files} == files
        assert "Read-only" in unkept(daemon)
        daemon.nsfs("inspect", reference)
        assert "written down later" in daemon.nsfs("umount", str(target)).stderr
        assert not os.path.ismount(target)
        assert "Traceback" not in daemon.tail()
    image = tmp_path / "ext4"
    assert wait_until(lambda: subprocess.run(["umount", small_disk], check=False).returncode == 0)
    assert wait_until(lambda: not subprocess.check_output(["losetup", "-j", image]))
    subprocess.run(["mount", "-o", "loop", image, small_disk], check=True)
    with run_daemon(str(tmp_path / "d"), settings) as daemon, daemon.mounted(reference, str(target)):
        assert {name: read(f"{target}/{name}") for name in files} == files
        assert unkept(daemon) == ""
        assert local(daemon) >= 12 << 20


def turn_read_only(mountpoint: Path) -> None:
    """As ext4 does by itself when it finds an error: from one moment to the next, under open files."""
    device = subprocess.check_output(["findmnt", "-no", "SOURCE", mountpoint], text=True).strip()
    with open(f"/sys/fs/ext4/{os.path.basename(device)}/trigger_fs_error", "w", encoding="ascii") as trigger:
        trigger.write("1")


@pytest.fixture
def failing_disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 filesystem of 128 MiB that goes on after errors; see `failing`."""
    image, target = tmp_path / "ext4", tmp_path / "small"
    target.mkdir()
    with image.open("wb") as opened:
        opened.truncate(128 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-b", "4096", "-m", "0", "-O", "^has_journal", image], check=True)
    with swept(tmp_path):
        subprocess.run(["mount", "-o", "loop,errors=continue", image, target], check=True)
        yield target


@contextlib.contextmanager
def failing(mountpoint: Path) -> Iterator[None]:
    """The kernel refuses access to the blocks of files: the loop device ends behind the filesystem's own tables."""
    limit_loop(mountpoint, 8 << 20)
    try:
        yield
    finally:
        limit_loop(mountpoint, 0)


def limit_loop(mountpoint: Path, size: int) -> None:
    """Let a loop device end after `size` bytes, or with its file (loop(4), LOOP_SET_STATUS64)."""
    device = subprocess.check_output(["findmnt", "-no", "SOURCE", mountpoint], text=True).strip()
    status = bytearray(LOOP_STATUS)
    with open(device, "rb") as opened:
        fcntl.ioctl(opened, LOOP_GET_STATUS64, status)
        struct.pack_into("<Q", status, LOOP_SIZE_LIMIT, size)
        assert wait_until(lambda: not refused(opened, status))


def refused(device: BinaryIO, status: bytearray) -> bool:
    """EAGAIN while pages of the device are being written."""
    try:
        fcntl.ioctl(device, LOOP_SET_STATUS64, status)
    except BlockingIOError:
        return True
    return False


@pytest.mark.soak
def test_a_disk_that_fails_harms_no_reader_and_is_used_again(
    registry: FakeRegistry, failing_disk: Path, tmp_path: Path
) -> None:
    """Reads go on from the network, by the same worker."""
    files, layer = make("eio", 1 << 20, 12)
    reference = publish(registry, Image((layer,)), "eio")
    target = tmp_path / "mnt"
    target.mkdir()
    settings = {**SETTINGS, "root": str(failing_disk / "root")}
    with mortal_daemons(str(tmp_path / "d"), settings) as start, ThreadPoolExecutor(1) as threads:
        daemon = start()
        daemon.nsfs("mount", reference, str(target), "--on-error", "wait")
        daemon.nsfs("evict", reference)
        assert read(f"{target}/d/0") == files["d/0"]
        worker = daemon.workers()
        mapped = [str(path) for path in failing_disk.rglob("*mdb") if path.is_file()]
        time.sleep(FLUSHED)
        with failing(failing_disk):
            for _ in range(3):
                for path in mapped:  # as a kernel does that is short of memory
                    drop_pages(path)
                assert threads.submit(read_all, target, list(files)).result(60) == files
                time.sleep(FLUSHED / 2)
            assert daemon.workers() == worker
            assert unkept(daemon)
        os.kill(daemon.pid, signal.SIGKILL)
        daemon = start()
        assert wait_until(lambda: read_all(target, list(files)) == files and local(daemon) >= 12 << 20, 60)
        assert unkept(daemon) == ""
        daemon.nsfs("umount", str(target), check=False)  # it may hear of what was lost before
        assert wait_until(lambda: daemon.json("status")["mounts"] == [], 30)


def read_all(target: Path, names: list[str]) -> dict[str, bytes]:
    """What the filesystem below says, and not the page cache."""
    found = {}
    for name in names:
        drop_pages(f"{target}/{name}")
        found[name] = read(f"{target}/{name}")
    return found


def drop_pages(path: str) -> None:
    """Have the next read of `path` ask the filesystem below."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def test_what_is_claimed_after_kills_is_what_was_fetched(registry: FakeRegistry, tmp_path: Path) -> None:
    """Reads, evictions and kills in any order; then every block that the durable bitmap claims is compared."""
    files, layer = make("durable", 300_000, 30)
    reference = publish(registry, Image((layer,)), "durable")
    directory, target = str(tmp_path / "daemon"), str(tmp_path / "mnt")
    chance = random.Random(5)
    with swept(tmp_path), contextlib.suppress(RuntimeError), run_daemon(directory, SETTINGS) as daemon:
        with daemon.mounted(reference, target):
            pass
        daemon.nsfs("evict", reference)
        daemon.nsfs("mount", reference, target)
        began = time.monotonic()
        while time.monotonic() < began + 3:
            for name in chance.sample(list(files), 4):
                assert read(f"{target}/{name}") == files[name]
            os.kill(daemon.workers().get("ns/default") or daemon.pid, signal.SIGKILL)
            time.sleep(chance.random())
        time.sleep(FLUSHED)
        read(f"{target}/d/1")
        for pid in (daemon.pid, *daemon.workers().values()):
            os.kill(pid, signal.SIGKILL)
    assert compare(stored_domain(f"{directory}/root"), layer) > 1 << 20
    with run_daemon(directory, SETTINGS) as daemon, daemon.mounted(reference, target):
        assert {name: read(f"{target}/{name}") for name in files} == files


def compare(layout: DomainLayout, layer: Layer) -> int:
    """Bytes that the durable bitmap claims of a layer, all of which are right."""
    for path in (layout.disk, layout.present):
        with open(path, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    bitmap = create_bitmap(layout)
    with open_index(layout.index, layout.key, readonly=True) as index:
        pool = open_pool(layout, bitmap, index.salt, readonly=True)
    table = open_table(layout.layer_dir(LayerKey(layer.digest, "plain")), layout.key)
    present = 0
    for address, size in table.ranges():
        for start in range(address, address + size, 4096):
            if pool.missing(start, 4096):
                continue
            present += 4096
            block = pool.read(start, 4096)
            for low, length, stream in table.segments(start, 4096):
                first, last = max(low, start), min(low + length, start + 4096)
                wanted = layer.tar[stream + first - low : stream + last - low]
                assert block[first - start : last - start] == wanted
    pool.close()
    os.close(bitmap)
    return present
