"""Content that is in the pool but not in the page cache, read from one end to the other, against ext4."""

from __future__ import annotations

import shutil

from bench import stacks
from bench.harness import Bench, Figure, drop_caches, touch
from nsfs_daemon import run_daemon
from registry import push_layout

_GOAL, _ENOUGH = 0.5, 1000
"""Half of ext4, or 1 GB/s."""
_SIZE = 384 << 20


def measure(bench: Bench) -> None:
    """All of it."""
    scratch = bench.scratch("sequential")
    push_layout(stacks.many_bytes(f"{scratch}/layout", _SIZE), bench.registry, "large")
    with open(f"{scratch}/list", "wb") as file:
        file.write(b"large\0")
    for driver in ("erofs", "fuse"):
        with (
            run_daemon(f"{scratch}/{driver}") as daemon,
            daemon.mounted(f"{bench.registry.host}/large", f"{scratch}/mnt", "--driver", driver),
        ):
            shutil.copyfile(f"{scratch}/mnt/large", f"{scratch}/large")
            ours, theirs = [], []
            for _ in range(bench.samples):
                ours.append(_megabytes(f"{scratch}/list", f"{scratch}/mnt"))
                theirs.append(_megabytes(f"{scratch}/list", scratch))
        bench.add(
            Figure(
                name=f"sequential, local, not cached, {driver}",
                unit="MB/s",
                samples=ours,
                baseline=theirs,
                baseline_name="ext4",
                higher_is_better=True,
                goal=_GOAL if driver == "erofs" else None,
                enough=_ENOUGH,
            )
        )


def _megabytes(paths: str, root: str) -> float:
    drop_caches()
    return touch("seq", paths, root) / 1e6
