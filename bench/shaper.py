"""A TCP proxy that is a slow, distant line: so many bits a second, so many milliseconds for a round trip.

Owns: its listening socket on loopback and a thread with an event loop of its own. The rate is one token bucket for all
connections and both directions each, as of one line; half the round trip is added to each direction, also to what
opens a connection. TCP's own slow start is loopback's, so it is absent: the line is a full pipe from the first byte.
It counts the bytes that the server sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_PIECE = 16 << 10


@dataclass(slots=True)
class Line:
    """What the proxy did so far, and how it is had."""

    host: str
    """`127.0.0.1:<port>`, to be used instead of the server's."""
    received: int = 0
    """Bytes that came from the server, headers included."""


@dataclass(slots=True)
class _Bucket:
    """When the line is free again: each piece takes its time after the one before it."""

    rate: float
    """Bytes a second; 0 is no limit."""
    free: float = 0.0

    def departure(self, now: float, size: int) -> float:
        """When the last of `size` bytes that arrive now has left."""
        if self.rate == 0:
            return now
        self.free = max(now, self.free) + size / self.rate
        return self.free


@dataclass(slots=True)
class _Proxy:
    line: Line
    server: tuple[str, int]
    delay: float
    """Seconds, one way."""
    down: _Bucket
    up: _Bucket
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        try:
            await asyncio.sleep(2 * self.delay)  # the handshake
            upstream, downstream = await asyncio.open_connection(*self.server)
            with contextlib.closing(downstream), contextlib.suppress(OSError):
                await asyncio.gather(
                    self._carry(reader, downstream, self.up, counted=False),
                    self._carry(upstream, writer, self.down, counted=True),
                )
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            self.tasks.discard(task)

    async def _carry(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, bucket: _Bucket, *, counted: bool
    ) -> None:
        """Move bytes, each as late as the line makes it; at most a quarter of a second of them is on the way."""
        on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(
            maxsize=max(4, int(bucket.rate / 4 / _PIECE) or 64)
        )
        async with asyncio.TaskGroup() as group:
            group.create_task(self._deliver(on_the_way, sink))
            loop = asyncio.get_running_loop()
            while data := await source.read(_PIECE):
                self.line.received += len(data) if counted else 0
                await on_the_way.put((bucket.departure(loop.time(), len(data)) + self.delay, data))
            await on_the_way.put((loop.time() + self.delay, b""))

    async def _deliver(self, on_the_way: asyncio.Queue[tuple[float, bytes]], sink: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due, data = await on_the_way.get()
            if due > loop.time():
                await asyncio.sleep(due - loop.time())
            if not data:
                with contextlib.suppress(OSError):
                    sink.write_eof()
                return
            sink.write(data)
            await sink.drain()


@contextlib.contextmanager
def run_line(host: str, *, mbit: float = 0, round_trip_ms: float = 0) -> Iterator[Line]:
    """A line to the server at `host` (`address:port`); rate 0 is no limit, for counting alone."""
    address, _, port = host.rpartition(":")
    started: threading.Event = threading.Event()
    line = Line("")
    rate = mbit * 1e6 / 8
    proxy = _Proxy(line, (address, int(port)), round_trip_ms / 2000, _Bucket(rate), _Bucket(rate))
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
