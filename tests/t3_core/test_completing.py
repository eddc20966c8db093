"""Completing: pinned images at once, what is in use when a start is over, one layer at a time, and never for nobody."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import trio

from nsfs.core.completing import Completing, InUse
from nsfs.errors import DeniedError, NoSpaceError, NsfsError, UnreachableError
from nsfs.model.digest import Digest
from nsfs.model.pool import LayerKey
from trio_tests import run

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

LAYER_TIME = 3.0


def used(number: int, owner: str = "") -> InUse:
    return InUse(LayerKey(Digest(f"sha256:{number:064x}"), "plain"), owner)


class FakeContents:
    """Layers that take their time; `errors` are raised one after another."""

    def __init__(self) -> None:
        self.errors: list[NsfsError] = []
        self.begun: list[tuple[float, InUse]] = []
        self.done: list[InUse] = []
        self.last_wait = trio.current_time()
        self.owners: Counter[str] = Counter()
        self.layers: Counter[LayerKey] = Counter()
        self.drips = self.refused = ""
        """Of these owners nothing ends, or everything is refused."""

    @property
    def at_once(self) -> int:
        return self.owners.total()

    async def complete(self, key: LayerKey, owner: str) -> None:
        self.begun.append((trio.current_time(), InUse(key, owner)))
        self.owners[owner] += 1
        self.layers[key] += 1
        assert self.owners[owner] == self.layers[key] == 1
        try:
            await trio.sleep(math.inf if self.drips and owner == self.drips else LAYER_TIME)
        finally:
            self.owners[owner] -= 1
            self.layers[key] -= 1
        if self.refused and owner == self.refused:
            raise DeniedError("not for this one")
        if self.errors:
            raise self.errors.pop(0)
        self.done.append(InUse(key, owner))

    def quiet_for(self) -> float:
        return trio.current_time() - self.last_wait


@asynccontextmanager
async def site(*, follows_use: bool = True) -> AsyncIterator[tuple[Completing, FakeContents]]:
    records: Any = None
    contents = FakeContents()
    async with trio.open_nursery() as nursery:
        yield Completing(records, contents, nursery, follows_use=follows_use), contents
        nursery.cancel_scope.cancel()


def test_what_is_in_use_is_completed_when_nobody_waited_for_a_while() -> None:
    async def test() -> None:
        async with site() as (completing, contents):
            completing.follow([used(1), used(2, "team")])
            await trio.sleep(4)
            contents.last_wait = trio.current_time()
            await trio.sleep(4)
            assert contents.begun == []
            await trio.sleep(100)
            assert set(contents.done) == {used(1), used(2, "team")}
            completing.follow([used(1), used(3)])
            await trio.sleep(100)
            assert contents.done[2:] == [used(3)]

    run(test)


def test_an_owner_whose_registry_drips_keeps_others_waiting_for_that_layer_alone() -> None:
    async def test() -> None:
        async with site() as (completing, contents):
            contents.drips = "b"
            completing.follow([used(1, "b"), used(2, "b")])
            await trio.sleep(100)
            completing.follow([used(1, "b"), used(2, "b"), used(2, "a"), used(3, "a"), used(1, "c"), used(4, "c")])
            await trio.sleep(100)
            assert contents.done == [used(2, "a"), used(3, "a")]
            assert contents.owners == {"a": 0, "b": 1}
            completing.follow([used(1, "c"), used(4, "c")])
            await trio.sleep(100)
            assert contents.done[2:] == [used(1, "c"), used(4, "c")]

    run(test)


def test_one_whom_a_registry_refuses_ends_nothing_of_others() -> None:
    async def test() -> None:
        async with site() as (completing, contents):
            contents.refused = "b"
            completing.follow([used(1, "b"), used(1, "a")])
            await trio.sleep(100)
            assert contents.done == [used(1, "a")]

    run(test)


def test_it_waits_for_quiet_again_between_two_layers() -> None:
    async def test() -> None:
        async with site() as (completing, contents):
            completing.follow([used(1), used(2)])
            await trio.sleep(5 + LAYER_TIME / 2)
            contents.last_wait = trio.current_time()
            await trio.sleep(100)
            first, second = (at for at, _ in contents.begun)
            assert second - first == LAYER_TIME / 2 + 5

    run(test)


def test_switched_off_nothing_is_fetched_for_use() -> None:
    async def test() -> None:
        async with site(follows_use=False) as (completing, contents):
            completing.follow([used(1)])
            await trio.sleep(100)
            assert contents.begun == []

    run(test)


def test_it_ends_with_the_use_and_begins_anew_with_the_next() -> None:
    async def test() -> None:
        async with site() as (completing, contents):
            completing.follow([used(1), used(2)])
            await trio.sleep(5 + LAYER_TIME / 2)
            completing.follow([used(2)])
            await trio.sleep(LAYER_TIME / 2)
            completing.follow([])
            await trio.sleep(100)
            assert (contents.done, contents.at_once) == ([], 0)
            assert [each for _, each in contents.begun] == [used(1), used(2)]
            completing.follow([used(1)])
            await trio.sleep(100)
            assert contents.done == [used(1)]

    run(test)


def test_what_is_given_up_stays_away_until_it_is_used_anew() -> None:
    async def test() -> None:
        async with site() as (completing, contents):
            completing.follow([used(1), used(2)])
            await trio.sleep(5 + LAYER_TIME / 2)
            completing.give_up([used(1).key])
            await trio.sleep(100)
            completing.give_up([used(2).key])
            completing.follow([used(1), used(2), used(3)])
            await trio.sleep(100)
            assert contents.done == [used(2), used(3)]
            completing.follow([])
            completing.follow([used(1)])
            await trio.sleep(100)
            assert contents.done == [used(2), used(3), used(1)]

    run(test)


def test_a_registry_that_is_away_is_tried_again_and_a_refusal_or_a_full_pool_is_not() -> None:
    async def test() -> None:
        async with site() as (completing, contents):
            contents.errors = [
                UnreachableError("away"),
                UnreachableError("away"),
                DeniedError("no"),
                NoSpaceError("full"),
            ]
            completing.follow([used(1), used(2), used(3)])
            await trio.sleep(200)
            assert [each for _, each in contents.begun] == [used(1), used(1), used(1), used(2), used(3)]
            assert contents.done == [used(3)]

    run(test)
