"""Where a daemon's descriptors outlive it: systemd's store, or a holder of our own; and what it tells systemd.

Owns the protocols: sd_notify(3) with FDSTORE, FDSTOREREMOVE and READY, sd_listen_fds(3) for what comes back, and the
holder's commands (`serve.holder`). systemd is believed to keep descriptors where it says so by $FDSTORE (systemd 254),
since an older one forgets them when the unit is stopped. A daemon that replaces itself by execve(2) takes them along.

Concurrency: every call talks to a process that answers at once, or is given up after seconds; call those that block in
a thread. Invariant: who took a descriptor from a store owns a copy of it.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Protocol

from nsfs.errors import UnreachableError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, MutableMapping, Sequence

_CARRIED: Final = "NSFS_FDS"
_FIRST_LISTENED: Final = 3
"""SD_LISTEN_FDS_START."""
_DEADLINE: Final = 5.0
"""Seconds for a holder to answer: it has nothing else to do."""
_MAX_MESSAGE: Final = 1024


class FdStore(Protocol):
    """Keeps descriptors by name for the next daemon. Blocks for moments; raises UnreachableError."""

    def take(self) -> dict[str, int]:
        """Copies of all that there are, at the start of a daemon."""

    def keep(self, name: str, fd: int) -> None:
        """Keep a copy of `fd`, in the place of what had that name."""

    def drop(self, name: str) -> None:
        """Give it up."""

    def carry(self) -> None:
        """Hand over what execve(2), which comes next, would lose."""

    def close(self) -> None:
        """The daemon ends: what keeps nothing for a next one ends, too."""


class Notifier:
    """What the service manager is told; nothing, where there is none."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        path = environ.get("NOTIFY_SOCKET", "")
        self._path = "\0" + path[1:] if path.startswith("@") else path

    def tell(self, *lines: str, fds: Sequence[int] = ()) -> None:
        """Send variable assignments; a manager that is gone is told nothing."""
        if not self._path:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, suppress(OSError):
            sock.connect(self._path)
            socket.send_fds(sock, ["\n".join(lines).encode()], fds)


class SystemdStore(FdStore):
    """The store of the unit that we are."""

    def __init__(self, notifier: Notifier, environ: MutableMapping[str, str]) -> None:
        self._notifier = notifier
        self._environ = environ
        self._kept: dict[str, int] = {}
        """Copies of our own, which an execve of ours can take along: systemd gives them back at a start alone."""

    def take(self) -> dict[str, int]:
        """See FdStore."""
        carried = json.loads(self._environ.pop(_CARRIED, "{}"))
        self._kept = {name: _raise_fd(fd) for name, fd in carried.items()} | dict(_listened(self._environ, os.getpid()))
        return {name: _copy(fd) for name, fd in self._kept.items()}

    def keep(self, name: str, fd: int) -> None:
        """See FdStore. Without FDPOLL=0 systemd would wait for an end, and be woken by each request of a connection."""
        self.drop(name)
        self._notifier.tell("FDSTORE=1", "FDPOLL=0", f"FDNAME={name}", fds=[fd])
        self._kept[name] = _copy(fd)

    def drop(self, name: str) -> None:
        """See FdStore."""
        if name in self._kept:
            self._notifier.tell("FDSTOREREMOVE=1", f"FDNAME={name}")
            os.close(self._kept.pop(name))

    def carry(self) -> None:
        """See FdStore."""
        for fd in self._kept.values():
            os.set_inheritable(fd, True)  # noqa: FBT003
        self._environ[_CARRIED] = json.dumps(self._kept)

    def close(self) -> None:
        """See FdStore. systemd ends with nothing; what it holds is for the next daemon."""


def _listened(environ: MutableMapping[str, str], pid: int) -> Iterator[tuple[str, int]]:
    """What sd_listen_fds_with_names(3) gives; nothing that we start inherits it."""
    count, names = environ.pop("LISTEN_FDS", "0"), environ.pop("LISTEN_FDNAMES", "").split(":")
    if environ.pop("LISTEN_PID", "") != str(pid):
        return
    for number, name in zip(range(int(count)), names, strict=False):
        fd = _FIRST_LISTENED + number
        os.set_inheritable(fd, False)  # noqa: FBT003
        yield name, _raise_fd(fd)


def _raise_fd(fd: int) -> int:
    """Off the low numbers, which programs that we start expect for themselves."""
    high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 64)
    os.close(fd)
    return high


class HolderStore(FdStore):
    """A holder behind a socket; started where there is none, and given everything again where it was killed."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._line: socket.socket | None = None
        self._watch: socket.socket | None = None
        """A second connection, on which nothing is ever said."""
        self._kept: dict[str, int] = {}
        """Copies of our own."""

    def take(self) -> dict[str, int]:
        """See FdStore."""
        with self._lock:
            if not self._open():
                self._start()
            found = self._ask("take")
            self._kept = {name: _copy(fd) for name, fd in found.items()}
            return found

    def keep(self, name: str, fd: int) -> None:
        """See FdStore."""
        with self._lock:
            self._forget(name)
            self._kept[name] = _copy(fd)
            self._ensure()
            self._ask(f"keep {name}", fd)

    def drop(self, name: str) -> None:
        """See FdStore."""
        with self._lock:
            self._forget(name)
            self._ensure()
            self._ask(f"drop {name}")

    def carry(self) -> None:
        """See FdStore. The holder has everything."""

    def close(self) -> None:
        """See FdStore."""
        with self._lock:
            if not self._kept:
                with suppress(UnreachableError):
                    self._ask("end")
                    os.unlink(self._path)
            self._hang_up()
            for name in list(self._kept):
                self._forget(name)

    def fileno(self) -> int:
        """Readable when the holder is gone."""
        assert self._watch is not None
        return self._watch.fileno()

    def restore(self) -> None:
        """Where the holder is gone, start another and give it what the last one had."""
        with self._lock:
            self._ensure()

    def _ensure(self) -> None:
        try:
            self._ask("hello")
        except UnreachableError:
            self._start()
            for name, fd in self._kept.items():
                self._ask(f"keep {name}", fd)

    def _ask(self, command: str, *fds: int) -> dict[str, int]:
        """Give a command; what it gives."""
        line = self._line
        assert line is not None
        try:
            socket.send_fds(line, [command.encode()], fds)
            return dict(iter(lambda: _receive(line), None))
        except OSError as error:
            raise UnreachableError(f"the process that holds descriptors does not answer: {error}") from error

    def _forget(self, name: str) -> None:
        if name in self._kept:
            os.close(self._kept.pop(name))

    def _open(self) -> bool:
        """Connect twice; whether there is somebody."""
        self._hang_up()
        try:
            self._line, self._watch = _connect(self._path), _connect(self._path)
        except OSError:
            return False
        return True

    def _hang_up(self) -> None:
        for sock in (self._line, self._watch):
            if sock is not None:
                sock.close()

    def _start(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            with suppress(FileNotFoundError):
                os.unlink(self._path)
            listener.bind(self._path)
            os.chmod(self._path, 0o600)
            listener.listen()
            _launch(listener.fileno())
        if not self._open():
            raise UnreachableError(f"the process that holds descriptors does not answer: {self._path}")


def _connect(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(_DEADLINE)
    try:
        sock.connect(path)
    except OSError:
        sock.close()
        raise
    return sock


def _launch(listener: int) -> None:
    """A process in a session of its own, which nothing of ours ends but its own command."""
    command = [sys.executable, "-P", "-m", "nsfs.serve.holder", str(listener)]
    process = subprocess.Popen(command, pass_fds=[listener], stdin=subprocess.DEVNULL, cwd="/", start_new_session=True)
    threading.Thread(target=process.wait, daemon=True).start()


def _receive(line: socket.socket) -> tuple[str, int] | None:
    """A kept descriptor; None at the end of the answer. Raises OSError."""
    data, fds, _, _ = socket.recv_fds(line, _MAX_MESSAGE, 1, socket.MSG_CMSG_CLOEXEC)
    if not data:
        raise ConnectionResetError("it is gone")
    return (data.decode().removeprefix("fd "), fds[0]) if fds else None


def _copy(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 64)
