"""Where metrics are scraped: HTTP/1.1 over TCP or a unix socket, GET and HEAD of one path.

Refuses everything else, a request that is no HTTP, and one that is not there within its time. A connection carries one
request. Nobody is asked who he is: an address should be one that only who may know the figures can reach, and the
socket is the daemon's user's alone (0600).

Concurrency: a task for each connection, so many at a time; further ones are closed.
"""

from __future__ import annotations

import logging
import os
from contextlib import asynccontextmanager, suppress
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

import h11
import trio

from nsfs.core.tasks import open_tasks
from nsfs.errors import NsfsError, UsageError
from nsfs.serve.config import parse_endpoint
from nsfs.serve.entrance import listen_unix

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from nsfs.serve.config import Endpoint

    Render = Callable[[str], Awaitable[tuple[bytes, str]]]

log = logging.getLogger(__name__)

PATH: Final = b"/metrics"
_AT_A_TIME: Final = 16
_LIFE: Final = 10.0
"""Seconds that a connection has in all."""
_PIECE: Final = 1 << 14
_MOST_ASKED: Final = 1 << 14
"""Bytes of a request."""


@asynccontextmanager
async def serve_scrapes(listen: str, render: Render) -> AsyncIterator[None]:
    """Give what `render` makes of a request's Accept to whoever asks, until the block ends; nowhere if not `listen`.

    Raises UsageError where nobody can listen there.
    """
    if not listen:
        yield
        return
    endpoint = parse_endpoint(listen)
    listeners = await _listen(endpoint)
    serve = partial(_serve_if_few, trio.CapacityLimiter(_AT_A_TIME), render)
    try:
        async with open_tasks() as tasks:
            tasks.start_soon(partial(trio.serve_listeners, serve, listeners))
            log.info("metrics are at %s", listen)
            yield
    finally:
        if endpoint.path:
            with suppress(FileNotFoundError):
                os.unlink(endpoint.path)


async def _listen(endpoint: Endpoint) -> list[trio.SocketListener]:
    if endpoint.path:
        return [trio.SocketListener(trio.socket.from_stdlib_socket(listen_unix(endpoint.path, "metrics.listen")))]
    try:
        return await trio.open_tcp_listeners(endpoint.port, host=endpoint.host)
    except OSError as error:
        where = f"{endpoint.host} port {endpoint.port}"
        raise UsageError(f"metrics.listen: cannot listen there: {where}: {error.strerror}") from None


async def _serve_if_few(limiter: trio.CapacityLimiter, render: Render, stream: trio.SocketStream) -> None:
    """Nothing that goes wrong with a scrape may harm anybody else."""
    if not limiter.available_tokens:
        return
    async with limiter:
        with trio.move_on_after(_LIFE):
            try:
                await _serve(stream, render)
            except (trio.BrokenResourceError, h11.RemoteProtocolError) as error:
                log.debug("a scrape ended: %s", error)
            except Exception:
                log.exception("a bug: a scrape failed")


async def _serve(stream: trio.SocketStream, render: Render) -> None:
    http = h11.Connection(h11.SERVER, max_incomplete_event_size=_MOST_ASKED)
    request = await _receive(http, stream)
    if request is None:
        return
    status, body, media_type = await _answer(request, render)
    headers = [("Content-Type", media_type), ("Content-Length", str(len(body))), ("Connection", "close")]
    response = h11.Response(status_code=status, headers=headers, reason=status.phrase)
    data = h11.Data(b"" if request.method == b"HEAD" else body)
    for event in (response, data, h11.EndOfMessage()):
        await stream.send_all(http.send(event) or b"")


async def _receive(http: h11.Connection, stream: trio.SocketStream) -> h11.Request | None:
    """The request; None where somebody connects and goes. Raises h11.RemoteProtocolError."""
    while True:
        match http.next_event():
            case h11.Request() as request:
                return request
            case h11.NEED_DATA:
                http.receive_data(await stream.receive_some(_PIECE))
            case _:
                return None


async def _answer(request: h11.Request, render: Render) -> tuple[HTTPStatus, bytes, str]:
    if request.target.partition(b"?")[0] != PATH:
        return HTTPStatus.NOT_FOUND, b"metrics are at /metrics\n", "text/plain"
    if request.method not in {b"GET", b"HEAD"}:
        return HTTPStatus.METHOD_NOT_ALLOWED, b"GET and HEAD only\n", "text/plain"
    accept = b",".join(value for name, value in request.headers if name == b"accept")
    try:
        body, media_type = await render(accept.decode("latin-1"))
    except NsfsError as error:
        return HTTPStatus.SERVICE_UNAVAILABLE, f"{error}\n".encode(), "text/plain"
    return HTTPStatus.OK, body, media_type
