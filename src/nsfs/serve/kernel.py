"""The mounts of a host, as `core.manual` asks for them.

Owns the translation of lowers, stacks and fronts into steps of `serve.mounts`, and where they go. Whatever may wait for
a view's bytes is done by processes of the fork server and given up at a deadline; directories are made, looked at and
deleted in threads. What fails or is cancelled leaves nothing mounted.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import trio

from nsfs.core.manual import Kernel
from nsfs.errors import DeniedError, NoSpaceError, NotFoundError, NsfsError, UnreachableError, UsageError
from nsfs.model.mounts import Bind, Driver, Lower
from nsfs.model.shift import render_map
from nsfs.serve import mounts
from nsfs.serve.fronts import FrontArgs, Fronts
from nsfs.serve.warming import Warming, WarmView
from nsfs.store.trees import delete_tree

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from nsfs.core import worker_api
    from nsfs.model.mounts import Host, MountRecord, Overlay, Rootfs
    from nsfs.model.shift import Shift
    from nsfs.serve.forkclient import ForkServer
    from nsfs.store.layout import Layout

READ_AHEAD_KB = 2048
"""Of FUSE and EROFS: sequential reads of local content reach 1 GB/s with it, 0.3 with the kernel's 128."""
_START = 20.0
"""Seconds in which less is read ahead of a start, and so what is read in a sequence comes in small pieces, or more:
longer than most."""
_LOOK_EVERY = 1.0
_DEADLINE = 60.0
_CHECK_DEADLINE = 5.0
_CHECKS = 8
"""Directories that are looked at at a time."""
_OUR_TYPES = {"overlay", "erofs", mounts.FUSE_TYPE}
_EMPTY = "empty"


class HostKernel(Kernel):
    """The kernel of a host where we are root."""

    def __init__(self, layout: Layout, host: Host, server: ForkServer) -> None:
        self._layout = layout
        self._host = host
        self._server = server
        self.warming = Warming(server)
        self._checks = trio.CapacityLimiter(_CHECKS)
        self._starting: deque[tuple[float, str]] = deque()
        """When which views are read far ahead again: trio's time, name as a bdi."""
        os.makedirs(self.empty, 0o755, exist_ok=True)

    @property
    def empty(self) -> str:
        """See Kernel."""
        return self.lower_path(_EMPTY)

    def lower_path(self, name: str) -> str:
        """See Kernel."""
        return os.path.join(self._layout.lowers, name)

    def tree_path(self, domain: str, tree: str) -> str:
        """See Kernel."""
        return self._layout.domain_run(domain).fuse_tree(tree)

    async def make_upper(self, mount_id: str) -> tuple[str, str]:
        """See Kernel."""
        upper, work = self._layout.upper(mount_id), self._layout.work(mount_id)
        await trio.to_thread.run_sync(_make_directories, upper, work)
        return upper, work

    async def drop_upper(self, mount_id: str) -> None:
        """See Kernel."""
        top = os.path.dirname(self._layout.upper(mount_id))
        with suppress(OSError):
            await trio.to_thread.run_sync(delete_tree, top)

    def mounted(self) -> set[str]:
        """See Kernel. What others have mounted over or under ours has another type, mostly."""
        types = {mount.target: mount.fstype for mount in mounts.load_mounts()}
        return {target for target, fstype in types.items() if fstype in _OUR_TYPES}

    async def check_target(self, target: str) -> None:
        """See Kernel."""
        with trio.move_on_after(_CHECK_DEADLINE):
            # A thread that hangs below somebody's mount keeps its slot, so these have slots of their own.
            await trio.to_thread.run_sync(_check_directory, target, abandon_on_cancel=True, limiter=self._checks)
            return
        raise UnreachableError(f"the directory does not answer: {target}", hint="is it below a mount that hangs?")

    def mounted_lowers(self) -> dict[str, Lower]:
        """See Kernel."""
        mounted = mounts.load_mounts()
        found = [(os.path.basename(mount.target), self._lower(mount, mounted)) for mount in mounted]
        return {name: lower for name, lower in found if lower is not None}

    def _lower(self, mount: mounts.MountInfo, mounted: Sequence[mounts.MountInfo]) -> Lower | None:
        """What is mounted there, if it is a lower, by the file of its domain's FUSE filesystem that it shows."""
        if os.path.dirname(mount.target) != self._layout.lowers or mount.is_idmapped:
            return None
        driver = Driver.EROFS if mount.fstype == "erofs" else Driver.FUSE
        path = mount.source
        if driver is Driver.FUSE:
            tops = [each.target for each in mounted if each.device == mount.device and each.root == "/"]
            path = (tops[0] if tops else "") + mount.root
        elif path.startswith("/dev/loop"):
            driver, path = Driver.EROFS_LOOP, mounts.loop_file(path)
        found = self._layout.parse_fuse_view(path)
        return found and Lower(*found, driver)

    async def sweep(self, domains: Collection[str], names: Collection[str]) -> None:
        """See Kernel."""
        keep = {self._layout.domain_run(domain).fuse for domain in domains} | {self.lower_path(name) for name in names}
        ours = (self._layout.lowers + "/", self._layout.domain_runs + "/")
        mounted = [mount.target for mount in mounts.load_mounts()]
        stale = [target for target in mounted if target.startswith(ours) and target not in keep]
        await self.unmount(stale[::-1], force=True)

    async def mount(
        self, lowers: Sequence[tuple[Lower, str]], rootfs: Rootfs | None = None, *, read_ahead: int = 0
    ) -> None:
        """See Kernel."""
        for _, path in lowers:
            os.makedirs(path, 0o755, exist_ok=True)
        steps = [self._step(lower, path, read_ahead or READ_AHEAD_KB) for lower, path in lowers]
        results = await self._mount(tuple(steps if rootfs is None else [*steps, self._rootfs_step(*rootfs)]))
        if read_ahead:
            self._note_starting([name for result in results for name in result.read_ahead_of])

    def warm(self, lowers: Sequence[tuple[Lower, str]], extents: Sequence[tuple[int, int]], read_ahead: int) -> None:
        """See Kernel. Layers without EROFS are left alone: their maps are not what is mounted."""
        views = [
            WarmView(path, self._layout.domain_run(lower.domain).fuse_map(lower.view))
            for lower, path in lowers
            if lower.driver is not Driver.FUSE
        ]
        if views:
            self.warming.begin(views, extents, (read_ahead or READ_AHEAD_KB) << 10)

    def _note_starting(self, names: Sequence[str]) -> None:
        due = trio.current_time() + _START
        self._starting += [(due, name) for name in names]
        with suppress(OSError), open(self._layout.starting, "a", encoding="ascii") as file:
            file.writelines(f"{name}\n" for name in names)

    async def follow_starts(self) -> None:
        """Have views read far ahead again that were mounted for a start a while ago, also by an earlier daemon.

        What others have mounted is theirs, so the names of ours are written down.
        """
        self._take_over_starts()
        while True:
            self._end_starts(trio.current_time())
            await trio.sleep(_LOOK_EVERY)

    def _take_over_starts(self) -> None:
        with suppress(OSError), open(self._layout.starting, encoding="ascii") as file:
            self._starting.extendleft((0.0, name) for name in file.read().split())

    def _end_starts(self, now: float) -> None:
        if not self._starting:
            return
        while self._starting and self._starting[0][0] <= now:
            mounts.set_read_ahead(self._starting.popleft()[1], READ_AHEAD_KB)
        if not self._starting:
            with suppress(OSError):
                os.unlink(self._layout.starting)

    def _step(self, lower: Lower, path: str, read_ahead_kb: int) -> mounts.Step:
        run = self._layout.domain_run(lower.domain)
        if lower.driver is Driver.FUSE:
            return mounts.Bind(target=path, source=run.fuse_layer(lower.view))
        return mounts.Erofs(
            target=path,
            image=run.fuse_map(lower.view),
            device=run.fuse_disk(lower.view),
            direct=self._host.directio,
            loop=lower.driver is Driver.EROFS_LOOP,
            read_ahead_kb=read_ahead_kb,
        )

    async def mount_clones(self, clones: Sequence[tuple[str, str]], shift: Shift) -> None:
        """See core.clones.Kernel."""
        base = self._layout.lowers
        for _, path in clones:
            os.makedirs(path, 0o755, exist_ok=True)
        pairs = tuple((source, path.removeprefix(base + "/")) for source, path in clones)
        step = mounts.Clones(target=base, clones=pairs, uids=render_map(shift.uids), gids=render_map(shift.gids))
        try:
            await self._carry_out((step,))
        except BaseException:
            with trio.CancelScope(shield=True):
                await self.unmount([path for _, path in clones], force=True)
            raise

    def _rootfs_step(self, target: str, plan: Bind | Overlay) -> mounts.Step:
        if isinstance(plan, Bind):
            return mounts.Bind(target=target, source=plan.source, guarded=True)
        base = self._layout.lowers
        lowers = tuple(path.removeprefix(base + "/") for path in plan.lowers)
        return mounts.Overlay(target=target, base=base, lowers=lowers, upper=plan.upper, work=plan.work, guarded=True)

    async def _mount(self, steps: tuple[mounts.Step, ...]) -> list[mounts.StepResult]:
        """Carry out all of `steps` or none; what was mounted at their targets before stays."""
        if not steps:
            return []
        before = {mount.id for mount in mounts.load_mounts()}
        try:
            return await self._carry_out(steps)
        except BaseException:
            targets = {step.target for step in steps}
            fresh = [each.target for each in mounts.load_mounts() if each.target in targets and each.id not in before]
            with trio.CancelScope(shield=True):
                await self.unmount(fresh[::-1], force=True)
            raise

    async def mount_front(self, record: MountRecord, maps: Sequence[worker_api.MapInfo]) -> None:
        """See Kernel."""
        raise NotImplementedError("root mounts trees of its domains, and needs no front")

    async def unmount(self, paths: Sequence[str], *, force: bool) -> None:
        """See Kernel."""
        if paths:
            self.warming.end(paths)
            await self._carry_out(tuple(mounts.Umount(target=path, detach=force) for path in paths))

    async def _carry_out(self, steps: tuple[mounts.Step, ...]) -> list[mounts.StepResult]:
        return await mounts.carry_out(self._server, mounts.MountPlan(steps), deadline=_DEADLINE)


class UserKernel(HostKernel):
    """The kernel of a host where we are somebody: one FUSE mount per image, by fusermount3, and nothing else."""

    def __init__(
        self, layout: Layout, host: Host, server: ForkServer, bitmap: Callable[[str], int], fronts: Fronts
    ) -> None:
        super().__init__(layout, host, server)
        self._bitmap = bitmap
        self._fronts = fronts

    async def check_target(self, target: str) -> None:
        """See Kernel."""
        mounts.check_fuse_as_user()
        await super().check_target(target)
        if not os.access(target, os.W_OK):
            raise DeniedError(f"not a directory that you may mount on: {target}", hint="take one of your own")

    async def mount_front(self, record: MountRecord, maps: Sequence[worker_api.MapInfo]) -> None:
        """See Kernel."""
        args = FrontArgs(
            domain=self._layout.domain(record.domain).path,
            worker=self._layout.domain_run(record.domain).socket,
            maps=tuple(info.path for info in maps),
            views=tuple(info.id + record.suffix for info in maps),
            info=record.describe(),
        )
        fd = await trio.to_thread.run_sync(mounts.mount_fuse_as_user, record.target)
        try:
            await self._fronts.start(record.target, args, fd, self._bitmap(record.domain))
        except BaseException:
            with trio.CancelScope(shield=True):
                await self.unmount([record.target], force=True)
            raise
        finally:
            os.close(fd)

    async def unmount(self, paths: Sequence[str], *, force: bool) -> None:
        """See Kernel."""
        for path in paths:
            await trio.to_thread.run_sync(partial(mounts.unmount_as_user, path, detach=force))
            if force:
                self._fronts.end(path)


def _check_directory(path: str) -> None:
    try:
        found = os.stat(path)
        real = os.path.realpath(path)
    except FileNotFoundError:
        raise NotFoundError(f"no such directory: {path}", hint=f"mkdir -p {path}") from None
    except OSError as error:
        raise UsageError(f"cannot be mounted on: {path}: {error.strerror}") from None
    if not stat.S_ISDIR(found.st_mode):
        raise UsageError(f"not a directory: {path}")
    if real != path:
        raise UsageError(f"not the directory's own path: {path}", hint=f"it is {real}")


def _make_directories(*paths: str) -> None:
    try:
        for path in paths:
            os.makedirs(path, 0o755)
    except OSError as error:
        kind = NoSpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else NsfsError
        raise kind(f"cannot make a directory for what will be written: {error.filename}: {error.strerror}") from None
