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
from nsfs.remote.hosts import HostsDirectory
from nsfs.remote.layout import LayoutDirectory, LayoutSource
from nsfs.remote.reference import LayoutReference, Reference
from nsfs.remote.registry import RegistrySource
from nsfs.remote.transport import Timeouts

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from nsfs.model.oci import Traffic
    from nsfs.remote.credentials import Credentials
    from nsfs.remote.hosts import Hosts
    from nsfs.remote.layout import LayoutFiles


class Remote:
    """Every registry, as one set of credentials sees it. Create it by `open_remote`."""

    def __init__(
        self,
        connections: Connections,
        credentials: Credentials,
        hosts: Hosts,
        layouts: Callable[[str], LayoutFiles],
        patience: Patience,
    ) -> None:
        self._connections = connections
        self._credentials = credentials
        self._hosts = hosts
        self._layouts = layouts
        self._patience = patience
        self._servers: dict[str, tuple[Server, ...]] = {}

    def take_bill(self) -> dict[str, Traffic]:
        """What every server cost since this was last called, tokens and redirects' targets included."""
        return self._connections.bill.take()

    async def source(self, reference: Reference | LayoutReference) -> RegistrySource | LayoutSource:
        """The repository or layout of `reference`; raises UsageError."""
        if isinstance(reference, LayoutReference):
            return LayoutSource(reference.directory, self._layouts(reference.directory))
        if reference.registry not in self._servers:
            endpoints = await self._hosts.endpoints(reference.registry)
            servers = [
                Server(endpoint, reference.registry, self._connections, self._credentials) for endpoint in endpoints
            ]
            self._servers.setdefault(reference.registry, tuple(servers))
        return RegistrySource(self._servers[reference.registry], reference.repository, self._patience)


@asynccontextmanager
async def open_remote(
    *,
    credentials: Credentials | None = None,
    hosts: Hosts = HostsDirectory(),  # noqa: B008  frozen
    layouts: Callable[[str], LayoutFiles] = LayoutDirectory,
    environment: Mapping[str, str] | None = None,
    timeouts: Timeouts = Timeouts(),  # noqa: B008  frozen
    patience: Patience = Patience(),  # noqa: B008  frozen
    connections: int = CONNECTIONS,
) -> AsyncIterator[Remote]:
    """Open a Remote; its connections are closed at the end.

    `layouts` gives access to the files of a layout's directory; `environment` names proxies, os.environ if None. At
    most `connections` are open to one server at a time.
    """
    opened = Connections(os.environ if environment is None else environment, timeouts, connections)
    try:
        yield Remote(opened, credentials or Anonymous(), hosts, layouts, patience)
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
    """Open one source with connections of its own; arguments as for `open_remote`.

    `hosts` is the directory of hosts.toml files (containerd's config_path).
    """
    async with open_remote(
        credentials=credentials,
        hosts=HostsDirectory(hosts),
        environment=environment,
        timeouts=timeouts,
        patience=patience,
    ) as remote:
        yield await remote.source(reference)
