"""A node: an nsfs daemon and a containerd that knows it by our own configuration snippets, as a user sets them up."""

from __future__ import annotations

import contextlib
import os
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from containerd import INSTALLED, Containerd, run_containerd, shared_directory
from nsfs_daemon import NSFS, Daemon, run_daemon

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

SNIPPETS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "contrib", "containerd")


@dataclass(frozen=True, slots=True)
class Node:
    """Both of them, running."""

    daemon: Daemon
    containerd: Containerd

    def pull(self, reference: str, *options: str, namespace: str = "default") -> subprocess.CompletedProcess[str]:
        """`nsfs pull`; raises RuntimeError where it fails."""
        command = [*NSFS, "--socket", self.daemon.socket, "pull", "--containerd", self.containerd.socket]
        done = subprocess.run(
            [*command, "-n", namespace, *options, reference], check=False, capture_output=True, text=True
        )
        if done.returncode != 0:
            raise RuntimeError(f"nsfs pull: exit {done.returncode}: {done.stderr}\n{self.daemon.tail()}")
        return done

    def run(
        self, reference: str, container: str, *command: str, options: Sequence[str] = (), namespace: str = "default"
    ) -> str:
        """What a container over nsfs prints."""
        options = ("--snapshotter", "nsfs", *options)
        return self.containerd.run(reference, container, *command, options=options, namespace=namespace)

    def snapshots(self, namespace: str = "default") -> list[str]:
        """Their keys, as containerd knows them."""
        listed = self.containerd.ctr("snapshots", "--snapshotter", "nsfs", "ls", namespace=namespace).stdout
        return [line.split()[0] for line in listed.splitlines()[1:]]


@contextlib.contextmanager
def run_node(
    directory: str, release: str = INSTALLED, *, cri: bool = False, settings: Mapping[str, Any] | None = None
) -> Iterator[Node]:
    """Start both below `directory`, which becomes a shared mount meanwhile."""
    names = ("config", "cri") if cri else ("config",)
    version = 2 if release == INSTALLED else 3
    with shared_directory(directory), run_daemon(f"{directory}/nsfs", settings) as daemon:
        imports = [_write_snippet(directory, f"{name}-v{version}.toml", daemon.socket) for name in names]
        with run_containerd(f"{directory}/containerd", release=release, imports=imports, cri=cri) as server:
            yield Node(daemon, server)


def _write_snippet(directory: str, name: str, socket: str) -> str:
    """The snippet as it is, but for the daemon's socket."""
    with open(f"{SNIPPETS}/{name}") as file:
        text = file.read()
    path = f"{directory}/{name}"
    with open(path, "w") as file:
        file.write(text.replace("/run/nsfs/nsfs.sock", socket))
    return path
