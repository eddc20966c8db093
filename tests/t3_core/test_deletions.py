"""When a namespace ends because containerd's did, and when nothing may be concluded."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

import trio

import trio_tests
from nsfs.core.deletions import Deletions
from nsfs.errors import UnreachableError
from nsfs.model.namespaces import Holding
from nsfs.model.snapshot import Kind, Record

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from nsfs.core.namespaces import Namespaces


def container(namespace: str) -> Record:
    said: dict[str, Any] = {"snapshotter": "nsfs", "parent": "", "labels": {}, "created": 0, "updated": 0}
    return Record(name=f"{namespace}/1/c", namespace=namespace, id=1, kind=Kind.ACTIVE, **said)


class FakeNamespaces:
    """`came` by containerd, `busy` with containers; `ended` in order."""

    def __init__(self, *came: str, busy: tuple[str, ...] = ()) -> None:
        self.came = set(came)
        self.busy = busy
        self.ended: list[str] = []

    async def came_by_containerd(self) -> set[str]:
        return self.came - set(self.ended)

    async def holdings(self) -> dict[str, Holding]:
        return {name: Holding(namespace=name, snapshots=[container(name)]) for name in self.busy}

    async def end_gone(self, namespace: str) -> bool:
        await trio.sleep(1)
        self.ended.append(namespace)
        return True


class FakeContainerd:
    """Has namespaces `there`; answers nobody unless `up`."""

    def __init__(self, *there: str) -> None:
        self.there = set(there)
        self.up = True
        self.snapshotter = "/nsfs.sock"
        self.events, self.deleted = trio.open_memory_channel[str](10)
        self.connections = 0

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[FakeContainerd]:
        if not self.up:
            raise UnreachableError("nobody is there")
        self.connections += 1
        yield self

    async def has_snapshotter_at(self, socket: str) -> bool:
        return socket == self.snapshotter

    async def namespaces(self) -> set[str]:
        await trio.sleep(0.1)
        if not self.up:
            raise UnreachableError("nobody is there any more")
        return set(self.there)

    @asynccontextmanager
    async def deletions(self) -> AsyncIterator[trio.MemoryReceiveChannel[str]]:
        yield self.deleted

    def delete(self, name: str) -> None:
        self.there.discard(name)
        self.events.send_nowait(name)


async def a_while() -> None:
    await trio.sleep(10)


def watching(
    containerd: FakeContainerd, namespaces: FakeNamespaces, body: Callable[[], Awaitable[None]] = a_while
) -> list[str]:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Deletions(containerd.connect, "/nsfs.sock", cast("Namespaces", namespaces)).watch)
            await body()
            nursery.cancel_scope.cancel()

    trio_tests.run(main)
    return namespaces.ended


def test_what_went_unnoticed_ends_at_the_beginning() -> None:
    assert watching(FakeContainerd("a", "new"), FakeNamespaces("a", "b", "c")) == ["b", "c"]


def test_a_containerd_without_namespaces_ends_nothing() -> None:
    assert watching(FakeContainerd(), FakeNamespaces("a", "b")) == []


def test_another_containerd_ends_nothing(caplog: Any) -> None:
    containerd = FakeContainerd("moby")
    containerd.snapshotter = "/elsewhere.sock"
    assert watching(containerd, FakeNamespaces("k8s.io")) == []
    assert "that containerd has no snapshotter at /nsfs.sock" in caplog.text
    caplog.clear()


def test_nobody_is_asked_before_containerd_asked_for_anything() -> None:
    containerd = FakeContainerd("a")
    assert watching(containerd, FakeNamespaces()) == []
    assert containerd.connections == 0


def test_what_still_has_containers_is_kept_until_containerd_says_so(caplog: Any) -> None:
    containerd = FakeContainerd("a")

    async def body() -> None:
        await trio.sleep(10)
        assert namespaces.ended == []
        containerd.delete("b")
        await trio.sleep(10)

    namespaces = FakeNamespaces("a", "b", busy=("b",))
    assert watching(containerd, namespaces, body) == ["b"]
    assert "namespace b is gone from containerd, its containers' snapshots are not" in caplog.text
    caplog.clear()


def test_each_deletion_ends_one_also_the_last() -> None:
    containerd = FakeContainerd("a", "b")

    async def body() -> None:
        await trio.sleep(5)
        for name in ("b", "a", "never-here"):
            containerd.delete(name)
        await trio.sleep(10)

    assert watching(containerd, FakeNamespaces("a", "b"), body) == ["b", "a", "never-here"]


def test_a_name_that_is_there_again_stays() -> None:
    containerd = FakeContainerd("a", "b")

    async def body() -> None:
        await trio.sleep(5)
        containerd.delete("b")
        containerd.there.add("b")
        await trio.sleep(10)

    assert watching(containerd, FakeNamespaces("a", "b"), body) == []


def test_an_unreachable_containerd_ends_nothing_and_is_waited_for(caplog: Any) -> None:
    containerd = FakeContainerd("a")
    containerd.up = False

    async def body() -> None:
        await trio.sleep(60)
        assert namespaces.ended == []
        containerd.up = True
        await trio.sleep(10)

    namespaces = FakeNamespaces("a", "b")
    assert watching(containerd, namespaces, body) == ["b"]
    assert caplog.text.count("not noticed now: nobody is there") == 1
    caplog.clear()


def test_an_event_that_was_lost_is_made_good() -> None:
    containerd = FakeContainerd("a", "b")

    async def body() -> None:
        await trio.sleep(5)
        containerd.there.discard("b")
        await trio.sleep(320)

    assert watching(containerd, FakeNamespaces("a", "b"), body) == ["b"]
    assert containerd.connections == 1
