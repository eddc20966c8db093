"""One registry server, asked until it answers: authentication, redirects, retries, limits.

Owns the conversation behind one request: who asks (once more after a 401 or 403), where redirects lead (no
Authorization and no configured header for another origin, no downgrade to plain HTTP; what is written is sent on only
where the answer says that it may be), and what errors are called. Bodies are never
interpreted here. Each attempt is bounded: by the timeouts until its answer begins, and from there on by how slowly
that may come (`Pace`); each `retrying` by its number of attempts.

Concurrency: any number of tasks. Of the connections that one server may have at a time, half are for streams and half
for other requests, so a range never waits behind whole layers, and nobody behind another server that does not answer.
Every call may be cancelled at any time.
"""

from __future__ import annotations

import random
import ssl
import time
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import httpx
import trio

from nsfs import __version__
from nsfs.errors import CorruptError, DeniedError, NsfsError, UnreachableError
from nsfs.model.oci import Traffic
from nsfs.model.route import RouteMeter
from nsfs.remote.auth import MAX_TOKEN_ANSWER, Authorizer, TokenRequest, parse_challenges
from nsfs.remote.hosts import Endpoint, Tls
from nsfs.remote.response import REDIRECTS, STALE, origin, plan_redirect, refusal
from nsfs.remote.transport import Bill, Timeouts, body_of, create_client

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence

    from nsfs.model.referrers import Upload
    from nsfs.remote.credentials import Credentials


T = TypeVar("T")

CONNECTIONS = 24
MAX_REDIRECTS = 5

_REST = 30.0
"""Seconds for which a server that did not answer is asked last."""
_MAX_REASON = 4096
_SHORT_BODY = 64 << 10
_SLOWEST = 16 << 10
"""Bytes a second: what comes in, or goes out, more slowly is given up."""
_IDENTITY = {"Accept-Encoding": "identity", "User-Agent": f"nsfs/{__version__}"}


@dataclass(frozen=True, slots=True)
class Patience:
    """How often and how long one call tries before it gives up; seconds."""

    attempts: int = 4
    first_delay: float = 0.2
    longest_delay: float = 10.0
    """Also of a Retry-After: when asked to wait longer, the caller is told instead."""


class Meter:
    """Counts what one source costs."""

    __slots__ = ("received", "requests")

    def __init__(self) -> None:
        self.requests = 0
        self.received = 0

    def reading(self) -> Traffic:
        """The counts now."""
        return Traffic(self.requests, self.received)


@dataclass(frozen=True, slots=True)
class Get:
    """One thing to ask a server for."""

    path: str
    """Below the API's base: /library/python/manifests/3.12."""
    repository: str
    what: str
    """For people, in errors."""
    headers: tuple[tuple[str, str], ...] = ()
    target: str | None = None
    """Where an earlier answer redirected to, to be tried first."""
    stream: bool = False
    """Takes a slot among the streams."""
    method: str = "GET"
    upload: Upload | None = None
    """What is sent, anew at each attempt."""
    location: str = ""
    """Where an earlier answer of this server said that this is to be sent, absolute, instead of `path`."""

    @property
    def actions(self) -> str:
        """What a token must allow."""
        return _ACTIONS.get(self.method, "pull")


_ACTIONS = {"POST": "pull,push", "PUT": "pull,push", "DELETE": "delete"}


class MeteredBody:
    """Tells a route's meter how one body comes in."""

    def __init__(self, meter: RouteMeter) -> None:
        self._meter = meter
        self._is_open = False

    def received(self, size: int) -> None:
        """A piece is here; one of size 0 is the end."""
        if not size:
            self.close()
        elif self._is_open:
            self._meter.received(trio.current_time(), size)
        else:
            self._is_open = True
            self._meter.began(trio.current_time())

    def close(self) -> None:
        """Nothing more is waited for."""
        if self._is_open:
            self._is_open = False
            self._meter.ended(trio.current_time())


class Pace:
    """How long a body may still be waited for: a silence, and longer for what came than a very slow line takes.

    Who takes his time between two pieces loses nothing by it.
    """

    def __init__(self, silence: float, host: str) -> None:
        self._silence = self._left = silence
        self._host = host

    async def wait(self, receive: Callable[[], Awaitable[bytes]]) -> bytes:
        """The next piece; raises UnreachableError where it, with those before, comes in too slowly."""
        begun = trio.current_time()
        with trio.move_on_after(self._left):
            piece = await receive()
            earned = len(piece) / _SLOWEST - (trio.current_time() - begun)
            self._left = max(0.0, min(self._silence, self._left + earned))
            return piece
        raise UnreachableError(
            f"the registry sends too slowly: {self._host}: under {_SLOWEST >> 10} KiB/s for {self._silence:g} s"
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """A successful response whose body is still to be read."""

    response: httpx.Response
    host: str
    target: str | None
    """The URL it came from, if a redirect led to another origin."""
    meter: Meter
    pace: Pace
    body: MeteredBody

    async def receive(self) -> bytes:
        """The next piece of the body, b"" at its end; raises UnreachableError when it breaks off, or hardly comes."""
        with mapped_errors(self.host):
            piece = await self.pace.wait(self._next)
        self.meter.received += len(piece)
        self.body.received(len(piece))
        return piece

    async def read(self, limit: int, what: str) -> bytes:
        """The whole body; raises CorruptError if it is longer than `limit`."""
        body = bytearray()
        while piece := await self.receive():
            body += piece
            if len(body) > limit:
                raise CorruptError(f"the registry's answer is longer than {limit} bytes: {what}")
        return bytes(body)

    async def _next(self) -> bytes:
        return await anext(body_of(self.response), b"")


@dataclass(frozen=True, slots=True)
class Lanes:
    """Slots for what one server may have open at a time; the same ones for both where it may have but one."""

    streams: trio.Semaphore
    requests: trio.Semaphore


class Connections:
    """The HTTP clients of a process, one per TLS configuration, and how many connections each server may have."""

    def __init__(self, environment: Mapping[str, str], timeouts: Timeouts, limit: int = CONNECTIONS) -> None:
        self.timeouts = timeouts
        self._limit = limit
        self._environment = environment
        self._clients: dict[Tls, httpx.AsyncClient] = {}
        self.bill = Bill()

    def client(self, tls: Tls) -> httpx.AsyncClient:
        """The client for servers of this configuration."""
        if tls not in self._clients:
            self._clients[tls] = create_client(tls, self._environment, self.timeouts, self.bill)
        return self._clients[tls]

    def lanes(self) -> Lanes:
        """The slots for one more server."""
        requests = trio.Semaphore(range_connections(self._limit))
        return Lanes(trio.Semaphore(self._limit // 2) if self._limit > 1 else requests, requests)

    async def aclose(self) -> None:
        """Close every connection."""
        for client in self._clients.values():
            await client.aclose()


def range_connections(limit: int) -> int:
    """How many of the connections that one server may have are for ranges and documents."""
    return -(-limit // 2)


class Server:
    """One endpoint of a registry."""

    def __init__(self, endpoint: Endpoint, registry: str, connections: Connections, credentials: Credentials) -> None:
        self.endpoint = endpoint
        self._connections = connections
        self._lanes = connections.lanes()
        account = endpoint.host if endpoint.namespace else registry
        self._authorizer = Authorizer(account, credentials, self._ask_token, plain=endpoint.plain)
        self._down_until = 0.0
        self.meter = RouteMeter()
        """Of what comes from it, or from where it redirects to."""

    def is_down(self) -> bool:
        """Whether it did not answer lately."""
        return trio.current_time() < self._down_until

    def rest(self, seconds: float) -> None:
        """Ask others first for a while."""
        self._down_until = trio.current_time() + seconds

    @asynccontextmanager
    async def open(self, get: Get, meter: Meter) -> AsyncIterator[Answer]:
        """Ask once; the body can be read inside the block. Raises NsfsError for everything but a 2xx."""
        async with self._lanes.streams if get.stream else self._lanes.requests:
            sending = get.upload.size / _SLOWEST if get.upload else 0.0
            with bounded(self._connections.timeouts.longest + sending, self.endpoint.host):
                response, url = await self._resolve(get, meter)
            target = url if origin(url) != origin(self.endpoint.base) else None
            body = MeteredBody(self.meter)
            answer = Answer(response, self.endpoint.host, target, meter, self._pace(self.endpoint.host), body)
            try:
                await self._refuse(answer, get)
                yield answer
            finally:
                body.close()
                await response.aclose()

    async def _resolve(self, get: Get, meter: Meter) -> tuple[httpx.Response, str]:
        """The first answer that is no redirect, and where it came from."""
        if get.target is not None:
            response, url = await self._follow(None, get.target, None, get, meter)
            if response.status_code not in STALE:
                return response, url
            await finish(response)
        url = self._url(get)
        if origin(url) != origin(self.endpoint.base):
            return await self._follow(None, url, None, get, meter)
        response, authorization = await self._authorized(url, get, meter)
        return await self._follow(response, url, authorization, get, meter)

    def _url(self, get: Get) -> str:
        if get.location:
            return get.location
        url = self.endpoint.base + get.path
        return f"{url}{'&' if '?' in url else '?'}ns={self.endpoint.namespace}" if self.endpoint.namespace else url

    def locate(self, answer: Answer, query: str = "") -> str:
        """Where a successful answer says that its sequel is to be sent, with `query` added; raises NsfsError."""
        location = plan_redirect(
            str(answer.response.request.url), answer.response.headers.get("location", ""), plain=self.endpoint.plain
        )
        return f"{location}{'&' if '?' in location else '?'}{query}" if query else location

    async def _authorized(self, url: str, get: Get, meter: Meter) -> tuple[httpx.Response, str | None]:
        authorization = await self._authorizer.get(get.repository, get.actions)
        response = await self._send(url, authorization, get, meter)
        if response.status_code not in {401, 403}:
            return response, authorization
        challenges = parse_challenges(response.headers.get_list("www-authenticate"))
        try:
            better = await self._authorizer.answer(get.repository, challenges, authorization, get.actions)
        except BaseException:
            await response.aclose()
            raise
        if better is None:
            return response, authorization
        await finish(response)
        return await self._send(url, better, get, meter), better

    async def _follow(
        self, response: httpx.Response | None, url: str, authorization: str | None, get: Get, meter: Meter
    ) -> tuple[httpx.Response, str]:
        home = origin(self.endpoint.base)
        for _ in range(MAX_REDIRECTS + 1):
            if response is None:
                response = await self._send(url, authorization if origin(url) == home else None, get, meter)
            if response.status_code not in REDIRECTS or not _is_sent_on(response.status_code, get):
                return response, url
            location = response.headers.get("location", "")
            await finish(response)
            url, response = plan_redirect(url, location, plain=self.endpoint.plain), None
        raise UnreachableError(f"the registry redirects without end: {self.endpoint.host}")

    async def _send(self, url: str, authorization: str | None, get: Get, meter: Meter) -> httpx.Response:
        meter.requests += 1
        at_home = origin(url) == origin(self.endpoint.base)
        headers = [*_IDENTITY.items(), *get.headers]
        if at_home:
            headers += self.endpoint.headers
        if authorization is not None:
            headers.append(("Authorization", authorization))
        if get.upload is not None:
            headers.append(("Content-Length", str(get.upload.size)))
        client = self._connections.client(self._tls(url))
        sent = trio.current_time()
        with mapped_errors(self.endpoint.host):
            request = client.build_request(get.method, url, headers=headers)
            async with _sent(request, get.upload):
                response = await client.send(request, stream=True)
        if get.upload is None:
            self.meter.answered(trio.current_time() - sent)
        return response

    def _tls(self, url: str) -> Tls:
        """Another host gets no client certificate and is always checked."""
        tls = self.endpoint.tls
        return tls if origin(url)[1] == origin(self.endpoint.base)[1] else Tls(ca=tls.ca)

    async def _refuse(self, answer: Answer, get: Get) -> None:
        response = answer.response
        if response.is_success:
            return
        body = b""
        while len(body) < _MAX_REASON and (piece := await answer.receive()):
            body += piece
        what = f"{self.endpoint.host}: {get.what}"
        raise refusal(response.status_code, response.headers, what, body[:_MAX_REASON], time.time())

    def _pace(self, host: str) -> Pace:
        return Pace(self._connections.timeouts.read, host)

    async def _ask_token(self, request: TokenRequest) -> bytes:
        host = origin(request.url)[1]
        client = self._connections.client(self._tls(request.url))
        headers = dict(_IDENTITY)
        if request.authorization:
            headers["Authorization"] = request.authorization
        with mapped_errors(host):
            built = _token_message(client, request, headers)
            response = await client.send(built, stream=True)
        try:
            metered = MeteredBody(RouteMeter())
            answer = Answer(response, host, None, Meter(), self._pace(host), metered)
            body = await answer.read(MAX_TOKEN_ANSWER, "token")
        finally:
            await response.aclose()
        if response.status_code in {400, 401, 403}:
            raise DeniedError(f"the token server denies access: {host}: status {response.status_code}")
        if response.status_code != 200:
            raise refusal(response.status_code, response.headers, f"{host}: token", b"", time.time())
        return body


class _Sending(httpx.AsyncByteStream):
    """What is sent, by an iterator that somebody else closes; httpx leaves it open where sending fails."""

    def __init__(self, pieces: AsyncIterator[bytes]) -> None:
        self._pieces = pieces

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._pieces


@asynccontextmanager
async def _sent(request: httpx.Request, upload: Upload | None) -> AsyncIterator[None]:
    """Have `upload` be the request's body inside the block."""
    if upload is None:
        yield
        return
    async with aclosing(upload.pieces()) as pieces:
        request.stream = _Sending(pieces)
        yield


def _is_sent_on(status: int, get: Get) -> bool:
    """Whether a redirect is followed: one of what is written only where it keeps its method (RFC 9110, 15.4)."""
    return get.method in {"GET", "HEAD"} or status in {307, 308}


async def retrying(patience: Patience, attempt: Callable[[], Awaitable[T]]) -> T:
    """The result of the first `attempt` that succeeds; raises the last one's error.

    Tries again what is transient, and answers that contradict themselves (a damaged byte, a wrong range), which are as
    often one broken proxy among several as a broken registry.
    """
    for number in range(1, patience.attempts + 1):
        try:
            return await attempt()
        except NsfsError as error:
            delay = plan_delay(patience, number, error)
            if delay is None:
                raise
        await pause(delay)
    raise AssertionError("the last attempt raises")


async def first_of(servers: Sequence[Server], ask: Callable[[Server], Awaitable[T]]) -> T:
    """The first server's result; if none has one, the last word belongs to the registry's own server."""
    errors: list[tuple[bool, NsfsError]] = []
    for server in servers:
        try:
            return await ask(server)
        except NsfsError as error:
            if error.transient:
                server.rest(_REST)
            errors.append((not server.endpoint.namespace, error))
    raise max(errors, key=lambda pair: pair[0])[1]


async def pause(delay: float) -> None:
    """Wait `delay` seconds or a little longer, so that those who failed together do not come back together."""
    await trio.sleep(delay * random.uniform(1.0, 1.25))  # noqa: S311  spreads load, hides nothing


def plan_delay(patience: Patience, number: int, error: NsfsError) -> float | None:
    """Seconds to wait after failed attempt `number` (1 is the first); None if `error` is the answer."""
    if number >= patience.attempts or not (error.transient or isinstance(error, CorruptError)):
        return None
    asked = getattr(error, "retry_after", None)
    if asked is not None:
        return asked if asked <= patience.longest_delay else None
    return min(patience.first_delay * 2.0 ** (number - 1), patience.longest_delay)


@contextmanager
def bounded(seconds: float, host: str) -> Iterator[None]:
    """Raise UnreachableError if what runs inside takes longer."""
    with trio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise UnreachableError(f"the registry is too slow: {host}: gave up after {seconds:.0f} s")


async def finish(response: httpx.Response) -> None:
    """Close a response that nobody wants to read; a short body is read, so that its connection can be used again."""
    length = response.headers.get("content-length", "")
    try:
        if length.isdigit() and int(length) <= _SHORT_BODY:
            with suppress(httpx.TransportError):
                async for _ in body_of(response):
                    pass
    finally:
        await response.aclose()


@contextmanager
def mapped_errors(host: str) -> Iterator[None]:
    """What httpx raises, as our errors."""
    try:
        yield
    except httpx.TransportError as error:
        if certificate := _certificate_error(error):
            raise UnreachableError(
                f"the registry's certificate is not trusted: {host}: {certificate.verify_message}",
                hint="name its CA in hosts.toml",
            ) from None
        reason = str(error) or type(error).__name__
        raise UnreachableError(f"the registry does not answer: {host}: {reason}") from None
    except (httpx.InvalidURL, httpx.HTTPError) as error:
        raise CorruptError(f"the registry answers with something that is no HTTP: {host}: {error}") from None


def _certificate_error(error: BaseException | None) -> ssl.SSLCertVerificationError | None:
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return error


def _token_message(client: httpx.AsyncClient, request: TokenRequest, headers: dict[str, str]) -> httpx.Request:
    if request.form is not None:
        return client.build_request("POST", request.url, headers=headers, data=dict(request.form))
    url = httpx.URL(request.url)
    return client.build_request("GET", url.copy_merge_params(dict(request.query)), headers=headers)
