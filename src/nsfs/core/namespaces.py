"""Namespaces: what each has here, and how all of it ends at once.

Owns the order of an end: mounts by hand, containerd's snapshots, what there is of its owners, domains with their pools;
last the memory that the namespace came by containerd. By its domains a namespace is known, and its tenants, so that an
end that is interrupted anywhere can be asked for again. Refuses to end what somebody uses, unless it is forced; domains
that others share stay.

Concurrency: one end at a time. What is asked for on behalf of the namespace meanwhile may begin it anew.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import trio

from nsfs.errors import BusyError, NotFoundError
from nsfs.model.namespaces import Holding, plan_holdings, plan_standing
from nsfs.model.policy import Domain, Isolation, check_namespace, own_domains

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from nsfs.core.manual import Lowers, ManualMounts
    from nsfs.model.namespaces import Standing
    from nsfs.model.snapshot import Record

log = logging.getLogger(__name__)

_NAMED = 10
"""Users that a refusal names."""


class Footprint(Protocol):
    """What a domain is on disk."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def uid(self) -> int:
        """Whose it is: its worker's."""

    @property
    def is_encrypted(self) -> bool:
        """Under a key of its own."""


class Disks(Protocol):
    """What domains have on disk. Blocks."""

    def names(self) -> list[str]:
        """The domains that have anything there."""

    def measure(self, domain: str) -> Footprint:
        """What one is there, its indexes included."""


class Memory(Protocol):
    """Which namespaces came by containerd, durably. Blocks."""

    def namespaces(self) -> list[str]:
        """All of them."""

    def forget_namespace(self, namespace: str) -> None:
        """Forget one, if it is known."""


class Owners(Protocol):
    """What there is of an owner beside domains: credentials, grants, costs."""

    def logins(self) -> list[str]:
        """Those who logged in to a registry. Blocks."""

    async def forget(self, owner: str) -> None:
        """Forget all that there is of one."""


class Snapshots(Protocol):
    """containerd's snapshots."""

    def all(self) -> list[Record]:
        """The records of all plugin names."""

    def shown(self) -> Mapping[int, Domain]:
        """Where the views of those that are mounted are, by ID."""

    def stacked(self) -> Mapping[int, Collection[str]]:
        """The maps that those are of."""

    async def drop(self, namespace: str) -> int:
        """Forget all of a namespace's, take away and delete what they had; how many that were."""


class NoSnapshots:
    """Of a daemon that serves no containerd."""

    def all(self) -> list[Record]:
        """See Snapshots."""
        return []

    def shown(self) -> Mapping[int, Domain]:
        """See Snapshots."""
        return {}

    def stacked(self) -> Mapping[int, Collection[str]]:
        """See Snapshots."""
        return {}

    async def drop(self, namespace: str) -> int:  # noqa: ARG002
        """See Snapshots."""
        return 0


@dataclass(frozen=True, slots=True)
class Ended:
    """What went with a namespace."""

    mounts: int
    snapshots: int
    domains: list[str]
    freed: int
    """Bytes of disk."""


class Namespaces:
    """The service."""

    def __init__(
        self,
        mounts: ManualMounts,
        snapshots: Snapshots,
        lowers: Lowers,
        disks: Disks,
        memory: Memory,
        owners: Owners,
    ) -> None:
        self._mounts = mounts
        self._snapshots = snapshots
        self._lowers = lowers
        self._disks = disks
        self._memory = memory
        self._owners = owners
        self._ending = trio.Lock()

    async def holdings(self) -> dict[str, Holding]:
        """What each namespace has, by name."""
        domains = await self.domains()
        return self.held(domains, await trio.to_thread.run_sync(self._owners.logins))

    def held(self, domains: Iterable[str], logins: Iterable[str] = ()) -> dict[str, Holding]:
        """What each namespace has where these domains are on disk and these owners logged in, by name."""
        return plan_holdings(domains, self._mounts.records(), self._snapshots.all(), self._snapshots.shown(), logins)

    def standing(self) -> Standing:
        """The maps that mounts and snapshots stand on, by domain and by namespace."""
        snapshots = self._snapshots
        return plan_standing(self._mounts.records(), snapshots.all(), snapshots.shown(), snapshots.stacked())

    async def domains(self) -> list[str]:
        """All that have anything on disk."""
        return await trio.to_thread.run_sync(self._disks.names)

    async def holding(self, namespace: str) -> Holding:
        """What one has; raises NotFoundError where that is nothing."""
        found = (await self.holdings()).get(check_namespace(namespace))
        if found is None:
            raise NotFoundError(f"nothing is here on behalf of namespace {namespace}", hint="nsfs ns ls lists them")
        return found

    async def measure(self, domain: str) -> Footprint:
        """What a domain is on disk."""
        return await trio.to_thread.run_sync(self._disks.measure, domain)

    async def came_by_containerd(self) -> set[str]:
        """Those on whose behalf containerd ever asked, and that were not ended since."""
        return set(await trio.to_thread.run_sync(self._memory.namespaces))

    async def end(self, namespace: str, *, force: bool) -> Ended:
        """End all that is here on behalf of a namespace; raises NotFoundError, and BusyError unless `force`."""
        async with self._ending:
            found = await self.holding(namespace)
            if not force:
                _refuse_used(found)
            for target in found.targets:
                await self._mounts.umount(target, force=True)
            return await self._end_rest(found)

    async def end_gone(self, namespace: str) -> bool:
        """End what containerd has no more, containers' snapshots included; whether that could be done.

        A namespace that is mounted by hand stays whole: somebody else uses it, too.
        """
        async with self._ending:
            found = (await self.holdings()).get(namespace) or Holding(namespace=namespace)
            if found.mounts:
                log.warning("namespace %s is gone from containerd, but mounted at %s", namespace, found.targets[0])
                return False
            ended = await self._end_rest(found)
        log.info("namespace %s ended with containerd's: %d snapshots", namespace, ended.snapshots)
        return True

    async def _end_rest(self, found: Holding) -> Ended:
        namespace = found.namespace
        snapshots = await self._snapshots.drop(namespace)
        domains = own_domains(namespace, await self.domains())
        for owner in sorted({*found.owners, *(name.removeprefix("ns/") for name in domains)}):
            await self._owners.forget(owner)
        freed = 0
        for name in domains:
            freed += (await self.measure(name)).size
            await self._lowers.end(Domain(name, Isolation.ISOLATED))
        await trio.to_thread.run_sync(partial(self._memory.forget_namespace, namespace))
        return Ended(len(found.mounts), snapshots, domains, freed)


def _refuse_used(found: Holding) -> None:
    users = [*found.targets, *found.containers]
    if users:
        more = f" and {len(users) - _NAMED} more" if len(users) > _NAMED else ""
        raise BusyError(
            f"somebody uses namespace {found.namespace}: {', '.join(users[:_NAMED])}{more}",
            hint="unmount them, delete the containers, or say --force",
        )
