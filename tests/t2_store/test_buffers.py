"""Memory that is used again: never while somebody has a view of it."""

from __future__ import annotations

import ctypes

from nsfs.store.buffers import Buffers


def test_a_view_is_its_holders_own() -> None:
    buffers = Buffers()
    held = [buffers.take(4096).toreadonly() for _ in range(8)]
    whole = [bytes(view) for view in held]
    for _ in range(8):
        buffers.take(4096)[:] = b"x" * 4096
    assert [bytes(view) for view in held] == whole


def test_memory_is_used_again_and_begins_at_a_page() -> None:
    buffers = Buffers()
    addresses = {ctypes.addressof(ctypes.c_char.from_buffer(buffers.take(size))) for size in (1, 4096, 1 << 20)}
    assert len(addresses) == 1
    assert addresses.pop() % 4096 == 0


def test_any_size() -> None:
    assert len(Buffers().take(5 << 20)) == 5 << 20
