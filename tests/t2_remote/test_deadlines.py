"""A server that stalls or drips, at each thing that is asked of it: every call ends with an error that names it."""

from __future__ import annotations

import socketserver
import threading
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio

from nsfs.errors import UnreachableError
from nsfs.model.digest import Digest
from nsfs.model.oci import Descriptor
from nsfs.model.referrers import Upload, upload_of
from nsfs.remote.client import Patience
from nsfs.remote.reference import parse_reference
from nsfs.remote.registry import RegistrySource
from nsfs.remote.source import open_source
from nsfs.remote.transport import Timeouts

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator

SIZE: Final = 1 << 20
LARGE: Final = 64 << 20
"""More than sockets keep."""
DIGEST: Final = Digest("sha256:" + "0" * 64)
LAYER: Final = Descriptor(media_type="application/vnd.oci.image.layer.v1.tar", digest=DIGEST, size=SIZE)
QUICK: Final = Timeouts(connect=0.5, read=0.3)
TWICE: Final = Patience(attempts=2, first_delay=0.01)
DRIP: Final = 0.05
"""Seconds between two bytes: never silent for as long as a connection may be."""
CLOSE: Final = "Connection: close"
AFTER_HEAD: Final = f"HTTP/1.1 200 OK\r\nContent-Length: {SIZE}\r\n\r\n".encode()
AFTER_RANGE: Final = (
    f"HTTP/1.1 206 Partial\r\nContent-Length: 1000\r\nContent-Range: bytes 0-999/{SIZE}\r\n\r\n".encode()
)


class Server(socketserver.ThreadingTCPServer):
    """Does with every request what `fault` says: `silent`, `slow head`, `no body`, `slow body`, `slow token`."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, fault: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.fault = fault
        self.over = threading.Event()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


class Handler(socketserver.BaseRequestHandler):
    server: Server

    def handle(self) -> None:
        with suppress(OSError):
            self._answer(self._head())

    def _head(self) -> bytes:
        head = b""
        while b"\r\n\r\n" not in head:
            piece = self.request.recv(1)  # what is written is left where it is
            if not piece:
                raise ConnectionResetError
            head += piece
        return head

    def _answer(self, head: bytes) -> None:
        method = head.partition(b" ")[0]
        fault = self.server.fault
        if fault == "slow token" and b"/token" not in head:
            self._refuse()
        elif method == b"HEAD":
            self.request.sendall(b"HTTP/1.1 404 None\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        elif method == b"POST":
            self.request.sendall(
                b"HTTP/1.1 202 OK\r\nLocation: /there\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            )
        elif fault == "silent":
            self.server.over.wait()
        else:
            begin = b"" if fault == "slow head" else AFTER_RANGE if b"bytes=0-999" in head else AFTER_HEAD
            self.request.sendall(begin)
            self._go_on(slowly=fault != "no body")

    def _refuse(self) -> None:
        challenge = f'WWW-Authenticate: Bearer realm="http://{self.server.host}/token",service="s"'
        self.request.sendall(f"HTTP/1.1 401 No\r\n{challenge}\r\nContent-Length: 0\r\n{CLOSE}\r\n\r\n".encode())

    def _go_on(self, *, slowly: bool) -> None:
        text = b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 10_000
        for byte in text:
            if self.server.over.wait(DRIP if slowly else None):
                return
            self.request.sendall(bytes([byte]))


@contextmanager
def serving(fault: str) -> Iterator[Server]:
    with Server(fault) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.over.set()
            server.shutdown()
            thread.join()


async def stream(source: RegistrySource) -> None:
    async with source.blob(LAYER).stream() as pieces:
        async for _ in pieces:
            pass


def large() -> Upload:
    async def pieces() -> AsyncGenerator[bytes, None]:
        for _ in range(LARGE >> 20):
            yield bytes(1 << 20)

    return Upload(LARGE, pieces)


CALLS: Final[dict[str, Callable[[RegistrySource], Awaitable[Any]]]] = {
    "resolve a tag": lambda source: source.manifest("latest"),
    "get a manifest": lambda source: source.manifest(str(DIGEST)),
    "get a configuration": lambda source: source.read_blob(LAYER, SIZE),
    "fetch a range": lambda source: source.blob(LAYER).fetch(0, 1000),
    "stream a layer": stream,
    "list referrers": lambda source: source.attached.referrers(DIGEST, ""),
    "push a blob": lambda source: source.attached.put_blob(DIGEST, upload_of(b"small")),
    "push a large blob": lambda source: source.attached.put_blob(DIGEST, large()),
}


@pytest.mark.parametrize("fault", ["silent", "slow head", "no body", "slow body", "slow token"])
def test_every_call_has_a_deadline_and_a_clear_error(fault: str) -> None:
    said: dict[str, str] = {}

    async def call(name: str, source: RegistrySource) -> None:
        try:
            await CALLS[name](source)
        except UnreachableError as error:
            said[name] = error.message

    async def body(host: str) -> None:
        reference = parse_reference(f"{host}/some/thing:latest")
        with trio.fail_after(90):
            async with open_source(reference, timeouts=QUICK, patience=TWICE, environment={}) as source:
                assert isinstance(source, RegistrySource)
                async with trio.open_nursery() as nursery:
                    for name in CALLS:
                        nursery.start_soon(call, name, source)

    with serving(fault) as server:
        trio.run(partial(body, server.host))
    assert all("127.0.0.1" in message for message in said.values()), said
    pushes = {"push a blob"} if fault in {"no body", "slow body"} else set()
    assert said.keys() == CALLS.keys() - pushes
