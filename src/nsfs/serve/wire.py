"""A small symmetrical RPC between our own processes over one unix stream socket.

Owns: framing (u32 little-endian length, then one msgpack message), the hello that agrees on a version, requests with
progress, results, errors and cancellation, and flow control of progress. Either side may call and serve. Refuses frames
over 16 MiB: bulk data goes as progress in pieces, of which at most `WINDOW` per call are under way, so a slow caller
holds up nobody but its own handler. Descriptors go with a request, over a `PassingStream`: its handler owns them.

Concurrency: calls may be made from any number of tasks of one trio run. One task reads, one writes, every handler has
a task of its own in the peer's nursery. A call that is cancelled cancels its handler and never corrupts the stream.

Invariants: a request is answered by exactly one result or error unless it was cancelled; what comes for an unknown
request is dropped (it was cancelled); a peer that breaks the protocol is treated as one that died.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import socket
import struct
from array import array
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

import msgspec
import trio
from msgspec import Raw, Struct

from nsfs.core.tasks import open_tasks
from nsfs.errors import ERRORS, CorruptError, NsfsError, UnreachableError, UnsupportedError

VERSION: Final = 1
"""What we speak; `OLDEST` is the oldest that we still understand."""
OLDEST: Final = 1
MAX_FRAME: Final = 16 << 20
WINDOW: Final = 8
"""Progress messages of one call that are under way at most."""
MAX_SERVED: Final = 4096
"""Requests of one peer that are handled at a time."""
QUEUE: Final = 64
"""Outgoing frames that wait for the writer before a sender has to wait too."""

_MAX_PASSED: Final = 16
_FD = struct.Struct("i")
_LENGTH = struct.Struct("<I")
_log = logging.getLogger(__name__)

Report: TypeAlias = Callable[[Struct], Awaitable[None]]
"""What a handler tells its caller on the way; waits while the caller is `WINDOW` messages behind."""
Handler: TypeAlias = Callable[[Any, Report], Awaitable[Struct | None]]
Methods: TypeAlias = Mapping[str, tuple[type[Struct], Handler]]
"""Parameter class and handler by method name."""

T = TypeVar("T")


class Hello(Struct, tag="hello", array_like=True):
    """The first frame of each side."""

    version: int
    oldest: int
    name: str


class Request(Struct, tag="request", array_like=True):
    """Call `method`; `window` is how many progress messages may be under way, 0 for none at all."""

    id: int
    method: str
    params: Raw
    window: int = 0
    fds: int = 0
    """How many descriptors came with it."""


class Passing(Struct, kw_only=True):
    """Parameters that descriptors come with; whoever handles them closes them."""

    fds: list[int] = []


class Progress(Struct, tag="progress", array_like=True):
    """Something on the way to the result."""

    id: int
    body: Raw


class Taken(Struct, tag="taken", array_like=True):
    """The caller has dealt with one progress message."""

    id: int


class Result(Struct, tag="result", array_like=True):
    """The end of a call that worked."""

    id: int
    body: Raw


class Error(Struct, tag="error", array_like=True):
    """The end of a call that failed; `code` is a key of `nsfs.errors.ERRORS`, or INTERNAL."""

    id: int
    code: str
    message: str
    hint: str | None = None
    retry_after: float | None = None


class Cancel(Struct, tag="cancel", array_like=True):
    """Nobody waits for this call any more."""

    id: int


Message: TypeAlias = Hello | Request | Progress | Taken | Result | Error | Cancel

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def render_frame(message: Message) -> bytes:
    """`message` as it goes over the socket; raises ValueError if it is over MAX_FRAME."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME:
        raise ValueError(f"frame of {len(body)} bytes is larger than {MAX_FRAME}")
    return _LENGTH.pack(len(body)) + body


class FrameParser:
    """Bytes in, messages out, however the bytes are cut."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """Give the messages that are complete now; raises msgspec.MsgspecError or ValueError on what is none."""
        self._buffer += data
        messages: list[Message] = []
        offset = 0
        while (end := self._frame_end(offset)) is not None:
            messages.append(self._decode(bytes(self._buffer[offset + _LENGTH.size : end])))
            offset = end
        if offset:
            del self._buffer[:offset]
        return messages

    @staticmethod
    def _decode(frame: bytes) -> Message:
        try:
            return _decoder.decode(frame)
        except RecursionError as error:
            raise ValueError("frame is nested too deeply") from error

    def _frame_end(self, offset: int) -> int | None:
        if len(self._buffer) - offset < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._buffer, offset)
        if length > MAX_FRAME:
            raise ValueError(f"frame of {length} bytes is larger than {MAX_FRAME}")
        end = offset + _LENGTH.size + int(length)
        return end if end <= len(self._buffer) else None


def decode_body(body: Raw, kind: Any) -> Any:  # noqa: ANN401  whatever `kind` says
    """What a message is about, as a `kind`; raises CorruptError for what the other side should not have sent."""
    try:
        return msgspec.msgpack.decode(body, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise CorruptError(f"process at the other end sends what makes no sense: {str(error)[:200]}") from error


def render_error(number: int, error: Exception) -> Error:
    """How `error` is told to the caller of request `number`; the traceback of a bug stays here."""
    if isinstance(error, NsfsError):
        return Error(number, error.code, error.message, error.hint, getattr(error, "retry_after", None))
    hint = "the log of the serving process says more"
    return Error(number, NsfsError.code, f"internal error: {type(error).__name__}", hint)


def _only_cause(error: Exception) -> Exception:
    """Unwrap what a nursery wrapped, if it is one exception alone."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def raise_error(error: Error) -> None:
    """Raise on this side what was raised on the other."""
    cls = ERRORS.get(error.code, NsfsError)
    if cls is UnreachableError:
        raise UnreachableError(error.message, hint=error.hint, retry_after=error.retry_after)
    raise cls(error.message, hint=error.hint)


class _Call:
    """One request of ours that waits for its end."""

    __slots__ = ("inbox", "outbox", "window")

    def __init__(self, window: int) -> None:
        self.window = window
        self.inbox: trio.MemorySendChannel[Message]
        self.outbox: trio.MemoryReceiveChannel[Message]
        self.inbox, self.outbox = trio.open_memory_channel(window + 1)


class _Served:
    """One request of theirs that is being handled."""

    __slots__ = ("fds", "scope", "slots")

    def __init__(self, window: int, fds: list[int]) -> None:
        self.fds = fds
        self.scope = trio.CancelScope()
        self.slots = trio.Semaphore(window, max_value=window) if window else None


class Peer:
    """The other end of a socket. Made by `open_peer`."""

    def __init__(self, stream: trio.abc.Stream, methods: Methods, hello: Hello, most: int) -> None:
        self.name = hello.name
        """What the other side calls itself."""
        self.version = min(VERSION, hello.version)
        """The version that both speak."""
        self._stream = stream
        self._methods = methods
        self._most = most
        self._ids = itertools.count(1)
        self._calls: dict[int, _Call] = {}
        self._served: dict[int, _Served] = {}
        self._slots = trio.Semaphore(QUEUE)
        self._queue: trio.MemorySendChannel[_Outgoing]
        self._frames: trio.MemoryReceiveChannel[_Outgoing]
        self._queue, self._frames = trio.open_memory_channel(math.inf)
        self._closed = trio.Event()

    async def call(
        self,
        method: str,
        params: Struct,
        result_type: type[T],
        on_progress: Callable[[Any], Awaitable[None]] | None = None,
        progress_type: Any = Any,  # noqa: ANN401
        fds: Sequence[int] = (),
    ) -> T:
        """Ask the other side for `method` and give its answer; `fds` stay the caller's, the other side gets copies.

        `on_progress` is awaited in the calling task, in order, with each progress message as a `progress_type` (a class
        or a union). Raises what the handler raised if that was an NsfsError, a bare NsfsError for its bugs,
        UnreachableError if the other side is gone or goes, and CorruptError for an answer that is no such thing.
        Cancellation is passed on.
        """
        number, call = next(self._ids), _Call(WINDOW if on_progress else 0)
        frame = render_frame(Request(number, method, Raw(_encoder.encode(params)), call.window, len(fds)))
        self._check_open()
        self._calls[number] = call
        done = False
        try:
            await self._send(frame, fds)
            end = await self._follow(call, on_progress, progress_type)
            done = True
        finally:
            del self._calls[number]
            if not done:
                self._send_nowait(Cancel(number))
        if isinstance(end, Error):
            raise_error(end)
        assert isinstance(end, Result)
        answer: T = decode_body(end.body, result_type)
        return answer

    @property
    def is_closed(self) -> bool:
        """The other side is gone."""
        return self._closed.is_set()

    async def wait_closed(self) -> None:
        """Until the other side is gone."""
        await self._closed.wait()

    async def _follow(self, call: _Call, on_progress: Callable[[Any], Awaitable[None]] | None, kind: Any) -> Message:  # noqa: ANN401
        async for message in call.outbox:
            if not isinstance(message, Progress):
                return message
            assert on_progress is not None
            await on_progress(decode_body(message.body, kind))
            await self._send(render_frame(Taken(message.id)))
        raise self._gone()

    def _gone(self) -> UnreachableError:
        return UnreachableError(f"process at the other end is gone: {self.name}")

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise self._gone()

    async def _send(self, frame: bytes, fds: Sequence[int] = ()) -> None:
        await self._slots.acquire()
        copies = [os.dup(fd) for fd in fds]
        try:
            self._queue.send_nowait(_Outgoing(frame, has_slot=True, fds=copies))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            _close_all(copies)
            raise self._gone() from None

    def _send_nowait(self, message: Message) -> None:
        """For what must go even from a cancelled task: one small frame per call."""
        if not self._closed.is_set():
            self._queue.send_nowait(_Outgoing(render_frame(message)))

    async def run(self, parser: FrameParser, early: list[Message]) -> None:
        """Read, write and serve until the other side is gone; `early` came together with its hello."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write, nursery.cancel_scope)
                await self._read(parser, early, nursery)
                nursery.cancel_scope.cancel()
        finally:
            self._close()

    def _close(self) -> None:
        self._closed.set()
        self._queue.close()
        with suppress(trio.WouldBlock, trio.EndOfChannel):
            while True:
                _close_all(self._frames.receive_nowait().fds)
        self._frames.close()
        for _ in range(QUEUE):
            self._slots.release()
        for call in self._calls.values():
            call.inbox.close()

    async def _write(self, scope: trio.CancelScope) -> None:
        try:
            async for outgoing in self._frames:
                await self._put(outgoing)
                if outgoing.has_slot:
                    self._slots.release()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            scope.cancel()

    async def _put(self, outgoing: _Outgoing) -> None:
        if not outgoing.fds:
            await self._stream.send_all(outgoing.frame)
            return
        try:
            assert isinstance(self._stream, PassingStream), "descriptors need a stream that passes them"
            await self._stream.send_with(outgoing.frame, outgoing.fds)
        finally:
            _close_all(outgoing.fds)

    async def _read(self, parser: FrameParser, early: list[Message], nursery: trio.Nursery) -> None:
        try:
            self._dispatch(early, nursery)
            while data := await self._stream.receive_some(1 << 17):
                self._dispatch(parser.feed(bytes(data)), nursery)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        except (msgspec.MsgspecError, ValueError, trio.WouldBlock) as error:
            _log.error("process at the other end broke the protocol: %s: %s", self.name, error)

    def _dispatch(self, messages: list[Message], nursery: trio.Nursery) -> None:
        for message in messages:
            match message:
                case Request():
                    self._start(message, nursery)
                case Progress() | Result() | Error():
                    self._deliver(message)
                case Taken():
                    served = self._served.get(message.id)
                    if served and served.slots:
                        served.slots.release()
                case Cancel():
                    if served := self._served.get(message.id):
                        served.scope.cancel()
                case Hello():
                    raise ValueError("second hello")

    def _deliver(self, message: Progress | Result | Error) -> None:
        call = self._calls.get(message.id)
        if call is None:
            return
        if isinstance(message, Progress) and not call.window:
            raise ValueError("progress that nobody asked for")
        call.inbox.send_nowait(message)

    def _start(self, request: Request, nursery: trio.Nursery) -> None:
        if request.id in self._served or len(self._served) >= self._most:
            raise ValueError(f"request is being served already, or one too many: {request.id}")
        fds = self._stream.take(request.fds) if isinstance(self._stream, PassingStream) else []
        if len(fds) != request.fds:
            raise ValueError(f"request with descriptors that did not come: {request.method}")
        served = self._served[request.id] = _Served(request.window, fds)
        nursery.start_soon(self._serve, request, served)

    async def _serve(self, request: Request, served: _Served) -> None:
        try:
            with served.scope:
                await self._send(await self._answer(request, served))
        except UnreachableError:
            pass
        finally:
            _close_all(served.fds)
            del self._served[request.id]

    async def _answer(self, request: Request, served: _Served) -> bytes:
        try:
            params_type, handler = self._find(request.method)
            params = decode_body(request.params, params_type)
            if isinstance(params, Passing):
                params.fds, served.fds = served.fds, []
            result = await handler(params, self._reporter(request.id, served))
            return render_frame(Result(request.id, Raw(_encoder.encode(result))))
        except Exception as error:  # noqa: BLE001 - whatever a handler raises is told to its caller
            cause = _only_cause(error)
            if not isinstance(cause, NsfsError):
                _log.exception("handler failed: %s", request.method)
            return render_frame(render_error(request.id, cause))

    def _find(self, method: str) -> tuple[type[Struct], Handler]:
        try:
            return self._methods[method]
        except KeyError:
            raise UnsupportedError(f"no such method: {method}") from None

    def _reporter(self, number: int, served: _Served) -> Report:
        async def report(body: Struct) -> None:
            if served.slots is not None:
                frame = render_frame(Progress(number, Raw(_encoder.encode(body))))
                await served.slots.acquire()
                await self._send(frame)

        return report


class _Outgoing(NamedTuple):
    """A frame that waits for the writer."""

    frame: bytes
    has_slot: bool = False
    fds: Sequence[int] = ()
    """Ours to close."""


class PassingStream(trio.abc.Stream):
    """A unix stream socket over which descriptors go.

    Those that arrive are kept, in order, until `take`; closed with the stream. A side that `only_sends` them has the
    kernel drop what the other one sends.
    """

    def __init__(self, sock: socket.socket, *, only_sends: bool = False) -> None:
        self._only_sends = only_sends
        self._socket = trio.socket.from_stdlib_socket(sock)
        self._stream = trio.SocketStream(self._socket)
        self._came: deque[int] = deque()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """As of any stream."""
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """As of any stream."""
        await self._stream.wait_send_all_might_not_block()

    async def send_with(self, data: bytes, fds: Sequence[int]) -> None:
        """Send `data`, and `fds` with its first byte."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))]
        try:
            sent = await self._socket.sendmsg([data], ancillary)
        except OSError as error:
            raise trio.BrokenResourceError from error
        await self._stream.send_all(data[sent:])

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """As of any stream."""
        if self._only_sends:
            return bytes(await self._stream.receive_some(max_bytes))
        space = socket.CMSG_SPACE(_MAX_PASSED * _FD.size)
        try:
            data, ancillary, _, _ = await self._socket.recvmsg(max_bytes or 1 << 16, space, socket.MSG_CMSG_CLOEXEC)
        except OSError as error:
            if self._socket.fileno() < 0:
                raise trio.ClosedResourceError from None
            raise trio.BrokenResourceError from error
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                whole = len(content) - len(content) % _FD.size
                self._came += [fd for (fd,) in _FD.iter_unpack(content[:whole])]
        return data

    def take(self, count: int) -> list[int]:
        """The `count` descriptors that came first, or as many as there are; the caller's from now on."""
        return [self._came.popleft() for _ in range(min(count, len(self._came)))]

    async def aclose(self) -> None:
        """Close the socket, and what nobody took."""
        _close_all(self.take(len(self._came)))
        await self._stream.aclose()


def _close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


def agree(theirs: Hello) -> None:
    """Raise UnsupportedError unless a version exists that both sides speak."""
    if theirs.version < OLDEST or theirs.oldest > VERSION:
        raise UnsupportedError(
            f"process at the other end speaks another version: {theirs.name}",
            hint=f"it speaks {theirs.oldest} to {theirs.version}, we speak {OLDEST} to {VERSION}: restart the older",
        )


async def _greet(stream: trio.abc.Stream, name: str, parser: FrameParser) -> tuple[Hello, list[Message]]:
    try:
        await stream.send_all(render_frame(Hello(VERSION, OLDEST, name)))
        messages: list[Message] = []
        while not messages:
            data = await stream.receive_some(1 << 16)
            if not data:
                raise UnreachableError("process at the other end went before it said hello")
            messages = parser.feed(bytes(data))
    except (trio.BrokenResourceError, msgspec.MsgspecError, ValueError) as error:
        raise UnreachableError(f"process at the other end said no hello: {error}") from error
    if not isinstance(messages[0], Hello):
        raise UnreachableError("process at the other end said no hello")
    agree(messages[0])
    return messages[0], messages[1:]


@asynccontextmanager
async def open_peer(
    stream: trio.abc.Stream, methods: Methods, *, name: str, most: int = MAX_SERVED
) -> AsyncIterator[Peer]:
    """Exchange hellos over `stream` and serve `methods` on it while the context lasts; closes `stream`.

    `name` is what the other side's messages call us; it may have `most` requests handled at a time, and one more breaks
    the protocol. Raises UnreachableError if there is no peer, UnsupportedError if
    it speaks another version. The context does not end by itself when the other side goes: see `Peer.wait_closed`.
    What the body raises leaves as it is, not in a group.
    """
    async with stream:
        parser = FrameParser()
        hello, early = await _greet(stream, name, parser)
        peer = Peer(stream, methods, hello, most)
        async with open_tasks() as tasks:
            tasks.start_soon(peer.run, parser, early)
            yield peer
