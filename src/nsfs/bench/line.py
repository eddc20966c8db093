"""A TCP proxy that is a slow, distant line: so many bits a second, so many milliseconds for a round trip.

Owns: its listening socket on loopback and a thread with an event loop of its own. The rate is one token bucket for all
connections and both directions each, as of one line; half the round trip is added to each direction, also to what
opens a connection. TCP's own slow start is loopback's, so it is absent: the line is a full pipe from the first byte.

It leads to one server, or, as an HTTP proxy by CONNECT (RFC 9110, section 9.3.6), to whichever is asked for. It counts
the bytes that servers sent once they have left it, and when. The shape may be changed at any time, from any thread, and
holds for what comes then.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_PIECE = 16 << 10
_BUFFERED = 0.25
"""Seconds' worth of bytes that are on the way in one direction of a connection."""
_QUIET, _PATIENCE = 0.5, 10.0
"""Seconds without a byte after which a line is quiet; seconds that are waited for that at most."""
_TRACE_EVERY = 0.02
"""Seconds between points of the trace."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a line is like."""

    rate: float = 0.0
    """Bytes a second; 0 is no limit."""
    round_trip: float = 0.0
    """Seconds."""


FREE = Shape()
"""As fast as the machine goes, for counting alone."""


@dataclass(slots=True)
class Line:
    """What the proxy did so far, and how it is had."""

    host: str
    """`127.0.0.1:<port>`, to be used instead of the server's, or as a proxy."""
    shape: Shape
    received: int = 0
    """Bytes that came from servers, headers included."""
    trace: list[tuple[float, int]] = field(default_factory=list)
    """(time.monotonic(), `received`), a few dozen a second while something comes."""

    def count(self, size: int) -> None:
        """So many bytes more."""
        self.received += size
        now = time.monotonic()
        if self.trace and now - self.trace[-1][0] < _TRACE_EVERY:
            self.trace[-1] = (self.trace[-1][0], self.received)
        else:
            self.trace.append((now, self.received))

    def wait_until_quiet(self) -> None:
        """Until nothing has come for a while; not for ever."""
        deadline = time.monotonic() + _PATIENCE
        seen = -1
        while seen != self.received and time.monotonic() < deadline:
            seen = self.received
            time.sleep(_QUIET)


@dataclass(slots=True)
class _Bucket:
    """When the line is free again: each piece takes its time after the one before it."""

    line: Line
    free: float = 0.0

    def departure(self, now: float, size: int) -> float:
        """When the last of `size` bytes that arrive now has left."""
        rate = self.line.shape.rate
        self.free = max(now, self.free) + size / rate if rate else now
        return self.free


@dataclass(slots=True)
class _Proxy:
    line: Line
    server: tuple[str, int] | None
    """None for whichever CONNECT names."""
    down: _Bucket
    up: _Bucket
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        try:
            await asyncio.sleep(self.line.shape.round_trip)  # the handshake
            address = self.server or await _accept_connect(reader, writer)
            upstream, downstream = await asyncio.open_connection(*address)
            with contextlib.closing(downstream), contextlib.suppress(OSError):
                await asyncio.gather(
                    self._carry(reader, downstream, self.up, counted=False),
                    self._carry(upstream, writer, self.down, counted=True),
                )
        except (OSError, ValueError, EOFError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            self.tasks.discard(task)

    async def _carry(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, bucket: _Bucket, *, counted: bool
    ) -> None:
        """Move bytes, each as late as the line makes it; raises OSError where either side is gone."""
        on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._deliver(on_the_way, sink, counted=counted))
                loop = asyncio.get_running_loop()
                while data := await source.read(_PIECE):
                    departure = bucket.departure(loop.time(), len(data))
                    on_the_way.put_nowait((departure + self.line.shape.round_trip / 2, data))
                    await asyncio.sleep(max(0.0, departure - loop.time() - _BUFFERED))
                on_the_way.put_nowait((loop.time() + self.line.shape.round_trip / 2, b""))
        except ExceptionGroup as errors:
            if errors.split(OSError)[1] is not None:
                raise
            raise ConnectionError("cut off") from errors

    async def _deliver(
        self, on_the_way: asyncio.Queue[tuple[float, bytes]], sink: asyncio.StreamWriter, *, counted: bool
    ) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due, data = await on_the_way.get()
            if due > loop.time():
                await asyncio.sleep(due - loop.time())
            if not data:
                with contextlib.suppress(OSError):
                    sink.write_eof()
                return
            if counted:
                self.line.count(len(data))
            sink.write(data)
            await sink.drain()


async def _accept_connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[str, int]:
    """Where a client wants to be connected to; raises ValueError where it wants something else."""
    head = await reader.readuntil(b"\r\n\r\n")
    method, target, *_ = head.decode("latin-1").split(" ", 2)
    host, _, port = target.rpartition(":")
    if method != "CONNECT" or not port.isdecimal():
        writer.write(b"HTTP/1.1 405 Only CONNECT\r\ncontent-length: 0\r\n\r\n")
        raise ValueError(f"not a CONNECT: {method[:20]}")
    writer.write(b"HTTP/1.1 200 Connected\r\n\r\n")
    return host.strip("[]"), int(port)


@contextlib.contextmanager
def run_line(server: str | None, shape: Shape = FREE) -> Iterator[Line]:
    """A line to `server` (`address:port`), or as an HTTP proxy where it is None."""
    address, _, port = (server or "").rpartition(":")
    started: threading.Event = threading.Event()
    line = Line("", shape)
    proxy = _Proxy(line, (address, int(port)) if server else None, _Bucket(line), _Bucket(line))
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(_run(proxy, started, stop),), name="line")
    thread.start()
    started.wait()
    try:
        yield line
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


async def _run(proxy: _Proxy, started: threading.Event, stop: asyncio.Event) -> None:
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0, limit=_PIECE)
    proxy.line.host = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    started.set()
    await stop.wait()
    server.close()
    for task in list(proxy.tasks):
        task.cancel()
    await asyncio.gather(*proxy.tasks, return_exceptions=True)
