"""A kernel, workers and records that remember what is there, fail when they are told to, and complain of nonsense.

Every call takes a moment, as real ones do, so that others come in between. A call whose name is in `script` does what
is said there, once: raises an error, or hangs until it is cancelled.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, TypeVar

import trio

from nsfs.core import worker_api
from nsfs.core.manual import Kernel, Lowers, ManualMounts, Wish
from nsfs.core.scopes import Scopes
from nsfs.errors import BusyError, NotFoundError, UnreachableError
from nsfs.model.mounts import Bind, Host, Lower, MountRecord, Overlay, Rootfs
from nsfs.model.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from nsfs.model.policy import Domain

T = TypeVar("T")

ROOT = Host(root=True, erofs=True, file_backed=True)
USER = Host(root=False, erofs=True, file_backed=True)
HANG = "hang"
FAIL = "fail"


class Script:
    """What goes wrong: the next call of a name does the first thing in its list."""

    def __init__(self) -> None:
        self.faults: defaultdict[str, list[str]] = defaultdict(list)
        self.calls: list[str] = []

    async def play(self, name: str) -> None:
        self.calls.append(name)
        await trio.sleep(0.01)
        fault = self.faults[name].pop(0) if self.faults[name] else ""
        if fault == HANG:
            await trio.sleep_forever()
        if fault == FAIL:
            raise UnreachableError(f"{name} fails")


class FakeRecords:
    """As store.meta."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.known: dict[str, MountRecord] = {}
        self.stacked: dict[str, list[Lower]] = {}

    def stacks(self) -> dict[str, list[Lower]]:
        return dict(self.stacked)

    def put_stack(self, user: str, lowers: Sequence[Lower]) -> None:
        self.stacked[user] = list(lowers)

    def delete_stack(self, user: str) -> None:
        self.stacked.pop(user, None)

    def mounts(self) -> list[MountRecord]:
        return list(self.known.values())

    def mount_at(self, target: str) -> MountRecord:
        for record in self.known.values():
            if record.target == target:
                return record
        raise NotFoundError(f"nothing of nsfs is mounted there: {target}")

    def put_mount(self, record: MountRecord) -> None:
        if self.script.faults["put_mount"]:
            self.script.faults["put_mount"].clear()
            raise UnreachableError("put_mount fails")
        self.known[record.id] = record

    def delete_mount(self, mount_id: str) -> None:
        self.known.pop(mount_id, None)


class FakeWorkers:
    """Images are called by numbers: image "3" has the layers of map 3 and of each number below."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.shown: set[tuple[str, str]] = set()
        self.trees: set[tuple[str, str]] = set()
        self.pods: set[str] = set()

    async def call(self, domain: Domain, method: str, params: Any, result: type[T], report: object = None) -> Any:
        await self.script.play(method)
        match method:
            case "Prepare":
                if domain.transient:
                    self.pods.add(domain.name)
                return prepared(int(params.reference))
            case "ShowViews":
                assert params.names
                self.shown |= {(domain.name, name) for name in params.names}
            case "HideViews":
                assert params.names
                self.shown -= {(domain.name, name) for name in params.names}
            case "ShowTree":
                self.trees.add((domain.name, params.id))
            case "HideTree":
                self.trees.discard((domain.name, params.id))
            case _:
                raise AssertionError(method)
        return result()

    async def rouse(self, domain: Domain) -> None:
        await trio.lowlevel.checkpoint()

    async def end(self, domain: Domain) -> None:
        assert domain.transient
        await self.script.play("end")
        self.pods.discard(domain.name)


def prepared(number: int) -> worker_api.Prepared:
    maps = [worker_api.MapInfo(id=f"{n:032x}", path=f"/maps/{n}", marks=n == 1) for n in range(number, -1, -1)]
    return worker_api.Prepared(
        reference=f"image {number}", digest="sha256:0", platform="linux/amd64", files=1, size=1, maps=maps
    )


class FakeKernel(Kernel):
    """Mount points and what is stacked there, the topmost last."""

    def __init__(self, script: Script, workers: FakeWorkers) -> None:
        self.script = script
        self.workers = workers
        self.stacks: defaultdict[str, list[object]] = defaultdict(list)
        self.uppers: set[str] = set()
        self.busy: set[str] = set()
        self.warmed: list[list[tuple[int, int]]] = []

    async def mount(
        self, lowers: Sequence[tuple[Lower, str]], rootfs: Rootfs | None = None, *, read_ahead: int = 0
    ) -> None:
        await self._mount_lowers(lowers)
        try:
            if rootfs is not None:
                await self._mount_rootfs(*rootfs)
        except BaseException:
            for _, path in lowers:
                self.stacks[path].pop()
            raise

    async def _mount_lowers(self, lowers: Sequence[tuple[Lower, str]]) -> None:
        if lowers:
            await self.script.play("mount_lowers")
        for lower, path in lowers:
            assert (lower.domain, lower.view) in self.workers.shown, "its files are not there"
            assert path not in self.mounted(), "it hides what is mounted there"
            self.stacks[path].append(lower)

    def warm(self, lowers: Sequence[tuple[Lower, str]], extents: Sequence[tuple[int, int]], read_ahead: int) -> None:
        self.warmed.append(list(extents))
        assert all(path in self.mounted() for _, path in lowers), "nothing is there"

    async def _mount_rootfs(self, target: str, plan: Bind | Overlay) -> None:
        sources = [plan.source] if isinstance(plan, Bind) else plan.lowers
        await self.script.play("mount_rootfs")
        for path in sources:
            assert path == self.empty or path in self.mounted() or path.startswith("/trees/"), "nothing is there"
        self.stacks[target].append(plan)

    async def mount_front(self, record: MountRecord, maps: Sequence[worker_api.MapInfo]) -> None:
        await self.script.play("mount_front")
        self.stacks[record.target].append(maps)

    async def unmount(self, paths: Sequence[str], *, force: bool) -> None:
        await self.script.play("unmount")
        for path in paths:
            if path in self.busy and not force:
                raise BusyError(f"in use: {path}")
            if self.stacks[path]:
                self.stacks[path].pop()

    async def check_target(self, target: str) -> None:
        await self.script.play("check_target")

    def mounted(self) -> set[str]:
        return {path for path, stack in self.stacks.items() if stack}

    def tree_path(self, domain: str, tree: str) -> str:
        return f"/trees/{domain}/{tree}"

    def lower_path(self, name: str) -> str:
        return f"/l/{name}"

    async def make_upper(self, mount_id: str) -> tuple[str, str]:
        self.uppers.add(mount_id)
        await self.script.play("make_upper")
        return f"/uppers/{mount_id}/fs", f"/uppers/{mount_id}/work"

    async def drop_upper(self, mount_id: str) -> None:
        await self.script.play("drop_upper")
        self.uppers.discard(mount_id)

    def mounted_lowers(self) -> dict[str, Lower]:
        tops = {path.removeprefix("/l/"): stack[-1] for path, stack in self.stacks.items() if stack}
        return {name: lower for name, lower in tops.items() if isinstance(lower, Lower)}

    async def sweep(self, domains: Collection[str], names: Collection[str]) -> None:
        await self.script.play("sweep")
        for path in self.mounted():
            if path.startswith("/l/") and path.removeprefix("/l/") not in names:
                self.stacks[path].clear()

    @property
    def empty(self) -> str:
        return "/l/empty"


class Site:
    """A daemon's manual mounts over fakes."""

    def __init__(self, host: Host = ROOT) -> None:
        self.script = Script()
        self.records = FakeRecords(self.script)
        self.workers = FakeWorkers(self.script)
        self.kernel = FakeKernel(self.script, self.workers)
        self.host = host
        self.restart()

    def restart(self) -> None:
        """As after the death of the daemon and of its workers: what is mounted and on disk stays."""
        self.follow()
        self.workers.shown.clear()
        self.workers.trees.clear()

    def follow(self) -> None:
        """As after the death of the daemon alone."""
        self.lowers = lowers = Lowers(self.kernel, self.workers, self.records)
        scopes = Scopes(Policy(), str, root=self.host.root)
        self.manual = ManualMounts(self.records, self.workers, self.kernel, self.host, scopes, lowers)

    async def mount(self, target: str = "/t", image: int = 1, **choices: Any) -> MountRecord:
        usual = {"isolation": "shared", "driver": "auto", "writable": False, "on_error": "wait", "profile": "use"}
        chosen: dict[str, Any] = {**usual, **choices}
        wish = Wish(reference=str(image), target=target, namespace="default", platform=None, **chosen)
        return (await self.manual.mount(wish, hear)).record

    def check(self) -> None:
        """What is mounted and shown is what the records need, once each."""
        records = self.records.mounts() if self.host.root else []
        trees = {(record.domain, record.id) for record in records if record.driver == "fuse"}
        needed = {
            Lower(record.domain, map_id + record.suffix, record.driver)  # type: ignore[arg-type]
            for record in records
            if record.driver != "fuse"
            for map_id in record.maps
        }
        lowers = [stack for path, stack in self.kernel.stacks.items() if path.startswith("/l/") and stack]
        assert all(len(stack) == 1 for stack in lowers)
        assert len(lowers) == len(needed)
        assert {stack[0] for stack in lowers} == needed
        assert self.workers.shown == {(lower.domain, lower.view) for lower in needed}
        assert self.workers.trees == trees
        stacked = {record.id for record in records if record.driver != "fuse" and record.maps}
        assert {user for user, lowers in self.records.stacked.items() if lowers} == stacked
        assert self.kernel.uppers == {record.id for record in records if record.writable}
        assert self.workers.pods == {record.domain for record in records if record.transient}
        targets = {path for path in self.kernel.mounted() if not path.startswith("/l/")}
        assert targets == {record.target for record in self.records.mounts()}


async def hear(_: object) -> None:
    """Somebody who is told of progress."""
