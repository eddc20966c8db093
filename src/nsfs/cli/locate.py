"""Which daemon serves this user, and how a private one comes to life.

Root asks the system's daemon where its socket answers. Otherwise, and any other user always, the user's own: started on
demand, detached, its log in $XDG_STATE_HOME/nsfs. Several commands may start one at the same time: a lock file in the
run directory lets one of them do it while the others wait. Refuses a run directory that anybody else can enter.
"""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from nsfs.errors import DeniedError, NsfsError, UnreachableError
from nsfs.serve.client import open_control, probe
from nsfs.serve.config import Config, load_private_config, private_log

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from contextlib import AbstractContextManager

    from nsfs.serve.client import Control

SYSTEM_SOCKET = f"{Config().run}/nsfs.sock"

_DAEMON = (sys.executable, "-P", "-m", "nsfs.cli", "serve", "--private")
_DEADLINE = 10.0
"""Seconds for a private daemon to answer."""
_ATTEMPTS = 3
"""A private daemon may end between the moment it is found and the first call."""
_LOG_TAIL = 5
"""Lines."""
_RUN_HINT = "set XDG_RUNTIME_DIR to a directory that is yours alone (mode 0700)"


def open_daemon(path: str | None, environ: Mapping[str, str], uid: int) -> AbstractContextManager[Control]:
    """Connect to the daemon at `path`, or where it is None to the one that serves `uid`, starting it if need be."""
    if path is None and uid == 0 and answers(SYSTEM_SOCKET):
        path = SYSTEM_SOCKET
    if path is not None:
        return open_control(path)
    return _open_private(load_private_config(environ, uid), private_log(environ), uid)


def answers(path: str) -> bool:
    """Whether somebody listens at `path`, and lets us in."""
    try:
        probe(path)
    except NsfsError:
        return False
    return True


@contextmanager
def _open_private(config: Config, log: str, uid: int) -> Iterator[Control]:
    with ExitStack() as stack:
        for attempt in range(1, _ATTEMPTS + 1):
            ensure_private(config, log, uid)
            try:
                control = stack.enter_context(open_control(config.socket))
                break
            except UnreachableError:
                if attempt == _ATTEMPTS:
                    raise
        yield control


def ensure_private(config: Config, log: str, uid: int, command: tuple[str, ...] = _DAEMON) -> None:
    """Return when the private daemon's socket answers; raises UnreachableError with the end of its log."""
    if answers(config.socket):
        return
    make_private_directory(config.run, uid)
    lock = os.open(f"{config.run}/start.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not answers(config.socket):
            _wait_for_daemon(_spawn(command, log), config.socket, log)
    finally:
        os.close(lock)


def make_private_directory(path: str, uid: int) -> None:
    """Make `path`, or check that it is a directory of `uid` that nobody else can enter; raises DeniedError."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise DeniedError(f"no place for the daemon's socket: {path}: {error.strerror}", hint=_RUN_HINT) from None
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != uid or status.st_mode & 0o077:
        raise DeniedError(f"not a directory of yours alone: {path}", hint=_RUN_HINT)


def _spawn(command: tuple[str, ...], log: str) -> subprocess.Popen[bytes]:
    """Start `command` detached: a session of its own, and nothing open but its log."""
    os.makedirs(os.path.dirname(log), 0o700, exist_ok=True)
    with open(log, "ab", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd="/", start_new_session=True
        )


def _wait_for_daemon(daemon: subprocess.Popen[bytes], socket: str, log: str) -> None:
    deadline = time.monotonic() + _DEADLINE
    while not answers(socket):
        if daemon.poll() is not None:
            raise UnreachableError(f"the private daemon ended at its start{_tail(log)}", hint=f"its log is {log}")
        if time.monotonic() > deadline:
            daemon.kill()
            daemon.wait()
            raise UnreachableError(
                f"the private daemon does not answer after {_DEADLINE:g} s{_tail(log)}", hint=f"its log is {log}"
            )
        time.sleep(0.02)
    daemon.returncode = 0  # it outlives us: from here on its end is not ours to wait for


def _tail(log: str) -> str:
    with open(log, encoding="utf-8", errors="replace") as file:
        lines = file.readlines()[-_LOG_TAIL:]
    return ":\n  " + "  ".join(lines).rstrip() if lines else ""
