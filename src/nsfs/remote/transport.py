"""Connections: an httpx transport with large reads, our own certificates, and proxies from the environment.

Owns the sockets. Built on httpcore's pool, with two changes. Reads ask for 256 KiB instead of 64: over loopback, from
docker-registry 2.8, that is 2.6 GB/s for 0.32 ns of CPU per byte against 1.2 GB/s for 0.82 (httpcore 1.0.9, two cores,
November 2026). And the pool's number of connections is not limited, because a request that is cancelled while it waits
for a slot may keep the slot for ever (encode/httpcore issue 1093); who sends requests limits them instead. So a request
may be cancelled at any time. HTTP/1.1 only: an HTTP/2 stream is held down by its flow-control window.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import ssl
from collections.abc import AsyncIterable
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import httpcore
import httpx

from nsfs.errors import UsageError
from nsfs.model.oci import Traffic
from nsfs.model.report import MAX_SERVERS, OTHERS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from nsfs.remote.hosts import Tls

READ_SIZE = 256 << 10
_KEEPALIVE = 30.0
_IDLE_CONNECTIONS = 32


@dataclass(frozen=True, slots=True)
class Timeouts:
    """In seconds: to connect (name, TCP, TLS), and to wait for a next byte."""

    connect: float = 10.0
    read: float = 30.0

    @property
    def longest(self) -> float:
        """Until an answer begins, with authentication and redirects."""
        return 2 * (self.connect + self.read)


class Bill:
    """What every server that was asked cost since the bill was last taken: requests, and bytes of bodies received.

    Servers beyond MAX_SERVERS count together: a registry may redirect each request to one of a new name.
    """

    def __init__(self) -> None:
        self._counts: dict[str, list[int]] = {}

    def add(self, host: str, requests: int, received: int) -> None:
        """Count for a server, by host and port."""
        name = host if host in self._counts or len(self._counts) < MAX_SERVERS else OTHERS
        counts = self._counts.setdefault(name, [0, 0])
        counts[0] += requests
        counts[1] += received

    def take(self) -> dict[str, Traffic]:
        """All of it; from here on it is counted anew."""
        taken, self._counts = self._counts, {}
        return {host: Traffic(*counts) for host, counts in taken.items()}


class Transport(httpx.AsyncBaseTransport):
    """Sends requests over connections that share one TLS configuration; one pool per scheme and proxy.

    Certificates are read when the first HTTPS URL is asked for: the system's cost 20 ms and megabytes.
    """

    def __init__(self, tls: Tls, environment: Mapping[str, str], bill: Bill | None = None) -> None:
        self._tls = tls
        self._bill = bill or Bill()
        self._environment = environment
        self._pools: dict[tuple[str, str | None], httpcore.AsyncConnectionPool] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request; raises httpx.TransportError."""
        url = request.url
        pool = self._pool(url.scheme, plan_proxy(str(url), self._environment))
        stream = request.stream
        assert isinstance(stream, httpx.AsyncByteStream)
        raw = httpcore.Request(
            request.method,
            httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
            headers=request.headers.raw,
            content=stream,
            extensions=request.extensions,
        )
        with _mapped_errors():
            answer = await pool.handle_async_request(raw)
        host = url.netloc.decode("ascii")
        self._bill.add(host, 1, 0)
        body = Body(answer, lambda size: self._bill.add(host, 0, size))
        extensions = {**answer.extensions, "nsfs.body": body}
        return httpx.Response(answer.status, headers=answer.headers, stream=body, extensions=extensions)

    async def aclose(self) -> None:
        """Close every connection."""
        for pool in self._pools.values():
            await pool.aclose()

    def _pool(self, scheme: str, proxy: str | None) -> httpcore.AsyncConnectionPool:
        if (scheme, proxy) not in self._pools:
            self._pools[scheme, proxy] = self._create(scheme, proxy)
        return self._pools[scheme, proxy]

    def _create(self, scheme: str, proxy: str | None) -> httpcore.AsyncConnectionPool:
        common: dict[str, Any] = {
            "ssl_context": create_context(self._tls) if scheme == "https" else None,
            "max_connections": None,
            "max_keepalive_connections": _IDLE_CONNECTIONS,
            "keepalive_expiry": _KEEPALIVE,
            "network_backend": _Backend(),
        }
        if proxy is None:
            return httpcore.AsyncConnectionPool(**common)
        parts = urlsplit(proxy)
        login = (unquote(parts.username or ""), unquote(parts.password or "")) if parts.username else None
        bare = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        return httpcore.AsyncHTTPProxy(bare, proxy_auth=login, **common)


def create_client(
    tls: Tls, environment: Mapping[str, str], timeouts: Timeouts, bill: Bill | None = None
) -> httpx.AsyncClient:
    """An HTTP client that follows no redirects, keeps no cookies and adds no credentials."""
    return httpx.AsyncClient(
        transport=Transport(tls, environment, bill),
        timeout=httpx.Timeout(timeouts.read, connect=timeouts.connect),
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
        follow_redirects=False,
        trust_env=False,
    )


def create_context(tls: Tls) -> ssl.SSLContext:
    """Trusts the system's certificates (httpx's where the system has none) and `tls.ca`; raises UsageError."""
    paths = ssl.get_default_verify_paths()
    context = ssl.create_default_context() if paths.cafile or paths.capath else httpx.create_ssl_context()
    try:
        for authority in tls.ca:
            context.load_verify_locations(cadata=authority)
        for certificate, key in tls.client:
            with _in_memory(f"{certificate}\n{key}") as path:
                context.load_cert_chain(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"unreadable certificate or key of a registry: {error}") from None
    if tls.skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


@contextlib.contextmanager
def _in_memory(text: str) -> Iterator[str]:
    """A file that no disk has, for a library that wants a path: for as long as the block."""
    fd = os.memfd_create("nsfs-pem")
    try:
        os.write(fd, text.encode())
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def plan_proxy(url: str, environment: Mapping[str, str]) -> str | None:
    """The proxy for `url`, from HTTPS_PROXY, HTTP_PROXY and NO_PROXY in either case; never for loopback.

    NO_PROXY lists, by commas: `*`, domains (which cover their subdomains), addresses, networks, each with or without
    a port. Raises UsageError for a proxy that is not HTTP or HTTPS.
    """
    parts = urlsplit(url)
    host = (parts.hostname or "").lower()
    proxy = _variable(environment, f"{parts.scheme}_proxy")
    if not proxy or _is_exempt(host, parts.port or (443 if parts.scheme == "https" else 80), environment):
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    if urlsplit(proxy).scheme not in {"http", "https"} or not urlsplit(proxy).hostname:
        raise UsageError(
            f"not a proxy that can be used: {parts.scheme.upper()}_PROXY", hint="a proxy is http://HOST:PORT"
        )
    return proxy


def _variable(environment: Mapping[str, str], name: str) -> str:
    return environment.get(name) or environment.get(name.upper()) or ""


def _is_exempt(host: str, port: int, environment: Mapping[str, str]) -> bool:
    address = _address(host)
    if host == "localhost" or (address is not None and address.is_loopback):
        return True
    entries = (entry.strip().lower() for entry in _variable(environment, "no_proxy").split(","))
    return any(_matches(entry, host, port, address) for entry in entries if entry)


def _matches(entry: str, host: str, port: int, address: ipaddress.IPv4Address | ipaddress.IPv6Address | None) -> bool:
    if entry == "*":
        return True
    if address is not None and "/" in entry:
        with contextlib.suppress(ValueError):
            return address in ipaddress.ip_network(entry, strict=False)
    name, colon, number = entry.rpartition(":")
    if colon and number.isdigit() and (":" not in name or name.endswith("]")):
        if int(number) != port:
            return False
        entry = name
    entry = entry.strip("[]").removeprefix("*").removeprefix(".")
    return host == entry or (address is None and host.endswith(f".{entry}"))


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


class Body(httpx.AsyncByteStream):
    """A response's body, piece by piece, which may be given up at any time.

    httpcore reads a body through a chain of async generators. Left half-way, they would end in the garbage collector,
    later and with warnings; so `aclose` cuts the connection and lets them run into that.
    """

    def __init__(self, answer: httpcore.Response, count: Callable[[int], None]) -> None:
        stream = answer.stream
        self._count = count
        assert isinstance(stream, AsyncIterable)
        self._stream: Any = stream
        self._pieces = aiter(stream)
        self._connection = answer.extensions.get("network_stream")
        self._ended = False

    def __aiter__(self) -> Body:
        return self

    async def __anext__(self) -> bytes:
        try:
            with _mapped_errors():
                piece = await anext(self._pieces)
        except BaseException:
            self._ended = True
            raise
        self._count(len(piece))
        return piece

    async def aclose(self) -> None:
        """Give the connection back, or close it if bytes are still to come."""
        if not self._ended and isinstance(self._connection, _Stream):
            self._connection.is_cut = True
            with contextlib.suppress(httpx.TransportError):
                async for _ in self:
                    pass
                self._connection.is_cut = False  # all of it had arrived: the connection is whole and will be used again
        await self._stream.aclose()


def body_of(response: httpx.Response) -> Body:
    """The body of a response that came through `Transport`, without the generators that httpx puts around it."""
    body = response.extensions["nsfs.body"]
    assert isinstance(body, Body)
    return body


@contextlib.contextmanager
def _mapped_errors() -> Iterator[None]:
    """Raise httpcore's errors as those of httpx, which have the same names."""
    try:
        yield
    except Exception as error:
        mapped = getattr(httpx, type(error).__name__, None)
        if type(error).__module__.partition(".")[0] != "httpcore" or mapped is None:
            raise
        raise mapped(str(error)) from error


class _Backend(httpcore.AsyncNetworkBackend):
    """Trio's sockets, read in large pieces."""

    def __init__(self) -> None:
        self._trio = httpcore.TrioBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        return _Stream(await self._trio.connect_tcp(host, port, timeout, local_address, socket_options))

    async def sleep(self, seconds: float) -> None:
        await self._trio.sleep(seconds)


class _Stream(httpcore.AsyncNetworkStream):
    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream = stream
        self.is_cut = False
        """Every read fails."""

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109
        if self.is_cut:
            raise httpcore.ReadError("given up")
        return await self._stream.read(max(max_bytes, READ_SIZE), timeout)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> httpcore.AsyncNetworkStream:
        return _Stream(await self._stream.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:  # noqa: ANN401  httpcore's signature
        return self._stream.get_extra_info(info)
