"""Give a layer its contents back out of its whole blob: for one that cannot be fetched by ranges.

Owns the order: the blob is checked against its digest before any of it is decompressed, so that what is stored is
verified. Refuses nothing that the first pass took. Memory is bounded by the decompressor's window, whatever the layer.
Blocks; belongs in a thread of the process that writes to committed layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nsfs.core.fetchplan import Window
from nsfs.core.firstpass import open_inflated, verify_spool
from nsfs.core.landing import store_window
from nsfs.core.ports import BLOCK

if TYPE_CHECKING:
    from nsfs.core.fetchplan import Table
    from nsfs.core.firstpass import CheckpointJob
    from nsfs.core.landing import Pool

_OVERLAP = 2 * BLOCK
"""Of the stream before a piece: more than a block that straddles has there."""


def refill(job: CheckpointJob, pool: Pool, table: Table) -> None:
    """Store every absent block that the spooled blob of `job` has; the spool stays.

    Raises NotFoundError without a spool, CorruptError (and removes the spool) if it is not the blob, NoSpaceError.
    """
    verify_spool(job)
    at, before = 0, b""
    for piece in open_inflated(job):
        held = before + piece
        refused = store_window(pool, table, Window([(at - len(before), held)]))
        if refused is not None:
            raise refused
        at += len(piece)
        before = held[-_OVERLAP:]
