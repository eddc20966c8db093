"""A private containerd of Debian forky, the baseline of a first pull."""

from __future__ import annotations

import contextlib
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import containerd
from bench import CACHE

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class Containerd:
    """A running containerd."""

    server: containerd.Containerd

    @property
    def version(self) -> str:
        """As it says itself."""
        return self.server.version

    def pull(self, reference: str) -> float:
        """Pull and unpack with the overlayfs snapshotter; returns seconds of wall time."""
        start = time.perf_counter()
        self._ctr("images", "pull", "--snapshotter", "overlayfs", "--plain-http", reference)
        return time.perf_counter() - start

    @contextlib.contextmanager
    def rootfs(self, reference: str, target: str) -> Iterator[None]:
        """Pull the image and show its root at `target`, read-only."""
        self.pull(reference)
        self._ctr("images", "mount", "--snapshotter", "overlayfs", reference, target)
        try:
            yield
        finally:
            subprocess.run(["umount", target], check=True)
            self._ctr("snapshots", "--snapshotter", "overlayfs", "remove", target)

    def remove(self, reference: str) -> None:
        """Forget the image, its blobs and its snapshots, so that the next pull is a first one."""
        self._ctr("images", "remove", "--sync", reference)

    def _ctr(self, *arguments: str) -> None:
        """Run ctr out here, where its mounts are seen."""
        command = [f"{self.server.binaries}/ctr", "--address", self.server.socket, *arguments]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"ctr {' '.join(arguments)}: {done.stderr[-2000:]}")


@contextlib.contextmanager
def run_containerd(directory: str, *, release: str = containerd.NEWER, cache: str = CACHE) -> Iterator[Containerd]:
    """Start a containerd that keeps everything below `directory`; it ends with the block."""
    with containerd.run_containerd(directory, release=release, cache=cache) as server:
        yield Containerd(server)
