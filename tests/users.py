"""What tests of a user's flows share: images to push, bytes to compare, processes and mounts to look at."""

from __future__ import annotations

import os
import random
import subprocess
import time
from typing import TYPE_CHECKING

import goestargz
from images import TAR_GZIP, Image, Layer, render_tar, write_oci_layout
from nsfs.serve import mounts
from nsfs_daemon import NSFS, Daemon
from registry import Registry, push_layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from images import Item

TOC_ANNOTATION = "containerd.io/snapshot/stargz/toc.digest"


def push(image: Image, registry: Registry, path: Path, name: str) -> None:
    """Put `image` into the registry as `name`:latest."""
    push_layout(str(write_oci_layout(path / f"layout-{name}", image)), registry, name)


def estargz_layer(items: Iterable[Item], chunk_size: int = 100_000) -> Layer:
    """A layer made by the reference implementation."""
    tar = render_tar(items)
    made = goestargz.convert(tar, chunk_size=chunk_size)
    return Layer(tar, made.blob, TAR_GZIP, {TOC_ANNOTATION: made.toc_digest})


def noise(size: int, seed: int) -> bytes:
    """Bytes that do not compress."""
    return random.Random(seed).randbytes(size)


def cat(daemon: Daemon, *arguments: str) -> bytes:
    """What `nsfs cat` writes."""
    command = [*NSFS, "--socket", daemon.socket, "cat", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout


def read(path: str | Path) -> bytes:
    """A file's bytes."""
    with open(path, "rb") as file:
        return file.read()


def drop_pages(path: str | Path) -> None:
    """Have the kernel forget a file's bytes, so that the next read asks for them."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def wait_until(true: Callable[[], object], what: str, seconds: float = 60) -> None:
    """Look again and again."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)


def mounts_of(daemon: Daemon) -> list[mounts.MountInfo]:
    """What is mounted in the daemon's run directory."""
    return [mount for mount in mounts.load_mounts() if mount.target.startswith(daemon.run + "/")]


def views_of(daemon: Daemon) -> set[str]:
    """Where the daemon has EROFS views."""
    return {mount.target for mount in mounts_of(daemon) if mount.fstype == "erofs"}


def is_dead(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in {"Z", "X"}
    except (FileNotFoundError, ProcessLookupError):
        return True
