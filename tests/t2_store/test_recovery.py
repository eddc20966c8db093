from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

import pytest

from nsfs.model.digest import Digest
from nsfs.model.pool import LayerKey, LayerRecord, Slab
from nsfs.store.index import DomainIndex, open_index
from nsfs.store.layout import DomainLayout
from nsfs.store.pool import Pool, open_pool
from nsfs.store.poolfiles import create_bitmap
from nsfs.store.recovery import recover, working

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB = 1 << 20


class Domain:
    def __init__(self, path: Path) -> None:
        self.layout = DomainLayout(str(path / "domain"))
        bitmap = create_bitmap(self.layout)
        self.pool: Pool = open_pool(self.layout, bitmap)
        os.close(bitmap)
        self.index: DomainIndex = open_index(self.layout.index)

    def recover(self) -> list[str]:
        return [str(key.blob) for key in recover(self.layout, self.index, self.pool)]

    def fill(self, slab: Slab) -> None:
        self.pool.write(slab.address, b"x" * MIB)

    def commit(self, name: str, *slabs: Slab, spooled: int = 0, has_spans: bool = False) -> Digest:
        """A layer whose blob has 1,000 bytes, so many of them spooled."""
        blob = Digest.of(name.encode())
        record = LayerRecord(
            blob=blob,
            index="plain",
            blob_size=1000,
            media_type="tar",
            diff_id=blob,
            verified="diff-id",
            stream_size=1000,
            files=1,
            content_bytes=1,
            slabs=slabs,
            has_spans=has_spans,
        )
        self.index.commit_layer(record, [])
        self.spool(blob, spooled)
        return blob

    def spool(self, blob: Digest, size: int) -> None:
        os.makedirs(self.layout.blob_dir(LayerKey(blob, "plain")), exist_ok=True)
        if size:
            with open(self.layout.spool(LayerKey(blob, "plain")), "wb") as file:
                file.write(bytes(size))


@pytest.fixture
def domain(tmp_path: Path) -> Iterator[Domain]:
    made = Domain(tmp_path)
    yield made
    made.index.close()
    made.pool.close()


def test_addresses_that_nobody_committed_are_cleared_and_given_up(domain: Domain) -> None:
    kept, lost = domain.index.reserve(), domain.index.reserve()
    for slab in (kept, lost):
        domain.fill(slab)
    domain.pool.flush()
    domain.commit("kept", kept)
    assert domain.recover() == []
    assert domain.index.orphan_slabs() == []
    assert domain.pool.is_present(kept.address, MIB)
    assert domain.pool.missing(lost.address, MIB) == [(lost.address, MIB)]
    assert os.stat(domain.layout.disk).st_blocks * 512 < 2 * MIB
    assert domain.index.reserve().address >= lost.address + lost.size
    assert domain.recover() == []


def test_only_spools_that_have_done_their_work_go(domain: Domain) -> None:
    spanned = domain.commit("spanned", spooled=1000, has_spans=True)
    waiting = domain.commit("waiting", spooled=1000)
    partial = domain.commit("partial", spooled=999)
    unspooled = domain.commit("unspooled")
    unknown = Digest.of(b"unknown")
    domain.spool(unknown, 500)
    assert domain.recover() == [str(waiting)]
    left = {
        blob
        for blob in (spanned, waiting, partial, unspooled, unknown)
        if os.path.exists(domain.layout.spool(LayerKey(blob, "plain")))
    }
    assert left == {waiting, partial, unknown}


def test_half_written_files_go(domain: Domain) -> None:
    blob = domain.commit("layer")
    directory = domain.layout.blob_dir(LayerKey(blob, "plain"))
    for name in ("index.77.tmp", "index"):
        with open(f"{directory}/{name}", "w") as file:
            file.write("x")
    domain.recover()
    assert os.listdir(directory) == ["index"]


def test_it_waits_for_who_still_works(domain: Domain) -> None:
    ended: list[float] = []

    def work() -> None:
        with working(domain.layout), working(domain.layout):
            started.set()
            time.sleep(0.3)
            ended.append(time.monotonic())

    started = threading.Event()
    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    domain.recover()
    assert ended
    assert time.monotonic() >= ended[0]
    thread.join()
