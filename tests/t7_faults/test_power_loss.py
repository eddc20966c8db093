"""A pool loses its power after any of its writes: what it says is there must be what was verified and written."""

from __future__ import annotations

import os
import random
import tempfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from nsfs.model.pool import Slab
from nsfs.store.crypt import DomainKey
from nsfs.store.layout import Layout
from nsfs.store.pool import Pool, open_pool
from nsfs.store.poolfiles import BLOCK, create_bitmap
from nsfs.store.recovery import recover
from power import Disk, Found, Killed, Punch, Sync

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nsfs.store.layout import DomainLayout

KEY = DomainKey(b"a key of the tests, of 32 bytes!")
SALT = b"sixteen bytes of"
FIRST = 1 << 30
SLAB = 64 << 20
USED = 48
"""Blocks of a slab that a pass writes."""
BITS = 64 << 10
"""Bytes of the live bitmap that these tests come to."""


@dataclass(frozen=True)
class Catalog:
    """What the index has committed, and what the test knows beside it."""

    slabs: dict[int, bool] = field(default_factory=dict)
    """Whether each is committed, or given up."""
    good: frozenset[int] = frozenset()
    """Slabs of layers: what is there was verified."""
    durable: frozenset[int] = frozenset()
    """Blocks, by address, that were there when a flush returned, and that nobody dropped since."""


class Index:
    """Stands in for LMDB: each change is one operation of the disk, and there as soon as it is done."""

    def __init__(self, disk: Disk | None, catalog: Catalog) -> None:
        self._disk = disk
        self.catalog = catalog

    def commit(self, **changes: Any) -> None:
        catalog = Catalog(**{**vars(self.catalog), **changes})
        if self._disk is not None:
            self._disk.note(catalog)
        self.catalog = catalog

    def reserve(self) -> Slab:
        slab = Slab(FIRST + SLAB * len(self.catalog.slabs), SLAB)
        self.commit(slabs={**self.catalog.slabs, slab.address: False})
        return slab

    def commit_layer(self, slab: Slab) -> None:
        self.commit(slabs={**self.catalog.slabs, slab.address: True}, good=self.catalog.good | {slab.address})

    def forget_slab(self, slab: Slab) -> None:
        self.commit(slabs={**self.catalog.slabs, slab.address: True})

    def reserved(self) -> int:
        return SLAB * len(self.catalog.slabs)

    def orphan_slabs(self) -> list[Slab]:
        return [Slab(address, SLAB) for address, committed in self.catalog.slabs.items() if not committed]

    def layers(self) -> list[Any]:
        return []


def content(address: int) -> bytes:
    """What a block has; every fifth is a hole."""
    number = address // BLOCK
    return bytes(BLOCK) if number % 5 == 0 else b"%015d\n" % number * (BLOCK // 16)


def blocks_of(slab: int) -> range:
    return range(slab, slab + USED * BLOCK, BLOCK)


def there(pool: Pool, slab: int) -> list[int]:
    return [address for address in blocks_of(slab) if pool.is_present(address, BLOCK)]


class Life:
    """A worker that does by chance what workers do; its disk records it."""

    def __init__(self, layout: DomainLayout, disk: Disk, rng: random.Random) -> None:
        self._layout = layout
        self._rng = rng
        self.disk = disk
        self.index = Index(disk, Catalog())
        self._bits = b""
        disk.on_kill = self._keep_bits
        disk.before_sync = self._land_beside
        self._syncing = False
        self._dropping: list[tuple[int, int]] = []
        self._bitmap = create_bitmap(layout)
        self.pool = open_pool(layout, self._bitmap, SALT)

    def close(self) -> None:
        self.pool.close()
        os.close(self._bitmap)

    def live(self, steps: int) -> None:
        self.read_layer()
        acts = [self.read_layer, self.land, self.land, self.flush, self.flush, self.evict, self.evict]
        for _ in range(steps):
            self._rng.choice(acts)()

    def read_layer(self) -> None:
        """A first pass, which may find at its end that nothing of it is right."""
        slab = self.index.reserve()
        is_right = self._rng.random() < 0.7
        for start, count in self._runs(slab.address):
            self._store(start, count, is_right=is_right)
            if self._rng.random() < 0.1:
                self.flush()
        if is_right:
            self.index.commit_layer(slab)
        else:
            self._drop([(slab.address, SLAB)])
            self.index.forget_slab(slab)

    def _runs(self, slab: int) -> Iterator[tuple[int, int]]:
        done = 0
        while done < USED:
            count = min(self._rng.randint(1, 20), USED - done)
            yield slab + done * BLOCK, count
            done += count

    def _store(self, start: int, count: int, *, is_right: bool = True) -> None:
        data = b"".join(content(start + n * BLOCK) for n in range(count))
        if not any(data):
            self.pool.write_zeros(start, count * BLOCK)
        else:
            self.pool.write(start, data if is_right else bytes(byte ^ 0xFF for byte in data))

    def land(self) -> None:
        """What is absent of some blocks of layers comes."""
        for start, size in self._ranges():
            for address, length in self.pool.missing(start, size):
                self._store(address, length // BLOCK)

    def _ranges(self) -> list[tuple[int, int]]:
        slabs = sorted(self.index.catalog.good)
        chosen = self._rng.choices(slabs, k=self._rng.randint(1, 3)) if slabs else []
        starts = [(slab, self._rng.randrange(USED)) for slab in chosen]
        return [(slab + at * BLOCK, self._rng.randint(1, USED - at) * BLOCK) for slab, at in starts]

    def flush(self) -> None:
        self._syncing = True
        try:
            found = {address for slab in self.index.catalog.slabs for address in there(self.pool, slab)}
            self.pool.flush()
        finally:
            self._syncing = False
        self.index.commit(durable=self.index.catalog.durable | found)

    def _land_beside(self, _path: str) -> None:
        if self._syncing and self._rng.random() < 0.5:
            self.land()

    def evict(self) -> None:
        self._drop(self._ranges())

    def _drop(self, ranges: list[tuple[int, int]]) -> None:
        self._dropping = ranges
        gone = {block for start, size in ranges for block in range(start, start + size, BLOCK)}
        self.index.commit(durable=self.index.catalog.durable - gone)
        self.pool.evict_all(ranges)

    def evict_again(self) -> None:
        """What was asked for last, and maybe not done."""
        self._drop(self._dropping)

    def _keep_bits(self) -> None:
        self._bits = os.pread(self._bitmap, BITS, 0)

    def be_born_again(self, *, with_daemon: bool) -> None:
        """The next worker over what a killed one left: the bits as they were then, or a new daemon's."""
        self.pool.close()
        os.pwrite(self._bitmap, self._bits, 0)
        if with_daemon:
            os.close(self._bitmap)
            self._bitmap = create_bitmap(self._layout)
        self.pool = open_pool(self._layout, self._bitmap, SALT)
        recover(self._layout, self.index, self.pool)  # type: ignore[arg-type]


@contextmanager
def a_life(rng: random.Random, key: DomainKey | None, forgets: str = "") -> Iterator[Life]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path, pytest.MonkeyPatch.context() as patch:
        disk = Disk(forgets)
        disk.install(patch)
        life = Life(Layout(path, path).domain("d", key), disk, rng)
        try:
            yield life
        finally:
            life.close()


def check_found(life: Life, point: int, rng: random.Random) -> int:
    """Power is lost before operation `point`; returns how many blocks are there when it is back."""
    found = Found(life.disk.ops[:point], rng)
    catalog: Catalog = found.notes[-1] if found.notes else Catalog()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        layout = Layout(path, path).domain("d", life._layout.key)
        os.makedirs(layout.path)
        found.make(life._layout.path, layout.path)
        with pytest.MonkeyPatch.context() as patch:
            Disk().install(patch)
            bitmap = create_bitmap(layout)
            pool = open_pool(layout, bitmap, SALT)
            os.close(bitmap)
            try:
                recover(layout, Index(None, catalog), pool)  # type: ignore[arg-type]
                return check_claims(pool, catalog)
            finally:
                pool.close()


def check_all_found(life: Life, first: int, rng: random.Random) -> int:
    """Power is lost before each operation from `first` on, or after the last; returns the most blocks there are."""
    return max(check_found(life, point, rng) for point in range(first, len(life.disk.ops) + 1))


def check_claims(pool: Pool, catalog: Catalog) -> int:
    claimed = {address for slab in catalog.good for address in there(pool, slab)}
    everything = pool.local_bytes([(FIRST, SLAB * (len(catalog.slabs) + 2))])
    assert everything == len(claimed) * BLOCK, "blocks that nobody verified are said to be there"
    for address in claimed:
        assert pool.read_present(address, BLOCK) == content(address), f"not what was written: {address}"
    kept = {address for slab in catalog.good for address in blocks_of(slab)} & catalog.durable
    assert kept <= claimed, "a flush had returned"
    return len(claimed)


@pytest.fixture(params=[None, KEY], ids=["plain", "encrypted"])
def key(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_power_may_be_lost_before_any_write(key: DomainKey | None) -> None:
    rng = random.Random(1)
    with a_life(rng, key) as life:
        life.live(40)
        assert check_all_found(life, 0, rng) > USED, "the pool keeps something"


@pytest.mark.parametrize("forgets", ["disk", "present"])
def test_a_sync_that_is_left_out_is_noticed(key: DomainKey | None, forgets: str) -> None:
    rng = random.Random(2)
    with a_life(rng, key, forgets) as life:
        life.live(40)
        with pytest.raises(AssertionError, match=r"not what was written|nobody verified"):
            check_all_found(life, 0, rng)


def check_killed(seed: int, *, with_daemon: bool) -> None:
    rng = random.Random(seed)
    with a_life(rng, None) as life:
        life.live(3)
        life.flush()
        life.disk.kills = lambda op: rng.random() < (0.3 if isinstance(op, Sync | Punch) else 0.02)
        with suppress(Killed):
            life.live(100)
        life.disk.kills = lambda _op: False
        killed = len(life.disk.ops)
        life.be_born_again(with_daemon=with_daemon)
        life.evict_again()
        for _ in range(3):
            check_all_found(life, killed, rng)


@pytest.mark.parametrize("seeds", [40, pytest.param(2_000, marks=[pytest.mark.soak, pytest.mark.timeout(0)])])
@pytest.mark.parametrize("with_daemon", [False, True], ids=["worker", "daemon"])
def test_power_may_be_lost_after_a_process_was_killed_in_any_write(with_daemon: bool, seeds: int) -> None:
    for seed in range(seeds):
        try:
            check_killed(seed, with_daemon=with_daemon)
        except AssertionError as error:
            error.add_note(f"seed {seed}")
            raise
