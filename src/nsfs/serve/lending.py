"""What a worker that may read nothing of the host asks of its daemon: hosts.toml, and the files of image layouts.

Owns the messages, both sides of them, and which layouts a domain may read: those that somebody who reaches the daemon
named for it, for as long as the domain has its records. What the worker itself names counts for nothing.

Concurrency: one call each; files are read in the daemon's threads, a piece at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import trio
from msgspec import Struct

from nsfs.errors import DeniedError, NsfsError, UnreachableError, UsageError
from nsfs.remote.hosts import Endpoint  # noqa: TC001  msgspec looks it up
from nsfs.remote.layout import FilePiece, LayoutDirectory
from nsfs.remote.reference import LayoutReference, parse_reference

if TYPE_CHECKING:
    from nsfs.remote.hosts import Hosts
    from nsfs.serve.wire import Methods, Peer

T = TypeVar("T")

_MOST: Final = 4 << 20
"""Bytes of one piece."""
MAX_ASKED: Final = 256
"""Questions of one worker that its daemon answers at a time: who asks more is no worker of ours any longer."""
_AT_A_TIME: Final = 16
"""Questions that a worker asks at a time; far below, as the daemon may still be busy with what was given up here."""


class RegistryName(Struct, kw_only=True):
    """Worker to daemon: where is this registry? Answered by Servers."""

    registry: str


class Servers(Struct, kw_only=True):
    """Its servers, in order."""

    endpoints: tuple[Endpoint, ...]


class PieceName(Struct, kw_only=True):
    """Worker to daemon: a piece of a layout's file. Answered by Piece."""

    directory: str
    name: str
    """`remote.layout.LayoutFiles.read`, as the rest."""
    offset: int
    size: int


class Piece(Struct, kw_only=True):
    """That piece."""

    data: bytes
    file_size: int


class Lent(Protocol):
    """Remembers which layouts each domain may read. May block."""

    def layouts(self, domain: str) -> frozenset[str]:
        """Their directories."""

    def add_layout(self, domain: str, directory: str) -> None:
        """One more."""


class Lending:
    """The daemon's side."""

    def __init__(self, hosts: Hosts, lent: Lent) -> None:
        self._hosts = hosts
        self._lent = lent

    def note(self, domain: str, reference: str) -> None:
        """Somebody who may names an image for `domain`."""
        try:
            named = parse_reference(reference)
        except NsfsError:
            return  # the worker says what is wrong with it
        if isinstance(named, LayoutReference) and named.directory not in self._lent.layouts(domain):
            self._lent.add_layout(domain, named.directory)

    def methods(self, domain: str) -> Methods:
        """What the worker of `domain` may ask."""

        async def servers(params: RegistryName, _report: object) -> Servers:
            return Servers(endpoints=await self._hosts.endpoints(params.registry))

        async def piece(params: PieceName, _report: object) -> Piece:
            if params.directory not in self._lent.layouts(domain):
                raise DeniedError(
                    f"the layout is not this domain's to read: {params.directory}", hint="name it in a command again"
                )
            if not (0 <= params.size <= _MOST and params.offset >= 0):
                raise UsageError(f"not a piece of a file: {params.size} bytes at {params.offset}")
            read = await LayoutDirectory(params.directory).read(params.name, params.offset, params.size)
            return Piece(data=read.data, file_size=read.file_size)

        return {"Servers": (RegistryName, servers), "ReadLayout": (PieceName, piece)}


class Uplink:
    """A worker's way to whatever daemon there is; who asks while there is none waits for one, some at a time."""

    def __init__(self) -> None:
        self._daemon: Peer | None = None
        self._connected = trio.Event()
        self._turns = trio.CapacityLimiter(_AT_A_TIME)

    def connect(self, daemon: Peer) -> None:
        """Ask over this line from now on."""
        self._daemon = daemon
        self._connected.set()

    def disconnect(self) -> None:
        """Wait for the next daemon."""
        if self._connected.is_set():
            self._connected = trio.Event()

    async def call(self, method: str, params: Struct, result: type[T]) -> T:
        """Ask; raises what the daemon raises, UnreachableError where it goes meanwhile."""
        async with self._turns:
            await self._connected.wait()
            assert self._daemon is not None
            return await self._daemon.call(method, params, result)

    async def call_until_answered(self, method: str, params: Struct, result: type[T]) -> T:
        """As `call`, but where a daemon goes meanwhile the next one is asked: what may be done twice."""
        async with self._turns:
            while True:
                await self._connected.wait()
                daemon = self._daemon
                assert daemon is not None
                try:
                    return await daemon.call(method, params, result)
                except UnreachableError:
                    if not daemon.is_closed:
                        raise
                    if daemon is self._daemon:
                        self.disconnect()


class Borrowing:
    """The worker's side."""

    def __init__(self, uplink: Uplink) -> None:
        self._uplink = uplink

    async def endpoints(self, registry: str) -> tuple[Endpoint, ...]:
        """See `remote.hosts.Hosts`."""
        return (await self._uplink.call("Servers", RegistryName(registry=registry), Servers)).endpoints

    def layout(self, directory: str) -> BorrowedLayout:
        """The files of a layout."""
        return BorrowedLayout(self._uplink, directory)


class BorrowedLayout:
    """See `remote.layout.LayoutFiles`."""

    def __init__(self, uplink: Uplink, directory: str) -> None:
        self._uplink = uplink
        self._directory = directory

    async def read(self, name: str, offset: int, size: int) -> FilePiece:
        """See LayoutFiles."""
        asked = PieceName(directory=self._directory, name=name, offset=offset, size=size)
        piece = await self._uplink.call("ReadLayout", asked, Piece)
        return FilePiece(piece.data, piece.file_size)
