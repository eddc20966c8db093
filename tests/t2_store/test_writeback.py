from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from nsfs.store.writeback import BEHIND, RUN, Writeback
from page_cache import cached_pages

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LONG = 3600.0
"""Seconds of patience that no disk uses up."""
HALF = RUN // 2


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "file")


@pytest.fixture
def fd(path: str) -> Iterator[int]:
    opened = os.open(path, os.O_RDWR | os.O_CREAT)
    yield opened
    os.close(opened)


@pytest.fixture
def given_back(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The runs, as the kernel is told of them."""
    told: list[tuple[int, int]] = []
    advise = os.posix_fadvise

    def record(fd: int, offset: int, size: int, advice: int) -> None:
        told.append((offset, size))
        advise(fd, offset, size, advice)

    monkeypatch.setattr(os, "posix_fadvise", record)
    return told


def write(fd: int, writeback: Writeback, offset: int, size: int) -> None:
    os.pwrite(fd, bytes([offset // HALF % 251 + 1]) * size, offset)
    writeback.follow(offset, size)


def test_pages_that_the_disk_has_are_given_back_a_few_runs_later(
    path: str, fd: int, given_back: list[tuple[int, int]]
) -> None:
    writeback = Writeback(fd, LONG)
    for number in range(2 * BEHIND):
        write(fd, writeback, number * HALF, HALF)
    os.fdatasync(fd)
    assert not given_back
    for number in range(2 * BEHIND, 4 * BEHIND):
        write(fd, writeback, number * HALF, HALF)
    assert given_back == [(number * RUN, RUN) for number in range(BEHIND)]
    assert cached_pages(path, 0, BEHIND * RUN) == 0
    assert [os.pread(fd, 1, number * HALF)[0] for number in range(4 * BEHIND)] == [*range(1, 4 * BEHIND + 1)]


def test_runs_that_are_apart_are_each_told_of_alone(fd: int, given_back: list[tuple[int, int]]) -> None:
    writeback = Writeback(fd, LONG)
    for number in range(BEHIND + 2):
        write(fd, writeback, number * 4 * RUN, RUN)
        write(fd, writeback, number * 4 * RUN + 2 * RUN, HALF)
    assert given_back == [(0, RUN), (4 * RUN, RUN)], "half a run is the kernel's"


def test_a_disk_that_is_slow_to_be_told_is_left_alone(fd: int, given_back: list[tuple[int, int]]) -> None:
    writeback = Writeback(fd, patience=1e-9)
    for number in range(2 * BEHIND):
        write(fd, writeback, number * RUN, RUN)
    assert not given_back
