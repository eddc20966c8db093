"""Proofs of what an artifact claims: whatever differs is found, and nothing is kept that could not be compared."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field

import pytest
from msgspec.structs import replace

from nsfs.core.ports import BLOCK
from nsfs.core.proving import check_contents, check_index
from nsfs.errors import CorruptError
from nsfs.model.layer import Entry, Kind, LayerIndex, Segment

CLAIMED, FOUND = 1 << 30, 2 << 30
SIZE = (1 << 20) + BLOCK + 10
FILE = Entry(b"a/file", Kind.REGULAR, 0o644, 0, 0, 0, SIZE, segments=(Segment(0, 512, SIZE),))


@dataclass
class FakePool:
    blocks: dict[int, bytes] = field(default_factory=dict)
    given_up: list[tuple[int, int]] = field(default_factory=list)

    def missing(self, address: int, size: int) -> list[tuple[int, int]]:
        return [(at, BLOCK) for at in range(address, address + size, BLOCK) if at not in self.blocks]

    def read_present(self, address: int, size: int) -> bytes | None:
        if self.missing(address, size):
            return None
        return b"".join(self.blocks[at] for at in range(address, address + size, BLOCK))

    def evict(self, address: int, size: int) -> int:
        self.given_up.append((address, size))
        return size


def filled(*, claimed: set[int] | None = None, found: set[int] | None = None) -> FakePool:
    """The file's blocks of those numbers, all of them by default, once as claimed and once as found."""
    pool = FakePool()
    for base, numbers in ((CLAIMED, claimed), (FOUND, found)):
        for number in range(-(-SIZE // BLOCK)) if numbers is None else numbers:
            pool.blocks[base + number * BLOCK] = bytes([number % 251]) * BLOCK
    return pool


def check(pool: FakePool) -> None:
    check_contents(pool, [(replace(FILE, path=b"empty", size=0, segments=()), 0, 0), (FILE, CLAIMED, FOUND)])


@pytest.mark.parametrize("claimed", [None, set(), {0, 2, 257}])
def test_what_is_the_same_holds_wherever_it_is_kept(claimed: set[int] | None) -> None:
    pool = filled(claimed=claimed)
    check(pool)
    assert not pool.given_up


@pytest.mark.parametrize("number", [0, 255, 256, 257])
def test_one_wrong_block_is_found(number: int) -> None:
    pool = filled()
    pool.blocks[CLAIMED + number * BLOCK] = b"x" * BLOCK
    with pytest.raises(CorruptError, match="other bytes than the layer: b'a/file'"):
        check(pool)


def test_what_cannot_be_compared_is_given_up() -> None:
    pool = filled(claimed={3, 4, 7}, found={3, 4})
    check(pool)
    assert pool.given_up == [(CLAIMED + 7 * BLOCK, BLOCK)]


@pytest.mark.parametrize(
    "claimed",
    [
        LayerIndex([FILE], 2 << 20),
        LayerIndex([], 1 << 21),
        LayerIndex([FILE, FILE], 3 << 20),
        LayerIndex([replace(FILE, path=b"b")], 3 << 20),
        LayerIndex([replace(FILE, mode=0o4755)], 3 << 20),
        LayerIndex([replace(FILE, segments=(Segment(0, 1024, SIZE),))], 3 << 20),
    ],
)
def test_an_index_is_the_same_in_everything(claimed: LayerIndex) -> None:
    found = LayerIndex([replace(FILE, digest=bytes(32))], 3 << 20)
    check_index(LayerIndex([FILE], 3 << 20), found, [CLAIMED])
    with pytest.raises(CorruptError):
        check_index(claimed, found, [CLAIMED] * len(claimed.entries))


@pytest.mark.parametrize(("digests", "honest"), [([b"a", b"b", b"a"], True), ([b"a", b"b", b"b"], False)])
def test_files_that_share_an_address_are_the_same(digests: list[bytes], honest: bool) -> None:
    files = [replace(FILE, path=path) for path in (b"a", b"b", b"c")]
    found = [replace(each, digest=digest * 32) for each, digest in zip(files, digests, strict=True)]
    with nullcontext() if honest else pytest.raises(CorruptError, match="the same as another: b'c'"):
        check_index(LayerIndex(files, 9), LayerIndex(found, 9), [CLAIMED, FOUND, CLAIMED])
