"""A private containerd of Debian forky, the baseline of a first pull.

Owns: its process, configuration and state, all below a directory of the caller's; nothing of the host's containerd is
used or changed. Forky's binaries run on bookworm's libc (they want 2.34) and are unpacked, never installed.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench import CACHE, debian

if TYPE_CHECKING:
    from collections.abc import Iterator

_CONFIG = """\
version = 3
root = "{directory}/root"
state = "{directory}/state"
disabled_plugins = [
  "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime",
  "io.containerd.grpc.v1.cri", "io.containerd.nri.v1.nri",
]
[grpc]
  address = "{directory}/sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "{directory}/opt"
"""


@dataclass(frozen=True, slots=True)
class Containerd:
    """A running containerd."""

    binaries: str
    socket: str
    version: str

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
            self._ctr("images", "unmount", "--snapshotter", "overlayfs", "--rm", target)

    def remove(self, reference: str) -> None:
        """Forget the image, its blobs and its snapshots, so that the next pull is a first one."""
        self._ctr("images", "remove", "--sync", reference)

    def _ctr(self, *arguments: str) -> None:
        command = [f"{self.binaries}/ctr", "--address", self.socket, *arguments]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"ctr {' '.join(arguments)}: {done.stderr[-2000:]}")


@contextlib.contextmanager
def run_containerd(directory: str, *, suite: str = "forky", cache: str = CACHE) -> Iterator[Containerd]:
    """Start a containerd that keeps everything below `directory`; it ends with the block."""
    package = debian.fetch_package("containerd", suite, f"{cache}/containerd-{suite}")
    binaries = f"{package}/usr/bin"
    version = subprocess.run([f"{binaries}/containerd", "--version"], check=True, capture_output=True, text=True).stdout
    os.makedirs(directory, exist_ok=True)
    with open(f"{directory}/config.toml", "w") as file:
        file.write(_CONFIG.format(directory=directory))
    command = ["setpriv", "--pdeathsig", "KILL", f"{binaries}/containerd", "--config", f"{directory}/config.toml"]
    with open(f"{directory}/log", "wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        running = Containerd(binaries, f"{directory}/sock", version.split()[2])
        _wait_until_serving(process, running, f"{directory}/log")
        yield running
    finally:
        process.terminate()
        process.wait()


def _wait_until_serving(process: subprocess.Popen[bytes], running: Containerd, log: str) -> None:
    command = [f"{running.binaries}/ctr", "--address", running.socket, "--timeout", "1s", "version"]
    deadline = time.monotonic() + 30
    while subprocess.run(command, check=False, capture_output=True).returncode != 0:
        if process.poll() is not None or time.monotonic() > deadline:
            with open(log) as file:
                raise RuntimeError(f"containerd does not start: {file.read()[-3000:]}")
        time.sleep(0.05)
