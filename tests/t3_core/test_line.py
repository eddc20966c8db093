"""The line to a domain's workers: what is sent is for one worker, and never stops a daemon."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING

import pytest

from nsfs.errors import UnreachableError
from nsfs.serve.line import Line, drain, make_line, send_end, send_over

if TYPE_CHECKING:
    from collections.abc import Iterator

MANY = 10_000
"""More messages than a socket has room for."""


@pytest.fixture
def line() -> Iterator[Line]:
    made = make_line()
    yield made
    made.close()


def taken(line: Line) -> bytes:
    """What a worker would be told now; nothing where it would wait."""
    with socket.socket(fileno=os.dup(line.far)) as far, contextlib.suppress(BlockingIOError):
        return far.recv(16, socket.MSG_DONTWAIT)
    return b""


def send_ends(line: Line, number: int) -> None:
    for _ in range(number):
        send_end(line)


def test_a_line_that_nobody_reads_says_so_and_does_not_block(line: Line) -> None:
    with pytest.raises(UnreachableError, match="takes no socket"):
        send_ends(line, MANY)


def test_the_next_worker_is_told_nothing_that_was_for_the_last(line: Line) -> None:
    before = len(os.listdir("/proc/self/fd"))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send_over(line, theirs)
    send_end(line)
    drain(line)
    assert taken(line) == b""
    assert len(os.listdir("/proc/self/fd")) == before
    send_end(line)
    assert taken(line) == b"e"
