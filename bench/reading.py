"""Content that is in the pool but not in the page cache, read from one end to the other, against ext4.

And what the key of a domain costs: the same without one, and single hits as the worker has them.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from bench import stacks
from bench.harness import Bench, Figure, touch
from nsfs.bench.pages import drop_caches
from nsfs.store.crypt import SALT_SIZE, DomainKey
from nsfs.store.index import FIRST_ADDRESS
from nsfs.store.layout import DomainLayout
from nsfs.store.pool import open_pool
from nsfs.store.poolfiles import create_bitmap
from nsfs_daemon import run_daemon
from registry import push_layout

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nsfs.store.pool import Pool

_GOAL, _ENOUGH = 0.5, 1000
"""Half of ext4, or 1 GB/s."""
_SIZE = 384 << 20
_HITS, _HIT = 64 << 20, 128 << 10


def measure(bench: Bench) -> None:
    """All of it."""
    scratch = bench.scratch("sequential")
    push_layout(stacks.many_bytes(f"{scratch}/layout", _SIZE), bench.registry, "large")
    with open(f"{scratch}/list", "wb") as file:
        file.write(b"large\0")
    for driver, encrypt in (("erofs", "isolated"), ("erofs", "off"), ("fuse", "isolated")):
        with (
            run_daemon(f"{scratch}/{driver}-{encrypt}", {"encrypt": encrypt}) as daemon,
            daemon.mounted(f"{bench.registry.host}/large", f"{scratch}/mnt", "--driver", driver),
        ):
            shutil.copyfile(f"{scratch}/mnt/large", f"{scratch}/large")
            ours, theirs = [], []
            for _ in range(bench.samples):
                ours.append(_megabytes(f"{scratch}/list", f"{scratch}/mnt"))
                theirs.append(_megabytes(f"{scratch}/list", scratch))
        bench.add(
            Figure(
                name=f"sequential, local, not cached, {driver}{'' if encrypt == 'isolated' else ', without a key'}",
                unit="MB/s",
                samples=ours,
                baseline=theirs,
                baseline_name="ext4",
                higher_is_better=True,
                goal=_GOAL if driver == "erofs" else None,
                enough=_ENOUGH,
            )
        )
    _measure_hits(bench)


def _measure_hits(bench: Bench) -> None:
    """Reads of the pool as a worker answers them, in turn with a key and without, out of the page cache."""
    with ExitStack() as stack:
        plain, encrypted = (stack.enter_context(_filled_pool(bench, key)) for key in (None, DomainKey.generate()))
        ours, theirs = [], []
        for _ in range(bench.samples):
            ours.append(_microseconds(encrypted))
            theirs.append(_microseconds(plain))
    bench.add(
        Figure(
            name="hit of 128 KiB in the worker, under a key",
            unit="us",
            samples=ours,
            baseline=theirs,
            baseline_name="without a key",
            higher_is_better=False,
        )
    )


@contextmanager
def _filled_pool(bench: Bench, key: DomainKey | None) -> Iterator[Pool]:
    layout = DomainLayout(bench.scratch("hits-key" if key else "hits"), key)
    bitmap = create_bitmap(layout)
    pool = open_pool(layout, bitmap, bytes(SALT_SIZE))
    os.close(bitmap)
    try:
        for address in range(FIRST_ADDRESS, FIRST_ADDRESS + _HITS, 1 << 20):
            pool.write(address, os.urandom(1 << 20))
        yield pool
    finally:
        pool.close()


def _microseconds(pool: Pool) -> float:
    """Of one hit, on average; blocks are dirty, so they stay in the page cache."""
    begun = time.perf_counter()
    for address in range(FIRST_ADDRESS, FIRST_ADDRESS + _HITS, _HIT):
        pool.read_present(address, _HIT)
    return (time.perf_counter() - begun) / (_HITS // _HIT) * 1e6


def _megabytes(paths: str, root: str) -> float:
    drop_caches()
    return touch("seq", paths, root) / 1e6
