"""The limits of a FUSE connection that only root may raise, by fusectl (Linux Documentation/filesystems/fuse/fuse.rst).

A worker without privileges answers the kernel's INIT, so what it asks for is cut to /sys/module/fuse/parameters/
max_user_bgreq, which depends on the host's memory (13 MiB of it for four requests). The filesystem is mounted where no
path leads to, for a moment, so that the host's need not be mounted. Blocks, some 0.1 ms.
"""

from __future__ import annotations

import os
from contextlib import suppress

from nsfs.serve.syscalls import FSCONFIG, FSMOUNT, FSOPEN, syscall

_CREATE, _CLOEXEC = 6, 1


def raise_background(device: int, most: int, congested: int) -> None:
    """Let the kernel have `most` reads in the background under way; `device` is the minor number of the filesystem's.

    Best effort: reads go on without, fewer at a time.
    """
    with suppress(OSError):
        root = open_fusectl()
        try:
            for name, value in (("max_background", most), ("congestion_threshold", congested)):
                with open(f"/proc/self/fd/{root}/{device}/{name}", "w", encoding="ascii") as file:
                    file.write(str(value))
        finally:
            os.close(root)


def open_fusectl() -> int:
    """A descriptor of its root, for the caller to close; raises OSError where it cannot be mounted."""
    context = syscall(FSOPEN, b"fusectl", _CLOEXEC)
    try:
        syscall(FSCONFIG, context, _CREATE, None, None, 0)
        return syscall(FSMOUNT, context, _CLOEXEC, 0)
    finally:
        os.close(context)
