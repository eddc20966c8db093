"""Warming: what a start is known to read comes into its views' memory in large reads, before its first use.

Owns the processes that do it, one for a start; a mount does not wait for them, and none outlives its views or a
deadline. What is still to come is waited for, in its order. Addresses become files by the inodes of the views' own
maps, which takes 0.6 us for each: what was found is remembered for the images that were started last. Opens files by
the numbers of their inodes, and nothing but regular ones. Whatever fails costs speed alone.

Concurrency: the daemon's event loop begins and ends; everything that touches a view is in the processes.
"""

from __future__ import annotations

import logging
import os
from bisect import bisect_right
from collections import deque
from contextlib import ExitStack, contextmanager, suppress
from hashlib import blake2b
from itertools import islice
from typing import TYPE_CHECKING, Final

import msgspec
import trio
from msgspec import Struct

from nsfs.errors import NsfsError
from nsfs.format.erofs_image import ErofsImage
from nsfs.serve.handles import ViewFiles

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from nsfs.serve.forkclient import ForkServer

log = logging.getLogger(__name__)

_DEADLINE: Final = 10.0
_AT_A_TIME: Final = 4
_KEPT: Final = 64
"""Images whose files are remembered."""
_UNDER_WAY: Final = 1 << 20
"""Bytes that are asked for before the first of them are there: who reads something else waits behind no more."""
_AT_LEAST: Final = 128 << 10
"""Bytes that the kernel reads ahead by one call, however little it reads ahead by itself (Linux mm/readahead.c,
force_page_cache_ra: the backing device's io_pages)."""
_MOST: Final = 1 << 14
"""Pieces of one start."""
_LARGEST_MAP: Final = 256 << 20


class WarmView(Struct, frozen=True, array_like=True):
    """A lower."""

    path: str
    """Where it is mounted."""
    map: str
    """The file that it is mounted from."""


class Piece(Struct, frozen=True, gc=False, array_like=True):
    """A part of a file of one view."""

    view: int
    """Its number."""
    nid: int
    """Of the file's inode."""
    offset: int
    size: int


class _Plan(Struct, frozen=True, kw_only=True):
    views: list[WarmView]
    """Top first."""
    extents: list[tuple[int, int]]
    """Address and size, in the order of first use."""
    step: int = _UNDER_WAY
    """Bytes that the kernel reads ahead by one call."""
    pieces: bytes = b""
    """The same as a rendered list[Piece], where that is known."""

    @property
    def key(self) -> bytes:
        """What its pieces follow from."""
        rendered = msgspec.msgpack.encode(([view.map for view in self.views], self.extents))
        return blake2b(rendered, digest_size=16).digest()


class Warming:
    """The service."""

    def __init__(self, server: ForkServer) -> None:
        self._server = server
        self._asked, self._plans = trio.open_memory_channel[_Plan](_AT_A_TIME)
        self._running: dict[trio.CancelScope, frozenset[str]] = {}
        self._found: dict[bytes, bytes] = {}
        """Pieces, by _Plan.key; those used last are the last."""

    def begin(self, views: Sequence[WarmView], extents: Sequence[tuple[int, int]], read_ahead: int) -> None:
        """Have what lies at these addresses come into the views' memory; not at all where much else comes already.

        `read_ahead` is how many bytes the kernel reads ahead of what reads these views.
        """
        plan = _Plan(views=list(views), extents=list(extents), step=max(read_ahead, _AT_LEAST))
        with suppress(trio.WouldBlock):
            self._asked.send_nowait(plan)

    def end(self, paths: Collection[str]) -> None:
        """Leave alone what is mounted at one of these paths."""
        for scope, busy in self._running.items():
            if not busy.isdisjoint(paths):
                scope.cancel()

    async def follow(self) -> None:
        """Do what `begin` was asked for."""
        async with trio.open_nursery() as nursery:
            for _ in range(_AT_A_TIME):
                nursery.start_soon(self._take)

    async def _take(self) -> None:
        async for plan in self._plans.clone():
            with trio.move_on_after(_DEADLINE) as scope:
                self._running[scope] = frozenset(view.path for view in plan.views)
                try:
                    await self._warm(plan)
                except NsfsError as error:
                    log.warning("a start is not made warm: %s", error)
                finally:
                    del self._running[scope]

    async def _warm(self, plan: _Plan) -> None:
        plan = msgspec.structs.replace(plan, pieces=self._found.pop(plan.key, b""))
        with _memory(msgspec.msgpack.encode(plan)) as asked, _memory() as found:
            if await self._server.run("nsfs.serve.warming:run_warming", None, [asked, found]) == 0:
                self._found[plan.key] = _content(found)
        while len(self._found) > _KEPT:
            del self._found[next(iter(self._found))]


@contextmanager
def _memory(content: bytes = b"") -> Iterator[int]:
    """A file in memory, for another process."""
    fd = os.memfd_create("nsfs-warming", os.MFD_CLOEXEC)
    try:
        os.pwrite(fd, content, 0)
        yield fd
    finally:
        os.close(fd)


def run_warming(_args: bytes, fds: list[int]) -> int:
    """Entry point for a fork server: do the plan in the first file, write its pieces to the second; 1 where it cannot.

    That is no news: views may be taken away meanwhile.
    """
    plan = msgspec.msgpack.decode(_content(fds[0]), type=_Plan)
    try:
        rendered = plan.pieces or msgspec.msgpack.encode(_find_pieces(plan))
        os.pwrite(fds[1], rendered, 0)
        pieces = msgspec.msgpack.decode(rendered, type=list[Piece])
        _read_ahead([view.path for view in plan.views], pieces, plan.step)
    except (OSError, NsfsError):
        return 1
    return 0


def _content(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def _find_pieces(plan: _Plan) -> list[Piece]:
    return plan_pieces(_load_files([view.map for view in plan.views]), plan.extents)


def _load_files(maps: Sequence[str]) -> list[tuple[int, int, int, int]]:
    """The files of views (top first) with content, by address: address, size, view, nid. Of two at one the upper."""
    found: dict[int, tuple[int, int, int, int]] = {}
    for number, path in reversed(list(enumerate(maps))):
        with open(path, "rb") as file:
            data = file.read(_LARGEST_MAP)
        found |= {address: (address, size, number, nid) for address, size, nid in ErofsImage(data).extents()}
    return sorted(found.values())


def plan_pieces(files: Sequence[tuple[int, int, int, int]], extents: Iterable[tuple[int, int]]) -> list[Piece]:
    """`extents` as parts of `files` (address, size, view, nid; by address), none larger than what is read at once.

    No more than so many, whatever a worker says.
    """
    return list(islice(_pieces(files, extents), _MOST))


def _pieces(files: Sequence[tuple[int, int, int, int]], extents: Iterable[tuple[int, int]]) -> Iterator[Piece]:
    starts = [file[0] for file in files]
    for address, size in extents:
        for at in range(max(0, bisect_right(starts, address) - 1), bisect_right(starts, address + size - 1)):
            begin, length, view, nid = files[at]
            low, high = max(address - begin, 0), min(address + size - begin, length)
            for start in range(low, high, _UNDER_WAY):
                yield Piece(view, nid, start, min(_UNDER_WAY, high - start))


def _read_ahead(roots: Sequence[str], pieces: Iterable[Piece], step: int) -> None:
    """Ask for all pieces in their order, so many at a time."""
    under_way: deque[tuple[int, Piece]] = deque()
    size = 0
    with ExitStack() as stack:
        views = [ViewFiles(_opened(stack, root)) for root in roots]
        for piece in pieces:
            with suppress(OSError):
                fd = views[piece.view].open(piece.nid)
                for start in range(piece.offset, piece.offset + piece.size, step):
                    os.posix_fadvise(fd, start, min(step, piece.offset + piece.size - start), os.POSIX_FADV_WILLNEED)
                under_way.append((fd, piece))
                size += piece.size
            while size > _UNDER_WAY:
                fd, first = under_way.popleft()
                os.pread(fd, 1, first.offset + first.size - 1)
                os.close(fd)
                size -= first.size


def _opened(stack: ExitStack, root: str) -> int:
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd
