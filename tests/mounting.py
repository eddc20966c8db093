"""Mounts of tests, and their removal whatever happens: no mount, connection or loop device outlives its test."""

import contextlib
import ctypes
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from nsfs.serve import mounts
from nsfs.serve.fusectl import open_fusectl

_LOOP_CLR_FD = 0x4C01
_DETACH = 2
_BIND, _PRIVATE = 4096, 1 << 18 | 1 << 14
_CLONE_NEWNS = 0x20000
_libc = ctypes.CDLL(None, use_errno=True)


def below(top: Path) -> list[mounts.MountInfo]:
    """What is mounted below `top`, last mounted first."""
    prefix = str(top) + "/"
    return [mount for mount in reversed(mounts.load_mounts()) if f"{mount.target}/".startswith(prefix)]


@contextlib.contextmanager
def control_of(connection: int) -> Iterator[Path]:
    """A FUSE connection's directory in fusectl, which is mounted where no path leads to: other tests run beside it."""
    root = open_fusectl()
    try:
        yield Path(f"/proc/self/fd/{root}/{connection}")
    finally:
        os.close(root)


def abort_connection(connection: int) -> None:
    """End a FUSE connection: whoever waits for it gets an error at once."""
    with control_of(connection) as directory:
        (directory / "abort").write_text("1")


def sweep(top: Path) -> None:
    """End every FUSE connection below `top`, so that nothing waits for it, then take every mount away."""
    found = below(top)
    for mount in found:
        if mount.fstype.startswith("fuse"):
            with contextlib.suppress(Exception):
                abort_connection(mount.connection)
    for mount in found:
        _libc.umount2(os.fsencode(mount.target), _DETACH)
    _detach_loops(top)


def loops(top: Path) -> list[str]:
    """Loop devices over files below `top`."""
    found = []
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if path.read_text().startswith(str(top) + "/"):
                found.append(path.parts[3])
    return found


def _detach_loops(top: Path) -> None:
    for name in loops(top):
        with contextlib.suppress(OSError):
            fd = os.open(f"/dev/{name}", os.O_RDONLY)
            try:
                fcntl.ioctl(fd, _LOOP_CLR_FD)
            finally:
                os.close(fd)


@contextlib.contextmanager
def swept(top: Path) -> Iterator[Path]:
    """Sweep `top` before and after."""
    sweep(top)
    try:
        yield top
    finally:
        sweep(top)


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Path]:
    """A directory to mount in."""
    with swept(tmp_path):
        yield tmp_path


def make_directory(path: Path) -> Path:
    """A directory for a mount."""
    path.mkdir(parents=True)
    return path


def become_user(uid: int, target: str) -> None:
    """Make this process `uid`'s, in a mount namespace of its own, where `target` can be reached and mounted on.

    There, everybody may open /dev/fuse, as udev sets it up on hosts that have udev; and the directories above `target`
    are replaced by one that everybody may enter. The host sees nothing of it, and all mounts go with the process.
    """
    _check(_libc.unshare(_CLONE_NEWNS))
    mounts._mount(None, "/", None, _PRIVATE, None)
    stage = f"{target}.user"
    os.mkdir(stage)
    mounts._mount("tmpfs", stage, "tmpfs", 0, "mode=755")
    os.mknod(f"{stage}/fuse", stat.S_IFCHR | 0o666, os.stat("/dev/fuse").st_rdev)
    os.chmod(f"{stage}/fuse", 0o666)
    mounts._mount(f"{stage}/fuse", "/dev/fuse", None, _BIND, None)
    top = target.split("/")[1]
    os.makedirs(f"{stage}/top/{target.partition(top + '/')[2]}")
    os.chown(f"{stage}/top/{target.partition(top + '/')[2]}", uid, uid)
    mounts._mount(f"{stage}/top", f"/{top}", None, _BIND, None)
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)


def _check(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), "system call failed")
