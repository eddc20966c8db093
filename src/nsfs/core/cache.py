"""How much all pools together take: looks now and then, and has contents go where it is too much.

Owns the decision which layers go, over all domains (`model.cache`), and how things stand. Each domain's worker does it,
and refuses what was taken into use meanwhile. A cap never keeps an image from being read: what is needed beyond it is
fetched again.

Concurrency: one look at a time; nothing waits for one but who asks for it. A domain whose worker does not answer is
left out until the next look.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

import msgspec
import trio

from nsfs.core import worker_api
from nsfs.core.manual import Workers
from nsfs.core.tasks import run_all
from nsfs.errors import NsfsError
from nsfs.model.cache import Limits, plan_eviction, plan_images, plan_prune, plan_room
from nsfs.model.policy import Domain, Isolation, own_domain
from nsfs.model.report import Note, render_count, render_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from msgspec import Struct

    from nsfs.core.namespaces import Footprint
    from nsfs.model.cache import CachedImage, HeldImage, HeldLayer

T = TypeVar("T")

log = logging.getLogger(__name__)

_LOOK_EVERY = 10.0
_ANSWERS_WITHIN = 30.0
_GIVES_UP_WITHIN = 120.0
"""Seconds; who takes longer keeps the others waiting no more."""
_GONE = "all of the pools that may go is gone"


class Disks(Protocol):
    """What domains have on disk. Blocks."""

    def names(self) -> list[str]:
        """The domains that have anything there."""

    def measure(self, domain: str) -> Footprint:
        """What one takes."""

    def free(self) -> int:
        """Bytes that the filesystem has left."""


class RunningWorkers(Workers, Protocol):
    """The domains' workers, and which of them run."""

    def pids(self) -> dict[str, int]:
        """Those of workers, by domain; 0 where none runs."""

    async def ask_now(self, domain: str, method: str, params: Struct, result: type[T]) -> T:
        """Ask one that runs; raises NsfsError where it does not answer at once."""


@dataclass(frozen=True, slots=True)
class Room:
    """How things stand. Bytes."""

    used: int
    free: int
    limits: Limits
    held_up: str = ""
    """Why contents that should go stay."""

    @property
    def need(self) -> int:
        """What is to go."""
        return plan_room(self.used, self.free, self.limits)

    @property
    def unless(self) -> str:
        """Why nothing more is to be kept; empty where there is room."""
        return self.state if self.free < self.limits.reserve else ""

    @property
    def state(self) -> str:
        """In words, for people."""
        if not self.need:
            return "ready"
        what = "the reserve of free space is used" if self.free < self.limits.reserve else "pools are over their cap"
        return f"{what}: {self.held_up}" if self.held_up else what


@dataclass(frozen=True, slots=True)
class Pruned:
    """What went, or would."""

    layers: list[HeldLayer]
    freed: int


class Cache:
    """The service; `quotas` are caps of owners' own domains, by owner.

    Where it `refuses`, workers keep nothing more once the reserve is used and nothing is left to go.
    """

    def __init__(
        self, workers: RunningWorkers, disks: Disks, limits: Limits, quotas: Mapping[str, int], *, refuses: bool
    ) -> None:
        self._refuses = refuses
        self._workers = workers
        self._disks = disks
        self._limits = limits
        self._quotas = {own_domain(owner): size for owner, size in quotas.items() if size}
        self._looking = trio.Lock()
        self.room = Room(0, limits.reserve, limits)
        """As it was at the last look."""
        self.sizes: dict[str, int] = {}
        """Bytes that each domain takes on disk, at the last look."""

    async def watch(self) -> None:
        """Look for ever; tells of a trouble once."""
        trouble = ""
        while True:
            before, trouble = trouble, ""
            try:
                await self.look()
            except NsfsError as error:
                trouble = str(error)
            if trouble and trouble != before:
                log.warning("it is not known how much the pools take: %s", trouble)
            await trio.sleep(_LOOK_EVERY)

    async def look(self) -> None:
        """See how much is taken, and have contents go where that is too much."""
        async with self._looking:
            sizes = await trio.to_thread.run_sync(self._measure)
            if await self._is_short(sizes) and await self._settle(sizes):
                sizes = await trio.to_thread.run_sync(self._measure)
            self.sizes = sizes
            for domain in sizes.keys() & self._quotas.keys():
                sizes[domain] -= await self._keep_quota(domain, sizes[domain])
            await self._keep_cap(sum(sizes.values()), list(sizes))

    def _measure(self) -> dict[str, int]:
        return {name: self._disks.measure(name).size for name in self._disks.names()}

    async def _is_short(self, sizes: Mapping[str, int]) -> bool:
        owned = sizes.keys() & self._quotas.keys()
        return any(self._over_quota(domain, sizes[domain]) for domain in owned) or bool(
            (await self._room(sum(sizes.values()))).need
        )

    def _over_quota(self, domain: str, used: int) -> int:
        return plan_room(used, 0, self._limits._replace(most=self._quotas[domain], reserve=0))

    async def _keep_quota(self, domain: str, used: int) -> int:
        """Have contents go that are too much of a domain; gives the bytes freed."""
        need = self._over_quota(domain, used)
        if not need:
            return 0
        layers, _ = await self._held([domain])
        return await self._drop(plan_eviction(layers, need), f"domain {domain} is over its quota")

    async def _keep_cap(self, used: int, domains: Sequence[str]) -> None:
        room = await self._room(used)
        if room.need:
            layers, _ = await self._held(domains)
            freed = await self._drop(plan_eviction(layers, room.need), room.state)
            held_up = "" if freed >= room.need else _GONE
            room = await self._room(max(0, used - freed), held_up)
            if held_up and self.room.state != room.state:
                log.warning("%s", room.state)
        self.room = room
        await self._tell()

    async def _tell(self) -> None:
        """Have every worker keep what it fetches, or nothing more: each time, since it may be new, or we."""
        if self._refuses:
            keep = worker_api.Keep(unless=self.room.unless)
            await run_all(partial(self._tell_one, domain, keep) for domain in self._workers.pids())

    async def _tell_one(self, domain: str, keep: worker_api.Keep) -> None:
        try:
            await self._workers.ask_now(domain, "Keep", keep, worker_api.Empty)
        except NsfsError as error:
            log.info("domain %s is told later whether to keep what it fetches: %s", domain, error)

    def larger_than_all(self, size: int) -> Note | None:
        """What to say of an image of so many bytes, if it cannot be kept whole."""
        most = self._limits.most
        if size <= most:
            return None
        sizes = f"{render_size(size)} of {render_size(most)}"
        return Note(text=f"the image is larger than what pools may take, and whole here only if pinned: {sizes}")

    async def _room(self, used: int, held_up: str = "") -> Room:
        return Room(used, await trio.to_thread.run_sync(self._disks.free), self._limits, held_up)

    async def _held(self, domains: Iterable[str]) -> tuple[list[HeldLayer], list[HeldImage]]:
        """What these domains hold, each with its domain's name."""
        layers: list[HeldLayer] = []
        images: list[HeldImage] = []

        async def ask(domain: str) -> None:
            try:
                with trio.fail_after(_ANSWERS_WITHIN):
                    held = await self._call(domain, "Held", worker_api.Empty(), worker_api.Held)
            except (NsfsError, trio.TooSlowError) as error:
                log.warning("domain %s does not say what it holds: %s", domain, error)
                return
            layers.extend(msgspec.structs.replace(layer, domain=domain) for layer in held.layers)
            images.extend(msgspec.structs.replace(image, domain=domain) for image in held.images)

        await run_all(partial(ask, domain) for domain in domains)
        return layers, images

    async def _settle(self, domains: Iterable[str]) -> int:
        """Have spools go, which costs nobody contents; gives the bytes freed."""
        return sum([(await self._give_up(domain, "Settle", worker_api.Empty())).freed for domain in domains])

    async def _drop(self, layers: Sequence[HeldLayer], why: str) -> int:
        freed = 0
        for domain in dict.fromkeys(layer.domain for layer in layers):
            theirs = [layer for layer in layers if layer.domain == domain]
            evicted = await self._give_up(domain, "Drop", worker_api.Drop(layers=theirs))
            freed += evicted.freed
            what = render_count(evicted.layers, "layer")
            log.info("%s: %s of domain %s, %s freed", why, what, domain, render_size(evicted.freed))
        return freed

    async def _give_up(self, domain: str, method: str, params: Struct) -> worker_api.Evicted:
        try:
            with trio.fail_after(_GIVES_UP_WITHIN):
                return await self._call(domain, method, params, worker_api.Evicted)
        except (NsfsError, trio.TooSlowError) as error:
            log.warning("domain %s gives nothing up: %s", domain, str(error) or "no answer")
            return worker_api.Evicted(layers=0, freed=0)

    async def _call(self, domain: str, method: str, params: Struct, result: type[T]) -> T:
        return await self._workers.call(Domain(domain, Isolation.SHARED), method, params, result)

    async def images(self) -> list[CachedImage]:
        """What every image has in the pools, the one used last first."""
        names = await trio.to_thread.run_sync(self._disks.names)
        return plan_images(*await self._held(names))

    async def prune(self, older: float, *, dry_run: bool) -> Pruned:
        """Have contents go that nobody stands on, and nobody did in the last `older` seconds."""
        async with self._looking:
            names = await trio.to_thread.run_sync(self._disks.names)
            if not dry_run:
                await self._settle(names)
            layers, _ = await self._held(names)
            going = plan_prune(layers, time.time() - older)
            freed = sum(layer.local for layer in going) if dry_run else await self._drop(going, "pruned")
        return Pruned(going, freed)
