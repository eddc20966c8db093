"""Libraries: what the dynamic linker will read of a program, fetched as soon as somebody reads how the program begins.

Owns the starts that are followed, each from its mount on for a while. The linker reads one library after the other and
learns from each which others it needs, so that without a profile every one of them costs a start round trips; here all
that one asks for come at once. What is sought is where the linker looks without configuration (ld.so(8)), in the tree
of the start. Refuses nothing: what is not found, or not understood, is left to the reads themselves.

Concurrency: tasks in the worker's nursery, one for each program or library; the trees are opened in a thread. Files are
read as their image's reads are, and only inside of their own extents, whatever they say of themselves.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import trio

from nsfs.core.union import UnionTree
from nsfs.errors import NotFoundError, NsfsError
from nsfs.format.elf import LONGEST_NAME, MAGIC, parse_needed, parse_program
from nsfs.model.layer import Kind
from nsfs.model.policy import parse_view_name

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from nsfs.core.maps import Maps
    from nsfs.model.policy import ViewName
    from nsfs.model.pool import LayerKey, MapRecord

log = logging.getLogger(__name__)

_FOLLOWED: Final = 60.0
"""Seconds for which a start may begin programs."""
_MOST: Final = 256
"""Libraries of one start."""
_HEAD: Final = 4096
_FRONT: Final = 512 << 10
"""Bytes from the beginning of a library: symbols, and how it is relocated."""
_AROUND: Final = 1 << 20
"""Bytes that the kernel reads before what is written to, at the end: half of what it reads around a fault."""
_MOST_NAMES: Final = 64 << 10
_DIRECTORIES: Final = (
    b"lib/x86_64-linux-gnu",
    b"usr/lib/x86_64-linux-gnu",
    b"lib/aarch64-linux-gnu",
    b"usr/lib/aarch64-linux-gnu",
    b"lib64",
    b"usr/lib64",
    b"lib",
    b"usr/lib",
    b"usr/local/lib",
)


class Contents(Protocol):
    """Who reads and fetches."""

    async def read(self, view: str, address: int, size: int) -> bytes | memoryview:
        """Exactly these bytes, as a mount reads them; raises NsfsError."""

    def are_local(self, keys: Collection[LayerKey]) -> bool:
        """Whether all of these layers' contents are in the pool."""

    async def look(self, map_id: str, owner: str, address: int, size: int) -> bytes:
        """Exactly these bytes; raises NsfsError."""

    async def fetch_ahead(self, map_id: str, owner: str, runs: Sequence[tuple[int, int]]) -> None:
        """Begin to fetch what is absent of these addresses, behind whoever reads."""

    def extent_at(self, map_id: str, owner: str, address: int) -> int:
        """How many bytes from `address` on are of one file; 0 for none."""


class _File(NamedTuple):
    """One of a start's."""

    map_id: str
    address: int
    size: int


@dataclass(eq=False, slots=True)
class _Start:
    """One that is followed."""

    maps: Sequence[MapRecord]
    """Top first."""
    owner: str
    """As whom its views ask."""
    seen: set[_File] = field(default_factory=set)
    tree: UnionTree | None = None

    @property
    def ids(self) -> tuple[str, ...]:
        """Of its maps."""
        return tuple(each.id for each in self.maps)


class Libraries:
    """The service."""

    def __init__(self, maps: Maps, contents: Contents, nursery: trio.Nursery) -> None:
        self._maps = maps
        self._contents = contents
        self._nursery = nursery
        self._starts: dict[tuple[tuple[str, ...], str], _Start] = {}
        """By their maps and owners: what begins at the same time from the same maps reads the same."""

    def follow(self, maps: Sequence[MapRecord], owner: str) -> None:
        """Look after the programs of a start from these maps, top first, that is about to begin."""
        self._nursery.start_soon(self._follow, _Start(tuple(maps), owner))

    async def _follow(self, start: _Start) -> None:
        self._starts[start.ids, start.owner] = start
        await trio.sleep(_FOLLOWED)
        self._forget(start)

    def _forget(self, start: _Start) -> None:
        if self._starts.get((start.ids, start.owner)) is start:
            del self._starts[start.ids, start.owner]

    async def read(self, view: str, address: int, size: int) -> bytes | memoryview:
        """As `Contents.read`, noticed if it is how a program begins."""
        data = await self._contents.read(view, address, size)
        if self._starts and data[: len(MAGIC)] == MAGIC:
            self._notice(parse_view_name(view), address)
        return data

    def _notice(self, view: ViewName, address: int) -> None:
        """A program is about to run for those starts whose view it is; what is local needs nothing."""
        for start in list(self._starts.values()):
            if start.owner != view.reader or view.map_id not in start.ids:
                continue
            if self._contents.are_local({key for each in start.maps for key in (each.key, *each.lowers)}):
                self._forget(start)
                continue
            size = self._contents.extent_at(view.map_id, start.owner, address)
            self._begin(start, _File(view.map_id, address, size))

    def _begin(self, start: _Start, file: _File) -> None:
        """Fetch what a program will read, and its libraries; once."""
        if file.size and file not in start.seen and len(start.seen) < _MOST:
            start.seen.add(file)
            self._nursery.start_soon(self._run, start, file)

    async def _run(self, start: _Start, file: _File) -> None:
        try:
            await self._fetch(start, file)
        except NsfsError as error:
            log.debug("the libraries of a program are left to who reads them: %s", error)
        except Exception:
            log.exception("a bug: no libraries of a program in map %s", file.map_id)

    async def _fetch(self, start: _Start, file: _File) -> None:
        await self._contents.fetch_ahead(file.map_id, start.owner, [(file.address, min(file.size, _FRONT))])
        program = parse_program(await self._read(start, file, range(_HEAD)))
        if program is None:
            return
        written = range(max(0, program.written.start - _AROUND), min(program.written.stop, file.size))
        if written:
            run = (file.address + written.start, len(written))
            await self._contents.fetch_ahead(file.map_id, start.owner, [run])
        needed = parse_needed(program, await self._read(start, file, program.dynamic))
        names = [program.interpreter, *await self._read_names(start, file, needed)]
        if start.tree is None:
            start.tree = await trio.to_thread.run_sync(self._open, start)
        for name in names:
            if (found := _find(start, start.tree, name)) is not None:
                self._begin(start, found)

    async def _read(self, start: _Start, file: _File, part: range) -> bytes:
        """What the file has of a part of itself."""
        low, high = part.start, min(part.stop, file.size)
        if low >= high:
            return b""
        return await self._contents.look(file.map_id, start.owner, file.address + low, high - low)

    async def _read_names(self, start: _Start, file: _File, offsets: Sequence[int]) -> list[bytes]:
        """The names at these offsets, which lie near to each other."""
        if not offsets or max(offsets) - min(offsets) > _MOST_NAMES:
            return []
        low = min(offsets)
        strings = await self._read(start, file, range(low, max(offsets) + LONGEST_NAME))
        return [strings[offset - low :].partition(b"\0")[0] for offset in offsets]

    def _open(self, start: _Start) -> UnionTree:
        return UnionTree([self._maps.open(each.path) for each in start.maps])


def _find(start: _Start, tree: UnionTree, name: bytes) -> _File | None:
    """The file that the linker will take for this name; None where that is not one of the image's."""
    paths = [name] if b"/" in name else [directory + b"/" + name for directory in _DIRECTORIES]
    for path in paths if name else ():
        try:
            node = tree.resolve(path)
        except NotFoundError:
            continue
        if node.kind is Kind.REGULAR:
            return _File(start.maps[node.layer].id, *tree.extent(node))
    return None
