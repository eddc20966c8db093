"""What pools take together: who is asked, who gives up what, who is told to keep nothing more. On fakes."""

from dataclasses import dataclass, field
from typing import Any

import pytest
from msgspec import Struct

from nsfs.core import worker_api
from nsfs.core.cache import Cache
from nsfs.core.keeping import KeptPool
from nsfs.errors import CorruptError, NoSpaceError, NsfsError, UnreachableError
from nsfs.model.cache import HeldLayer, Limits
from nsfs.model.policy import Domain
from nsfs.store.domains import Footprint
from trio_tests import run

MIB = 1 << 20


def layer(number: int, *, local: int = MIB, used: float = 0.0, pinned: bool = False) -> HeldLayer:
    return HeldLayer(
        blob=f"sha256:{number:064x}",
        index="plain",
        local=local,
        size=MIB,
        used=used,
        mounted=False,
        pinned=pinned,
        returns=True,
    )


@dataclass
class FakeHost:
    """`core.cache.Disks` and `RunningWorkers`: what a domain drops it has no more."""

    held: dict[str, list[HeldLayer]]
    spare: int = 100 * MIB
    silent: set[str] = field(default_factory=set)
    kept: list[tuple[str, str]] = field(default_factory=list)
    dropped: list[tuple[str, int]] = field(default_factory=list)
    spooled: dict[str, int] = field(default_factory=dict)

    def names(self) -> list[str]:
        return list(self.held)

    def measure(self, domain: str) -> Footprint:
        return Footprint(
            self.spooled.get(domain, 0) + sum(each.local for each in self.held[domain]), 0, is_encrypted=False
        )

    def free(self) -> int:
        return self.spare

    def pids(self) -> dict[str, int]:
        return dict.fromkeys(self.held, 1)

    async def call(self, domain: Domain, method: str, params: Struct, _result: type, _report: object = None) -> Any:
        if domain.name in self.silent:
            raise UnreachableError("no answer")
        if isinstance(params, worker_api.Drop):
            return self.drop(domain.name, params.layers)
        if method == "Settle":
            return worker_api.Evicted(layers=1, freed=self.spooled.pop(domain.name, 0))
        assert method == "Held"
        return worker_api.Held(layers=self.held[domain.name], images=[])

    def drop(self, domain: str, layers: list[HeldLayer]) -> worker_api.Evicted:
        blobs = {each.blob for each in layers}
        self.dropped += [(domain, int(blob[-4:], 16)) for blob in sorted(blobs)]
        freed = sum(each.local for each in self.held[domain] if each.blob in blobs)
        self.held[domain] = [each for each in self.held[domain] if each.blob not in blobs]
        self.spare += freed
        return worker_api.Evicted(layers=len(blobs), freed=freed)

    async def ask_now(self, domain: str, method: str, params: Struct, _result: type) -> worker_api.Empty:
        assert method == "Keep"
        assert isinstance(params, worker_api.Keep)
        if domain in self.silent:
            raise UnreachableError("no answer")
        self.kept.append((domain, params.unless))
        return worker_api.Empty()


def cache_of(host: Any, most: int, reserve: int = 0, quota: int = 0, *, refuses: bool = True) -> Cache:
    return Cache(host, host, Limits(most, reserve, 1.0, 0.5), {"a": quota}, refuses=refuses)


def test_over_the_cap_the_oldest_of_all_domains_go() -> None:
    host = FakeHost({"ns/a": [layer(1, used=5), layer(2, used=1)], "ns/b": [layer(3, used=2), layer(4, used=9)]})
    cache = cache_of(host, 3 * MIB)

    async def body() -> None:
        await cache.look()

    run(body)
    assert sorted(host.dropped) == [("ns/a", 1), ("ns/a", 2), ("ns/b", 3)]
    assert (cache.room.used, cache.room.state) == (MIB, "ready")


def test_spools_go_before_contents_do() -> None:
    host = FakeHost({"ns/a": [layer(1, used=1), layer(2, used=2)]}, spooled={"ns/a": 4 * MIB})
    cache = cache_of(host, 5 * MIB)

    async def body() -> None:
        await cache.look()

    run(body)
    assert (host.spooled, host.dropped) == ({}, [])
    assert (cache.room.used, cache.room.state) == (2 * MIB, "ready")


def test_below_the_cap_nobody_is_asked_what_it_holds() -> None:
    host = FakeHost({"ns/a": [layer(1)]})
    cache = cache_of(host, 3 * MIB)

    async def body() -> None:
        await cache.look()

    run(body)
    assert host.dropped == []
    assert host.kept == [("ns/a", "")]


def test_a_quota_is_one_domains_matter() -> None:
    host = FakeHost({"ns/a": [layer(1, used=1), layer(2, used=2)], "ns/b": [layer(3)]})
    cache = cache_of(host, 100 * MIB, quota=MIB * 3 // 2)

    async def body() -> None:
        await cache.look()

    run(body)
    assert host.dropped[0] == ("ns/a", 1)
    assert {domain for domain, _ in host.dropped} == {"ns/a"}


def test_a_domain_that_does_not_answer_is_left_out() -> None:
    host = FakeHost({"ns/a": [layer(1)], "ns/b": [layer(2)]}, silent={"ns/a"})
    cache = cache_of(host, MIB)

    async def body() -> None:
        await cache.look()

    run(body)
    assert host.dropped == [("ns/b", 2)]
    assert [domain for domain, _ in host.kept] == ["ns/b"]


def test_where_nothing_may_go_that_is_said_and_the_reserve_is_kept() -> None:
    host = FakeHost({"ns/a": [layer(1, pinned=True)]}, spare=MIB)
    cache = cache_of(host, 100 * MIB, reserve=2 * MIB)
    why = "the reserve of free space is used: all of the pools that may go is gone"

    async def body() -> None:
        await cache.look()
        assert cache.room.state == why
        await cache.look()
        host.spare = 2 * MIB
        await cache.look()

    run(body)
    assert host.kept == [("ns/a", why), ("ns/a", why), ("ns/a", "")]
    assert cache.room.state == "ready"


def test_beyond_the_cap_alone_workers_keep_on() -> None:
    host = FakeHost({"ns/a": [layer(1, pinned=True)]})
    cache = cache_of(host, 1000)

    async def body() -> None:
        await cache.look()

    run(body)
    assert cache.room.state == "pools are over their cap: all of the pools that may go is gone"
    assert host.kept == [("ns/a", "")]


def test_where_readers_need_the_pool_nobody_is_told_to_refuse() -> None:
    host = FakeHost({"ns/a": [layer(1, pinned=True)]}, spare=0)
    cache = cache_of(host, 100 * MIB, reserve=MIB, refuses=False)

    async def body() -> None:
        await cache.look()

    run(body)
    assert "reserve" in cache.room.state
    assert host.kept == []


def test_an_image_larger_than_the_cap_is_said_to_be() -> None:
    cache = cache_of(FakeHost({}), MIB)
    assert cache.larger_than_all(MIB) is None
    note = cache.larger_than_all(3 * MIB)
    assert note is not None
    assert note.text.endswith("3.0 MiB of 1.0 MiB")


class FakePool:
    """Takes writes, or fails with `error`."""

    error: NsfsError | None = None
    written = 0

    missing = read_present = begin_reading = evict = None

    def write(self, _address: int, data: bytes) -> None:
        if self.error:
            raise self.error
        self.written += len(data)

    def flush(self) -> None:
        if self.error:
            raise self.error


def test_a_refused_write_reaches_no_disk() -> None:
    pool: Any = FakePool()
    kept = KeptPool(pool)
    kept.refuse("no room")
    with pytest.raises(NoSpaceError, match="no room"):
        kept.write(0, bytes(10))
    assert (pool.written, kept.trouble) == (0, "no room")
    kept.refuse("")
    kept.write(0, bytes(10))
    assert (pool.written, kept.trouble) == (10, "")


@pytest.mark.parametrize("how", ["write", "flush"])
def test_a_write_that_succeeds_ends_the_trouble(how: str) -> None:
    pool: Any = FakePool()
    kept = KeptPool(pool)
    pool.error = CorruptError("Input/output error")
    with pytest.raises(CorruptError):
        kept.write(0, b"a") if how == "write" else kept.flush()
    pool.error = None
    kept.flush()
    assert kept.trouble == "Input/output error"
    kept.write(0, b"a")
    assert kept.trouble == ""
