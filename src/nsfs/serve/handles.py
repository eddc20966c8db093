"""Files of a view by the numbers of their inodes: a file handle of EROFS is made of one (open_by_handle_at(2)).

Owns how such handles look: as Linux encodes them of 64-bit numbers (fs/erofs/super.c, erofs_encode_fh), or of 32-bit
ones before that. Opens regular files alone; no name is looked up, so nothing that an image says leads elsewhere. Needs
CAP_DAC_READ_SEARCH. Raises OSError; blocks.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from typing import Final

_AT_EMPTY_PATH: Final = 0x1000
_MOST: Final = 128
"""Bytes of a handle (include/linux/exportfs.h, MAX_HANDLE_SZ)."""
_HEAD: Final = struct.Struct("=Ii")
"""Bytes of what follows, and its type."""
_INO32_GEN, _INO64_GEN = 0x01, 0x81

_libc = ctypes.CDLL(None, use_errno=True)


class ViewFiles:
    """Those of one view, by an open descriptor of its root, which stays the caller's."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._type = _handle_type(root)

    def open(self, nid: int) -> int:
        """A regular file, for reading."""
        named = _check(_libc.open_by_handle_at(self._root, render_handle(self._type, nid), os.O_PATH | os.O_CLOEXEC))
        try:
            if not stat.S_ISREG(os.fstat(named).st_mode):
                raise OSError(f"not a regular file: nid {nid}")
            return os.open(f"/proc/self/fd/{named}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(named)


def render_handle(kind: int, nid: int) -> bytes:
    """The handle of an inode, as struct file_handle; raises OSError for a type that is not EROFS's."""
    if kind == _INO64_GEN:
        body = struct.pack("=3I", nid >> 32, nid & 0xFFFFFFFF, 0)
    elif kind == _INO32_GEN:
        body = struct.pack("=2I", nid, 0)
    else:
        raise OSError(f"file handles of an unknown type: {kind}")
    return _HEAD.pack(len(body), kind) + body


def _handle_type(root: int) -> int:
    buffer = ctypes.create_string_buffer(_HEAD.pack(_MOST, 0), _HEAD.size + _MOST)
    _check(_libc.name_to_handle_at(root, b"", buffer, ctypes.byref(ctypes.c_int()), _AT_EMPTY_PATH))
    return int(_HEAD.unpack_from(buffer)[1])


def _check(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
