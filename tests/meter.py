"""What a client really gets from a real registry: a proxy in front of one that counts, holds back, and goes away.

`Meter` forwards GET and HEAD over HTTP/1.1 and logs each request with the bytes of body that left. `hold_after` lets no
more than so many bytes of each blob through until it is None again, so that a test can act in the middle of a download;
`down` closes the port and every connection, `up` opens it again. Threads of this process, on loopback.
"""

from __future__ import annotations

import http.client
import re
import socket
import threading
import time
from contextlib import closing, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from types import TracebackType

_PIECE = 64 << 10
_HEADERS = ("Accept", "Authorization", "Range")


@dataclass(slots=True)
class Served:
    """One request, and what of its answer has left so far."""

    path: str
    status: int
    first: int
    """Offset of the body in the blob."""
    size: int
    """Of the body."""
    sent: int = 0


@dataclass
class Meter:
    """Start it with `with`. Attributes may be changed between requests."""

    registry: str
    """Host and port to forward to."""
    hold_after: int | None = None
    log: list[Served] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._port = 0
        self._server: _Server | None = None

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hold_after = None
        self.down()

    @property
    def host(self) -> str:
        """What goes before the first slash of a reference."""
        return f"127.0.0.1:{self._port}"

    def up(self) -> None:
        """Answer, on the same port as before."""
        self._server = _Server(self, self._port)
        self._port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def down(self) -> None:
        """Be gone: connections are closed, new ones refused."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server.hang_up()
            self._thread.join()
            self._server = None

    def served(self, digest: str = "") -> int:
        """Bytes of a blob's content that left; of all blobs without `digest`."""
        return sum(one.sent for one in self.blobs(digest))

    def blobs(self, digest: str = "") -> list[Served]:
        """Requests for a blob, in order."""
        return [one for one in list(self.log) if re.search(f"/blobs/{digest}", one.path)]

    def wait_served(self, digest: str, size: int, seconds: float = 20) -> None:
        """Until so many bytes of a blob have left."""
        deadline = time.monotonic() + seconds
        while self.served(digest) < size:
            assert time.monotonic() < deadline, f"{self.served(digest)} of {size} bytes served: {self.log}"
            time.sleep(0.01)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    block_on_close = False

    def __init__(self, meter: Meter, port: int) -> None:
        self.meter = meter
        self.gone = False
        self._open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        self.gone = True
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up here as a matter of course."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *args: Any) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def do_HEAD(self) -> None:
        self._forward()

    def do_GET(self) -> None:
        self._forward()

    def _forward(self) -> None:
        headers = {name: self.headers[name] for name in _HEADERS if self.headers[name] is not None}
        with closing(http.client.HTTPConnection(self.server.meter.registry, timeout=30)) as connection:
            connection.request(self.command, self.path, headers=headers)
            answer = connection.getresponse()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in {"connection", "transfer-encoding", "date", "server"}:
                    self.send_header(name, value)
            self.end_headers()
            self._relay(answer)

    def _relay(self, answer: http.client.HTTPResponse) -> None:
        first = re.match(r"bytes (\d+)-", answer.getheader("Content-Range") or "")
        served = Served(self.path, answer.status, int(first[1]) if first else 0, answer.length or 0)
        self.server.meter.log.append(served)
        while piece := answer.read(self._allowed(served)):
            served.sent += len(piece)
            self.wfile.write(piece)

    def _allowed(self, served: Served) -> int:
        """How many bytes may leave now; waits while that is none."""
        while (limit := self.server.meter.hold_after) is not None and "/blobs/" in served.path:
            if limit > served.sent:
                return min(_PIECE, limit - served.sent)
            if self.server.gone:
                raise ConnectionResetError
            time.sleep(0.01)
        return _PIECE
