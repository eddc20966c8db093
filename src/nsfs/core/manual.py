"""Manual mounts: what `nsfs mount`, `nsfs umount` and `nsfs status` ask of the daemon.

Owns: the life of a mount from request to record, and the *lowers*: each view of a domain is mounted once, under a
short name, for all mounts that stack it, and goes with the last of them. Refuses: a target that is no directory or has
a mount of ours already.

Concurrency: one lock around everything that changes lowers, so that a view is never mounted twice or taken away while
another mount is about to stack it; the long part, preparing an image, runs outside of it. Whatever fails or is
cancelled half-way is undone in reverse order before the error leaves.
"""

from __future__ import annotations

import itertools
import logging
import secrets
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import trio

from nsfs.core import worker_api
from nsfs.errors import BusyError, DeniedError, NsfsError
from nsfs.model.mounts import Bind, Driver, Host, MountRecord, Overlay, choose_driver, plan_rootfs, unique_maps
from nsfs.model.policy import Domain, Isolation, parse_patience, resolve_domain, resolve_private_domain

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from msgspec import Struct

    from nsfs.model.policy import Patience

T = TypeVar("T")
log = logging.getLogger(__name__)

_UNDO_DEADLINE = 60.0
"""Seconds for each thing that a mount which fails had begun."""


class Records(Protocol):
    """Where mounts are remembered, durably."""

    def mounts(self) -> list[MountRecord]:
        """All of them."""

    def mount_at(self, target: str) -> MountRecord:
        """The one at `target`; raises NotFoundError."""

    def put_mount(self, record: MountRecord) -> None:
        """Remember one."""

    def delete_mount(self, mount_id: str) -> None:
        """Forget one, if it is known."""


class Workers(Protocol):
    """The domains' workers, started when they are first needed."""

    async def call(
        self,
        domain: Domain,
        method: str,
        params: Struct,
        result: type[T],
        report: Callable[[Struct], Awaitable[None]] | None = None,
    ) -> T:
        """Ask the worker of `domain`."""

    async def end(self, domain: Domain) -> None:
        """End the worker of `domain` and delete the domain's pool."""


@dataclass(frozen=True, slots=True)
class Lower:
    """One view to be mounted once for all who stack it."""

    domain: str
    view: str
    driver: Driver


class Kernel(Protocol):
    """mount(2) and umount(2), done where a hanging call harms nobody. Raises NsfsError."""

    async def mount_lowers(self, lowers: Sequence[tuple[Lower, str]]) -> None:
        """Mount each view at its path; all or none."""

    async def mount_rootfs(self, target: str, plan: Bind | Overlay) -> None:
        """Put the tree at `target`."""

    async def mount_front(self, record: MountRecord, maps: Sequence[worker_api.MapInfo]) -> None:
        """Serve the tree at `record.target` from a process of its own, without root."""

    async def unmount(self, paths: Sequence[str], *, force: bool) -> None:
        """Take mounts away, in order; BusyError where somebody uses one, unless `force`."""

    async def check_target(self, target: str) -> None:
        """Raise unless `target` is a directory that can be mounted on."""

    def mounted(self) -> set[str]:
        """Every path at which something is mounted now."""

    def tree_path(self, domain: str, tree: str) -> str:
        """Where the FUSE tree of a mount shows."""

    def lower_path(self, name: str) -> str:
        """Where the lower of that short name is mounted."""

    def make_upper(self, mount_id: str) -> tuple[str, str]:
        """Fresh (upper, work) directories for a writable mount."""

    def drop_upper(self, mount_id: str) -> None:
        """Delete them."""

    @property
    def empty(self) -> str:
        """An empty directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """A request for a mount, as the control API states it."""

    reference: str
    target: str
    namespace: str
    isolation: str | None
    platform: str | None
    driver: str
    writable: bool
    on_error: str


class Lowers:
    """Which views are mounted under which short names, and by how many mounts they are stacked."""

    def __init__(self, kernel: Kernel, workers: Workers) -> None:
        self._kernel = kernel
        self._workers = workers
        self._names: dict[Lower, str] = {}
        self._users: dict[Lower, int] = {}

    async def acquire(self, lowers: Sequence[Lower]) -> list[str]:
        """Mount what is not mounted yet; gives the paths in the order of `lowers`, which are distinct."""
        taken = set(self._names.values())
        free = (name for name in (f"{number:x}" for number in itertools.count()) if name not in taken)
        fresh = {lower: next(free) for lower in lowers if lower not in self._names}
        await self._tell("ShowViews", list(fresh))
        await self._kernel.mount_lowers([(lower, self._kernel.lower_path(name)) for lower, name in fresh.items()])
        self._names |= fresh
        for lower in lowers:
            self._users[lower] = self._users.get(lower, 0) + 1
        return [self._kernel.lower_path(self._names[lower]) for lower in lowers]

    async def release(self, lowers: Sequence[Lower]) -> None:
        """Count down; unmount what nobody stacks any more."""
        idle: list[Lower] = []
        for lower in lowers:
            self._users[lower] -= 1
            if not self._users[lower]:
                del self._users[lower]
                idle.append(lower)
        if idle:
            paths = [self._kernel.lower_path(self._names.pop(lower)) for lower in idle]
            await self._kernel.unmount(paths, force=True)
            await self._tell("HideViews", idle)

    async def _tell(self, method: str, lowers: Sequence[Lower]) -> None:
        for domain in {lower.domain for lower in lowers}:
            names = [lower.view for lower in lowers if lower.domain == domain]
            params = worker_api.Views(names=names)
            await self._workers.call(Domain(domain, Isolation.SHARED), method, params, worker_api.Empty)


class ManualMounts:
    """The service."""

    def __init__(
        self, records: Records, workers: Workers, kernel: Kernel, host: Host, default: Isolation = Isolation.ISOLATED
    ) -> None:
        self._records = records
        self._workers = workers
        self._kernel = kernel
        self._host = host
        self._default = default
        self._lowers = Lowers(kernel, workers)
        self._lock = trio.Lock()
        self._claimed: set[str] = set()

    def domain_for(self, namespace: str, isolation: str | None, mount_id: str = "inspect") -> Domain:
        """The domain of a request; a user who is not root has only one."""
        if not self._host.root:
            return resolve_private_domain(isolation)
        return resolve_domain(namespace, isolation, self._default, mount_id)

    def records(self) -> list[MountRecord]:
        """All mounts there are."""
        return self._records.mounts()

    def domain_of(self, record: MountRecord) -> Domain:
        """The domain that serves a mount."""
        return Domain(record.domain, Isolation.POD if record.transient else Isolation.SHARED)

    def named_domain(self, name: str) -> Domain:
        """The domain of that name, for questions that need no more than its name."""
        return Domain(name, Isolation.SHARED)

    async def mount(self, wish: Wish, report: Callable[[Struct], Awaitable[None]]) -> MountRecord:
        """Make `wish` come true; raises NsfsError with nothing left behind."""
        driver = choose_driver(wish.driver, self._host)
        patience = parse_patience(wish.on_error)
        mount_id = secrets.token_hex(8)
        domain = self.domain_for(wish.namespace, wish.isolation, mount_id)
        if wish.writable and not self._host.root:
            raise DeniedError("a writable mount needs root: the kernel's overlay", hint="leave --rw away")
        async with AsyncExitStack() as undo:
            self._claim(wish.target, undo)
            await self._kernel.check_target(wish.target)
            if domain.transient:
                _push_undo(undo, self._workers.end, domain)
            params = worker_api.Prepare(reference=wish.reference, platform=wish.platform)
            image = await self._workers.call(domain, "Prepare", params, worker_api.Prepared, report)
            record = _record(mount_id, wish, domain, driver, patience, image)
            async with self._lock:
                await self._build(record, image, undo)
                self._records.put_mount(record)
            undo.pop_all()
            self._claimed.discard(wish.target)
        log.info("mounted %s at %s", record.reference, record.target)
        return record

    def _claim(self, target: str, undo: AsyncExitStack) -> None:
        if target in self._claimed or any(record.target == target for record in self._records.mounts()):
            raise BusyError(f"nsfs has a mount there already: {target}", hint=f"nsfs umount {target}")
        self._claimed.add(target)
        undo.callback(self._claimed.discard, target)

    async def _build(self, record: MountRecord, image: worker_api.Prepared, undo: AsyncExitStack) -> None:
        infos = {info.id: info for info in image.maps}
        if not self._host.root:
            await self._kernel.mount_front(record, [infos[map_id] for map_id in record.maps])
            return
        if record.driver == Driver.FUSE:
            lowers = [await self._show_tree(record, [infos[map_id] for map_id in record.maps], undo)]
            marks = False
        else:
            views = _lowers_of(record)
            lowers = await self._lowers.acquire(views)
            _push_undo(undo, self._lowers.release, views)
            marks = any(infos[map_id].marks for map_id in record.maps)
        upper = None
        if record.writable:
            upper = self._kernel.make_upper(record.id)
            undo.callback(self._kernel.drop_upper, record.id)
        plan = plan_rootfs(lowers, marks=marks, empty=self._kernel.empty, upper=upper)
        await self._kernel.mount_rootfs(record.target, plan)

    async def _show_tree(self, record: MountRecord, maps: list[worker_api.MapInfo], undo: AsyncExitStack) -> str:
        domain = self.domain_of(record)
        tree = worker_api.Tree(id=record.id, maps=maps, suffix=record.suffix)
        await self._workers.call(domain, "ShowTree", tree, worker_api.Empty)
        _push_undo(undo, self._hide_tree, record)
        return self._kernel.tree_path(record.domain, record.id)

    async def _hide_tree(self, record: MountRecord) -> None:
        await self._workers.call(
            self.domain_of(record), "HideTree", worker_api.TreeGone(id=record.id), worker_api.Empty
        )

    async def umount(self, target: str, *, force: bool) -> None:
        """Take away the mount at `target`; raises NotFoundError, BusyError."""
        record = self._records.mount_at(target)
        async with self._lock:
            if target in self._kernel.mounted():
                await self._kernel.unmount([target], force=force)
            await self._forget(record)
        log.info("unmounted %s", target)

    async def forget_gone(self) -> int:
        """Give up what was unmounted by others than us (umount(8)); gives how many mounts there are now."""
        records = self._records.mounts()
        mounted = self._kernel.mounted()
        left = len(records)
        for record in records:
            if record.target not in mounted and record.target not in self._claimed:
                async with self._lock:
                    await self._forget(record)
                left -= 1
        return left + len(self._claimed)

    async def _forget(self, record: MountRecord) -> None:
        self._records.delete_mount(record.id)
        if record.writable:
            self._kernel.drop_upper(record.id)
        if not self._host.root:
            return
        try:
            if record.driver == Driver.FUSE:
                await self._hide_tree(record)
            else:
                await self._lowers.release(_lowers_of(record))
            if record.transient:
                await self._workers.end(self.domain_of(record))
        except NsfsError as error:
            log.warning("unmounted %s, but something of it is left: %s", record.target, error)

    async def sweep(self) -> None:
        """At start: the connections of a daemon that died are gone; take their mounts and records away."""
        for record in self._records.mounts():
            if record.target in self._kernel.mounted():
                await self._kernel.unmount([record.target], force=True)
            self._records.delete_mount(record.id)
            log.warning("took away a mount of a daemon that died: %s", record.target)

    async def end_all(self) -> None:
        """At the end of the daemon: take every mount away, in use or not."""
        for record in self._records.mounts():
            await self.umount(record.target, force=True)


def _push_undo(undo: AsyncExitStack, work: Callable[[T], Awaitable[None]], what: T) -> None:
    """Have `work` done when `undo` ends, also for a caller who was cancelled: then nothing could be awaited else."""

    async def shielded() -> None:
        with trio.move_on_after(_UNDO_DEADLINE, shield=True):
            await work(what)

    undo.push_async_callback(shielded)


def _record(
    mount_id: str, wish: Wish, domain: Domain, driver: Driver, patience: Patience, image: worker_api.Prepared
) -> MountRecord:
    return MountRecord(
        id=mount_id,
        target=wish.target,
        reference=image.reference,
        digest=image.digest,
        namespace=wish.namespace,
        domain=domain.name,
        transient=domain.transient,
        driver=driver,
        writable=wish.writable,
        files=image.files,
        size=image.size,
        maps=unique_maps([info.id for info in image.maps]),
        suffix=patience.suffix,
    )


def _lowers_of(record: MountRecord) -> list[Lower]:
    driver = Driver(record.driver)
    return [Lower(record.domain, map_id + record.suffix, driver) for map_id in record.maps]
