"""A node: an nsfs daemon and a containerd that knows it by our own configuration snippets, as a user sets them up."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import tarfile
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from containerd import INSTALLED, NEWER, Containerd, run_containerd, shared_directory
from nsfs_daemon import NSFS, Daemon, run_daemon

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

_SANDBOXES = {
    INSTALLED: """
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = true
""",
    NEWER: """
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "{pause}"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
""",
}
"""What pods need here: an image for sandboxes, and no less a score for the OOM killer than we may set."""

_PROXY = """
[proxy_plugins.{name}]
  type = "snapshot"
  address = "/run/nsfs/nsfs.sock"
"""
_PLUGIN = {
    INSTALLED: _PROXY,
    NEWER: _PROXY
    + """
[proxy_plugins.{name}.exports]
  enable_remote_snapshot_annotations = "true"
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux"
  snapshotter = "{name}"
""",
}
"""One more name of the snapshotter, as the snippets make the first."""

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

    def unpack(self, reference: str, namespace: str = "default") -> None:
        """Pull as containerd does by itself: everything is fetched, and unpacked into ordinary snapshots of ours."""
        local = ("--local",) if self.containerd.major >= 2 else ()
        command = ("images", "pull", *local, "--plain-http", "--snapshotter", "nsfs", reference)
        self.containerd.ctr(*command, namespace=namespace)

    def start(self, reference: str, container: str, script: str, namespace: str = "default") -> None:
        """Start a container that stays."""
        command = ("run", "--detach", "--snapshotter", "nsfs", reference, container, "/bin/sh", "-c")
        self.containerd.ctr(*command, f"{script}; sleep 1000", namespace=namespace)

    def ask(self, container: str, script: str, namespace: str = "default") -> str:
        """What `script` prints in a running container, once it succeeds."""
        said: list[str] = []

        def succeeds() -> bool:
            command = ("tasks", "exec", "--exec-id", f"ask{len(said)}", container, "/bin/sh", "-c", script)
            done = self.containerd.ctr(*command, namespace=namespace, check=False)
            said.append(done.stdout if done.returncode == 0 else done.stderr)
            return done.returncode == 0

        assert wait_until(succeeds), said[-1]
        return said[-1]

    def commit(self, container: str, namespace: str = "default") -> set[str]:
        """The names in the layer that a commit of a container would be: what containerd's diff finds."""
        server = self.containerd
        command = [*server.enter, f"{server.binaries}/ctr", "-a", server.socket, "-n", namespace, "snapshots"]
        layer = subprocess.run(
            [*command, "--snapshotter", "nsfs", "diff", container], check=True, stdout=subprocess.PIPE
        ).stdout
        with tarfile.open(fileobj=io.BytesIO(layer)) as archive:
            return set(archive.getnames())

    def collect_garbage(self, namespace: str) -> None:
        """Have containerd do now what it does in its own time: what a failed start left goes."""
        self.containerd.ctr("leases", "create", "--id", "collect", namespace=namespace)
        self.containerd.ctr("leases", "delete", "--sync", "collect", namespace=namespace)

    def clear(self, namespace: str) -> None:
        """Remove the containers and images of a namespace, and collect garbage."""
        ctr = self.containerd.ctr
        for container in ctr("containers", "ls", "-q", namespace=namespace).stdout.split():
            ctr("tasks", "rm", "--force", container, namespace=namespace, check=False)
            ctr("containers", "rm", container, namespace=namespace)
        for image in ctr("images", "ls", "-q", namespace=namespace).stdout.split():
            ctr("images", "rm", "--sync", image, namespace=namespace)

    def views(self) -> list[str]:
        """Where views are mounted."""
        with open("/proc/self/mountinfo") as file:
            points = [line.split()[4] for line in file]
        return [point for point in points if point.startswith(f"{self.daemon.run}/l/")]

    def directories(self) -> list[str]:
        """Of snapshots that are written, or were unpacked."""
        return os.listdir(f"{self.daemon.root}/snapshots")

    def is_clean(self) -> bool:
        """Whether nothing is left of any snapshot, once a garbage collection that is under way has ended."""
        return wait_until(lambda: self.views() == [] and self.directories() == [])

    def snapshots(self, namespace: str = "default") -> list[str]:
        """Their keys, as containerd knows them."""
        listed = self.containerd.ctr("snapshots", "--snapshotter", "nsfs", "ls", namespace=namespace).stdout
        return [line.split()[0] for line in listed.splitlines()[1:]]


def wait_until(true: Callable[[], bool], seconds: float = 60) -> bool:
    """Look again and again; whether it came true."""
    deadline = time.monotonic() + seconds
    while not (came := true()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return came


@contextlib.contextmanager
def run_node(
    directory: str,
    release: str = INSTALLED,
    *,
    cri: bool = False,
    pause: str = "",
    classes: str = "",
    plugins: Sequence[str] = (),
    more: str = "",
    settings: Mapping[str, Any] | None = None,
) -> Iterator[Node]:
    """Start both below `directory`, which becomes a shared mount meanwhile.

    `pause` is the image that pods' sandboxes are made of, where `cri` is to run any, and `classes` what its
    configuration says of runtime classes; `plugins` are further names of the snapshotter, and `more` is what else goes
    into containerd's own configuration.
    """
    named = "".join(_PLUGIN[release].format(name=name) for name in plugins)
    added = {"config": named, "cri": _SANDBOXES[release].format(pause=pause) + classes if pause else ""}
    names = ("config", "cri") if cri else ("config",)
    version = 2 if release == INSTALLED else 3
    with shared_directory(directory), run_daemon(f"{directory}/nsfs", settings) as daemon:
        imports = [write_snippet(directory, f"{name}-v{version}.toml", daemon.socket, added[name]) for name in names]
        with run_containerd(f"{directory}/containerd", release=release, imports=imports, cri=cri, more=more) as server:
            yield Node(daemon, server)


def write_snippet(directory: str, name: str, socket: str, more: str = "") -> str:
    """The snippet as it is, but for the daemon's socket; `more` is in the same file, as imports replace sections."""
    with open(f"{SNIPPETS}/{name}") as file:
        text = file.read()
    path = f"{directory}/{name}"
    with open(path, "w") as file:
        file.write((text + more).replace("/run/nsfs/nsfs.sock", socket))
    return path
