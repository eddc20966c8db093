"""Idmapped mounts: a directory seen a second time, with other owners (mount_setattr(2), Linux 5.12; EROFS 5.19).

Owns the system calls for it, and the user namespace whose maps the kernel is told by: made by unshare(1), written to
from outside, and empty again before it is used. Raises OSError, for callers to tell. Blocks; keeps no state.
"""

from __future__ import annotations

import errno
import os
import struct
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from nsfs.serve.syscalls import MOUNT_SETATTR, MOVE_MOUNT, OPEN_TREE, syscall

if TYPE_CHECKING:
    from collections.abc import Iterator

# include/uapi/linux/mount.h, include/uapi/linux/fcntl.h
_HERE: Final = -100
_EMPTY_PATH: Final = 0x1000
_CLONE: Final = 1
_FROM_EMPTY_PATH: Final = 4
_READ_ONLY, _IDMAP, _PRIVATE = 0x1, 0x100000, 1 << 18
_ATTR: Final = struct.Struct("=4Q")
"""struct mount_attr: attributes to set, to clear, propagation, descriptor of a user namespace."""


@contextmanager
def user_namespace(uids: str, gids: str) -> Iterator[int]:
    """A descriptor of a user namespace that has these maps, as uid_map and gid_map have them, and nobody in it."""
    descriptor = _make_user_namespace(uids, gids)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _make_user_namespace(uids: str, gids: str) -> int:
    pipe = subprocess.PIPE
    with subprocess.Popen(["unshare", "--user", "cat"], stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0) as inside:
        _wait_until_inside(inside)
        for name, text in (("uid_map", uids), ("gid_map", gids)):
            with open(f"/proc/{inside.pid}/{name}", "w", encoding="ascii") as file:
                file.write(text)
        return os.open(f"/proc/{inside.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)


def _wait_until_inside(process: subprocess.Popen[bytes]) -> None:
    """It echoes what it reads once it is in its namespace."""
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        process.stdin.write(b".")
        echo = process.stdout.read(1)
    except BrokenPipeError:
        echo = b""
    if not echo:
        said = process.stderr.read().decode(errors="replace").strip()
        raise OSError(errno.EPERM, f"no user namespace can be made: {said}")


@contextmanager
def cloned(source: str, namespace: int) -> Iterator[int]:
    """A descriptor of the directory `source` as a mount that no path leads to yet: read-only, owners shifted.

    What is mounted below it is not in there.
    """
    tree = syscall(OPEN_TREE, _HERE, os.fsencode(source), _CLONE | os.O_CLOEXEC)
    try:
        attributes = _ATTR.pack(_READ_ONLY | _IDMAP, 0, _PRIVATE, namespace)
        syscall(MOUNT_SETATTR, tree, b"", _EMPTY_PATH, attributes, _ATTR.size)
        yield tree
    finally:
        os.close(tree)


def shift_owners(path: str, namespace: int) -> None:
    """Shift the owners of the mount at `path`, which nobody has seen yet."""
    syscall(MOUNT_SETATTR, _HERE, os.fsencode(path), 0, _ATTR.pack(_IDMAP, 0, 0, namespace), _ATTR.size)


def attach(tree: int, target: str) -> None:
    """Mount what `cloned` gave at `target`."""
    syscall(MOVE_MOUNT, tree, b"", _HERE, os.fsencode(target), _FROM_EMPTY_PATH)
