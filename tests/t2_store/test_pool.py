from __future__ import annotations

import errno
import itertools
import os
import random
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from nsfs.errors import CorruptError, NoSpaceError, UnsupportedError
from nsfs.store import pool as pool_module
from nsfs.store.crypt import DomainKey
from nsfs.store.layout import DomainLayout, Layout
from nsfs.store.pool import Pool, open_pool
from nsfs.store.poolfiles import BITMAP_SIZE, DISK_SIZE, create_bitmap
from page_cache import cached_pages

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BASE = 1 << 30
BLOCK = 4096


KEY = DomainKey(b"a key of the tests, of 32 bytes!")
SALT = b"sixteen bytes of"


@pytest.fixture(params=[None, KEY], ids=["plain", "encrypted"])
def domain(tmp_path: Path, request: pytest.FixtureRequest) -> DomainLayout:
    return Layout(str(tmp_path), str(tmp_path)).domain("d", request.param)


@pytest.fixture
def bitmap(domain: DomainLayout) -> Iterator[int]:
    fd = create_bitmap(domain)
    yield fd
    os.close(fd)


@pytest.fixture
def pool(domain: DomainLayout, bitmap: int) -> Iterator[Pool]:
    opened = open_pool(domain, bitmap, SALT)
    yield opened
    opened.close()


def after_power_loss(domain: DomainLayout) -> Pool:
    """The pool as the durable bitmap has it."""
    fd = create_bitmap(domain)
    try:
        return open_pool(domain, fd, SALT)
    finally:
        os.close(fd)


def test_a_new_pool_is_empty_large_and_sparse(domain: DomainLayout, pool: Pool) -> None:
    assert os.stat(domain.disk).st_size == DISK_SIZE == (1 << 44) - 4096
    assert os.stat(domain.disk).st_blocks * 512 < 64 << 10
    assert os.stat(domain.present).st_size == BITMAP_SIZE
    assert os.stat(domain.disk).st_mode & 0o777 == os.stat(domain.present).st_mode & 0o777 == 0o600
    with open(domain.tag, "rb") as tag:
        assert tag.read().startswith(b"Signature: 8a477f597d28d172789f06886806bc55")
    assert pool.missing(BASE, 10 * BLOCK) == [(BASE, 10 * BLOCK)]
    assert not pool.is_present(0, 1)
    assert pool.missing(0, 2 * BLOCK) == [(0, 2 * BLOCK)], "headers are no data"
    assert pool.read_present(0, 4096) is None


def test_descriptors_are_not_inherited(pool: Pool, bitmap: int) -> None:
    assert not any(os.get_inheritable(fd) for fd in (pool._disk, pool._present, bitmap))


class PoolMachine(RuleBasedStateMachine):
    """A pool against a dict of blocks, each of which has one content ever; a power loss may come at any time."""

    blocks = st.integers(0, 70)
    counts = st.integers(1, 40)
    key: DomainKey | None = None

    def __init__(self) -> None:
        super().__init__()
        self.directory = f"/dev/shm/nsfs-pool-{os.getpid()}-{random.getrandbits(64):x}"
        self.domain = Layout(self.directory, self.directory).domain("d", self.key)
        self.first = BASE + (128 << 20) - 32 * BLOCK
        self.bitmap = create_bitmap(self.domain)
        self.pool = open_pool(self.domain, self.bitmap, SALT)
        self.live: dict[int, bytes] = {}
        self.durable: dict[int, bytes] = {}

    @rule(block=blocks, count=counts)
    def write(self, block: int, count: int) -> None:
        data = b"".join(b"%08d" % (block + n) * 512 for n in range(count))
        self.pool.write(self.first + block * BLOCK, data)
        self.live |= {block + n: data[n * BLOCK : (n + 1) * BLOCK] for n in range(count)}

    @rule(block=blocks, count=counts)
    def evict(self, block: int, count: int) -> None:
        gone = [block + n for n in range(count) if block + n in self.live]
        assert self.pool.evict(self.first + block * BLOCK + 1, count * BLOCK - 1) == len(gone) * BLOCK
        for number in range(block, block + count):
            self.live.pop(number, None)
            self.durable.pop(number, None)

    @rule()
    def flush(self) -> None:
        self.pool.flush()
        self.durable = dict(self.live)

    @rule()
    def lose_worker(self) -> None:
        self.pool.close()
        self.pool = open_pool(self.domain, self.bitmap, SALT)

    @rule()
    def lose_power(self) -> None:
        self.pool.close()
        os.close(self.bitmap)
        self.bitmap = create_bitmap(self.domain)
        self.pool = open_pool(self.domain, self.bitmap, SALT)
        self.live = dict(self.durable)

    @rule(block=blocks, count=counts, offset=st.integers(0, 4095), size=st.integers(1, 9000))
    def ask(self, block: int, count: int, offset: int, size: int) -> None:
        address = self.first + block * BLOCK + offset
        touched = range(block, block + (offset + size - 1) // BLOCK + 1)
        present = all(number in self.live for number in touched)
        assert self.pool.is_present(address, size) == present
        data = self.pool.read_present(address, size)
        whole = b"".join(self.live.get(number, b"") for number in touched)
        assert data == (whole[offset : offset + size] if present else None)
        absent = [n for n in range(block, block + count) if n not in self.live]
        runs = self.pool.missing(self.first + block * BLOCK, count * BLOCK)
        assert [(a - self.first) // BLOCK + n for a, size in runs for n in range(size // BLOCK)] == absent
        assert all(a + size < b for (a, size), (b, _) in itertools.pairwise(runs))

    @invariant()
    def bits_are_counted(self) -> None:
        assert self.pool.local_bytes([(self.first, 200 * BLOCK)]) == len(self.live) * BLOCK

    def teardown(self) -> None:
        self.pool.close()
        os.close(self.bitmap)
        for path in (self.domain.disk, self.domain.present, self.domain.tag):
            os.unlink(path)
        os.removedirs(self.domain.path)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=25, stateful_step_count=30)


class EncryptedPoolMachine(PoolMachine):
    """The same, of a domain that has a key."""

    key = KEY


TestEncryptedPoolMachine = EncryptedPoolMachine.TestCase
TestEncryptedPoolMachine.settings = settings(max_examples=15, stateful_step_count=30)


@settings(max_examples=50)
@given(st.integers(0, 1 << 60), st.integers(0, 1000))
def test_runs_are_the_runs_of_ones(bits: int, start: int) -> None:
    ones = [start + n for n in range(bits.bit_length()) if bits >> n & 1]
    assert [n for low, high in pool_module._runs(bits, start) for n in range(low, high)] == ones


def test_long_ranges_are_asked_in_steps(pool: Pool) -> None:
    pool.write(BASE + (300 << 20), b"x" * BLOCK)
    assert pool.missing(BASE, 1 << 30) == [
        (BASE, 300 << 20),
        (BASE + (300 << 20) + BLOCK, (724 << 20) - BLOCK),
    ]
    assert not pool.is_present(BASE, 1 << 30)
    pool.write_zeros(BASE, 300 << 20)
    assert pool.is_present(BASE, (300 << 20) + 1)
    assert pool.evict(BASE, 1 << 30) == (300 << 20) + BLOCK


@pytest.mark.parametrize(
    ("address", "size"), [(BASE + 1, BLOCK), (BASE, 100), (BASE, 0), (0, BLOCK), (DISK_SIZE, BLOCK)]
)
def test_only_whole_blocks_of_given_out_addresses_are_written(pool: Pool, address: int, size: int) -> None:
    with pytest.raises(ValueError, match="not whole blocks"):
        pool.write(address, bytes(size))


def test_the_last_address_can_be_used(pool: Pool) -> None:
    pool.write(DISK_SIZE - BLOCK, b"z" * BLOCK)
    pool.flush()
    assert pool.read_present(DISK_SIZE - 1, 1) == b"z"
    with pytest.raises(CorruptError, match="ends early"):
        pool.read(DISK_SIZE - 1, 2)


def test_bits_become_durable_only_after_the_bytes(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    real_sync, real_write = os.fdatasync, os.pwrite
    names = {pool._disk: "disk", pool._present: "present"}

    def sync(fd: int) -> None:
        order.append(f"sync {names[fd]}")
        real_sync(fd)

    def write(fd: int, data: Any, offset: int) -> int:
        order.append(f"write {names[fd]}")
        return real_write(fd, data, offset)

    monkeypatch.setattr(os, "fdatasync", sync)
    monkeypatch.setattr(os, "pwrite", write)
    monkeypatch.setattr(Pool, "_punch", lambda *_: order.append("punch"))
    pool.write(BASE, bytes(BLOCK))
    pool.flush()
    assert order == ["write disk", "sync disk", "write present", "sync present"]
    order.clear()
    pool.flush()
    assert order == [], "nothing new"
    pool.evict(BASE, BLOCK)
    assert order == ["write present", "sync present", "punch"]
    order.clear()
    pool.write(BASE, bytes(BLOCK))
    pool.evict(BASE, BLOCK)
    assert order == ["write disk", "punch"], "nothing durable was said"


def test_bits_set_while_syncing_are_not_yet_durable(
    domain: DomainLayout, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fdatasync

    def sync(fd: int) -> None:
        real(fd)
        if fd == pool._disk:
            monkeypatch.setattr(os, "fdatasync", real)
            pool.write(BASE + BLOCK, b"b" * BLOCK)

    pool.write(BASE, b"a" * BLOCK)
    monkeypatch.setattr(os, "fdatasync", sync)
    pool.flush()
    lost = after_power_loss(domain)
    assert (lost.is_present(BASE, 1), lost.is_present(BASE + BLOCK, 1)) == (True, False)
    lost.close()
    pool.flush()
    kept = after_power_loss(domain)
    assert kept.read_present(BASE + BLOCK, 1) == b"b"
    kept.close()


def test_a_failed_sync_takes_back_what_it_was_about(
    domain: DomainLayout, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool.write(BASE, b"a" * BLOCK)
    pool.flush()
    pool.write(BASE + BLOCK, b"b" * BLOCK)

    def fail(_: int) -> None:
        raise OSError(errno.EIO, "broken")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(CorruptError, match="cannot sync"):
            pool.flush()
    assert pool.is_present(BASE, 1)
    assert not pool.is_present(BASE + BLOCK, 1), "the next sync would not report it again"
    pool.flush()
    later = after_power_loss(domain)
    assert not later.is_present(BASE + BLOCK, 1)
    later.close()


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, NoSpaceError), (errno.EDQUOT, NoSpaceError), (errno.EIO, CorruptError)]
)
def test_a_partial_write_leaves_no_bit(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    real = os.pwrite
    calls = 0

    def write(fd: int, data: Any, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise OSError(number, "no")
        return real(fd, memoryview(data)[:BLOCK], offset)

    monkeypatch.setattr(os, "pwrite", write)
    with pytest.raises(kind):
        pool.write(BASE, bytes(3 * BLOCK))
    assert pool.missing(BASE, 3 * BLOCK) == [(BASE, 3 * BLOCK)]


def test_freed_blocks_are_free_and_punched(domain: DomainLayout, pool: Pool) -> None:
    pool.write(BASE, os.urandom(4 << 20))
    pool.flush()
    used = os.stat(domain.disk).st_blocks
    assert pool.evict(BASE, 4 << 20) == 4 << 20
    assert os.stat(domain.disk).st_blocks <= used - (4 << 20) // 512
    assert pool.read(BASE, BLOCK) == bytes(BLOCK)


def test_readers_and_writers_never_see_a_hole_while_blocks_are_evicted(pool: Pool) -> None:
    count, data = 16, b"".join(bytes([n + 1]) * BLOCK for n in range(16))
    ends = time.monotonic() + 1.5
    failures: list[str] = []
    seen = [0, 0]

    def read() -> None:
        while time.monotonic() < ends:
            got = pool.read_present(BASE, count * BLOCK)
            seen[got is None] += 1
            if got is not None and got != data:
                failures.append("a hole")

    def write() -> None:
        while time.monotonic() < ends:
            pool.write(BASE, data)

    def evict() -> None:
        while time.monotonic() < ends:
            pool.evict(BASE, count * BLOCK)
            pool.flush()

    threads = [threading.Thread(target=work) for work in (read, read, write, write, evict)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert min(seen) > 10


def test_a_job_and_the_worker_share_bits_but_each_has_its_own_pool(
    domain: DomainLayout, pool: Pool, bitmap: int
) -> None:
    pid = os.fork()
    if pid == 0:
        job = open_pool(domain, bitmap, SALT)
        job.write(BASE + (64 << 20), b"j" * BLOCK)
        os._exit(0)
    os.waitpid(pid, 0)
    assert pool.read_present(BASE + (64 << 20), 1) == b"j"
    pool.flush()
    before = after_power_loss(domain)
    assert not before.is_present(BASE + (64 << 20), 1), "nobody told the worker"
    before.close()
    pool.mark_dirty(BASE + (64 << 20), BLOCK)
    pool.flush()
    after = after_power_loss(domain)
    assert after.is_present(BASE + (64 << 20), 1)
    after.close()


def test_a_front_reads_and_cannot_write(domain: DomainLayout, pool: Pool, bitmap: int) -> None:
    front = open_pool(domain, bitmap, SALT, readonly=True)
    pool.write(BASE, b"x" * BLOCK)
    assert front.read_present(BASE, 3) == b"xxx"
    with pytest.raises(CorruptError):
        front.write(BASE, b"y" * BLOCK)
    front.close()


def test_a_worker_that_died_in_an_eviction_blocks_nobody(domain: DomainLayout, pool: Pool, bitmap: int) -> None:
    pool._epoch[0] |= 1
    heir = open_pool(domain, bitmap, SALT)
    assert heir._epoch[0] % 2 == 0
    heir.write(BASE, b"x" * BLOCK)
    assert heir.read_present(BASE, 1) == b"x"
    heir.close()


def test_a_bitmap_without_its_disk_says_nothing(domain: DomainLayout, pool: Pool, bitmap: int) -> None:
    pool.write(BASE, b"x" * BLOCK)
    pool.flush()
    os.unlink(domain.disk)
    fresh = after_power_loss(domain)
    assert not fresh.is_present(BASE, 1)
    fresh.close()
    with pytest.raises(CorruptError, match="another pool"):
        open_pool(domain, bitmap, SALT)


@pytest.mark.parametrize("name", ["disk", "present"])
def test_other_formats_are_refused(domain: DomainLayout, bitmap: int, name: str) -> None:
    path = getattr(domain, name)
    with open(path, "r+b") as file:
        file.seek(8)
        file.write(b"\x07")
    for attempt in (lambda: create_bitmap(domain), lambda: open_pool(domain, bitmap, SALT)):
        with pytest.raises(UnsupportedError, match=r"newer format.*: 7"):
            attempt()
    with open(path, "r+b") as file:
        file.write(b"something")
    with pytest.raises(CorruptError):
        create_bitmap(domain)


def test_a_nearly_empty_bitmap_is_loaded_in_no_time(domain: DomainLayout, pool: Pool) -> None:
    for number in range(20):
        pool.write(BASE + number * (40 << 30), b"x" * BLOCK)
    pool.flush()
    begun = time.process_time()
    again = after_power_loss(domain)
    assert time.process_time() - begun < 0.5
    assert again.local_bytes([(BASE + number * (40 << 30), 1) for number in range(20)]) == 20 * BLOCK
    again.close()


def test_many_ranges_are_evicted_with_one_sync(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    ranges = [(BASE + number * 3 * BLOCK, BLOCK) for number in range(50)]
    for address, size in ranges:
        pool.write(address, bytes(size))
    pool.write(BASE + BLOCK, b"k" * BLOCK)
    pool.flush()
    syncs: list[int] = []
    monkeypatch.setattr(os, "fdatasync", syncs.append)
    assert pool.evict_all(ranges) == 50 * BLOCK
    assert syncs == [pool._present]
    assert pool.missing(BASE, 3 * BLOCK) == [(BASE, BLOCK), (BASE + 2 * BLOCK, BLOCK)]


def test_what_reads_leave_in_the_page_cache_is_dropped_when_nobody_reads(domain: DomainLayout, pool: Pool) -> None:
    data = os.urandom(16 << 20)
    pool.write(BASE, data)
    pool.flush()
    for offset in range(4096, len(data) - (64 << 10), 1 << 20):
        assert pool.read(BASE + offset, 64 << 10) == data[offset : offset + (64 << 10)]
    pool.drop_read()
    assert cached_pages(domain.disk, BASE, len(data)) >= 256, "somebody reads"
    pool.drop_read()
    assert cached_pages(domain.disk, BASE, len(data)) < 256


def test_reads_leave_only_so_much_in_the_page_cache(domain: DomainLayout, pool: Pool) -> None:
    size, step = 40 << 20, 1 << 20
    for offset in range(0, size, step):
        pool.write(BASE + offset, os.urandom(step))
    pool.flush()
    for order in (1, -1):
        for offset in range(0, size, step)[::order]:
            pool.read(BASE + offset, step)
        assert cached_pages(domain.disk, BASE, size) * 4096 < size - (16 << 20)


def test_the_disk_reads_ahead_of_who_is_known_to_ask(domain: DomainLayout, pool: Pool) -> None:
    pool.write(BASE, os.urandom(4 << 20))
    pool.flush()
    extents = [(BASE + (1 << 20), 256 << 10), (BASE + (3 << 20), BLOCK)]
    pool.begin_reading(extents)
    assert [cached_pages(domain.disk, *extent) * 4096 for extent in extents] == [256 << 10, BLOCK]
    assert cached_pages(domain.disk, BASE, 1 << 20) == 0


def test_what_is_to_be_read_is_not_dropped_behind_a_reader_that_goes_on(domain: DomainLayout, pool: Pool) -> None:
    pool.write(BASE, os.urandom(6 << 20))
    pool.flush()
    pool.begin_reading([(BASE, 1 << 20), (BASE + (4 << 20), 2 << 20)])
    for offset in range(4 << 20, 6 << 20, 64 << 10):
        pool.read(BASE + offset, 64 << 10)
    assert cached_pages(domain.disk, BASE, 1 << 20) == 256


def test_what_may_not_have_reached_the_disk_stays_in_memory(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what it failed to write the kernel reads something else, once the page is gone."""
    dropped: list[tuple[int, int]] = []

    def drop(_fd: int, start: int, size: int, advice: int) -> None:
        if advice == os.POSIX_FADV_DONTNEED:
            dropped.append((start, size))

    def read() -> None:
        pool.read(BASE, BLOCK)
        pool.drop_read()
        pool.drop_read()

    real_sync = os.fdatasync

    def sync(fd: int) -> None:
        read()
        real_sync(fd)

    monkeypatch.setattr(os, "posix_fadvise", drop)
    pool.write(BASE, bytes(BLOCK))
    read()
    with monkeypatch.context() as syncing:
        syncing.setattr(os, "fdatasync", sync)
        pool.flush()
        assert dropped == [(0, 0)], "by the flush, at its end"
    dropped.clear()
    read()
    assert dropped != []
