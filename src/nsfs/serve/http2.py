"""What the door knows of HTTP/2 (RFC 9113): where frames begin, which streams are open, a greeting and a farewell.

Owns one connection's state as its bytes pass in whatever pieces they come; no field of a header is looked at, and no
compression state is kept. Pure. Invariants: only whole frames are given out, in their order; after a farewell nothing
of a later stream gets in, so that its client knows that it was not begun, and may begin it elsewhere.
"""

from __future__ import annotations

import enum
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""What a client begins with (3.4)."""
_HEADER: Final = struct.Struct(">BHBBI")
"""Length in two parts, kind, flags, stream (4.1)."""
_RESERVED: Final = 1 << 31
_ACK = _END_STREAM = 0x1


class Kind(enum.IntEnum):
    """Kinds of frames (6) that are looked at."""

    DATA = 0
    HEADERS = 1
    RST_STREAM = 3
    SETTINGS = 4
    GOAWAY = 7
    PREFACE = 256
    """None in the protocol's sense: what comes before the first one."""


class Frame(NamedTuple):
    """One frame; `data` are all its bytes."""

    kind: int
    flags: int
    stream: int
    data: bytes


class Frames:
    """One direction's bytes, taken apart; `preface` comes before the first frame."""

    def __init__(self, preface: bytes = b"") -> None:
        self._preface = preface
        self._buffer = bytearray()

    def feed(self, data: bytes | memoryview) -> list[Frame]:
        """The frames that `data` completes; raises ValueError where another preface comes."""
        self._buffer += data
        frames, begin = [], 0
        while (size := self._size(begin)) is not None and begin + size <= len(self._buffer):
            frames.append(self._cut(bytes(self._buffer[begin : begin + size])))
            begin += size
        del self._buffer[:begin]
        return frames

    def _size(self, begin: int) -> int | None:
        """Of what begins there; None where that is not known yet."""
        if self._preface:
            return len(self._preface)
        if len(self._buffer) - begin < _HEADER.size:
            return None
        return _HEADER.size + int.from_bytes(self._buffer[begin : begin + 3], "big")

    def _cut(self, data: bytes) -> Frame:
        if self._preface:
            if data != self._preface:
                raise ValueError("a client that does not speak HTTP/2")
            self._preface = b""
            return Frame(Kind.PREFACE, 0, 0, data)
        _, _, kind, flags, stream = _HEADER.unpack_from(data)
        return Frame(kind, flags, stream & ~_RESERVED, data)


def render_frame(kind: Kind, payload: bytes = b"", *, flags: int = 0, stream: int = 0) -> bytes:
    """A frame's bytes."""
    return _HEADER.pack(len(payload) >> 16, len(payload) & 0xFFFF, kind, flags, stream) + payload


GREETING: Final = render_frame(Kind.SETTINGS)
"""What a server begins with (3.4), which asks for nothing: more settings may follow at any time (6.5)."""


class Conversation:
    """One connection between a client and its server, seen from between them.

    A client that `is_greeted` acknowledges settings that its server never sent: that is kept from the server.
    """

    def __init__(self, *, is_greeted: bool = False) -> None:
        self._from_client, self._from_server = Frames(PREFACE), Frames()
        self._is_greeted = is_greeted
        self._has_ended = False
        self.is_settled = False
        """The client has acknowledged settings: to it the connection is made, and may be taken leave of."""
        self._last = 0
        self._open: set[int] = set()

    @property
    def open(self) -> int:
        """Streams that were begun, and have not ended."""
        return len(self._open)

    def inwards(self, data: bytes | memoryview) -> bytes:
        """What of a client's bytes the server gets; raises ValueError where they are not HTTP/2."""
        return _joined(self._from_client.feed(data), self._enters)

    def outwards(self, data: bytes | memoryview) -> bytes:
        """What of a server's bytes the client gets."""
        return _joined(self._from_server.feed(data), self._leaves)

    def say_farewell(self) -> bytes:
        """A GOAWAY (6.8) for the client: streams that are open go on, no other begins."""
        self._has_ended = True
        return render_frame(Kind.GOAWAY, struct.pack(">II", self._last, 0))

    def _enters(self, frame: Frame) -> bool:
        if frame.stream > self._last and self._has_ended:
            return False
        match frame.kind:
            case Kind.HEADERS if frame.stream > self._last:
                self._last = frame.stream
                self._open.add(frame.stream)
            case Kind.RST_STREAM:
                self._open.discard(frame.stream)
            case Kind.SETTINGS if frame.flags & _ACK:
                self.is_settled = True
                is_ours, self._is_greeted = self._is_greeted, False
                return not is_ours
        return True

    def _leaves(self, frame: Frame) -> bool:
        is_last = frame.kind in {Kind.DATA, Kind.HEADERS} and frame.flags & _END_STREAM
        if is_last or frame.kind == Kind.RST_STREAM:
            self._open.discard(frame.stream)
        return frame.kind != Kind.GOAWAY or not self._has_ended


def _joined(frames: Iterable[Frame], passes: Callable[[Frame], bool]) -> bytes:
    return b"".join([frame.data for frame in frames if passes(frame)])
