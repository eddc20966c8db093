"""What programs need, against made ones and one of this machine's; and that nothing makes the parser fail."""

from __future__ import annotations

import os
import sys

from hypothesis import given
from hypothesis import strategies as st

from nsfs.format.elf import LONGEST_NAME, MAGIC, Program, parse_needed, parse_program
from programs import SIZE, render_program


def names_of(file: bytes) -> tuple[Program, list[bytes]]:
    program = parse_program(file[:4096])
    assert program is not None
    offsets = parse_needed(program, file[program.dynamic.start : program.dynamic.stop])
    return program, [file[offset : offset + LONGEST_NAME].partition(b"\0")[0] for offset in offsets]


def test_a_program_says_what_it_needs() -> None:
    program, names = names_of(render_program([b"libz.so.1", b"libc.so.6"], b"/lib64/ld.so"))
    assert program.interpreter == b"/lib64/ld.so"
    assert names == [b"libz.so.1", b"libc.so.6"]
    assert program.written == range(SIZE - 8192, SIZE)


def test_so_does_one_of_this_machine() -> None:
    with open(os.path.realpath(sys.executable), "rb") as file:
        program, names = names_of(file.read())
    assert os.path.exists(program.interpreter)
    assert any(name.startswith(b"libc.") for name in names)
    assert program.written


def test_a_library_that_needs_nothing_and_one_whose_names_are_nowhere() -> None:
    assert names_of(render_program([]))[1] == []
    assert names_of(render_program([b"libc.so.6"], strings=1 << 60))[1] == []


def test_what_is_no_program_is_none() -> None:
    assert parse_program(b"#!/bin/sh\n") is None
    assert parse_program(render_program([])[:100]) is None


@given(st.binary(max_size=512), st.integers(0, 400))
def test_nothing_makes_it_fail(noise: bytes, at: int) -> None:
    file = bytearray(render_program([b"libc.so.6"], b"/lib64/ld.so"))
    file[len(MAGIC) + at : len(MAGIC) + at + len(noise)] = noise
    program = parse_program(bytes(file[:4096]))
    if program is not None:
        parse_needed(program, noise)
