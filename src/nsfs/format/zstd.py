"""zstd: walk frames without decompressing them, inflate a blob as it arrives, find the frames that can be restarted.

Owns `FrameWalker`, `ZstdInflater`, `FrameScanner` and `inflate_frames`. Everything is from RFC 8878, sections 3.1.1
(frames, blocks) and 3.1.2 (skippable frames). Refused: what is no frame (also zero padding and the formats before
0.8), frames that need a dictionary, and frames with a window over 128 MiB.

Everything is sans-IO and holds a bounded amount of memory: a block gives at most 128 KiB, so output is bounded by
feeding the decompressor few blocks at a time. An object belongs to one thread at a time; the decompression runs without
the interpreter lock. An object that raised is dead.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, NamedTuple, cast

import zstandard

from nsfs.errors import CorruptError, UnsupportedError
from nsfs.format.openspan import OpenSpan, Piece

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nsfs.model.layer import Span

WINDOW_MAX = 128 << 20
"""Bytes of the largest window (`zstd --long=27`); a frame's decompressor may need this much memory."""
SPACING = 512 << 10
"""Bytes of stream after which a span ends with the next frame."""

_BLOCKS = 7
"""Blocks fed at once: with one that the decompressor may hold back, 1 MiB of output."""
_RLE, _RESERVED = 1, 3


class Frame(NamedTuple):
    """A frame that ended: its range of the blob."""

    offset: int
    length: int
    is_skippable: bool


class End(NamedTuple):
    """A block, or a skippable frame, ended at `offset` of the blob; `frame` is set where its frame ended too."""

    offset: int
    frame: Frame | None


class FrameWalker:
    """Goes from block to block of a blob that is fed in pieces of any size.

    `consumed` counts the blob's bytes; `begun` is where the frame begins that it is in.
    """

    def __init__(self) -> None:
        self.consumed = 0
        self.begun = 0
        self._held = bytearray()
        self._steps = self._walk()
        self._is_kept, self._left = cast("_Pass", next(self._steps))

    def feed(self, data: bytes | memoryview) -> Iterator[End]:
        """Yield each end of a block in `data`; exhaust it before the next call.

        Raises CorruptError, and UnsupportedError for a window or a dictionary that is not offered.
        """
        view = memoryview(data)
        while True:
            taken = min(self._left, len(view))
            if self._is_kept:
                self._held += view[:taken]
            view = view[taken:]
            self.consumed += taken
            self._left -= taken
            if self._left:
                return
            step = self._steps.send(bytes(self._held))
            self._held.clear()
            if isinstance(step, End):
                yield step
                step = next(self._steps)
            self._is_kept, self._left = cast("_Pass", step)

    def finish(self) -> None:
        """Say that the blob ends here; raises CorruptError if that cuts a frame off, or if there was none."""
        if self.consumed == 0:
            raise CorruptError("the blob is empty: no zstd frame")
        if self.consumed != self.begun:
            raise CorruptError(f"the blob ends inside the zstd frame at byte {self.begun}: {self.consumed} bytes")

    def _walk(self) -> _Steps:
        while True:
            magic = yield _read(4)
            if magic[1:] == b"\x2a\x4d\x18" and magic[0] & 0xF0 == 0x50:
                size = yield _read(4)
                yield _skip(int.from_bytes(size, "little"))
                yield self._end_frame(is_skippable=True)
            elif magic == b"\x28\xb5\x2f\xfd":
                yield from self._walk_frame()
                yield self._end_frame(is_skippable=False)
            else:
                raise CorruptError(f"not a zstd frame at byte {self.begun}: {magic.hex()}")

    def _walk_frame(self) -> _Steps:
        descriptor = (yield _read(1))[0]
        self._check_header(descriptor, (yield _read(_header_rest(descriptor))))
        while True:
            block = int.from_bytes((yield _read(3)), "little")
            kind, size = block >> 1 & 3, block >> 3
            if kind == _RESERVED:
                raise CorruptError(f"a block of the zstd frame at byte {self.begun} is of no type")
            yield _skip(1 if kind == _RLE else size)
            if block & 1:
                break
            yield End(self.consumed, None)
        if descriptor & 4:
            yield _skip(4)

    def _end_frame(self, *, is_skippable: bool) -> End:
        frame = Frame(self.begun, self.consumed - self.begun, is_skippable)
        self.begun = self.consumed
        return End(self.consumed, frame)

    def _check_header(self, descriptor: int, rest: bytes) -> None:
        is_single = descriptor >> 5 & 1
        dictionary = rest[1 - is_single :][: _DICTIONARY_ID[descriptor & 3]]
        if descriptor & 8:
            raise CorruptError(f"the zstd frame at byte {self.begun} sets a reserved bit")
        if any(dictionary):
            raise UnsupportedError(f"the zstd frame at byte {self.begun} needs a dictionary")
        window = _content_size(rest[len(dictionary) :]) if is_single else _window_size(rest[0])
        if window > WINDOW_MAX:
            raise UnsupportedError(f"the zstd frame at byte {self.begun} needs a window over 128 MiB: {window} bytes")


_Pass = tuple[bool, int]
"""What the walk asks for: whether to keep the next bytes, and how many they are."""
_Steps = Generator[_Pass | End, bytes, None]
_DICTIONARY_ID = (0, 1, 2, 4)
"""Bytes of the dictionary ID, by the lowest two bits of the frame header descriptor."""


def _read(size: int) -> _Pass:
    return True, size


def _skip(size: int) -> _Pass:
    return False, size


def _header_rest(descriptor: int) -> int:
    """Bytes of a frame header behind its descriptor: window, dictionary ID, content size."""
    is_single = descriptor >> 5 & 1
    content_size = (is_single, 2, 4, 8)[descriptor >> 6]
    return 1 - is_single + _DICTIONARY_ID[descriptor & 3] + content_size


def _content_size(field: bytes) -> int:
    return int.from_bytes(field, "little") + (256 if len(field) == 2 else 0)


def _window_size(descriptor: int) -> int:
    base = 1 << (10 + (descriptor >> 3))
    return base + base // 8 * (descriptor & 7)


class ZstdInflater:
    """The stream of a blob of zstd frames that is fed in pieces of any size.

    `consumed` and `produced` count bytes of the blob and of the stream.
    """

    def __init__(self) -> None:
        self.consumed = 0
        self.produced = 0
        self._walker = FrameWalker()
        self._context = zstandard.ZstdDecompressor(max_window_size=WINDOW_MAX)
        self._inflate: zstandard.ZstdDecompressionObj | None = None

    def feed(self, data: bytes | memoryview) -> Iterator[bytes]:
        """Yield what `data` adds to the stream, in pieces of at most 1 MiB; exhaust it before the next call.

        A generator, so that a bomb costs time but no memory. Raises CorruptError, which says where in the blob, and
        UnsupportedError.
        """
        return (event for event in self.events(data) if isinstance(event, bytes))

    def events(self, data: bytes | memoryview) -> Iterator[bytes | Frame]:
        """As `feed`, and each frame at its end, when `produced` is where it ends in the stream."""
        view, offset = memoryview(data), self.consumed
        blocks = 0
        for end in self._walker.feed(view):
            blocks += 1
            if end.frame or blocks == _BLOCKS:
                yield from self._decompress(view[self.consumed - offset : end.offset - offset])
                blocks = 0
            if end.frame:
                self._inflate = None
                yield end.frame
        yield from self._decompress(view[self.consumed - offset :])

    def finish(self) -> None:
        """Say that the blob ends here; raises CorruptError if that cuts a frame off, or if there was none."""
        self._walker.finish()

    def _decompress(self, view: memoryview) -> Iterator[bytes]:
        if not view:
            return
        self._inflate = self._inflate or self._context.decompressobj()
        self.consumed += len(view)
        try:
            piece = self._inflate.decompress(view)
        except zstandard.ZstdError as error:
            where = f"in the zstd frame at byte {self._walker.begun}, before byte {self.consumed} of the blob"
            raise CorruptError(f"{where}: {error}") from None
        if piece:
            self.produced += len(piece)
            yield piece


class FrameScanner:
    """The spans (Codec.ZSTD, Covers.COMPRESSED) of a zstd blob that is fed in pieces of any size.

    A span is one frame, or as many neighbours as it takes to reach `spacing` bytes of stream, with no skippable frame
    among them. A blob of one frame is one span, however long: a frame cannot be restarted inside.
    """

    def __init__(self, spacing: int = SPACING) -> None:
        self._spacing = spacing
        self._inflater = ZstdInflater()
        self._open = OpenSpan(0, 0)

    def feed(self, data: bytes) -> list[Span]:
        """Return the spans that have ended by now; raises CorruptError and UnsupportedError."""
        done: list[Span] = []
        piece = Piece(memoryview(data), self._inflater.consumed)
        for event in self._inflater.events(data):
            if isinstance(event, Frame):
                done += self._end_frame(event, piece)
        self._open.digest_to(piece, piece.end)
        return done

    def finish(self) -> list[Span]:
        """Say that the blob ends here and return the last span, if any; raises CorruptError if a frame is cut off."""
        self._inflater.finish()
        return self._open.close()

    def _end_frame(self, frame: Frame, piece: Piece) -> list[Span]:
        end, stream_end = frame.offset + frame.length, self._inflater.produced
        self._open.settle(piece, end, stream_end)
        if not frame.is_skippable and stream_end - self._open.start < self._spacing:
            return []
        done = self._open.close()
        self._open = OpenSpan(end, stream_end)
        return done


def inflate_frames(data: bytes, size: int) -> bytes:
    """The first `size` bytes of the stream of the frames that begin with `data`.

    What follows in `data` is not looked at. Raises CorruptError, also for what `FrameWalker` does not offer.
    """
    context = zstandard.ZstdDecompressor(max_window_size=WINDOW_MAX)
    try:
        with context.stream_reader(data, read_across_frames=True) as reader:
            stream = reader.read(size) if size else b""
    except zstandard.ZstdError as error:
        raise CorruptError(f"zstd data is damaged: {error}") from None
    if len(stream) < size:
        raise CorruptError(f"compressed data is cut off: {size - len(stream)} bytes of stream are missing")
    return stream
