"""When work that nobody waits for begins: after reads, first passes and recordings, but not never."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from nsfs.core.lulls import Lulls
from nsfs.core.recording import LONGEST, QUIET
from trio_tests import run

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


class Site:
    """A domain in which something is read, passed over or recorded."""

    def __init__(self) -> None:
        self.read = trio.current_time() - 1000
        self.is_recording = False
        self.lulls = Lulls(lambda: trio.current_time() - self.read, lambda: self.is_recording)

    async def wait(self) -> float:
        """How long there was no lull."""
        begun = trio.current_time()
        await self.lulls.wait(begun)
        return trio.current_time() - begun


def with_site(test: Callable[[Site], Awaitable[object]]) -> None:
    async def body() -> None:
        await test(Site())

    run(body)


def test_a_lull_begins_a_while_after_the_last_read() -> None:
    async def test(site: Site) -> None:
        assert await site.wait() == QUIET
        assert await site.wait() == 0
        site.read = trio.current_time() - QUIET / 2
        assert await site.wait() == QUIET / 2

    with_site(test)


def test_reads_put_it_off() -> None:
    async def test(site: Site) -> None:
        async def read() -> None:
            for _ in range(6):
                await trio.sleep(QUIET / 2)
                site.read = trio.current_time()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            assert await site.wait() == 4 * QUIET

    with_site(test)


def test_so_do_first_passes_and_recordings() -> None:
    async def test(site: Site) -> None:
        async def pass_over() -> None:
            with site.lulls.disturbed():
                await trio.sleep(3 * QUIET)

        async def record() -> None:
            site.is_recording = True
            await trio.sleep(6.5 * QUIET)
            site.is_recording = False

        async with trio.open_nursery() as nursery:
            nursery.start_soon(pass_over)
            nursery.start_soon(record)
            assert await site.wait() == 7 * QUIET

    with_site(test)


def test_it_is_not_waited_for_without_end() -> None:
    async def test(site: Site) -> None:
        begun = trio.current_time()
        with site.lulls.disturbed():
            assert await site.wait() == LONGEST
            await site.lulls.wait(begun)
            assert trio.current_time() == begun + LONGEST

    with_site(test)
