"""A daemon of our own, driven as a user drives it: through `nsfs` and its exit codes.

Owns: one `nsfs serve` process with a configuration, root and run directory below a directory of the caller's, so that
neither the host's daemon nor its state is touched. When the block ends everything below that directory is unmounted and
the process is gone, also if it misbehaves: `sweep` aborts FUSE connections before it detaches mounts, so that nothing
waits for a dead worker. A daemon that had to be killed, or left mounts behind a clean end, is an error.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mounting import abort_connection
from nsfs.errors import UnreachableError
from nsfs.serve.client import open_control
from nsfs.store.keys import Keys
from nsfs.store.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from nsfs.store.layout import DomainLayout

_DEADLINE = 60.0
"""Seconds for the daemon to answer, and to end."""

NSFS = (os.path.join(os.path.dirname(sys.executable), "nsfs"),)


def stored_domain(root: str, domain: str = "ns/default") -> DomainLayout:
    """What a domain of a daemon has on disk, and the key that it is under."""
    layout = Layout(root, root)
    return layout.domain(domain, Keys(layout, None).load(domain))


@dataclass(frozen=True, slots=True)
class Daemon:
    """A running daemon."""

    socket: str
    root: str
    run: str
    log: str
    pid: int

    def nsfs(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the command line against this daemon."""
        command = [*NSFS, "--socket", self.socket, *arguments]
        done = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if check and done.returncode != 0:
            raise RuntimeError(f"nsfs {' '.join(arguments)}: exit {done.returncode}: {done.stderr}\n{self.tail()}")
        return done

    @contextlib.contextmanager
    def started(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """A command that runs beside the test, and is killed if it has not ended with the block."""
        command = [*NSFS, "--socket", self.socket, *arguments]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True) as running:
            try:
                yield running
            finally:
                running.kill()

    def json(self, *arguments: str) -> Any:
        """What a command says with --json."""
        return json.loads(self.nsfs(*arguments, "--json").stdout)

    @contextlib.contextmanager
    def mounted(self, reference: str, target: str, *options: str) -> Iterator[dict[str, Any]]:
        """`reference` at `target`, which is made; gives what `nsfs mount` reports."""
        os.makedirs(target, exist_ok=True)
        report = self.json("mount", reference, target, *options)
        try:
            yield report
        finally:
            self.nsfs("umount", target)

    def workers(self) -> dict[str, int]:
        """Process ID of each domain's worker."""
        return {domain["name"]: domain["pid"] for domain in self.json("status")["domains"] if domain["pid"]}

    def layout(self, domain: str = "ns/default") -> DomainLayout:
        """What a domain has on disk, and the key that it is under."""
        return stored_domain(self.root, domain)

    def tail(self) -> str:
        """The end of the daemon's log."""
        with open(self.log, errors="replace") as file:
            return file.read()[-3000:]

    def said(self, text: str) -> str:
        """The rest of the first line of the daemon's log that has `text`, which comes soon."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with open(self.log, errors="replace") as file:
                found = re.search(f"{re.escape(text)}(.*)", file.read())
            if found is not None:
                return found[1]
            time.sleep(0.05)
        raise AssertionError(self.tail())


@contextlib.contextmanager
def run_daemon(directory: str, settings: Mapping[str, Any] | None = None) -> Iterator[Daemon]:
    """A daemon below `directory`; `settings` are TOML keys, a table's as a mapping."""
    process, daemon = start_daemon(directory, settings)
    try:
        _wait_until_serving(process, daemon)
        yield daemon
    finally:
        _end(process, directory, daemon)


@contextlib.contextmanager
def mortal_daemons(directory: str, settings: Mapping[str, Any] | None = None) -> Iterator[Callable[[], Daemon]]:
    """Start daemons one after the other, all below `directory`, which the test ends in its own ways."""
    processes: list[subprocess.Popen[bytes]] = []

    def start() -> Daemon:
        process, daemon = start_daemon(directory, settings)
        processes.append(process)
        _wait_until_serving(process, daemon)
        return daemon

    try:
        yield start
    finally:
        for process in processes:
            process.kill()
            process.wait()
        sweep(directory)


def start_daemon(directory: str, settings: Mapping[str, Any] | None) -> tuple[subprocess.Popen[bytes], Daemon]:
    """Start one, and do not wait for it."""
    os.makedirs(directory, exist_ok=True)
    keys = {"root": f"{directory}/root", "run": f"{directory}/run", **(settings or {})}
    with open(f"{directory}/config.toml", "w") as file:
        file.write(_render_toml(keys))
    log = f"{directory}/log"
    with open(log, "ab") as output:
        # Ctrl-C is for us, who unmount first; should we die, the kernel ends the daemon.
        command = ["setpriv", "--pdeathsig", "INT", *NSFS, "serve", "--config", f"{directory}/config.toml"]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    return process, Daemon(f"{directory}/run/nsfs.sock", f"{directory}/root", f"{directory}/run", log, process.pid)


def _render_toml(keys: Mapping[str, Any]) -> str:
    plain = [f"{key} = {json.dumps(value)}\n" for key, value in keys.items() if not isinstance(value, dict)]
    tables = [f"[{key}]\n{_render_toml(value)}" for key, value in keys.items() if isinstance(value, dict)]
    return "".join(plain + tables)


def _wait_until_serving(process: subprocess.Popen[bytes], daemon: Daemon) -> None:
    deadline = time.monotonic() + _DEADLINE
    while not _answers(daemon.socket):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"nsfs serve does not start: {daemon.tail()}")
        time.sleep(0.02)


def _answers(path: str) -> bool:
    try:
        with open_control(path):
            return True
    except UnreachableError:
        return False


def _end(process: subprocess.Popen[bytes], directory: str, daemon: Daemon) -> None:
    process.send_signal(signal.SIGINT)
    try:
        status = process.wait(_DEADLINE)
    except subprocess.TimeoutExpired:
        process.kill()
        status = process.wait()
    left = sweep(directory)
    if sys.exception() is None and (status != 0 or left):
        raise RuntimeError(f"nsfs serve ended with {status} and left mounts: {left}\n{daemon.tail()}")


def sweep(directory: str) -> list[str]:
    """Unmount everything below `directory`, whatever state it is in; returns what there was."""
    mounts = list(_mounts_below(directory))
    for device, _ in mounts:
        with contextlib.suppress(OSError):  # no FUSE connection
            abort_connection(device)
    for _, target in reversed(mounts):
        subprocess.run(["umount", "--lazy", target], check=False, capture_output=True)
    _end_holder(f"{directory}/run/holder.sock")
    return [target for _, target in mounts]


def _end_holder(path: str) -> None:
    """End the process that keeps descriptors for a next daemon, if there is one."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as line, contextlib.suppress(OSError):
        line.connect(path)
        line.send(b"end")
        line.recv(16)


def _mounts_below(directory: str) -> Iterator[tuple[int, str]]:
    """(device, mount point) in the order of mounting (proc(5), mountinfo)."""
    with open("/proc/self/mountinfo") as file:
        for line in file:
            fields = line.split()
            target = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4])
            if target.startswith(directory + "/"):
                major, minor = fields[2].split(":")
                yield os.makedev(int(major), int(minor)), target
