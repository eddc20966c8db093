"""What encryption of a disk stands on: no address ever gets two different plaintexts.

A pool that is opened here is under a key, and notes all that anybody writes, whether the write succeeds or not.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from nsfs.store.crypt import BLOCK, SALT_SIZE, DiskCipher, DomainKey
from nsfs.store.pool import Pool, open_pool

if TYPE_CHECKING:
    from collections.abc import Callable

    from nsfs.store.layout import DomainLayout

KEY = DomainKey(b"a key of the tests, of 32 bytes!")
SALT = bytes(SALT_SIZE)


class OnceCipher(DiskCipher):
    """Fails where a block is written that was written before as something else."""

    def __init__(self, key: bytes) -> None:
        super().__init__(key)
        self._written: dict[int, bytes] = {}

    def store(self, address: int, blocks: memoryview, write: Callable[[memoryview, int], None]) -> None:
        for start in range(0, len(blocks), BLOCK):
            digest = hashlib.sha256(blocks[start : start + BLOCK]).digest()
            assert self._written.setdefault(address + start, digest) == digest, f"two plaintexts at {address + start}"
        super().store(address, blocks, write)


def open_watched(layout: DomainLayout, bitmap: int) -> Pool:
    """The pool of a domain under KEY."""
    pool = open_pool(layout, bitmap, SALT)
    pool._cipher = OnceCipher(KEY.derive("disk", SALT))
    return pool
