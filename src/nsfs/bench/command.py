"""A command in a root filesystem, in a minimal container of its own, until it first says something.

Owns the container: mount, pid, ipc, uts and network namespaces with a loopback interface, /proc, /sys and a /dev of its
own; environment, user and working directory of the image's configuration; no cgroup and no seccomp filter. It is made
by tools of the host, the same for every root, so that what is compared is where the root comes from. Nothing of it is
left when `run_command` returns or fails, and nothing if this process is killed.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nsfs.errors import NotFoundError, NsfsError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_TOOLS = ("setpriv", "unshare", "sh", "mount", "mkdir", "cp", "ln", "ip", "env")
_SETUP = """
cd "$1"
mkdir -p proc sys dev tmp
mount -t proc -o nosuid,nodev,noexec proc proc
mount -t sysfs -o ro,nosuid,nodev,noexec sysfs sys
mount -t tmpfs -o nosuid,mode=755 dev dev
cp -a /dev/null /dev/zero /dev/full /dev/random /dev/urandom /dev/tty dev
mkdir -m 1777 dev/shm dev/pts
mount -t devpts -o nosuid,noexec,newinstance,ptmxmode=0666 devpts dev/pts
ln -s /proc/self/fd /proc/self/fd/0 /proc/self/fd/1 /proc/self/fd/2 pts/ptmx dev
mv dev/0 dev/stdin; mv dev/1 dev/stdout; mv dev/2 dev/stderr
ip link set lo up
shift
exec "$@"
"""
_GRACE = 10.0
"""Seconds for a command to end by itself once it has said what was waited for."""
_TAIL = 2000
_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True)
class Command:
    """What to run, and when it counts as up."""

    words: tuple[str, ...]
    wait_for: str = ""
    """Text of its output; empty for the first byte, or its end where it says nothing."""
    environment: tuple[str, ...] = (_PATH,)
    """NAME=value."""
    directory: str = "/"
    user: str = ""
    """As the image's configuration has it: name or uid, with a group behind a colon; empty for root."""


def with_config(words: Sequence[str], wait_for: str, config: Mapping[str, Any]) -> Command:
    """The command as an image's configuration (OCI image specification, `config`) would have it run."""
    environment = tuple(map(str, config.get("Env") or ()))
    return Command(
        tuple(words) or (*(config.get("Entrypoint") or ()), *(config.get("Cmd") or ())),
        wait_for,
        environment if any(each.startswith("PATH=") for each in environment) else (_PATH, *environment),
        config.get("WorkingDir") or "/",
        config.get("User") or "",
    )


def check_tools() -> None:
    """Raise UnsupportedError where the host lacks what containers are made with."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        raise UnsupportedError(f"tools of the host are missing: {', '.join(missing)}")


def rehearse() -> None:
    """Have the host's tools in memory: a container with nothing in it, that fails when all is set up."""
    with tempfile.TemporaryDirectory(prefix="nsfs-rehearsal-") as root, contextlib.suppress(NsfsError):
        run_command(root, Command(("true",)), timeout=_GRACE)


def run_command(root: str, command: Command, *, timeout: float, linger: float = 0.0) -> float:
    """Run it in the writable tree at `root`; time.monotonic() of the moment at which it was up.

    Blocks until it has ended, or until it is up and was killed, `linger` seconds later. Raises NsfsError with what it
    said where it fails, or is not up within `timeout` seconds.
    """
    inside = ["unshare", f"--root={root}", f"--wd={command.directory}", *_identity(root, command.user)]
    words = ["sh", "-ec", _SETUP, "sh", root, "env", "-i", *command.environment, *_found(inside), *command.words]
    namespaces = ["unshare", "--mount", "--pid", "--ipc", "--uts", "--net", "--fork", "--kill-child"]
    with subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", *namespaces, *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        try:
            up = _watch(process, command, timeout)
            time.sleep(max(0.0, up + linger - time.monotonic()))
            return up
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _found(words: list[str]) -> list[str]:
    """With the host's program, as the PATH is the image's from here on."""
    return [shutil.which(words[0]) or words[0], *words[1:]]


def _identity(root: str, user: str) -> list[str]:
    """Options of unshare(1) for a user of the image."""
    name, _, group = user.partition(":")
    if name in {"", "0", "root"}:
        return []
    uid, gid = (int(name), 0) if name.isdecimal() else _look_up(f"{root}/etc/passwd", name)
    if group:
        gid = int(group) if group.isdecimal() else _look_up(f"{root}/etc/group", group)[0]
    return [f"--setgid={gid}", f"--setuid={uid}"]


def _look_up(path: str, name: str) -> tuple[int, int]:
    """The numbers in the third and fourth field of `name` in passwd(5); group(5) has the first alone."""
    with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8", errors="replace") as file:
        for fields in (line.rstrip("\n").split(":") for line in file):
            if fields[0] == name:
                return int(fields[2]), int(fields[3]) if fields[3].isdecimal() else 0
    raise NotFoundError(f"the image has no such user or group: {name}")


def _watch(process: subprocess.Popen[bytes], command: Command, timeout: float) -> float:
    assert process.stdout is not None
    output = process.stdout.fileno()
    said = b""
    deadline = time.monotonic() + timeout
    while select.select([output], [], [], max(0.0, deadline - time.monotonic()))[0]:
        data = os.read(output, 1 << 16)
        up, said = time.monotonic(), said + data
        if command.wait_for and command.wait_for.encode() in said:
            return up
        if data and not command.wait_for:
            _check_end(process, output, said)
            return up
        if not data:
            _check_status(process, said, silent=not command.wait_for)
            return up
    raise NsfsError(f"the command is not up after {timeout:g} s: {_tail(said)}", hint="see --wait-for and --timeout")


def _check_end(process: subprocess.Popen[bytes], output: int, said: bytes) -> None:
    """Let the command end by itself for a while: where it fails, what it said was an error."""
    deadline = time.monotonic() + _GRACE
    while select.select([output], [], [], max(0.0, deadline - time.monotonic()))[0]:
        data = os.read(output, 1 << 16)
        said += data
        if not data:
            return _check_status(process, said, silent=True)
    return None


def _check_status(process: subprocess.Popen[bytes], said: bytes, *, silent: bool) -> None:
    status = process.wait()
    if status or not silent:
        raise NsfsError(f"the command ended with {status}: {_tail(said)}")


def _tail(said: bytes) -> str:
    return said[-_TAIL:].decode(errors="replace").strip() or "it said nothing"
