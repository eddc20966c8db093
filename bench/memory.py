"""Page cache and private memory of workers per MiB of image read: one image, two on one base, two apart.

The page cache is counted by cachestat(2) (Linux 6.5) over the files that can hold a page of an image: those of the
views, the FUSE files below them, the pools' own. So other users of the machine do not disturb the figures.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import stat
import struct
import subprocess
import time
from typing import TYPE_CHECKING

from bench import images, stacks
from bench.harness import Bench, Figure, say
from bench.metadata import views
from nsfs.bench.pages import drop_caches
from nsfs_daemon import Daemon, run_daemon
from registry import push_layout

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

GOAL = 1.1
_CROWD_GOAL = 40
_REST = 8.0
"""Seconds after which a pool has synced what it wrote and dropped what it read: what remains is what an image costs."""
_CACHESTAT = 451
_LIBC = ctypes.CDLL(None, use_errno=True)
_SHARED = ("--isolation", "shared")


def measure(bench: Bench) -> None:
    """All of it."""
    references = []
    for image in (images.build(images.PYTHON), images.build(images.JDK)):
        push_layout(image.layout, bench.registry, f"memory/{image.recipe.name}")
        references.append(f"{bench.registry.host}/memory/{image.recipe.name}")
    _measure_reading(bench, "one image", [(references[0], _SHARED)])
    _measure_reading(bench, "two on one base", [(reference, _SHARED) for reference in references])
    apart = [(ref, ("--namespace", f"ns{n}", "--isolation", "isolated")) for n, ref in enumerate(references)]
    _measure_reading(bench, "two on one base, isolated", apart)
    _measure_crowd(bench)


def _measure_reading(bench: Bench, name: str, mounts: Sequence[tuple[str, tuple[str, ...]]]) -> None:
    """Read every file of all mounts: the pages and the workers' memory that this takes, over the images' bytes."""
    scratch = bench.scratch("memory")
    with _mounted(scratch, mounts) as (daemon, targets):
        private = sum(map(private_memory, daemon.workers().values()))
        peak, pages = _pages_after_reading(daemon, targets)
        grown = sum(map(private_memory, daemon.workers().values())) - private
        size = sum(_contents(targets).values())
    say(f"  {name}: {size >> 20} MiB read, {pages >> 20} MiB of pages, {grown >> 10} KiB more in workers")
    for when, bytes_kept, goal in (("at rest", pages, GOAL), ("just after", peak, None)):
        figure = f"memory per byte read, {when}, {name}"
        kept = [(bytes_kept + grown) / size]
        bench.add(Figure(name=figure, unit="x", samples=kept, higher_is_better=False, goal=goal))


def _pages_after_reading(daemon: Daemon, targets: Iterable[str]) -> tuple[int, int]:
    """Bytes in the page cache once all was read from a cold start: at once, and at rest."""
    time.sleep(_REST)
    drop_caches()
    for target in targets:
        _read_all(target)
    peak = sum(map(cached, _holders(daemon)))
    time.sleep(_REST)
    return peak, sum(map(cached, _holders(daemon)))


@contextlib.contextmanager
def _mounted(scratch: str, mounts: Sequence[tuple[str, tuple[str, ...]]]) -> Iterator[tuple[Daemon, dict[str, str]]]:
    """A daemon with these mounts: the domain of each by where it is."""
    with run_daemon(f"{scratch}/nsfs") as daemon, contextlib.ExitStack() as stack:
        targets: dict[str, str] = {}
        for number, (reference, options) in enumerate(mounts):
            report = stack.enter_context(daemon.mounted(reference, f"{scratch}/mnt{number}", *options))
            targets[report["target"]] = report["domain"]
        yield daemon, targets


def _read_all(root: str) -> None:
    found = subprocess.run(["find", root, "-xdev", "-type", "f", "-print0"], check=True, capture_output=True).stdout
    subprocess.run(["xargs", "-0", "cat"], input=found, check=True, stdout=subprocess.DEVNULL)


def _contents(targets: dict[str, str]) -> dict[tuple[str, str, int], int]:
    """Bytes, in whole pages, of each different file; what two images of a domain have from their base counts once."""
    sizes: dict[tuple[str, str, int], int] = {}
    for target, domain in targets.items():
        seen = set()
        for path in _regular(target):
            status = os.lstat(path)
            if status.st_ino not in seen:
                seen.add(status.st_ino)
                key = (domain, path.removeprefix(target), status.st_mtime_ns)
                sizes[key] = -(-status.st_size // 4096) * 4096
    return sizes


def _holders(daemon: Daemon) -> Iterator[str]:
    """Every file that can hold pages of an image's content: in views, below them, and the pools' own."""
    for view in views(daemon):
        yield from _regular(view)
    for directory in (f"{daemon.run}/domains", f"{daemon.root}/domains"):
        yield from (path for path in _regular(directory) if re.search(r"/disks/[^/]+$|/disk$", path))


def _regular(root: str) -> Iterator[str]:
    for directory, _, names in os.walk(root):
        for name in names:
            if stat.S_ISREG(os.lstat(f"{directory}/{name}").st_mode):
                yield f"{directory}/{name}"


def cached(path: str) -> int:
    """Bytes of the file that are in the page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        whole, result = struct.pack("=QQ", 0, 0), ctypes.create_string_buffer(40)
        if _LIBC.syscall(_CACHESTAT, fd, whole, result, 0):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
        return int(struct.unpack_from("=Q", result.raw)[0]) * 4096
    finally:
        os.close(fd)


def private_memory(pid: int) -> int:
    """Private bytes of a process (proc(5), smaps_rollup)."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        kib = re.findall(r"^Private_(?:Clean|Dirty): +(\d+)", file.read(), re.MULTILINE)
    return sum(map(int, kib)) << 10


def _measure_crowd(bench: Bench) -> None:
    """What a mount of 100,000 files costs its worker over one of a single file."""
    scratch = bench.scratch("crowd")
    used = {}
    with run_daemon(f"{scratch}/nsfs") as daemon:
        for name, files, layers in (("one", 1, 1), ("many", 100_000, 10)):
            push_layout(stacks.many_files(f"{scratch}/{name}", files, layers), bench.registry, f"memory/{name}")
            options = ("--namespace", name, "--isolation", "isolated")
            with daemon.mounted(f"{bench.registry.host}/memory/{name}", f"{scratch}/mnt", *options) as report:
                _read_all(f"{scratch}/mnt")
                used[name] = private_memory(daemon.workers()[report["domain"]])
    more = [(used["many"] - used["one"]) / 2**20]
    figure = "a worker's memory for 100,000 files"
    bench.add(Figure(name=figure, unit="MiB", samples=more, higher_is_better=False, goal=_CROWD_GOAL))
