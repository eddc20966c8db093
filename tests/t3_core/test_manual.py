"""Manual mounts whose caller leaves half-way."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, TypeVar

import trio
import trio.testing

from nsfs.core import worker_api
from nsfs.core.manual import Lower, ManualMounts, Wish
from nsfs.errors import NotFoundError
from nsfs.model.mounts import Bind, Host, MountRecord, Overlay

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nsfs.model.policy import Domain

T = TypeVar("T")
HOST = Host(root=True, erofs=True, file_backed=True)
MAPS = [worker_api.MapInfo(id=f"{n:032x}", path=f"/maps/{n}", marks=False) for n in range(2)]


class NoRecords:
    def mounts(self) -> list[MountRecord]:
        return []

    def mount_at(self, target: str) -> MountRecord:
        raise NotFoundError(target)

    def put_mount(self, record: MountRecord) -> None:
        raise AssertionError(record)

    def delete_mount(self, mount_id: str) -> None:
        raise AssertionError(mount_id)


class Workers:
    """Their calls take a moment, as real ones do; Prepare waits for ever if it `stalls`."""

    def __init__(self, *, stalls: bool = False) -> None:
        self.said: list[str] = []
        self._stalls = stalls

    async def call(self, domain: Domain, method: str, params: object, result: type[T], report: object = None) -> T:
        del domain, params, report
        await trio.lowlevel.checkpoint()
        self.said.append(method)
        if method != "Prepare":
            return result()
        if self._stalls:
            await trio.sleep_forever()
        image: Any = worker_api.Prepared(reference="r", digest="d", platform="p", files=1, size=1, maps=MAPS)
        return image  # type: ignore[no-any-return]

    async def end(self, domain: Domain) -> None:
        await trio.lowlevel.checkpoint()
        self.said.append(f"end {domain.isolation}")


class HangingKernel:
    """Mounts views; never comes to the end of a root filesystem."""

    def __init__(self) -> None:
        self.paths: set[str] = set()

    async def mount_lowers(self, lowers: Sequence[tuple[Lower, str]]) -> None:
        await trio.lowlevel.checkpoint()
        self.paths |= {path for _, path in lowers}

    async def mount_rootfs(self, target: str, plan: Bind | Overlay) -> None:
        del target, plan
        await trio.sleep_forever()

    async def unmount(self, paths: Sequence[str], *, force: bool) -> None:
        assert force
        await trio.lowlevel.checkpoint()
        self.paths -= set(paths)

    async def check_target(self, target: str) -> None:
        del target

    async def mount_front(self, record: MountRecord, maps: Sequence[worker_api.MapInfo]) -> None:
        raise AssertionError(record, maps)

    def mounted(self) -> set[str]:
        return self.paths

    def tree_path(self, domain: str, tree: str) -> str:
        raise AssertionError(domain, tree)

    def make_upper(self, mount_id: str) -> tuple[str, str]:
        raise AssertionError(mount_id)

    def drop_upper(self, mount_id: str) -> None:
        raise AssertionError(mount_id)

    def lower_path(self, name: str) -> str:
        return f"/l/{name}"

    @property
    def empty(self) -> str:
        return "/l/empty"


def give_up_mounting(workers: Workers, kernel: HangingKernel, isolation: str) -> None:
    """Mount, and leave when nothing happens any more."""
    wish = Wish(
        reference="r",
        target="/t",
        namespace="default",
        isolation=isolation,
        platform=None,
        driver="erofs",
        writable=False,
        on_error="wait",
    )

    async def report(_: object) -> None:
        raise AssertionError

    async def main() -> None:
        manual = ManualMounts(NoRecords(), workers, kernel, HOST)
        with contextlib.suppress(trio.TooSlowError), trio.fail_after(5):
            await manual.mount(wish, report)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_pod_ends_with_the_call_that_made_it() -> None:
    workers = Workers(stalls=True)
    give_up_mounting(workers, HangingKernel(), "pod")
    assert workers.said == ["Prepare", "end pod"]


def test_views_are_taken_away_again() -> None:
    workers, kernel = Workers(), HangingKernel()
    give_up_mounting(workers, kernel, "shared")
    assert kernel.paths == set()
    assert workers.said == ["Prepare", "ShowViews", "HideViews"]
