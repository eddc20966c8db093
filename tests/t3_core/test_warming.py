"""Which parts of which files a start's extents are, and what becomes of a plan that cannot be carried out."""

from __future__ import annotations

import os

import msgspec

from nsfs.serve.warming import Piece, plan_pieces, run_warming

MIB = 1 << 20
FILES = [(4096, 5000, 0, 40), (12288, 100, 1, 41), (20480, 3 * MIB, 0, 42), (10 * MIB, 4096, 1, 43)]


def test_extents_are_parts_of_files_in_the_order_of_the_extents() -> None:
    extents = [(10 * MIB, 8192), (8192, 16384), (4096, 4096)]
    assert plan_pieces(FILES, extents) == [
        Piece(1, 43, 0, 4096),
        Piece(0, 40, 4096, 904),
        Piece(1, 41, 0, 100),
        Piece(0, 42, 0, 4096),
        Piece(0, 40, 0, 4096),
    ]


def test_what_is_in_no_file_is_left_alone() -> None:
    assert plan_pieces(FILES, [(0, 4096), (16384, 4096), (20 * MIB, MIB)]) == plan_pieces([], [(4096, 4096)]) == []


def test_large_extents_are_read_in_pieces_and_whatever_a_worker_says_there_are_only_so_many() -> None:
    assert plan_pieces(FILES, [(20480 + 100, 5 * MIB)]) == [
        Piece(0, 42, 100 + number * MIB, min(MIB, 2 * MIB - 100 + (1 - number) * MIB)) for number in range(3)
    ]
    assert len(plan_pieces([(4096, 1 << 60, 0, 40)], [(4096, 1 << 60)])) == 1 << 14


def test_a_plan_for_views_that_are_gone_ends_without_a_word() -> None:
    plan = {"views": [("/nowhere/0", "/nowhere/map")], "extents": [(4096, 4096)]}
    asked, found = os.memfd_create("asked"), os.memfd_create("found")
    try:
        os.pwrite(asked, msgspec.msgpack.encode(plan), 0)
        assert run_warming(b"", [asked, found]) == 1
        assert os.fstat(found).st_size == 0
    finally:
        os.close(asked)
        os.close(found)
