"""Where a registry's content is fetched from: mirrors, schemes, certificates, as hosts.toml says.

Owns the reading of containerd's hosts.toml (its docs/hosts.md, version 2.x): `server`, `[host."URL"]` in file order,
`capabilities`, `ca`, `client`, `skip_verify`, `override_path`, `header`; other keys are ignored, as containerd ignores
keys that it does not know. Without a file, a registry is asked directly, by HTTPS, or by plain HTTP if it is localhost
or a loopback address. Certificates and keys are read with the file that names them, so that an endpoint can be used by
a process that may read none of them. Blocking, and only on `load_endpoints`; everything else is pure.
"""

from __future__ import annotations

import ipaddress
import os
import tomllib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

import trio

from nsfs.errors import UsageError
from nsfs.remote.reference import DEFAULT_REGISTRY

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PULL = "pull"
RESOLVE = "resolve"
PUSH = "push"

_MAX_PEM = 4 << 20
_DOCKER_HUB = "registry-1.docker.io"


@dataclass(frozen=True, slots=True)
class Tls:
    """How a server's certificate is checked, and what is shown to it. PEM texts."""

    ca: tuple[str, ...] = ()
    """Beside the system's."""
    client: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """Certificate and key; "" if the key is with the certificate."""
    skip_verify: bool = False


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One server that may have a registry's content."""

    base: str
    """URL up to and with the API's version, without a trailing slash: https://mirror.example/v2."""
    capabilities: frozenset[str] = frozenset({PULL, RESOLVE, PUSH})
    tls: Tls = Tls()
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    namespace: str = ""
    """The registry it stands in for, sent as `?ns=`; "" if it is that registry."""

    @property
    def host(self) -> str:
        """Host and port, as credentials are looked up for it."""
        return urlsplit(self.base).netloc

    @property
    def plain(self) -> bool:
        """Without TLS."""
        return self.base.startswith("http:")


class Hosts(Protocol):
    """Knows where registries are."""

    async def endpoints(self, registry: str) -> tuple[Endpoint, ...]:
        """Where to ask for what `registry` (host[:port]) has, in order. Raises NsfsError."""


@dataclass(frozen=True, slots=True)
class HostsDirectory:
    """Hosts by the files below a directory (containerd's config_path); None knows of no file."""

    path: str | None = None

    async def endpoints(self, registry: str) -> tuple[Endpoint, ...]:
        """See Hosts; UsageError for a file that is not right."""
        return await trio.to_thread.run_sync(load_endpoints, registry, self.path)


def load_endpoints(registry: str, directory: str | None) -> tuple[Endpoint, ...]:
    """Where to ask for what `registry` (host[:port]) has, in order; `directory` is containerd's config_path."""
    for name in _directory_names(registry) if directory else ():
        path = os.path.join(directory or "", name)
        try:
            with open(os.path.join(path, "hosts.toml"), "rb") as file:
                return parse_hosts(tomllib.load(file), registry, path, _read_pem)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            raise UsageError(f"unreadable hosts.toml: {path}/hosts.toml: {error}") from None
    return (default_endpoint(registry),)


def default_endpoint(registry: str) -> Endpoint:
    """The registry itself, without configuration."""
    host = _DOCKER_HUB if registry == DEFAULT_REGISTRY else registry
    return Endpoint(f"{'http' if is_loopback(registry) else 'https'}://{host}/v2")


def parse_hosts(
    table: Mapping[str, Any], registry: str, directory: str, read: Callable[[str], str]
) -> tuple[Endpoint, ...]:
    """The endpoints that a hosts.toml lists, its server last; relative paths in it begin at `directory`.

    `read` gives the text of a PEM file.
    """
    hosts = table.get("host", {})
    if not isinstance(hosts, dict):
        raise _malformed(directory, "host is not a table")
    mirrors = [_endpoint(url, options, registry, directory, read) for url, options in hosts.items()]
    server = table.get("server") or default_endpoint(registry).base.removesuffix("/v2")
    return (*mirrors, _endpoint(server, table, registry, directory, read))


def is_loopback(registry: str) -> bool:
    """Whether host[:port] is this machine by its name alone: localhost, 127.0.0.0/8 or ::1."""
    host = urlsplit(f"//{registry}").hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _directory_names(registry: str) -> tuple[str, ...]:
    """The names containerd tries for a registry's directory, in its order."""
    host, colon, port = registry.rpartition(":")
    with_port = (f"{host}_{port}_",) if colon and port.isdigit() else ()
    return (*with_port, registry, "_default")


def _endpoint(url: object, options: object, registry: str, directory: str, read: Callable[[str], str]) -> Endpoint:
    if not isinstance(url, str) or not isinstance(options, dict):
        raise _malformed(directory, f"not a table for host: {url}")
    base = _base(url, override_path=_flag(options, "override_path", directory), directory=directory)
    host = urlsplit(base).netloc
    itself = host in {registry, _DOCKER_HUB if registry == DEFAULT_REGISTRY else registry}
    return Endpoint(
        base,
        capabilities=frozenset(_strings(options.get("capabilities", [PULL, RESOLVE, PUSH]), "capabilities", directory)),
        tls=_tls(options, directory, read),
        headers=_headers(options.get("header", {}), directory),
        namespace="" if itself else registry,
    )


def _base(url: str, *, override_path: bool, directory: str) -> str:
    full = url if "://" in url else f"https://{url}"
    try:
        parts = urlsplit(full)
        valid = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid or parts.username is not None or parts.query or parts.fragment:
        raise _malformed(directory, f"not a server's URL: {url}")
    path = parts.path.rstrip("/")
    if not override_path and not path.endswith("/v2"):
        path += "/v2"
    return f"{parts.scheme}://{parts.netloc}{path}"


def _tls(options: Mapping[str, Any], directory: str, read: Callable[[str], str]) -> Tls:
    def text(path: str) -> str:
        return read(os.path.join(directory, path)) if path else ""

    ca = _strings(options.get("ca", []), "ca", directory)
    client = options.get("client", [])
    pairs = [_pair(item, directory) for item in (client if isinstance(client, list) else [client])]
    return Tls(
        tuple(text(path) for path in ca),
        tuple((text(cert), text(key)) for cert, key in pairs),
        _flag(options, "skip_verify", directory),
    )


def _read_pem(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read(_MAX_PEM)
    except OSError as error:
        raise UsageError(f"unreadable certificate or key of a registry: {path}: {error.strerror}") from None


def _pair(item: object, directory: str) -> tuple[str, str]:
    strings = _strings(item, "client", directory)
    if not 1 <= len(strings) <= 2:
        raise _malformed(directory, "client is not a certificate, nor pairs of certificate and key")
    return strings[0], strings[1] if len(strings) == 2 else ""


def _headers(table: object, directory: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(table, dict):
        raise _malformed(directory, "header is not a table")
    return tuple((name, value) for name, values in table.items() for value in _strings(values, "header", directory))


def _strings(value: object, key: str, directory: str) -> list[str]:
    values = value if isinstance(value, list) else [value]
    strings = [item for item in values if isinstance(item, str)]
    if len(strings) != len(values):
        raise _malformed(directory, f"{key} is not a string or a list of strings")
    return strings


def _flag(options: Mapping[str, Any], key: str, directory: str) -> bool:
    value = options.get(key, False)
    if not isinstance(value, bool):
        raise _malformed(directory, f"{key} is not true or false")
    return value


def _malformed(directory: str, why: str) -> UsageError:
    return UsageError(f"malformed hosts.toml: {directory}: {why}")
