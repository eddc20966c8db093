"""What processes that were killed left in a domain, and how its next worker puts that right.

Owns the order of it: first the jobs of the last worker must be gone, each of which holds the domain's lock for as long
as it lives; then addresses that were given out and never committed are cleared and given up, and files that nobody will
ask for again go. Refuses to touch what a resume needs: blobs that are spooled in part stay. Blocks; run it once, in a
thread, before the first job. Doing it twice, or being killed in it, does no harm.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nsfs.store.spool import Spool

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nsfs.model.pool import LayerKey, LayerRecord
    from nsfs.store.index import DomainIndex
    from nsfs.store.layout import DomainLayout
    from nsfs.store.pool import Pool

_TEMPORARY = ".tmp"


@contextmanager
def working(layout: DomainLayout) -> Iterator[None]:
    """Keep the next worker of the domain from clearing up while this process may still write there."""
    with _locked(layout, fcntl.LOCK_SH):
        yield


def recover(layout: DomainLayout, index: DomainIndex, pool: Pool) -> list[LayerKey]:
    """Put a domain right; returns the layers that lack nothing but spans, which their spooled blob can give them.

    Waits for every process that is `working` there. Raises NoSpaceError, CorruptError; what was not done is done next
    time.
    """
    with _locked(layout, fcntl.LOCK_EX):
        if not index.reserved():
            pool.clear()  # an index that is new knows of none of it, and would give its addresses out again
        clear_orphans(index, pool)
        _remove_temporaries(layout)
        return _judge_spools(layout, index.layers())


def clear_orphans(index: DomainIndex, pool: Pool) -> int:
    """Clear the addresses that no layer was committed with, and give them up; returns the bytes that freed."""
    orphans = index.orphan_slabs()
    freed = sum(pool.evict(slab.address, slab.size) for slab in orphans)
    for slab in orphans:
        index.forget_slab(slab)
    return freed


def _remove_temporaries(layout: DomainLayout) -> None:
    for directory, _, names in os.walk(layout.path):
        for name in names:
            if name.endswith(_TEMPORARY):
                os.unlink(os.path.join(directory, name))


def _judge_spools(layout: DomainLayout, records: list[LayerRecord]) -> list[LayerKey]:
    """Remove the spools of layers that have their spans; returns those whose complete spool waits to be used."""
    waiting: list[LayerKey] = []
    for record in records:
        if record.verified != "diff-id":
            continue
        spool = Spool(layout.spool(record.key), layout.key)
        if record.has_spans:
            spool.remove()
        elif spool.size() == record.blob_size:
            waiting.append(record.key)
    return waiting


@contextmanager
def _locked(layout: DomainLayout, mode: int) -> Iterator[None]:
    fd = os.open(layout.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, mode)
        yield
    finally:
        os.close(fd)
