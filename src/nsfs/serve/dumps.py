"""Keeping secrets out of core dumps: of the daemon, of commands that read a secret, and of the programs they start."""

from __future__ import annotations

import ctypes
import os
import resource
from typing import Final

from nsfs.errors import NsfsError

_PR_SET_DUMPABLE: Final = 4
_NEITHER: Final = 1
"""Bytes of a core dump: too few for a file, and the limit at which Linux pipes none to a program (fs/coredump.c)."""


def forbid_core_dumps() -> None:
    """Keep this process, and whatever it starts, out of core dumps, and itself from being traced by others of its user.

    The limit outlives an execve, the mark on this process does not (prctl(2), PR_SET_DUMPABLE).
    """
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise NsfsError(f"core dumps cannot be forbidden: {os.strerror(ctypes.get_errno())}")
    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    least = _NEITHER if most else 0
    resource.setrlimit(resource.RLIMIT_CORE, (least, least))
