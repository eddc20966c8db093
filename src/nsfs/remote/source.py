"""The way in: a reference becomes a source of documents and blobs, wherever it points to.

Owns what all sources of a process share: connections, tokens, the hosts configuration. Refuses nothing itself. Open one
`Remote` for a worker's life; sources cost nothing to make, and keep counts of their own.
"""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from nsfs.remote.client import CONNECTIONS, Connections, Patience, Server
from nsfs.remote.credentials import Anonymous
from nsfs.remote.hosts import load_endpoints
from nsfs.remote.layout import LayoutSource
from nsfs.remote.reference import LayoutReference, Reference
from nsfs.remote.registry import RegistrySource
from nsfs.remote.transport import Timeouts

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from nsfs.remote.credentials import Credentials


class Remote:
    """Every registry, as one set of credentials sees it. Create it by `open_remote`."""

    def __init__(
        self, connections: Connections, credentials: Credentials, hosts: str | None, patience: Patience
    ) -> None:
        self._connections = connections
        self._credentials = credentials
        self._hosts = hosts
        self._patience = patience
        self._servers: dict[str, tuple[Server, ...]] = {}

    def source(self, reference: Reference | LayoutReference) -> RegistrySource | LayoutSource:
        """The repository or layout of `reference`; reads small files (hosts.toml), raises UsageError."""
        if isinstance(reference, LayoutReference):
            return LayoutSource(reference.directory)
        if reference.registry not in self._servers:
            self._servers[reference.registry] = tuple(self._create_servers(reference.registry))
        return RegistrySource(self._servers[reference.registry], reference.repository, self._patience)

    def _create_servers(self, registry: str) -> list[Server]:
        return [
            Server(endpoint, registry, self._connections, self._credentials)
            for endpoint in load_endpoints(registry, self._hosts)
        ]


@asynccontextmanager
async def open_remote(
    *,
    credentials: Credentials | None = None,
    hosts: str | None = None,
    environment: Mapping[str, str] | None = None,
    timeouts: Timeouts = Timeouts(),  # noqa: B008  frozen
    patience: Patience = Patience(),  # noqa: B008  frozen
    connections: int = CONNECTIONS,
) -> AsyncIterator[Remote]:
    """Open a Remote; its connections are closed at the end.

    `hosts` is the directory of hosts.toml files (containerd's config_path); `environment` names proxies, os.environ if
    None. At most `connections` are open to one server at a time.
    """
    opened = Connections(os.environ if environment is None else environment, timeouts, connections)
    try:
        yield Remote(opened, credentials or Anonymous(), hosts, patience)
    finally:
        await opened.aclose()


@asynccontextmanager
async def open_source(
    reference: Reference | LayoutReference,
    *,
    credentials: Credentials | None = None,
    hosts: str | None = None,
    environment: Mapping[str, str] | None = None,
    timeouts: Timeouts = Timeouts(),  # noqa: B008  frozen
    patience: Patience = Patience(),  # noqa: B008  frozen
) -> AsyncIterator[RegistrySource | LayoutSource]:
    """Open one source with connections of its own; arguments as for `open_remote`."""
    async with open_remote(
        credentials=credentials, hosts=hosts, environment=environment, timeouts=timeouts, patience=patience
    ) as remote:
        yield remote.source(reference)
