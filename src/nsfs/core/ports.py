"""What the services need from disk and network, as Protocols; `store` and `remote` provide them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractAsyncContextManager

    from nsfs.model.digest import Digest

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
