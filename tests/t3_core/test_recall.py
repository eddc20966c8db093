"""What is fenced off is taken back from a containerd that is slow, away, or still uses it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

import trio_tests
from nsfs.core.ledger import Ledger
from nsfs.core.recall import Recall
from nsfs.errors import BusyError, UnreachableError
from nsfs.model.lazy import LazyLayer, State
from nsfs.model.snapshot import Change, Kind, Record

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

CHAIN, TOP, MANIFEST = (f"sha256:{digit * 64}" for digit in "abc")
FENCED = Record(
    snapshotter="nsfs",
    name="red/lazy/x",
    namespace="red",
    id=1,
    kind=Kind.COMMITTED,
    parent="",
    labels={"containerd.io/snapshot/cri.image-ref": "registry/x:1@sha256:0"},
    created=0,
    updated=0,
    layer=LazyLayer(reference=f"registry/x:1@{MANIFEST}", blob=CHAIN, chain=CHAIN, state=State.FENCED),
)
ABOVE = Record(
    snapshotter="nsfs",
    name=f"red/7/{TOP}",
    namespace="red",
    id=2,
    kind=Kind.COMMITTED,
    parent=FENCED.name,
    labels={},
    created=0,
    updated=0,
)


class Memory:
    """Two snapshots, one on the other."""

    def snapshots(self) -> list[Record]:
        return [FENCED, ABOVE]

    def last_snapshot(self) -> int:
        return 2

    def change_snapshots(self, change: Change) -> None:
        pass


class Containerd:
    """Answers `images` to one question after another; raises what is an error, and goes on with the last one."""

    def __init__(self, *images: int | Exception, busy: int = 0) -> None:
        self.images = list(images)
        self.busy = busy
        self.asked: list[tuple[str, str, str]] = []
        self.removed: list[tuple[str, str, tuple[str, ...], float]] = []

    async def delete_images(self, namespace: str, name: str, manifest: str) -> int:
        self.asked.append((namespace, name, manifest))
        said = self.images.pop(0) if len(self.images) > 1 else self.images[0]
        if isinstance(said, Exception):
            raise said
        return said

    async def remove_snapshots(self, namespace: str, snapshotter: str, keys: Sequence[str]) -> None:
        if self.busy:
            self.busy -= 1
            raise BusyError("somebody stands on it")
        self.removed.append((namespace, snapshotter, tuple(keys), trio.current_time()))


def recalling(containerd: Containerd, body: Callable[[Ledger], Awaitable[None]]) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            ledger = Ledger(Memory())
            Recall(ledger, containerd, nursery).begin(FENCED)
            await body(ledger)
            nursery.cancel_scope.cancel()

    trio_tests.run(main)


async def some_minutes(_ledger: Ledger) -> None:
    await trio.sleep(500)


def test_the_image_goes_and_what_stands_on_the_layer_from_the_top() -> None:
    containerd = Containerd(1)
    recalling(containerd, some_minutes)
    assert containerd.asked == [("red", "registry/x:1@sha256:0", MANIFEST)]
    ((namespace, snapshotter, keys, _),) = containerd.removed
    assert (namespace, snapshotter, keys) == ("red", "nsfs", (TOP, CHAIN))


def test_a_pull_that_goes_on_is_let_finish() -> None:
    containerd = Containerd(0, 0, 0, 1)
    recalling(containerd, some_minutes)
    assert len(containerd.asked) == 4
    assert len(containerd.removed) == 1


def test_an_image_that_never_comes_is_not_waited_for_for_ever() -> None:
    containerd = Containerd(0)
    recalling(containerd, some_minutes)
    ((*_, when),) = containerd.removed
    assert 60 <= when < 180


@pytest.mark.parametrize(
    "containerd", [Containerd(UnreachableError("away"), UnreachableError("away"), 1), Containerd(1, 0, 0, busy=2)]
)
def test_what_fails_is_tried_again_and_said_once(containerd: Containerd, caplog: pytest.LogCaptureFixture) -> None:
    recalling(containerd, some_minutes)
    ((*_, when),) = containerd.removed
    assert when < 10
    assert [record.message for record in caplog.records if "not taken back" in record.message] != []
    assert len(caplog.records) == 2
    caplog.clear()


def test_what_containerd_removes_meanwhile_is_done() -> None:
    containerd = Containerd(UnreachableError("away"))

    async def remove(ledger: Ledger) -> None:
        await trio.sleep(2)
        async with ledger.lock:
            await ledger.carry_out(Change(gone=ABOVE))
            await ledger.carry_out(Change(gone=FENCED))
        await trio.sleep(300)

    recalling(containerd, remove)
    assert len(containerd.asked) < 4
    assert containerd.removed == []
