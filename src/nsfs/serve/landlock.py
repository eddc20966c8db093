"""Landlock: what below which paths a process may do, for the rest of its life (landlock(7), Linux 5.13).

Owns the three system calls and the rights by the kernel's ABI; refuses nothing itself. `plan_rights` is pure. What the
kernel's ABI does not know yet is left out, so that every kernel gives what it can: renames between directories and
truncation (2, 3), TCP (4), devices' ioctl (5), signals and abstract sockets to others (6).
"""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from nsfs.serve.syscalls import syscall

if TYPE_CHECKING:
    from collections.abc import Iterable

# include/uapi/linux/landlock.h; the calls' numbers are the same on all architectures
_CREATE, _ADD_RULE, _RESTRICT = 444, 445, 446
_GET_VERSION, _PATH_BENEATH = 1, 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_REMOVE_DIR, _REMOVE_FILE, _MAKE_DIR, _MAKE_REG, _MAKE_SOCK = 1 << 4, 1 << 5, 1 << 7, 1 << 8, 1 << 9
_ALL_OF_FIRST: Final = (1 << 13) - 1
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_BIND_TCP: Final = 1
_SCOPE_ABSTRACT_SOCKETS, _SCOPE_SIGNALS = 1, 2
_ON_FILES: Final = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV


@dataclass(frozen=True, slots=True)
class Rights:
    """What a ruleset handles, and what its rules grant. Bit masks."""

    handled: int
    tcp: int
    scoped: int
    read: int
    write: int
    """Reading, and regular files, directories and sockets made, changed, renamed and deleted."""

    @property
    def ruleset(self) -> bytes:
        """Struct landlock_ruleset_attr; a kernel that does not know its later fields takes them if they are 0."""
        return struct.pack("=QQQ", self.handled, self.tcp, self.scoped)


def plan_rights(abi: int) -> Rights:
    """The most that a kernel with Landlock of this ABI holds a process to. Pure."""
    handled = _ALL_OF_FIRST
    for since, right in ((2, _REFER), (3, _TRUNCATE), (5, _IOCTL_DEV)):
        handled |= right if abi >= since else 0
    write = _READ_FILE | _READ_DIR | _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _MAKE_SOCK
    return Rights(
        handled=handled,
        tcp=_BIND_TCP if abi >= 4 else 0,
        scoped=_SCOPE_ABSTRACT_SOCKETS | _SCOPE_SIGNALS if abi >= 6 else 0,
        read=_READ_FILE | _READ_DIR,
        write=(write | _REFER | _TRUNCATE) & handled,
    )


def abi() -> int:
    """The kernel's; 0 where there is no Landlock, or it is turned off."""
    try:
        return syscall(_CREATE, None, 0, _GET_VERSION)
    except OSError:
        return 0


def restrict(paths: Iterable[tuple[str, bool]]) -> None:
    """Hold the calling process and its children to `paths`, writable ones by True; what is not there is left out.

    It must have no_new_privs, or be root's. Raises OSError; does nothing without Landlock.
    """
    version = abi()
    if not version:
        return
    rights = plan_rights(version)
    ruleset = syscall(_CREATE, rights.ruleset, len(rights.ruleset), 0)
    try:
        for path, writable in paths:
            _grant(ruleset, path, rights.write if writable else rights.read)
        syscall(_RESTRICT, ruleset, 0)
    finally:
        os.close(ruleset)


def _grant(ruleset: int, path: str, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return
    try:
        granted = rights if stat.S_ISDIR(os.fstat(fd).st_mode) else rights & _ON_FILES
        rule = struct.pack("=Qi", granted, fd)  # struct landlock_path_beneath_attr is packed
        syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0)
    finally:
        os.close(fd)
