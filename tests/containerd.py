"""A private containerd with namespaces of its own, of the machine's release of Debian or of a newer one.

Owns: the process, its configuration, root, state and socket, all below a directory of the caller's, and everything
that it starts. containerd runs as the first process of a pid namespace and in a mount namespace: one SIGKILL ends it
together with its shims, containers and mounts, in whatever state they are, also when the test dies first. Mounts that
others make below a `shared_directory` are seen in there. `/run/containerd`, which shims and runc use whatever the
configuration says, is a tmpfs of its own. What it takes for the top of each cgroup hierarchy is a cgroup of its own, so
that containers of one name may run beside each other; these cgroups are removed at the end.

Containers need nothing more: ctr, unless told otherwise, asks for no seccomp profile, no AppArmor profile and a cgroup
named /<namespace>/<container>, which runc 1.1.5 makes in every cgroup v1 hierarchy without systemd. gVisor's runsc runs
behind the same shim, as `runsc` says.

A release newer than the machine's is unpacked into the repository's .cache, never installed; forky's containerd runs on
bookworm's libc (it wants 2.34), beside bookworm's runc.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import debian

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

CACHE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), ".cache")

INSTALLED = "installed"
NEWER = "forky"
RELEASES = (INSTALLED, NEWER)
"""Debian 12's 1.6 and forky's 2.1, as `release` of `run_containerd`."""

_DEADLINE = 60.0
"""Seconds for containerd to answer."""

_CONFIG = """\
version = {version}
disabled_plugins = [{disabled}]
root = "{directory}/root"
state = "{directory}/state"
imports = [{imports}]
[grpc]
  address = "{directory}/sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "{directory}/opt"
"""
_NRI = "io.containerd.nri.v1.nri"
_CRI = ("io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime")

_CGROUPS = "/sys/fs/cgroup"
_ENTER = """\
set -e
mount -t tmpfs tmpfs /run/containerd
for top in /sys/fs/cgroup/*; do
    if [ -d "$top/$0" ]; then
        echo 0 > "$top/$0/cgroup.procs"
        mount --bind "$top/$0" "$top"
    fi
done
exec unshare --cgroup "$@"
"""
"""$0 is what its cgroups are called, the rest what to execute in them."""

_RUNSC = """\
#!/bin/sh
exec /usr/bin/runsc --network=none "$@"
"""


@dataclass(frozen=True, slots=True)
class Containerd:
    """A running containerd."""

    binaries: str
    directory: str
    version: str
    pid: int
    """As we see it; it is 1 inside."""

    @property
    def socket(self) -> str:
        """Its gRPC API's."""
        return f"{self.directory}/sock"

    @property
    def major(self) -> int:
        """Of the version."""
        return int(self.version.partition(".")[0])

    def ctr(self, *arguments: str, namespace: str = "default", check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run its own ctr, inside, where a container's pipes are."""
        command = [*self.enter, f"{self.binaries}/ctr", "-a", self.socket, "-n", namespace, *arguments]
        done = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if check and done.returncode != 0:
            raise RuntimeError(f"ctr {' '.join(arguments)}: exit {done.returncode}: {done.stderr}\n{self.tail()}")
        return done

    def run(
        self, reference: str, container: str, *command: str, options: Sequence[str] = (), namespace: str = "default"
    ) -> str:
        """What `command` prints in a container that lives as long as it; `options` are those of `ctr run`."""
        return self.ctr("run", "--rm", *options, reference, container, *command, namespace=namespace).stdout

    def runsc(self) -> tuple[str, ...]:
        """Options of `ctr run` for gVisor: Debian packages runsc without a shim, and runc's has no option for networks.

        ctr makes an empty network namespace, which runsc of 2022 takes for the host's and refuses.
        """
        path = f"{self.directory}/runsc"
        with open(path, "w", opener=lambda name, flags: os.open(name, flags, 0o755)) as file:
            file.write(_RUNSC)
        return "--runc-binary", path

    @property
    def enter(self) -> list[str]:
        """What goes before a command that is to run in its namespaces."""
        return ["nsenter", f"--target={self.pid}", "--mount", "--pid", "--"]

    def see(self, path: str) -> str:
        """The path by which we reach what `path` is inside."""
        return f"/proc/{self.pid}/root{path}"

    def tail(self) -> str:
        """The end of its log."""
        with open(f"{self.directory}/log", errors="replace") as file:
            return file.read()[-3000:]


def binaries_of(release: str, cache: str = CACHE) -> str:
    """The directory with containerd, ctr and the shim of a release."""
    if release == INSTALLED:
        return "/usr/bin"
    return debian.fetch_package("containerd", release, f"{cache}/containerd-{release}") + "/usr/bin"


def proxy_plugins(socket: str, *names: str) -> str:
    """The part of a configuration that makes each of `names` a snapshotter behind `socket`."""
    return "".join(f'[proxy_plugins."{name}"]\n  type = "snapshot"\n  address = "{socket}"\n' for name in names)


@contextlib.contextmanager
def run_containerd(
    directory: str,
    *,
    release: str = INSTALLED,
    cache: str = CACHE,
    more: str = "",
    imports: Sequence[str] = (),
    cri: bool = False,
) -> Iterator[Containerd]:
    """Start a containerd that keeps everything below `directory`; nothing of it is left when the block ends.

    `more` is appended to its configuration (of version 2 for containerd 1.x, else 3), `imports` are files with more of
    it.
    """
    binaries = binaries_of(release, cache)
    version = _version(binaries)
    os.makedirs(directory, exist_ok=True)
    with open(f"{directory}/config.toml", "w") as file:
        file.write(_render_config(directory, 2 if version.startswith("1.") else 3, imports, cri=cri) + more)
    with _cgroups() as cgroups, _started(directory, binaries, cgroups) as (process, pid):
        running = Containerd(binaries, directory, version, pid)
        _wait_until_serving(process, running)
        yield running


def _render_config(directory: str, version: int, imports: Sequence[str], *, cri: bool) -> str:
    return _CONFIG.format(
        directory=directory,
        version=version,
        disabled=_quoted([_NRI] if cri else [_NRI, *_CRI]),
        imports=_quoted(imports),
    )


def _quoted(texts: Sequence[str]) -> str:
    return ", ".join(f'"{text}"' for text in texts)


def _version(binaries: str) -> str:
    said = subprocess.run([f"{binaries}/containerd", "--version"], check=True, capture_output=True, text=True).stdout
    return said.split()[2]


@contextlib.contextmanager
def _cgroups() -> Iterator[str]:
    """The name of a new cgroup in each hierarchy, in which there is nothing any more when the block ends."""
    name = f"nsfs-{secrets.token_hex(8)}"
    tops = [f"{_CGROUPS}/{hierarchy}" for hierarchy in os.listdir(_CGROUPS)]
    tops = [top for top in tops if os.path.isdir(top) and not os.path.islink(top)]
    try:
        for top in tops:
            os.mkdir(f"{top}/{name}")
        for file in ("cpuset.cpus", "cpuset.mems"):  # a new one has none (cgroup-v1/cpusets.rst)
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(f"{_CGROUPS}/cpuset/{file}", f"{_CGROUPS}/cpuset/{name}/{file}")
        yield name
    finally:
        for top in tops:
            for directory, _, _ in os.walk(f"{top}/{name}", topdown=False):
                os.rmdir(directory)


@contextlib.contextmanager
def _started(directory: str, binaries: str, cgroups: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    os.makedirs("/run/containerd", exist_ok=True)
    isolated = ["unshare", "--mount", "--propagation=slave", "--pid", "--fork", "--kill-child", "--mount-proc"]
    command = ["setpriv", "--pdeathsig", "KILL", *isolated, "sh", "-c", _ENTER, cgroups]
    with open(f"{directory}/log", "ab") as log:
        process = subprocess.Popen(
            [*command, f"{binaries}/containerd", "--config", f"{directory}/config.toml"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | {"PATH": f"{binaries}:{os.environ['PATH']}"},
        )
    try:
        pid = _child_of(process)
        try:
            yield process, pid
        finally:
            _end(process, pid)
    finally:
        process.kill()
        process.wait()


def _end(process: subprocess.Popen[bytes], pid: int) -> None:
    """Kill the first process of the namespace: it is not gone before all others there are (pid_namespaces(7))."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_DEADLINE)


def _child_of(process: subprocess.Popen[bytes]) -> int:
    """The first process of the pid namespace, once there is one."""
    deadline = time.monotonic() + _DEADLINE
    while process.poll() is None and time.monotonic() < deadline:
        with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
            children = file.read().split()
        if children:
            return int(children[0])
        time.sleep(0.005)
    raise RuntimeError("containerd's namespaces cannot be made")


def _wait_until_serving(process: subprocess.Popen[bytes], running: Containerd) -> None:
    deadline = time.monotonic() + _DEADLINE
    command = [f"{running.binaries}/ctr", "-a", running.socket, "--timeout", "1s", "version"]
    while subprocess.run(command, check=False, capture_output=True).returncode != 0:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"containerd does not start: {running.tail()}")
        time.sleep(0.05)


@contextlib.contextmanager
def shared_directory(path: str) -> Iterator[str]:
    """Make `path` a mount whose mounts other namespaces see; what is mounted there at the end goes with it."""
    os.makedirs(path, exist_ok=True)
    subprocess.run(["mount", "--bind", path, path], check=True)
    try:
        subprocess.run(["mount", "--make-shared", path], check=True)
        yield path
    finally:
        subprocess.run(["umount", "--lazy", "--recursive", path], check=True)
