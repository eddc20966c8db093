"""Whether a domain keeps what it fetches, and why not.

Owns the refusal: while the daemon says that there is no room, nothing is written, and readers get their bytes from
memory; and what the last write found, which is all that is known of a disk that is full, read-only or broken. The next
write that succeeds ends that: there is nothing to reset. Refuses nothing that is read.

Concurrency: any thread, as `store.pool`; each field is one reference.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from nsfs.core import landing, worker_api
from nsfs.errors import NoSpaceError, NsfsError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from msgspec import Struct


class Pool(landing.Pool, Protocol):
    """What is written to."""

    def flush(self) -> None:
        """Make durable what was written; raises NsfsError."""


class KeptPool:
    """`pool`, as core.landing.Pool, while there is room."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._refusal = ""
        self._trouble = ""
        self.missing = pool.missing
        self.read_present = pool.read_present
        self.begin_reading = pool.begin_reading
        self.evict = pool.evict

    @property
    def trouble(self) -> str:
        """Why what is fetched is not kept; empty where it is."""
        return self._refusal or self._trouble

    def methods(self) -> dict[str, tuple[type[Struct], Callable[[Any, object], Awaitable[Struct | None]]]]:
        """What the daemon may call, by name."""
        return {"Keep": (worker_api.Keep, self._keep)}

    async def _keep(self, params: worker_api.Keep, _report: object) -> worker_api.Empty:
        self.refuse(params.unless)
        return worker_api.Empty()

    def refuse(self, why: str) -> None:
        """Write nothing from now on; again what comes, where `why` is empty."""
        self._refusal = why

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """See Pool; raises NoSpaceError while nothing is to be written."""
        if self._refusal:
            raise NoSpaceError(self._refusal)
        with self._noted():
            self._pool.write(address, data)
        self._trouble = ""

    def write_zeros(self, address: int, size: int) -> None:
        """See Pool. A hole takes no room."""
        self._pool.write_zeros(address, size)

    def flush(self) -> None:
        """See Pool. That it succeeds proves nothing: there may have been nothing to write."""
        with self._noted():
            self._pool.flush()

    @contextmanager
    def _noted(self) -> Iterator[None]:
        try:
            yield
        except NsfsError as error:
            self._trouble = str(error)
            raise
