"""The eager way: pull the whole image, unpack it, stack the directories with overlayfs.

Talks to the containerd of the host through its ctr, in a namespace of its own that is empty again at the end. Whether
a pull was one is seen from the line's bytes: blobs that another namespace of that containerd has would not be fetched.
Not for two benches of one containerd at the same time.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nsfs.errors import NsfsError
from nsfs.serve.mounts import unmount

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_NAMESPACE = "nsfs-bench"
_OVERLAYFS = ("--snapshotter", "overlayfs")


@dataclass(frozen=True, slots=True)
class Containerd:
    """A containerd that answers."""

    socket: str
    version: str
    plain_http: bool
    """Registries on loopback are asked without TLS."""
    proxied: bool
    """The line is a proxy, which ctr knows of and the daemon does not."""
    hosts: str
    """Directory of hosts.toml files."""
    environment: Mapping[str, str]

    def pull(self, reference: str) -> None:
        """Pull and unpack."""
        local = ["--local"] if self.proxied and int(self.version.partition(".")[0]) >= 2 else []
        hosts = ["--plain-http"] if self.plain_http else ["--hosts-dir", self.hosts]
        self._ctr("images", "pull", *local, *hosts, *_OVERLAYFS, reference)

    def mount(self, reference: str, target: str) -> None:
        """Show what was unpacked at `target`, writable."""
        self._ctr("images", "mount", *_OVERLAYFS, "--rw", reference, target)

    def umount(self, target: str) -> None:
        """Take it away, with what was written."""
        unmount(target)
        self._remove_active()

    def layers(self, target: str) -> list[str]:
        """The directories of what is mounted at `target`, top first."""
        said = self._ctr("snapshots", *_OVERLAYFS, "mounts", "/", target)
        found = re.search(r"lowerdir=([^, ]+)", said)
        if found is None:
            raise NsfsError(f"containerd shows an image by no overlay: {said.strip()}")
        return found[1].split(":")

    def clear(self) -> None:
        """Have nothing of our namespace left: no image, no snapshot, no blob of its own."""
        self._remove_active()
        for name in self._ctr("images", "ls", "-q").split():
            self._ctr("images", "remove", "--sync", name)

    def _remove_active(self) -> None:
        """Remove the snapshots that are no layer's; containerd does so, too, where a pull was interrupted."""
        for line in self._ctr("snapshots", *_OVERLAYFS, "ls").splitlines()[1:]:
            key, *_, kind = line.split()
            if kind != "Committed":
                self._remove_snapshot(key)

    def _remove_snapshot(self, key: str) -> None:
        try:
            self._ctr("snapshots", *_OVERLAYFS, "remove", key)
        except NsfsError as error:
            if not error.message.endswith(": not found"):
                raise

    def forget(self) -> None:
        """Remove our namespace; it must be clear."""
        with contextlib.suppress(NsfsError):
            self._ctr("namespaces", "remove", _NAMESPACE)

    def rehearse(self) -> None:
        """Have ctr in memory."""
        self._ctr("version")

    def _ctr(self, *arguments: str) -> str:
        done = subprocess.run(
            ["ctr", "--address", self.socket, "--namespace", _NAMESPACE, *arguments],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=os.environ | self.environment,
        )
        if done.returncode:
            raise NsfsError(f"ctr {' '.join(arguments[:2])} fails: {done.stderr.strip()[-1000:]}")
        return done.stdout


@contextlib.contextmanager
def open_containerd(
    socket: str, *, plain_http: bool, hosts: str, environment: Mapping[str, str]
) -> Iterator[Containerd | None]:
    """The containerd at `socket`, with our namespace empty before and after; None where there is none."""
    version = _ask_version(socket)
    if version is None:
        yield None
        return
    containerd = Containerd(socket, version, plain_http, bool(environment), hosts, environment)
    containerd.clear()
    try:
        yield containerd
    finally:
        containerd.clear()
        containerd.forget()


def _ask_version(socket: str) -> str | None:
    """The server's; None where nobody answers."""
    if shutil.which("ctr") is None or not os.path.exists(socket):
        return None
    command = ["ctr", "--address", socket, "--timeout", "5s", "version"]
    said = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    found = re.search(r"Server:\s+Version:\s+v?(\S+)", said.stdout)
    return found[1] if said.returncode == 0 and found else None


@dataclass(frozen=True, slots=True)
class Stack:
    """Directories of layers, top first, of our own: files that containerd knows nothing of."""

    layers: list[str]
    scratch: str
    """For what is written, on the same filesystem."""

    def mount(self, target: str) -> None:
        """Stack them at `target`, writable, with containerd's options."""
        self._clear()
        os.makedirs(f"{self.scratch}/upper")
        os.makedirs(f"{self.scratch}/work")
        lowers = ":".join(os.path.relpath(layer, self.scratch) for layer in self.layers)
        options = f"index=off,lowerdir={lowers},upperdir=upper,workdir=work"
        _run("mount", "-t", "overlay", "-o", options, "overlay", target, directory=self.scratch)

    def umount(self, target: str) -> None:
        """Take it away, with what was written."""
        unmount(target)
        self._clear()

    def _clear(self) -> None:
        for name in ("upper", "work"):
            shutil.rmtree(f"{self.scratch}/{name}", ignore_errors=True)


def copy_layers(containerd: Containerd, reference: str, directory: str) -> Stack:
    """Pull, and keep a copy of what was unpacked, when containerd has forgotten it."""
    target = f"{directory}/mnt"
    os.makedirs(target)
    containerd.clear()
    containerd.pull(reference)
    containerd.mount(reference, target)
    try:
        kept = [copy_tree(layer, f"{directory}/{number}") for number, layer in enumerate(containerd.layers(target))]
    finally:
        containerd.umount(target)
        containerd.clear()
    return Stack(kept, directory)


def copy_tree(source: str, target: str) -> str:
    """Copy all that a tree says, whiteouts included, and see it written out; returns `target`."""
    _run("cp", "-a", source, target)
    _run("sync", "--file-system", target)
    return target


def _run(*command: str, directory: str | None = None) -> None:
    done = subprocess.run(command, cwd=directory, check=False, capture_output=True, text=True)
    if done.returncode:
        raise NsfsError(f"{command[0]} fails: {done.stderr.strip()[-1000:]}")
