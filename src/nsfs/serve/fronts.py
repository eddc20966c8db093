"""Fronts: a process for each mount of a user who is not root, started again when it dies.

Owns what must outlive a front: the mount's /dev/fuse descriptor (so the connection stays) and the INIT that the kernel
sent. A front that dies is followed by one that is given both and goes on; a mount that is taken away ends its front.

Concurrency: one task per mount, in the nursery of `open_fronts`. Nothing here touches a path below a mount.
"""

from __future__ import annotations

import logging
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import msgspec
import trio
from msgspec import Struct

from nsfs.core.tasks import open_tasks
from nsfs.errors import NsfsError
from nsfs.serve.session import is_connected, read_init

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from nsfs.serve.forkclient import Child, ForkServer
    from nsfs.serve.sandbox import Confinement

log = logging.getLogger(__name__)

_ENTRY: Final = "nsfs.front:main"
_FIRST_PAUSE: Final = 0.01
_LONGEST_PAUSE: Final = 5.0
"""Seconds between two starts of a front that dies at once."""


class FrontArgs(Struct, frozen=True, kw_only=True):
    """What a front is started with.

    Its descriptors: /dev/fuse, mounted already, the domain's live bitmap, and a pipe for a byte when it serves.
    """

    domain: str
    """The domain's directory."""
    worker: str
    """Path of the worker's socket."""
    maps: tuple[str, ...]
    """Files of the layers' maps, top first."""
    views: tuple[str, ...]
    """Names of the views, as the worker knows them, in the same order."""
    info: dict[str, str | int | bool] = {}
    """What `.nsfs/mount.json` says: reference, digest, …"""
    init: bytes = b""
    """The connection's INIT request; empty if nobody has read it yet."""


class _Kept:
    """The front of now of one mount."""

    def __init__(self, front: Child) -> None:
        self.front = front
        self.is_over = False
        """There shall be no other."""


class Fronts:
    """The service. Made by `open_fronts`."""

    def __init__(self, server: ForkServer, nursery: trio.Nursery, confine: Callable[[str], Confinement]) -> None:
        self._server = server
        self._confine = confine
        self._nursery = nursery
        self._kept: dict[str, _Kept] = {}
        """By target."""

    async def start(self, target: str, args: FrontArgs, fuse_fd: int, bitmap_fd: int) -> None:
        """Return when the new mount of `fuse_fd`, which stays the caller's, is served; raises NsfsError if it is not.

        `bitmap_fd` must stay open for as long as the mount is there.
        """
        args = msgspec.structs.replace(args, init=await read_init(fuse_fd))
        kept = self._kept[target] = _Kept(await self._spawn(args, fuse_fd, bitmap_fd))
        self._nursery.start_soon(self._keep, target, kept, args, os.dup(fuse_fd), bitmap_fd)

    def end(self, target: str) -> None:
        """End a mount's front, and with it the connection: whoever still waits for it gets an error."""
        kept = self._kept.pop(target, None)
        if kept is not None:
            kept.is_over = True
            kept.front.kill()

    async def _keep(self, target: str, kept: _Kept, args: FrontArgs, fuse_fd: int, bitmap_fd: int) -> None:
        """Have a front as long as there is a mount."""
        pause = _FIRST_PAUSE
        try:
            while True:
                began = trio.current_time()
                await _wait_end(kept.front)
                if kept.is_over or not is_connected(fuse_fd):
                    return
                log.warning("the front of a mount died: pid %d", kept.front.pid)
                pause = _FIRST_PAUSE if trio.current_time() - began > _LONGEST_PAUSE else min(2 * pause, _LONGEST_PAUSE)
                await trio.sleep(pause)
                if kept.is_over:
                    return
                try:
                    kept.front = await self._spawn(args, fuse_fd, bitmap_fd)
                except NsfsError as error:
                    log.warning("a mount has no front: %s", error)
        finally:
            if self._kept.get(target) is kept:
                del self._kept[target]
            os.close(fuse_fd)

    async def _spawn(self, args: FrontArgs, fuse_fd: int, bitmap_fd: int) -> Child:
        """A front that serves."""
        receive, send = os.pipe2(os.O_CLOEXEC)
        async with trio.lowlevel.FdStream(receive) as line:
            try:
                confinement = self._confine(args.domain)
                front = await self._server.spawn(_ENTRY, args, [fuse_fd, bitmap_fd, send], confinement=confinement)
            finally:
                os.close(send)
            if not await line.receive_some(1):
                front.close()
                raise NsfsError("the mount's process ended at its start", hint="the daemon's log says more")
            return front


async def _wait_end(front: Child) -> None:
    try:
        await front.wait()
    except NsfsError as error:
        log.info("a front's end is not known: %s", error)
    finally:
        front.close()


@asynccontextmanager
async def open_fronts(server: ForkServer, confine: Callable[[str], Confinement]) -> AsyncIterator[Fronts]:
    """Fronts that end with the block, if their mounts have not ended before.

    `confine` says what the front of a mount is held to that reads a domain's directory.
    """
    async with open_tasks() as nursery:
        yield Fronts(server, nursery, confine)
