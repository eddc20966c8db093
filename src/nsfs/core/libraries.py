"""Libraries: what the dynamic linker will read of a program, fetched as soon as it is known which program that is.

Owns the starts that are followed, each from its mount on for a while. What an image runs is in its configuration, and
what else runs is known once somebody reads how it begins. The linker reads one library after the other and learns from
each which others it needs, so that without a profile every one of them costs a start round trips; here all that one
asks for come at once. What is sought is where the linker looks without configuration (ld.so(8)), in the tree of the
start. Refuses nothing: what is not found, or not understood, is left to the reads themselves.

Concurrency: tasks in the worker's nursery, one for each program or library; the trees are opened in a thread. Files are
read as their image's reads are, and only inside of their own extents, whatever they say of themselves.
"""

from __future__ import annotations

import logging
import posixpath
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import trio

from nsfs.core.union import UnionTree
from nsfs.errors import NotFoundError, NsfsError
from nsfs.format.elf import LONGEST_NAME, MAGIC, parse_needed, parse_program
from nsfs.model.layer import Kind
from nsfs.model.policy import parse_view_name

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence

    from nsfs.core.maps import Maps
    from nsfs.model.oci import Runtime
    from nsfs.model.policy import ViewName
    from nsfs.model.pool import LayerKey, MapRecord

log = logging.getLogger(__name__)

_FOLLOWED: Final = 60.0
"""Seconds for which a start may begin programs."""
_AT_A_TIME: Final = 2.0
"""Seconds within which starts from the same maps are one."""
_MOST: Final = 256
"""Libraries of one start."""
_HEAD: Final = 4096
_FRONT: Final = 512 << 10
"""Bytes from the beginning of a library: symbols, and how it is relocated."""
_AROUND: Final = 256 << 10
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
_USUAL: Final = (
    (0.02, (b"etc/ld.so.cache", b"etc/passwd", b"etc/group", b"etc/nsswitch.conf", b"etc/localtime")),
    (0.4, (b"usr/lib/locale/C.utf8/LC_CTYPE", *(each + b"/gconv/gconv-modules.cache" for each in _DIRECTORIES))),
)
"""What a runtime, the linker and the C library read whatever runs, fetched so many seconds later than what the image
runs: users, how names are found, the time; and characters, for UTF-8, which Python wants unasked (PEP 538)."""
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_MOST_WORDS: Final = 8
_SCRIPT: Final = b"#!"


class Contents(Protocol):
    """Who reads and fetches."""

    async def read(self, view: str, address: int, size: int) -> bytes | memoryview:
        """Exactly these bytes, as a mount reads them; raises NsfsError."""

    def are_local(self, keys: Collection[LayerKey]) -> bool:
        """Whether all of these layers' contents are in the pool."""

    async def peek(self, map_id: str, owner: str, address: int, size: int) -> bytes:
        """Exactly these bytes, and nothing that lies around them; raises NsfsError."""

    async def fetch_ahead(self, map_id: str, owner: str, runs: Sequence[tuple[int, int]]) -> bool:
        """Begin to fetch what is absent of these addresses, which a start is known to read, behind whoever reads.

        False where nothing comes ahead.
        """

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
    runtime: Runtime
    """What its image runs."""
    begun: float = field(default_factory=trio.current_time)
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

    def follow(self, maps: Sequence[MapRecord], owner: str, runtime: Runtime) -> None:
        """Look after the programs of a start from these maps, top first, that is about to begin as its image says.

        Raises NsfsError where a layer's tables cannot be read.
        """
        start = _Start(tuple(maps), owner, runtime)
        known = self._starts.get((start.ids, owner))
        is_new = known is None or start.begun - known.begun >= _AT_A_TIME
        if is_new and not self._is_local(start):
            self._starts[start.ids, owner] = start
            self._nursery.start_soon(self._follow, start)

    async def _follow(self, start: _Start) -> None:
        self._nursery.start_soon(self._run, self._expect, start)
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
            if self._is_local(start):
                self._forget(start)
                continue
            size = self._contents.extent_at(view.map_id, start.owner, address)
            self._begin(start, _File(view.map_id, address, size))

    def _is_local(self, start: _Start) -> bool:
        return self._contents.are_local({key for each in start.maps for key in (each.key, *each.lowers)})

    def _begin(self, start: _Start, file: _File) -> None:
        """Fetch what a program will read, and its libraries; once."""
        if file.size and file not in start.seen and len(start.seen) < _MOST:
            start.seen.add(file)
            self._nursery.start_soon(self._run, self._fetch, start, file)

    async def _run(self, work: Callable[..., Awaitable[None]], start: _Start, *args: _File) -> None:
        try:
            await work(start, *args)
        except NsfsError as error:
            log.debug("what a program reads is left to who reads it: %s", error)
        except Exception:
            log.exception("a bug: nothing is fetched ahead of programs from maps %s", ", ".join(start.ids))

    async def _expect(self, start: _Start) -> None:
        """Fetch what the image runs, before anybody does."""
        runtime = start.runtime
        await self._seek(start, plan_programs([*(runtime.entrypoint or ()), *(runtime.cmd or ())], runtime))
        for seconds, paths in _USUAL:
            await trio.sleep(seconds)
            for file in await self._find(start, ([path] for path in paths)):
                await self._fetch_front(start, file)

    async def _fetch(self, start: _Start, file: _File) -> None:
        if not await self._fetch_front(start, file):
            return
        head = await self._read(start, file, range(_HEAD))
        if head.startswith(_SCRIPT):
            words = head[len(_SCRIPT) :].partition(b"\n")[0].decode("utf-8", "replace").split()
            await self._seek(start, plan_programs(words, start.runtime))
        program = parse_program(head)
        if program is None:
            return
        written = range(max(0, program.written.start - _AROUND), min(program.written.stop, file.size))
        if written:
            run = (file.address + written.start, len(written))
            await self._contents.fetch_ahead(file.map_id, start.owner, [run])
        needed = parse_needed(program, await self._read(start, file, program.dynamic))
        names = [program.interpreter, *await self._read_names(start, file, needed)]
        await self._seek(start, map(_library_paths, filter(None, names)))

    async def _fetch_front(self, start: _Start, file: _File) -> bool:
        return await self._contents.fetch_ahead(file.map_id, start.owner, [(file.address, min(file.size, _FRONT))])

    async def _seek(self, start: _Start, wanted: Iterable[Sequence[bytes]]) -> None:
        """Fetch what programs and libraries will read, each known by the paths at which it may be."""
        for file in await self._find(start, wanted):
            self._begin(start, file)

    async def _find(self, start: _Start, wanted: Iterable[Sequence[bytes]]) -> list[_File]:
        """The first file that is there of each of these paths."""
        if start.tree is None:
            start.tree = await trio.to_thread.run_sync(self._open, start)
        tree = start.tree
        found = (_find(start, tree, paths) for paths in wanted)
        return [file for file in found if file is not None]

    async def _read(self, start: _Start, file: _File, part: range) -> bytes:
        """What the file has of a part of itself."""
        low, high = part.start, min(part.stop, file.size)
        if low >= high:
            return b""
        return await self._contents.peek(file.map_id, start.owner, file.address + low, high - low)

    async def _read_names(self, start: _Start, file: _File, offsets: Sequence[int]) -> list[bytes]:
        """The names at these offsets, which lie near to each other."""
        if not offsets or max(offsets) - min(offsets) > _MOST_NAMES:
            return []
        low = min(offsets)
        strings = await self._read(start, file, range(low, max(offsets) + LONGEST_NAME))
        return [strings[offset - low :].partition(b"\0")[0] for offset in offsets]

    def _open(self, start: _Start) -> UnionTree:
        return UnionTree([self._maps.open(each.path) for each in start.maps])


def plan_programs(words: Sequence[str], runtime: Runtime) -> list[list[bytes]]:
    """Where each of these words is sought, which an image or a script runs, if it is a program or a file at all.

    The first is, as execvp(3) has it; an image often begins with a script, which runs one of the others.
    """
    environment = dict(each.split("=", 1) for each in runtime.env or () if "=" in each)
    directories = environment.get("PATH", _PATH).split(":")
    home = runtime.working_dir or "/"
    named = [word for word in words[:_MOST_WORDS] if 0 < len(word) <= LONGEST_NAME and not word.startswith("-")]
    places = [[home] if "/" in word else directories for word in named]
    return [
        [posixpath.join(place, word).encode("utf-8", "replace") for place in tried]
        for word, tried in zip(named, places, strict=True)
    ]


def _library_paths(name: bytes) -> list[bytes]:
    """Where the linker looks."""
    return [name] if b"/" in name else [directory + b"/" + name for directory in _DIRECTORIES]


def _find(start: _Start, tree: UnionTree, paths: Iterable[bytes]) -> _File | None:
    """The first of `paths` that is a file of the image."""
    for path in paths:
        try:
            node = tree.resolve(path)
        except NotFoundError:
            continue
        if node.kind is Kind.REGULAR:
            return _File(start.maps[node.layer].id, *tree.extent(node))
    return None
