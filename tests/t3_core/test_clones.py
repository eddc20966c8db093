"""Clones are mounted once for all who stack them, and go with the last."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

import trio_tests
from nsfs.core.clones import Clones
from nsfs.errors import UnreachableError, UnsupportedError
from nsfs.model.shift import Range, Shift

if TYPE_CHECKING:
    from collections.abc import Sequence

ONE, OTHER = (Shift((Range(0, start, 9),), (Range(0, start, 9),)) for start in (100, 200))


class Kernel:
    """Remembers what is mounted where."""

    def __init__(self) -> None:
        self.mounted: dict[str, tuple[str, Shift]] = {}
        self.fails = False

    async def mount_clones(self, clones: Sequence[tuple[str, str]], shift: Shift) -> None:
        await trio.sleep(1)
        if self.fails:
            raise UnreachableError("it fails")
        assert clones
        for source, path in clones:
            assert path not in self.mounted
            self.mounted[path] = source, shift

    async def unmount(self, paths: Sequence[str], *, force: bool) -> None:
        assert force
        await trio.sleep(1)
        for path in paths:
            del self.mounted[path]

    def lower_path(self, name: str) -> str:
        return f"/l/{name}"


def test_one_clone_for_each_directory_and_shift() -> None:
    kernel = Kernel()
    clones = Clones(kernel, possible=True)

    async def main() -> None:
        found: dict[int, dict[str, str]] = {}

        async def acquire(snapshot: int, shift: Shift) -> None:
            found[snapshot] = await clones.acquire({"a": "/a", "b": "/b"}, shift, snapshot)

        async with trio.open_nursery() as nursery:
            for snapshot, shift in enumerate((ONE, ONE, OTHER)):
                nursery.start_soon(acquire, snapshot, shift)
        assert found[0] == found[1]
        assert not set(found[0].values()) & set(found[2].values())
        assert kernel.mounted[found[2]["b"]] == ("/b", OTHER)
        assert len(kernel.mounted) == 4
        assert clones.stacked() == {0, 1, 2}
        await clones.release(0)
        assert len(kernel.mounted) == 4
        await clones.release(1)
        assert {shift for _, shift in kernel.mounted.values()} == {OTHER}
        await clones.release(1)
        await clones.release(2)
        assert kernel.mounted == {}
        assert clones.stacked() == set()

    trio_tests.run(main)


def test_what_fails_or_is_cancelled_is_not_known() -> None:
    kernel = Kernel()
    clones = Clones(kernel, possible=True)

    async def main() -> None:
        kernel.fails = True
        with pytest.raises(UnreachableError):
            await clones.acquire({"a": "/a"}, ONE, 1)
        with trio.move_on_after(0.5):
            await clones.acquire({"a": "/a"}, ONE, 1)
        assert clones.stacked() == set()
        kernel.fails = False
        await clones.acquire({"a": "/a"}, ONE, 1)
        with trio.move_on_after(0.5):
            await clones.release(1)
        assert kernel.mounted == {}

    trio_tests.run(main)


def test_a_host_that_cannot_says_what_to_do() -> None:
    async def main() -> None:
        with pytest.raises(UnsupportedError, match=r"kernel\.idmap") as caught:
            await Clones(Kernel(), possible=False).acquire({"a": "/a"}, ONE, 1)
        assert caught.value.hint is not None
        assert "remap-ids" in caught.value.hint

    trio_tests.run(main)
