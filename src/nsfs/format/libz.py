"""zlib's block-wise inflate, which Python's `zlib` does not offer: where deflate blocks begin, and the window there.

Owns the binding of libz.so.1 (zlib's manual, inflate(Z_BLOCK) and inflateGetDictionary; zlib 1.2.9 of 2017 or newer).
What is inflated is thrown away; checksums are not checked, since who looks for blocks has checked the blob. Refuses
damaged data. A `BlockInflater` belongs to one thread; it inflates without the interpreter lock and holds 300 KiB.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import weakref

from nsfs.errors import CorruptError, UnsupportedError

_Z_OK, _Z_STREAM_END, _Z_BUF_ERROR = 0, 1, -5
_Z_BLOCK = 5
_GZIP = 31
"""windowBits for gzip and the largest window."""
_AT_BLOCK, _AFTER_LAST = 128, 64
"""Bits of `data_type` after inflate(Z_BLOCK); its lowest three say how many bits of the last byte are unused."""
_SCRATCH = 256 << 10
_WINDOW = 32 << 10


class Stop(enum.Enum):
    """Why `BlockInflater.run` returned."""

    INPUT = enum.auto()
    """All input is used up."""
    BLOCK = enum.auto()
    """A deflate block begins here."""
    DATA_END = enum.auto()
    """The last block of a member ended here; its trailer comes next."""
    MEMBER_END = enum.auto()
    """A member's trailer ended here."""


class _Stream(ctypes.Structure):
    _fields_ = (
        ("next_in", ctypes.c_void_p),
        ("avail_in", ctypes.c_uint),
        ("total_in", ctypes.c_ulong),
        ("next_out", ctypes.c_void_p),
        ("avail_out", ctypes.c_uint),
        ("total_out", ctypes.c_ulong),
        ("msg", ctypes.c_char_p),
        ("state", ctypes.c_void_p),
        ("zalloc", ctypes.c_void_p),
        ("zfree", ctypes.c_void_p),
        ("opaque", ctypes.c_void_p),
        ("data_type", ctypes.c_int),
        ("adler", ctypes.c_ulong),
        ("reserved", ctypes.c_ulong),
    )


@functools.cache
def _libz() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libz.so.1")
        library.inflate.argtypes = (ctypes.c_void_p, ctypes.c_int)
        library.inflateValidate.argtypes = (ctypes.c_void_p, ctypes.c_int)
        library.zlibVersion.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        raise UnsupportedError(f"zlib 1.2.9 or newer cannot be loaded: {error}", hint="install zlib1g") from error
    return library


class BlockInflater:
    """Goes through gzip members and stops at every deflate block."""

    def __init__(self) -> None:
        self._libz = _libz()
        self._stream = _Stream()
        self._ref = ctypes.byref(self._stream)
        self._scratch = ctypes.create_string_buffer(_SCRATCH)
        self._input = b""
        self._given = self._ended_size = 0
        version = self._libz.zlibVersion()
        if self._libz.inflateInit2_(self._ref, _GZIP, version, ctypes.sizeof(_Stream)) != _Z_OK:
            raise MemoryError
        weakref.finalize(self, self._libz.inflateEnd, self._ref)
        self._libz.inflateValidate(self._ref, 0)

    @property
    def consumed(self) -> int:
        """Bytes of input that the inflater has taken, headers and trailers included."""
        return self._given - int(self._stream.avail_in)

    @property
    def produced(self) -> int:
        """Bytes of stream, of all members so far."""
        return self._ended_size + int(self._stream.total_out)

    @property
    def unused_bits(self) -> int:
        """How many high bits of the last byte consumed belong to what follows; for `Stop.BLOCK`."""
        return int(self._stream.data_type) & 7

    @property
    def is_between_members(self) -> bool:
        """No member has begun, or the last one that did has ended."""
        return int(self._stream.total_in) == 0

    def give(self, data: bytes) -> None:
        """Set the next input, less than 4 GiB; what was given before must be used up."""
        assert self._stream.avail_in == 0
        self._input = data
        self._given += len(data)
        self._stream.next_in = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p)
        self._stream.avail_in = len(data)

    def run(self) -> Stop:
        """Inflate up to the next stop; raises CorruptError."""
        stream = self._stream
        while True:
            stream.next_out = ctypes.addressof(self._scratch)
            stream.avail_out = _SCRATCH
            result = self._libz.inflate(self._ref, _Z_BLOCK)
            if result == _Z_STREAM_END:
                self._end_member()
                return Stop.MEMBER_END
            if result not in (_Z_OK, _Z_BUF_ERROR):
                raise CorruptError(f"deflate data is damaged at or before byte {self.consumed}: {self._reason(result)}")
            if result == _Z_OK and stream.data_type & _AT_BLOCK:
                return Stop.DATA_END if stream.data_type & _AFTER_LAST else Stop.BLOCK
            if not stream.avail_in and stream.avail_out:
                return Stop.INPUT

    def window(self) -> bytes:
        """The last 32 KiB of the member's stream so far, or as much as there is."""
        window = ctypes.create_string_buffer(_WINDOW)
        length = ctypes.c_uint(0)
        self._libz.inflateGetDictionary(self._ref, window, ctypes.byref(length))
        return window.raw[: length.value]

    def _end_member(self) -> None:
        self._ended_size += self._stream.total_out
        self._libz.inflateReset(self._ref)

    def _reason(self, result: int) -> str:
        return self._stream.msg.decode() if self._stream.msg else f"zlib error {result}"
