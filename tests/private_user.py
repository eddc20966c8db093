"""A user who is not root: a home, a runtime directory, and a private daemon that must not outlive the test.

Everything runs under `setpriv` with an ordinary uid and no capabilities. Hosts with udev let everybody open /dev/fuse;
where this one does not, it does while the block lasts. Python must be one that this user may execute: if .venv's is
not, one of the system's that sees the same packages (in <repo>/.cache/user-venv) takes its place.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

import mounting
import prepared
from users import is_dead, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

UID = 1000
REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
_BECOME = ("setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "sh", "-c", 'exec "$0" "$@"')
"""setpriv has root's capabilities until it executes something: here sh, which then looks for the command without."""


@dataclass(frozen=True, slots=True)
class User:
    """What this user has."""

    home: str
    python: str

    @property
    def runtime(self) -> str:
        return f"{self.home}/runtime"

    @property
    def socket(self) -> str:
        """Of the private daemon."""
        return f"{self.runtime}/nsfs/nsfs.sock"

    @property
    def environment(self) -> dict[str, str]:
        """Nothing of root's."""
        return {"HOME": self.home, "XDG_RUNTIME_DIR": self.runtime, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}

    def run(self, *command: str, check: bool = True, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a command; `more` goes into its environment."""
        done = subprocess.run(
            [*_BECOME, *command],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=self.environment | more,
            cwd=self.home,
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"{command}: exit {done.returncode}: {done.stderr}\n{self.log()}")
        return done

    def nsfs(self, *arguments: str, check: bool = True, **more: str) -> subprocess.CompletedProcess[str]:
        """Run the command line."""
        return self.run(self.python, "-P", "-m", "nsfs.cli", *arguments, check=check, **more)

    def json(self, *arguments: str) -> Any:
        """What a command says with --json."""
        return msgspec.json.decode(self.nsfs(*arguments, "--json").stdout)

    def directory(self, name: str) -> str:
        """A new one of this user's."""
        path = f"{self.home}/{name}"
        os.mkdir(path)
        os.chown(path, UID, UID)
        return path

    def log(self) -> str:
        """The end of the private daemon's."""
        with contextlib.suppress(FileNotFoundError), open(f"{self.home}/.local/state/nsfs/daemon.log") as file:
            return file.read()[-3000:]
        return ""

    def fronts(self) -> list[int]:
        """The processes that serve this user's mounts: whoever has /dev/fuse open, the daemon aside."""
        holders = {int(path.parts[2]) for path in pathlib.Path("/proc").glob("[0-9]*/fd/*") if _is_fuse(path)}
        return sorted(pid for pid in holders - {self.daemon()} if os.stat(f"/proc/{pid}").st_uid == UID)

    def daemon(self) -> int:
        """The private daemon's process, 0 if there is none."""
        with socket.socket(socket.AF_UNIX) as connection:
            try:
                connection.connect(self.socket)
            except (FileNotFoundError, ConnectionRefusedError):
                return 0
            peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            return int(struct.unpack("3i", peer)[0])


def _is_fuse(path: pathlib.Path) -> bool:
    try:
        return os.readlink(path) == "/dev/fuse"
    except OSError:
        return False


@contextlib.contextmanager
def private_user() -> Iterator[User]:
    """A user with an empty home; their mounts and processes end with the block. One at a time: they share a uid."""
    home = pathlib.Path(tempfile.mkdtemp(prefix="nsfs-user-"))
    try:
        with prepared.alone("user"), _fuse_for_all(), mounting.swept(home):
            for path in (home, home / "runtime"):
                path.mkdir(mode=0o700, exist_ok=True)
                os.chown(path, UID, UID)
            user = User(str(home), _find_python())
            try:
                yield user
            finally:
                _end(user)
    finally:
        shutil.rmtree(home)


def _end(user: User) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        if pid := user.daemon():
            os.kill(pid, number)
            with contextlib.suppress(AssertionError):
                wait_until(lambda pid=pid: is_dead(pid), "the private daemon ends")  # type: ignore[misc]


@contextlib.contextmanager
def _fuse_for_all() -> Iterator[None]:
    mode = stat.S_IMODE(os.stat("/dev/fuse").st_mode)
    os.chmod("/dev/fuse", 0o666)
    try:
        yield
    finally:
        os.chmod("/dev/fuse", mode)


def _find_python() -> str:
    if _may_run(sys.executable):
        return sys.executable
    venv = REPOSITORY / ".cache/user-venv"
    python = str(venv / "bin/python")
    if not _may_run(python):
        shutil.rmtree(venv, ignore_errors=True)
        subprocess.run(["/usr/bin/python3", "-m", "venv", "--without-pip", venv], check=True)
        version = "python{}.{}".format(*sys.version_info)
        site = venv / "lib" / version / "site-packages"
        assert site.is_dir(), f"the system's Python is not {version}, and user {UID} may not run {sys.executable}"
        packages = [path for path in sys.path if path.endswith("site-packages")]
        (site / "shared.pth").write_text("\n".join([str(REPOSITORY / "src"), *packages]) + "\n")
        assert _may_run(python), f"user {UID} may not run {python}"
    return python


def _may_run(python: str) -> bool:
    command = [*_BECOME, python, "-P", "-c", "import nsfs.cli"]
    return subprocess.run(command, check=False, capture_output=True, cwd="/").returncode == 0
