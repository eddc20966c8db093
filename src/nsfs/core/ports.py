"""What the services need from disk and network, as Protocols; `store` and `remote` provide them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from contextlib import AbstractAsyncContextManager, AbstractContextManager

    from nsfs.model.digest import Digest
    from nsfs.model.oci import Descriptor, Document, Traffic
    from nsfs.model.referrers import Referrer
    from nsfs.model.route import Route

BLOCK = 4096
"""Bytes per block: the unit of presence, of alignment, and of every map's addresses."""


class Content(Protocol):
    """The bytes of a file, of which a slice is read when it is asked for."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, part: slice, /) -> bytes | memoryview:
        """Some of them."""


class Spool(Protocol):
    """A blob's compressed bytes on this machine while they are still needed, from its beginning. Its calls block."""

    def size(self) -> int:
        """How many are there; 0 without a spool."""

    def pieces(self) -> Iterator[bytes]:
        """All of them; raises NotFoundError without a spool."""

    def appending(self, most: int) -> AbstractContextManager[Callable[[bytes], None]]:
        """What adds more to the first `most` of them; raises NoSpaceError, CorruptError."""

    def remove(self) -> None:
        """Delete it, if it is there."""


class Blob(Protocol):
    """One blob of one repository (or layout), as somebody with access to it sees it.

    Both calls raise NsfsError only: UnreachableError when trying again may help (the client's own retries are over),
    DeniedError, NotFoundError, CorruptError (a registry that answers something else than what was asked).
    """

    @property
    def digest(self) -> Digest:
        """What the manifest calls it."""

    @property
    def size(self) -> int:
        """In bytes, as the manifest says."""

    async def fetch(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes at `offset`; unverified."""

    def stream(self, offset: int = 0) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """The blob's bytes from `offset` to its end, in pieces as they arrive; unverified.

        Resumes by range by itself when a connection breaks. Ends after exactly `size - offset` bytes.
        """


@runtime_checkable
class LocalBlob(Blob, Protocol):
    """A blob of an image layout on this machine: it costs no network."""

    @property
    def directory(self) -> str:
        """The layout's."""


@runtime_checkable
class MeasuredBlob(Blob, Protocol):
    """A blob of a registry, the way to which is measured."""

    def route(self) -> Route:
        """What is known of that way now; its name is the server's."""


class Source(Protocol):
    """One repository of a registry, or one image layout, as somebody with access to it sees it; raises NsfsError."""

    async def manifest(self, identifier: str) -> Document:
        """The manifest or index of a tag or digest, verified; of a layout, "" stands for its only one."""

    def blob(self, descriptor: Descriptor) -> Blob:
        """The blob that `descriptor` names; nothing is asked before it is read."""

    async def read_blob(self, descriptor: Descriptor, limit: int) -> bytes:
        """All of a small blob, verified by its digest; CorruptError if it is larger than `limit` bytes."""

    async def referrers(self, subject: Digest, artifact_type: str) -> list[Referrer]:
        """What of that type is attached to a manifest; nothing where nothing can be."""

    def statistics(self) -> Traffic:
        """What this source has cost so far."""
