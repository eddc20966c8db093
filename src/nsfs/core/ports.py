"""What the services need from disk and network, as Protocols; `store` and `remote` provide them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractAsyncContextManager

    from nsfs.model.digest import Digest
    from nsfs.model.oci import Descriptor, Document, Traffic

BLOCK = 4096
"""Bytes per block: the unit of presence, of alignment, and of every map's addresses."""


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


class Source(Protocol):
    """One repository of a registry, or one image layout, as somebody with access to it sees it; raises NsfsError."""

    async def manifest(self, identifier: str) -> Document:
        """The manifest or index of a tag or digest, verified; of a layout, "" stands for its only one."""

    def blob(self, descriptor: Descriptor) -> Blob:
        """The blob that `descriptor` names; nothing is asked before it is read."""

    async def read_blob(self, descriptor: Descriptor, limit: int) -> bytes:
        """All of a small blob, verified by its digest; CorruptError if it is larger than `limit` bytes."""

    def statistics(self) -> Traffic:
        """What this source has cost so far."""
