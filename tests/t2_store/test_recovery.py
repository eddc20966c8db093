"""What a worker puts right before it serves."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nsfs.store.index import DomainIndex, open_index
from nsfs.store.layout import DomainLayout
from nsfs.store.pool import Pool, create_bitmap, open_pool
from nsfs.store.recovery import recover

CONTENT = b"x" * 8192


@pytest.fixture
def layout(tmp_path: Path) -> DomainLayout:
    return DomainLayout(str(tmp_path / "domain"))


@pytest.fixture
def pool(layout: DomainLayout) -> Iterator[Pool]:
    bitmap = create_bitmap(layout)
    pool = open_pool(layout, bitmap)
    yield pool
    pool.close()
    os.close(bitmap)


def write(pool: Pool, index: DomainIndex) -> int:
    address = index.reserve().address
    pool.write(address, CONTENT)
    return address


def test_addresses_of_an_index_that_was_lost_hold_nothing(layout: DomainLayout, pool: Pool) -> None:
    with open_index(layout.index) as index:
        address = write(pool, index)
    pool.flush()
    os.unlink(layout.index)
    bitmap = create_bitmap(layout)
    later = open_pool(layout, bitmap)
    with open_index(layout.index) as index:
        recover(layout, index, later)
        assert index.reserve().address == address
        assert later.read_present(address, len(CONTENT)) is None
    later.close()
    os.close(bitmap)


def test_what_belongs_to_no_layer_is_cleared_and_not_given_out_again(layout: DomainLayout, pool: Pool) -> None:
    with open_index(layout.index) as index:
        address = write(pool, index)
        recover(layout, index, pool)
        assert pool.read_present(address, len(CONTENT)) is None
        assert index.reserve().address > address
