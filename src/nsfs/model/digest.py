"""Digests and the identifiers made of them.

Owns the one parser of digest strings. A `Digest` that exists is well formed, so it may become part of a path.
The grammar is the OCI image specification's (descriptor.md, "Digests"), limited to its registered algorithms.
"""

from __future__ import annotations

import hashlib
import re
from typing import NewType, Self

from nsfs.errors import UsageError

_GRAMMAR = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")


class Digest(str):
    """`algorithm:hex`, checked; equal to, hashed and ordered as, its text."""

    __slots__ = ()

    def __new__(cls, text: str) -> Self:
        """Check `text`; raises UsageError."""
        if _GRAMMAR.fullmatch(text) is None:
            raise UsageError(f"not a digest: {text[:200]!r}", hint="a digest is sha256: and 64 lower-case hex digits")
        return super().__new__(cls, text)

    @classmethod
    def of(cls, data: bytes | memoryview) -> Self:
        """The sha256 digest of `data`."""
        return cls("sha256:" + hashlib.sha256(data).hexdigest())

    @property
    def algorithm(self) -> str:
        """`sha256` or `sha512`, as `hashlib.new` takes it."""
        return self.partition(":")[0]

    @property
    def hex(self) -> str:
        """The digits alone."""
        return self.partition(":")[2]

    @property
    def short(self) -> str:
        """The first 12 digits, for people."""
        return self.hex[:12]


DiffId = NewType("DiffId", Digest)
"""Digest of a layer's uncompressed tar."""

ChainId = NewType("ChainId", Digest)
"""Digest of a stack of diff IDs, lowest first."""


def chain_ids(diff_ids: list[DiffId]) -> list[ChainId]:
    """The chain ID of every prefix of `diff_ids` (OCI image specification, config.md, "Layer ChainID")."""
    chains: list[ChainId] = []
    for diff_id in diff_ids:
        text = f"{chains[-1]} {diff_id}".encode() if chains else None
        chains.append(ChainId(Digest.of(text) if text else diff_id))
    return chains
