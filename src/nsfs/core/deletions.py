"""Deletions: a namespace that containerd deletes ends here, too.

containerd tells a snapshotter nothing of it, but whoever listens to its events. Owns when to look: when a connection
begins, since nobody told what happened before, then at each event, and now and then. Refuses to conclude anything from
a containerd that does not answer, has no namespaces at all, or is not the one whose snapshotter this is; and ends only
what came by containerd.

Concurrency: one task, which ends namespaces one after another; it never gives up.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final, Protocol

import trio

from nsfs.errors import NotFoundError, NsfsError
from nsfs.model.namespaces import plan_gone

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from nsfs.core.namespaces import Namespaces

log = logging.getLogger(__name__)

_PAUSE: Final = 2.0
"""Seconds between attempts to reach containerd."""
_AGAIN: Final = 300.0
"""Seconds between looks without an event: one may be lost where a connection begins."""


class Containerd(Protocol):
    """A connection."""

    async def has_snapshotter_at(self, socket: str) -> bool:
        """Whether a snapshotter of its is served there."""

    async def namespaces(self) -> set[str]:
        """Those that it has; raises UnreachableError."""

    def deletions(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[str]]:
        """Names of namespaces as they are deleted; the block fails when that ends."""


class Deletions:
    """The service."""

    def __init__(
        self, connect: Callable[[], AbstractAsyncContextManager[Containerd]], socket: str, namespaces: Namespaces
    ) -> None:
        self._connect = connect
        self._socket = socket
        self._namespaces = namespaces

    async def watch(self) -> None:
        """Follow containerd for ever, once it has asked for anything."""
        said = ""
        while True:
            try:
                if await self._namespaces.came_by_containerd():
                    async with self._connect() as containerd:
                        await self._follow(containerd)
            except NsfsError as error:
                if str(error) != said:
                    log.warning("namespaces that containerd deletes are not noticed now: %s", error)
                said = str(error)
            await trio.sleep(_PAUSE)

    async def _follow(self, containerd: Containerd) -> None:
        if not await containerd.has_snapshotter_at(self._socket):
            raise NotFoundError(
                f"that containerd has no snapshotter at {self._socket}",
                hint="set containerd.address to the one that has",
            )
        async with containerd.deletions() as deleted:
            while True:
                await self._compare(containerd)
                due = trio.current_time() + _AGAIN
                while trio.current_time() < due:
                    with trio.move_on_at(due):
                        await self._note(containerd, await deleted.receive())

    async def _note(self, containerd: Containerd, namespace: str) -> None:
        """End what was deleted, if there is no new one of that name."""
        with trio.CancelScope(shield=True):
            if namespace not in await containerd.namespaces():
                await self._namespaces.end_gone(namespace)

    async def _compare(self, containerd: Containerd) -> None:
        came = await self._namespaces.came_by_containerd()
        for namespace in plan_gone(came, await containerd.namespaces()):
            holding = (await self._namespaces.holdings()).get(namespace)
            if holding is not None and holding.containers:
                log.warning("namespace %s is gone from containerd, its containers' snapshots are not", namespace)
            else:
                await self._namespaces.end_gone(namespace)
