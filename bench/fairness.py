"""What one tenant's reading costs another's.

A file that is local and not in the page cache is read alone, and beside a tenant who reads all the time, by four
processes at once. Each namespace is isolated and has its own worker. Where two tenants want all that there is, half of
it is each one's share.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from bench import stacks
from bench.harness import Bench, Figure
from nsfs_daemon import run_daemon
from registry import push_layout

if TYPE_CHECKING:
    from collections.abc import Iterator

_SIZE = 64 << 20
_PIECE = 1 << 20
_SECONDS = 2.0
_GREEDY = 4
_SHARE = 0.5
_READ_ON = f"""
import os, sys
file = os.open(sys.argv[1], os.O_RDONLY)
while True:
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    for at in range(0, {_SIZE}, {_PIECE}):
        os.pread(file, {_PIECE}, at)
"""


def measure(bench: Bench) -> None:
    """All of it."""
    scratch = bench.scratch("fairness")
    push_layout(stacks.many_bytes(f"{scratch}/layout", _SIZE), bench.registry, "fairness")
    reference = f"{bench.registry.host}/fairness"
    with ExitStack() as stack:
        daemon = stack.enter_context(run_daemon(f"{scratch}/nsfs"))
        for name in ("meek", "greedy"):
            stack.enter_context(daemon.mounted(reference, f"{scratch}/{name}", "--namespace", name))
        alone, beside = [], []
        for _ in range(bench.samples):
            alone.append(_megabytes(f"{scratch}/meek/large"))
            with _read_all_the_time(f"{scratch}/greedy/large"):
                beside.append(_megabytes(f"{scratch}/meek/large"))
    bench.add(
        Figure(
            name="one tenant's cold reads beside another's who reads all the time",
            unit="MB/s",
            samples=beside,
            baseline=alone,
            baseline_name="alone",
            higher_is_better=True,
            goal=_SHARE,
        )
    )


@contextmanager
def _read_all_the_time(path: str) -> Iterator[None]:
    readers = [subprocess.Popen([sys.executable, "-c", _READ_ON, path]) for _ in range(_GREEDY)]
    try:
        yield
    finally:
        for reader in readers:
            reader.kill()
            reader.wait()


def _megabytes(path: str) -> float:
    """Of a file, a second, past the page cache."""
    read, begun = 0, time.perf_counter()
    file = os.open(path, os.O_RDONLY)
    try:
        while time.perf_counter() - begun < _SECONDS:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            for at in range(0, _SIZE, _PIECE):
                read += len(os.pread(file, _PIECE, at))
    finally:
        os.close(file)
    return read / (time.perf_counter() - begun) / 1e6
