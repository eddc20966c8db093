"""A machine of its own: Debian with a real systemd and containerd's own unit, booted by systemd-nspawn.

Owns: the tree (made once by debootstrap, in the repository's .cache, never written to: what runs sees an overlay), the
container that boots from it, and its end: SIGKILL of its first process ends all there is in it. It shares the host's
network, where the registries of tests are, and /dev/fuse. nsfs inside is this repository's, by its units in contrib.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import debian
import nsfs
import prepared

if TYPE_CHECKING:
    from collections.abc import Iterator

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_PACKAGES = "systemd,systemd-sysv,dbus,python3,containerd,runc,fuse3,kmod,procps,busybox-static"
_ISOLATED = ("unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child", "--mount-proc")
"""What debootstrap mounts ends with it."""
_DEADLINE = 60.0
"""Seconds for the machine to boot."""
NAMESPACE = "booted"
"""containerd's, of containers inside; runc names cgroups by it."""
_WRITTEN = ("var/lib/containerd", "var/lib/nsfs")
"""What must not lie on an overlay, since overlays are mounted from there."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A booted machine."""

    pid: int
    """Of its first process, as we see it."""

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command inside."""
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--pid", "--ipc", "--uts", "--cgroup", "--"]
        done = subprocess.run([*enter, *command], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}: {done.stderr}\n{self.journal()}")
        return done

    def journal(self) -> str:
        """What nsfs's unit said last."""
        return self.run("journalctl", "--no-pager", "-u", "nsfs", "-n", "30", check=False).stdout

    def main_pid(self, unit: str) -> str:
        """Of a unit's main process, as it is called inside."""
        return self.run("systemctl", "show", "--property=MainPID", "--value", unit).stdout.strip()

    def is_active(self, unit: str) -> bool:
        """Whether a unit has started, and said so."""
        return self.run("systemctl", "is-active", unit, check=False).returncode == 0

    def set_up(self, unit: str, text: str) -> None:
        """Add a drop-in to a unit."""
        self.run("sh", "-c", f"mkdir -p /etc/systemd/system/{unit}.service.d")
        self.run("sh", "-c", f"printf '%s' '{text}' > /etc/systemd/system/{unit}.service.d/test.conf")
        self.run("systemctl", "daemon-reload")


@contextlib.contextmanager
def booted(directory: str) -> Iterator[Machine]:
    """Boot one that keeps everything below `directory`, with nsfs's units enabled."""
    with _root(directory) as root:
        _install(root)
        command = ["systemd-nspawn", "--directory", root, "--boot", "--register=no", "--keep-unit", "--console=pipe"]
        command += ["--machine", f"nsfs-{os.getpid()}", "--private-users=no", "--capability=all", "--bind=/dev/fuse"]
        command += ["--system-call-filter=@keyring bpf"]
        command += [f"--bind={directory}/{path}:/{path}" for path in _WRITTEN]
        command += [f"--bind-ro={path}" for path in sorted({REPOSITORY, os.path.realpath(REPOSITORY), *_code()})]
        with open(f"{directory}/console", "wb") as console:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=console, stderr=console)
        try:
            machine = Machine(_first_process(process, f"{directory}/console"))
            _wait_for_boot(machine)
            yield machine
        finally:
            _end(process)


def _code() -> set[str]:
    """Where the interpreter, its packages and ours are."""
    places = {os.path.realpath(sys.prefix), os.path.dirname(nsfs.__path__[0]), sys.base_prefix}
    return {place for place in places if place != "/usr"}


@contextlib.contextmanager
def _root(directory: str) -> Iterator[str]:
    for name in ("upper", "work", "root", *_WRITTEN):
        os.makedirs(f"{directory}/{name}")
    options = f"lowerdir={make_tree()},upperdir={directory}/upper,workdir={directory}/work"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, f"{directory}/root"], check=True)
    try:
        yield f"{directory}/root"
    finally:
        subprocess.run(["umount", "--lazy", f"{directory}/root"], check=True)


def make_tree() -> str:
    """The tree that machines boot from, made where it is not there."""
    archive = debian.find_archive()
    tree = f"{prepared.CACHE}/booted-{archive.suite}"
    with prepared.alone("booted"):
        if not os.path.exists(tree):
            shutil.rmtree(f"{tree}.tmp", ignore_errors=True)
            command = ["debootstrap", "--variant=minbase", f"--include={_PACKAGES}", archive.suite, f"{tree}.tmp"]
            subprocess.run([*_ISOLATED, *command, archive.uri], check=True, capture_output=True)
            os.rename(f"{tree}.tmp", tree)
    return tree


def _install(root: str) -> None:
    """As an administrator does, from contrib."""
    units = f"{root}/etc/systemd/system"
    os.makedirs(f"{units}/containerd.service.d")
    os.makedirs(f"{units}/multi-user.target.wants", exist_ok=True)
    shutil.copy(f"{REPOSITORY}/contrib/systemd/nsfs.service", units)
    shutil.copy(f"{REPOSITORY}/contrib/systemd/containerd.conf", f"{units}/containerd.service.d")
    os.symlink("../nsfs.service", f"{units}/multi-user.target.wants/nsfs.service")
    os.makedirs(f"{root}/etc/containerd", exist_ok=True)
    shutil.copy(f"{REPOSITORY}/contrib/containerd/config-v2.toml", f"{root}/etc/containerd/config.toml")
    with open(f"{root}/usr/local/bin/nsfs", "w", opener=lambda path, flags: os.open(path, flags, 0o755)) as file:
        file.write(f"#!/bin/sh\nexport PYTHONPATH={os.path.dirname(nsfs.__path__[0])}\n")
        file.write(f'exec {sys.executable} -P -m nsfs.cli "$@"\n')


def _first_process(process: subprocess.Popen[bytes], console: str) -> int:
    deadline = time.monotonic() + _DEADLINE
    while process.poll() is None and time.monotonic() < deadline:
        for pid in _descendants(process.pid):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as status:
                numbers = next(line for line in status if line.startswith("NSpid:")).split()[1:]
                if len(numbers) > 1 and numbers[-1] == "1":
                    return pid
        time.sleep(0.05)
    with open(console, errors="replace") as file:
        raise RuntimeError(f"the machine does not boot: {file.read()[-2000:]}")


def _descendants(pid: int) -> list[int]:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{pid}/children") as file:
        children = [int(child) for child in file.read().split()]
        return children + [below for child in children for below in _descendants(child)]
    return []


def _wait_for_boot(machine: Machine) -> None:
    deadline = time.monotonic() + _DEADLINE
    units = ("nsfs", "containerd")
    while not all(machine.is_active(unit) for unit in units):
        if time.monotonic() > deadline:
            raise RuntimeError(f"nsfs does not start: {machine.journal()}")
        time.sleep(0.2)
    # As on a machine that is no container, and so may make cgroups in every hierarchy of version 1.
    machine.run("sh", "-c", "for each in /sys/fs/cgroup/*; do mount -o remount,bind,rw $each; done; true")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill all there is; cgroups of systemd-nspawn and of containers, which are the host's, go after that."""
    for pid in reversed(_descendants(process.pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    try:
        process.wait(_DEADLINE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for hierarchy in os.listdir("/sys/fs/cgroup"):
        for name in (NAMESPACE, "payload", "supervisor"):
            for directory, _, _ in os.walk(f"/sys/fs/cgroup/{hierarchy}/{name}", topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(directory)
