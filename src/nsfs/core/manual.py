"""Manual mounts: what `nsfs mount`, `nsfs umount` and `nsfs status` ask of the daemon.

Owns: the life of a mount from request to record, and the *lowers*: each view of a domain is mounted once, under a
short name, for all mounts that stack it, and goes with the last of them. Refuses: a target that is no directory or has
a mount of ours already.

Concurrency: one lock per domain around everything that changes its lowers, so that a view is never mounted twice or
taken away while another mount is about to stack it, and so that no domain waits for another's worker; the long part,
preparing an image, runs outside of it. Whatever fails or is cancelled half-way is undone in reverse order, under the
same lock, before the error leaves; what was begun to be taken away is taken away.
"""

from __future__ import annotations

import itertools
import logging
import secrets
from collections import defaultdict
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

import trio

from nsfs.core import worker_api
from nsfs.errors import BusyError, DeniedError, NotFoundError, NsfsError, UsageError
from nsfs.model.mounts import Driver, Host, Lower, MountRecord, Rootfs, choose_driver, plan_rootfs, unique_maps
from nsfs.model.policy import Domain, Isolation, ScopeRequest, domain_named, parse_patience
from nsfs.model.profile import ProfileUse, parse_profile_use
from nsfs.model.report import Phases

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence

    from msgspec import Struct

    from nsfs.core.scopes import Scopes
    from nsfs.model.policy import Patience

T = TypeVar("T")
log = logging.getLogger(__name__)

_UNDO_DEADLINE = 90.0
"""Seconds for each thing that is taken away: longer than those that do it take by themselves."""


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


class Stacks(Protocol):
    """Which lowers each user stacks, remembered durably."""

    def stacks(self) -> dict[str, list[Lower]]:
        """By user."""

    def put_stack(self, user: str, lowers: Sequence[Lower]) -> None:
        """Remember what one stacks, instead of what was known."""

    def delete_stack(self, user: str) -> None:
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


class Replaceable(Workers, Protocol):
    """Workers that may be stuck."""

    async def rouse(self, domain: Domain) -> None:
        """Have no worker of `domain` that does not answer within half a second: another follows it."""


class Kernel(Protocol):
    """mount(2) and umount(2), done where a hanging call harms nobody. Raises NsfsError.

    What mounts leaves nothing mounted where it fails or is cancelled.
    """

    async def mount(
        self, lowers: Sequence[tuple[Lower, str]], rootfs: Rootfs | None = None, *, read_ahead: int = 0
    ) -> None:
        """Mount each view at its path, then the tree where it belongs.

        For a while the kernel reads so many KiB ahead of the views, if it is not 0.
        """

    def warm(self, lowers: Sequence[tuple[Lower, str]], extents: Sequence[tuple[int, int]], read_ahead: int) -> None:
        """Begin to bring what lies at addresses (and has that size) into the memory of mounted views, top first.

        `read_ahead` is what they were mounted with.
        """

    async def mount_front(self, record: MountRecord, maps: Sequence[worker_api.MapInfo]) -> None:
        """Serve the tree at `record.target` from a process of its own, without root."""

    async def unmount(self, paths: Sequence[str], *, force: bool) -> None:
        """Take mounts away, in order; BusyError where somebody uses one, unless `force`."""

    async def check_target(self, target: str) -> None:
        """Raise unless `target` is a directory that can be mounted on, named as the kernel shows it."""

    def mounted(self) -> set[str]:
        """Every path at which something of our kind is mounted on top now."""

    def mounted_lowers(self) -> dict[str, Lower]:
        """What is mounted at paths of lowers, by short name."""

    def tree_path(self, domain: str, tree: str) -> str:
        """Where the FUSE tree of a mount shows."""

    def lower_path(self, name: str) -> str:
        """Where the lower of that short name is mounted."""

    async def make_upper(self, mount_id: str) -> tuple[str, str]:
        """Fresh (upper, work) directories for a writable mount."""

    async def drop_upper(self, mount_id: str) -> None:
        """Delete them, as far as they are there."""

    async def sweep(self, domains: Collection[str], names: Collection[str]) -> None:
        """Take away all connections but those of `domains`, and all lowers but `names`."""

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
    profile: str
    """`model.profile.ProfileUse`."""

    def scope(self, mount_id: str) -> ScopeRequest:
        """What it says of itself, as a mount of that ID."""
        return ScopeRequest(
            namespace=self.namespace, references=(self.reference,), wish=self.isolation, mount_id=mount_id
        )


class Lowers:
    """Which views are mounted under which short names, and which mounts stack each.

    Calls for one domain may not overlap, those for several may.
    """

    def __init__(self, kernel: Kernel, workers: Workers, records: Stacks) -> None:
        self._kernel = kernel
        self._workers = workers
        self._records = records
        self._names: dict[Lower, str] = {}
        self._users: defaultdict[Lower, set[str]] = defaultdict(set)
        """Mounts by ID, and snapshots."""
        self.locks: defaultdict[str, trio.Lock] = defaultdict(trio.Lock)
        """One per domain; who calls for it holds it."""

    def adopt(self, domains: Collection[str]) -> set[str]:
        """At start: go on with what an earlier daemon mounted in `domains` and somebody stacks; gives the short names.

        A user of whose lowers one is gone has to acquire them again.
        """
        mounted = {lower: name for name, lower in self._kernel.mounted_lowers().items() if lower.domain in domains}
        for user, lowers in self._records.stacks().items():
            if not mounted.keys() >= set(lowers):
                self._records.delete_stack(user)
                continue
            for lower in lowers:
                self._names[lower] = mounted[lower]
                self._users[lower].add(user)
        return set(self._names.values())

    def users(self) -> dict[str, str]:
        """The domain in which each user stacks something."""
        return {user: lower.domain for lower, users in self._users.items() for user in users}

    def stacks(self) -> dict[str, list[Lower]]:
        """What each user stacks."""
        found: defaultdict[str, list[Lower]] = defaultdict(list)
        for lower, users in self._users.items():
            for user in users:
                found[user].append(lower)
        return found

    def held(self, user: str) -> list[Lower]:
        """What a user stacks."""
        return [lower for lower, users in self._users.items() if user in users]

    async def acquire(
        self,
        lowers: Sequence[Lower],
        user: str,
        *,
        read_ahead: int = 0,
        warm: Sequence[tuple[int, int]] = (),
        stack: Callable[[list[str]], Rootfs] | None = None,
    ) -> list[str]:
        """Mount what is not mounted yet; gives the paths in the order of `lowers`, distinct ones of one domain.

        Then what `stack` makes of the paths, in one go. Of what is mounted now the kernel reads so many KiB ahead for a
        while, if `read_ahead` is not 0. The extents `warm`, address and size, are then brought into memory, and not
        waited for.
        """
        fresh = [lower for lower in lowers if lower not in self._names]
        self._names |= zip(fresh, self._free_names(), strict=False)
        paths = [self._path(lower) for lower in lowers]
        rootfs = stack(paths) if stack is not None else None
        try:
            await self._tell("ShowViews", fresh)
            await self._kernel.mount([(lower, self._path(lower)) for lower in fresh], rootfs, read_ahead=read_ahead)
        except BaseException:
            for lower in fresh:
                del self._names[lower]
            with trio.move_on_after(_UNDO_DEADLINE, shield=True):
                await self._hide(fresh)
            raise
        if fresh and warm:
            self._kernel.warm([(lower, self._path(lower)) for lower in lowers], warm, read_ahead)
        known = self.held(user)
        for lower in lowers:
            self._users[lower].add(user)
        if not set(lowers) <= set(known):
            self._remember(user, list(dict.fromkeys([*known, *lowers])))
        return paths

    def _remember(self, user: str, lowers: Sequence[Lower]) -> None:
        """For the next daemon; where that cannot be written, it is of use until then."""
        try:
            self._records.put_stack(user, lowers)
        except NsfsError as error:
            log.warning("views will end with this daemon: %s: %s", user, error)

    async def release(self, user: str) -> None:
        """Unmount what nobody but `user` stacks; once begun this is finished, since nobody would know of it again."""
        idle = [lower for lower, users in self._users.items() if users == {user}]
        self._records.delete_stack(user)
        for users in self._users.values():
            users.discard(user)
        if idle:
            paths = [self._path(lower) for lower in idle]
            for lower in idle:
                del self._names[lower], self._users[lower]
            with trio.move_on_after(_UNDO_DEADLINE, shield=True):
                try:
                    await self._kernel.unmount(paths, force=True)
                finally:
                    await self._hide(idle)

    async def end(self, domain: Domain) -> None:
        """End a domain that nothing will ever be mounted of again; its lock must not be held."""
        await self._workers.end(domain)
        self.locks.pop(domain.name, None)

    def _path(self, lower: Lower) -> str:
        return self._kernel.lower_path(self._names[lower])

    def _free_names(self) -> Iterator[str]:
        """Names that no lower has; one that could not be unmounted keeps its name from being used."""
        taken = {self._path(lower) for lower in self._names} | self._kernel.mounted()
        names = (f"{number:x}" for number in itertools.count())
        return (name for name in names if self._kernel.lower_path(name) not in taken)

    async def _hide(self, lowers: Sequence[Lower]) -> None:
        """Have views taken away that no other driver's lower shows."""
        shown = {(lower.domain, lower.view) for lower in self._names}
        hidden = [lower for lower in lowers if (lower.domain, lower.view) not in shown]
        try:
            await self._tell("HideViews", hidden)
        except NsfsError as error:
            log.warning("views are still shown that nobody stacks any more: %s", error)

    async def _tell(self, method: str, lowers: Sequence[Lower]) -> None:
        if lowers:
            domain = Domain(lowers[0].domain, Isolation.SHARED)
            params = worker_api.Views(names=[lower.view for lower in lowers])
            await self._workers.call(domain, method, params, worker_api.Empty)


class Made(NamedTuple):
    """A mount that was made."""

    record: MountRecord
    phases: Phases


def plan_phases(called: float, prepared: float, made: float, indexing: float) -> Phases:
    """What a mount spent its time with, as its times say, and its worker, who need not be right: seconds."""
    index = min(max(0.0, indexing), prepared - called)
    return Phases(resolve=prepared - called - index, index=index, mount=made - prepared)


class ManualMounts:
    """The service."""

    def __init__(
        self,
        records: Records,
        workers: Replaceable,
        kernel: Kernel,
        host: Host,
        scopes: Scopes,
        lowers: Lowers,
    ) -> None:
        self._records = records
        self._workers = workers
        self._kernel = kernel
        self._host = host
        self._scopes = scopes
        self._lowers = lowers
        self._locks = self._lowers.locks
        self._claimed: set[str] = set()

    @property
    def is_root(self) -> bool:
        """Whether layers can be shown one by one, as snapshots need them."""
        return self._host.root

    def records(self) -> list[MountRecord]:
        """All mounts there are."""
        return self._records.mounts()

    def domain_of(self, record: MountRecord) -> Domain:
        """The domain that serves a mount."""
        return Domain(record.domain, Isolation.POD if record.transient else Isolation.SHARED)

    async def mount(self, wish: Wish, report: Callable[[Struct], Awaitable[None]]) -> Made:
        """Make `wish` come true; raises NsfsError with nothing left behind."""
        called = trio.current_time()
        driver = choose_driver(wish.driver, self._host)
        patience = parse_patience(wish.on_error)
        mount_id = secrets.token_hex(8)
        domain = self._scopes.domain(wish.scope(mount_id))
        if wish.writable and not self._host.root:
            raise DeniedError("a writable mount needs root: the kernel's overlay", hint="leave --rw away")
        profile = self._check_profile(wish, domain)
        async with AsyncExitStack() as undo:
            self._claim(wish.target, undo)
            await self._kernel.check_target(wish.target)
            if domain.transient:
                _push_undo(undo, partial(self._lowers.end, domain))
            params = worker_api.Prepare(
                reference=wish.reference,
                platform=wish.platform,
                owner=domain.owner,
                profile=profile,
                trust=domain.trust_index,
            )
            image = await self._workers.call(domain, "Prepare", params, worker_api.Prepared, report)
            prepared = trio.current_time()
            worker_api.check_maps(image, domain.owner)
            record = _record(mount_id, wish, domain, driver if image.maps else Driver.FUSE, patience, image)
            await self._set_up(record, image)
            undo.pop_all()
            self._claimed.discard(wish.target)
        log.info("mounted %s at %s", record.reference, record.target)
        return Made(record, plan_phases(called, prepared, trio.current_time(), image.indexing))

    def _check_profile(self, wish: Wish, domain: Domain) -> ProfileUse:
        """What is to be done with the image's profile; raises where nothing could be recorded, or kept."""
        profile = parse_profile_use(wish.profile)
        records = profile in {ProfileUse.RECORD, ProfileUse.FIRST}
        if records and not self._host.root:
            raise DeniedError("recording a profile needs root", hint="leave --profile record away")
        if records and domain.transient:
            raise UsageError("a pod's domain ends with its mount, and a profile with it", hint="choose another scope")
        return profile

    def _claim(self, target: str, undo: AsyncExitStack) -> None:
        if target in self._claimed or any(record.target == target for record in self._records.mounts()):
            raise BusyError(f"nsfs has a mount there already: {target}", hint=f"nsfs umount {target}")
        if target in self._kernel.mounted():
            raise BusyError(f"something is mounted there already: {target}", hint="unmount it, or mount elsewhere")
        self._claimed.add(target)
        undo.callback(self._claimed.discard, target)

    async def _set_up(self, record: MountRecord, image: worker_api.Prepared) -> None:
        async with self._locks[record.domain], AsyncExitStack() as undo:
            await self._build(record, image, undo)
            self._records.put_mount(record)
            undo.pop_all()

    async def _build(self, record: MountRecord, image: worker_api.Prepared, undo: AsyncExitStack) -> None:
        infos = {info.id: info for info in image.maps}
        maps = [infos[map_id] for map_id in record.maps]
        if not self._host.root:
            await self._kernel.mount_front(record, maps)
        else:
            marks = record.driver != Driver.FUSE and any(info.marks for info in maps)
            upper = await self._make_upper(record, undo) if record.writable else None
            plan = partial(plan_rootfs, marks=marks, empty=self._kernel.empty, upper=upper)
            await self._show(record, maps, lambda lowers: Rootfs(record.target, plan(lowers)), undo, image)
        _push_undo(undo, partial(self._kernel.unmount, [record.target], force=True))

    async def _show(
        self,
        record: MountRecord,
        maps: list[worker_api.MapInfo],
        stack: Callable[[list[str]], Rootfs],
        undo: AsyncExitStack,
        image: worker_api.Prepared,
    ) -> None:
        """Have the kernel see the image's layers, and what `stack` makes of where they are, top first."""
        if record.driver != Driver.FUSE:
            ahead, warm = image.read_ahead, image.warm
            await self._lowers.acquire(_lowers_of(record), record.id, read_ahead=ahead, warm=warm, stack=stack)
            _push_undo(undo, partial(self._lowers.release, record.id))
            return
        _push_undo(undo, partial(self._hide_tree, record))
        tree = worker_api.Tree(
            id=record.id, maps=maps, suffix=record.suffix, recording=record.recording, info=record.describe()
        )
        await self._workers.call(self.domain_of(record), "ShowTree", tree, worker_api.Empty)
        await self._kernel.mount([], stack([self._kernel.tree_path(record.domain, record.id)]))

    async def _make_upper(self, record: MountRecord, undo: AsyncExitStack) -> tuple[str, str]:
        _push_undo(undo, partial(self._kernel.drop_upper, record.id))
        return await self._kernel.make_upper(record.id)

    async def _hide_tree(self, record: MountRecord) -> None:
        gone = worker_api.TreeGone(id=record.id)
        await self._workers.call(self.domain_of(record), "HideTree", gone, worker_api.Empty)

    async def umount(self, target: str, *, force: bool) -> str:
        """Take away the mount at `target`; raises NotFoundError, BusyError.

        By `force` who waits for a read of it gets an error, however its registry and its worker are.
        Where it is gone and that cannot be written down, gives why; `forget_gone` does it as soon as it can be.
        """
        record = self._records.mount_at(target)
        if force:
            await self._workers.rouse(self.domain_of(record))
        async with self._locks[record.domain]:
            if not self._is_known(record):
                raise NotFoundError(f"somebody else unmounts it: {target}")
            if target in self._kernel.mounted():
                await self._kernel.unmount([target], force=force)
            log.info("unmounted %s", target)
            try:
                await self._forget(record)
            except NsfsError as error:
                return str(error)
        return ""

    async def forget_gone(self) -> int:
        """Give up what was unmounted by others than us (umount(8)); gives how many mounts there are now."""
        records = self._records.mounts()
        mounted = self._kernel.mounted()
        for record in records:
            if record.target not in mounted:
                async with self._locks[record.domain]:
                    if self._is_known(record):
                        await self._forget(record)
        return len(self._records.mounts()) + len(self._claimed)

    def _is_known(self, record: MountRecord) -> bool:
        """It was not given up while we waited for the lock."""
        return any(known.id == record.id for known in self._records.mounts())

    async def _forget(self, record: MountRecord) -> None:
        """Give up a mount that the kernel has no more, and all that it alone had; once begun this is finished."""
        self._records.delete_mount(record.id)
        with trio.CancelScope(shield=True):
            for work in self._remains(record):
                await _do_quietly(work)

    def _remains(self, record: MountRecord) -> Iterator[Callable[[], Awaitable[None]]]:
        if self._host.root and record.driver == Driver.FUSE:
            yield partial(self._hide_tree, record)
        elif self._host.root:
            yield partial(self._lowers.release, record.id)
        if record.writable:
            yield partial(self._kernel.drop_upper, record.id)
        if record.transient:
            yield partial(self._lowers.end, self.domain_of(record))

    async def resume(self, domains: Collection[str]) -> None:
        """At start: go on with an earlier daemon's mounts in `domains`; take all others and their records away.

        A pod's domain of which nothing is mounted ends, too: what it was made for was begun and never done. A mount
        that cannot be taken away keeps its record, so that it can be tried again by `umount`.
        """
        names = self._lowers.adopt(domains)
        for record in self._records.mounts():
            if record.domain in domains:
                continue
            try:
                if record.target in self._kernel.mounted():
                    await self._kernel.unmount([record.target], force=True)
            except NsfsError as error:
                log.warning("a mount of a daemon that died is left: %s: %s", record.target, error)
                continue
            await self._forget_dead(record)
            log.warning("took away a mount of a daemon that died: %s", record.target)
        await _do_quietly(partial(self._kernel.sweep, domains, names))
        used = {record.domain for record in self._records.mounts()} | set(self._lowers.users().values())
        for domain in map(domain_named, sorted(set(domains) - used)):
            if domain.transient:
                await _do_quietly(partial(self._lowers.end, domain))

    async def _forget_dead(self, record: MountRecord) -> None:
        """As `_forget`, of a mount whose worker died with its daemon."""
        self._records.delete_mount(record.id)
        if record.writable:
            await _do_quietly(partial(self._kernel.drop_upper, record.id))
        if record.transient:
            await _do_quietly(partial(self._lowers.end, self.domain_of(record)))

    async def end_all(self) -> None:
        """At the end of the daemon: take every mount away, in use or not."""
        for record in self._records.mounts():
            await _do_quietly(partial(self.umount, record.target, force=True))


async def _do_quietly(work: Callable[[], Awaitable[object]]) -> None:
    """Do what others must not wait for, nor fail by; each has a deadline."""
    with trio.move_on_after(_UNDO_DEADLINE) as scope:
        try:
            await work()
        except NsfsError as error:
            log.warning("something is left of a mount: %s", error)
    if scope.cancelled_caught:
        log.warning("something is left of a mount: gave up after %g s", _UNDO_DEADLINE)


def _push_undo(undo: AsyncExitStack, work: Callable[[], Awaitable[None]]) -> None:
    """Have `work` done when `undo` ends, also for a caller who was cancelled: then nothing could be awaited else."""

    async def shielded() -> None:
        with trio.CancelScope(shield=True):
            await _do_quietly(work)

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
        readers={info.id: info.reader for info in image.maps if info.reader},
        recording=image.recording,
    )


def _lowers_of(record: MountRecord) -> list[Lower]:
    driver = Driver(record.driver)
    return [Lower(record.domain, view, driver) for view in record.views()]
