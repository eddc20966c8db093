"""Which system calls a confined process may not make: one program for the kernel's filter (seccomp(2)).

Owns the list, its numbers on x86-64 and AArch64, and the classic BPF made of it. A list of what is denied, not of what
is allowed: an interpreter, its C library and its extensions call what the next release of each brings, and other walls
(an own uid, no capability, Landlock, an own root) hold what they reach. The filter takes away what the kernel offers to
everybody and a worker never needs: other processes' memory, programs, namespaces, mounts, keys, BPF, io_uring, old and
rare interfaces. What is newer than the list counts as not there (ENOSYS), as on an older kernel.

Invariants: a filter cannot be taken off, and children have it; a process of another architecture's calls is killed.
`plan_filter` is pure.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# include/uapi/linux/bpf_common.h, seccomp.h, audit.h
_LOAD, _JUMP_EQUAL, _JUMP_OVER, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_KILL, _ALLOW, _ERRNO = 0x80000000, 0x7FFF0000, 0x00050000
_AT_NUMBER, _AT_ARCHITECTURE, _AT_FIRST, _AT_SECOND = 0, 4, 16, 24
_INSTRUCTION: Final = struct.Struct("=HBBI")
_PR_SET_SECCOMP, _MODE_FILTER = 22, 2

_NEWEST: Final = 469
"""file_setattr(2), Linux 6.17: the last call that the list was checked against."""
_NAMESPACES: Final = 0x7E020000
"""The flags of clone(2) that make namespaces (CLONE_NEWNS to CLONE_NEWNET)."""
_FAMILIES: Final = (1, 2, 10, 16)
"""AF_UNIX, AF_INET, AF_INET6, and AF_NETLINK, by which getaddrinfo(3) asks what addresses there are."""
_TERMINALS: Final = (0x5412, 0x541C)
"""TIOCSTI and TIOCLINUX: typing on somebody's terminal."""

DENIED: Final = {
    # programs: a worker is a fork of its zygote, and so are its jobs
    "execve": (59, 221), "execveat": (322, 281), "uselib": (134, None),
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "process_madvise": (440, 440), "process_mrelease": (448, 448),
    "migrate_pages": (256, 238), "move_pages": (279, 239),
    # mounts, roots, namespaces
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442), "statmount": (457, 457),
    "listmount": (458, 458), "open_tree_attr": (467, 467), "unshare": (272, 97), "setns": (308, 268),
    # files past their paths; everything that happens to files
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "fanotify_init": (300, 262),
    # large interfaces of the kernel
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "vmsplice": (278, 75), "memfd_secret": (447, 447), "lookup_dcookie": (212, 18),
    "mbind": (237, 235), "set_mempolicy": (238, 237), "set_mempolicy_home_node": (450, 450),
    # the machine
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89),
    "quotactl": (179, 60), "quotactl_fd": (443, 443), "syslog": (103, 116), "sethostname": (170, 161),
    "setdomainname": (171, 162), "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171),
    "clock_adjtime": (305, 266), "ioperm": (173, None), "iopl": (172, None), "modify_ldt": (154, None),
    "personality": (135, 92), "vhangup": (153, 58), "nfsservctl": (180, 42), "sysfs": (139, None),
    "ustat": (136, None), "mknod": (133, None), "mknodat": (259, 33),
}  # fmt: skip
"""Answered with EPERM; by name, the numbers on x86-64 and AArch64 (arch/x86/entry/syscalls/syscall_64.tbl,
include/uapi/asm-generic/unistd.h). mknod: a worker makes regular files and directories alone, by open and mkdir."""

_CLONE: Final = (56, 220)
_CLONE3: Final = (435, 435)
_SOCKET: Final = (41, 198)
_IOCTL: Final = (16, 29)


@dataclass(frozen=True, slots=True)
class Architecture:
    """One that we know the numbers of."""

    audit: int
    """AUDIT_ARCH_… of include/uapi/linux/audit.h."""
    column: int
    """Of the tuples of `DENIED`."""


ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    "x86_64": Architecture(0xC000003E, 0),
    "aarch64": Architecture(0xC00000B7, 1),
}
"""By what uname(2) calls the machine."""


def plan_filter(architecture: Architecture) -> bytes:
    """The program for processes of `architecture`: an array of struct sock_filter. Pure."""
    column = architecture.column
    denied = sorted({number for numbers in DENIED.values() if (number := numbers[column]) is not None})
    program = [
        (_LOAD, 0, 0, _AT_ARCHITECTURE),
        (_JUMP_EQUAL, 1, 0, architecture.audit),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _AT_NUMBER),
        (_JUMP_OVER, 0, 1, _NEWEST),  # x32's numbers are above, too
        (_RETURN, 0, 0, _ERRNO | errno.ENOSYS),
    ]
    for number in denied:
        program += [(_JUMP_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | errno.EPERM)]
    # clone3(2) has its flags where a filter cannot look: without it, C libraries call clone(2)
    program += [(_JUMP_EQUAL, 0, 1, _CLONE3[column]), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    program += _on(_CLONE[column], _AT_FIRST, [(_JUMP_ANY_BIT, 0, 1, _NAMESPACES), *_refuse(errno.EPERM)])
    families = [(_JUMP_EQUAL, len(_FAMILIES) - index, 0, family) for index, family in enumerate(_FAMILIES)]
    program += _on(_SOCKET[column], _AT_FIRST, [*families, *_refuse(errno.EAFNOSUPPORT)])
    for request in _TERMINALS:
        program += _on(_IOCTL[column], _AT_SECOND, [(_JUMP_EQUAL, 0, 1, request), *_refuse(errno.EPERM)])
    program += [(_RETURN, 0, 0, _ALLOW)]
    return b"".join(_INSTRUCTION.pack(*instruction) for instruction in program)


def _on(number: int, argument: int, checks: Sequence[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """For calls of `number`: look at an argument's low half, run the checks; then go on with the number again."""
    reload = (_LOAD, 0, 0, _AT_NUMBER)
    return [(_JUMP_EQUAL, 0, len(checks) + 2, number), (_LOAD, 0, 0, argument), *checks, reload]


def _refuse(code: int) -> list[tuple[int, int, int, int]]:
    return [(_RETURN, 0, 0, _ERRNO | code)]


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def is_available() -> bool:
    """Whether this kernel filters system calls, and we know its numbers."""
    return platform.machine() in ARCHITECTURES and os.path.exists("/proc/sys/kernel/seccomp/actions_avail")


def deny_calls(libc: ctypes.CDLL) -> None:
    """Filter the calling process and its children from now on; it must have no_new_privs, or be root's.

    Raises OSError; does nothing on an architecture whose numbers are not known here.
    """
    architecture = ARCHITECTURES.get(platform.machine())
    if architecture is None:
        return
    program = plan_filter(architecture)
    packed = _Program(len(program) // _INSTRUCTION.size, program)
    if libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(packed), 0, 0) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"seccomp: {os.strerror(code)}")
