"""System calls that the C libraries of 2022 have no wrapper for; their numbers are the same on all architectures.

Raises OSError as a wrapper would. Blocks as the calls do; keeps no state.
"""

from __future__ import annotations

import ctypes
import os
from typing import Final

OPEN_TREE: Final = 428
MOVE_MOUNT: Final = 429
FSOPEN: Final = 430
FSCONFIG: Final = 431
FSMOUNT: Final = 432
MOUNT_SETATTR: Final = 442

_libc = ctypes.CDLL(None, use_errno=True)


def syscall(number: int, *arguments: int | bytes | None) -> int:
    """Call it; integers are passed as C's long."""
    given = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    result: int = _libc.syscall(ctypes.c_long(number), *given)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
