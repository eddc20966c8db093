"""Lazy layers for snapshots: which worker serves them, when they count, where their views are mounted.

Owns the way from a layer's names to its view: the domain is the one that a mount by the namespace gets, its worker
indexes the layer, and `core.manual.Lowers` mounts each view once for all who stack it. Refuses, with the reason, what
cannot be served: `offer` raises, and the caller has containerd unpack that layer.

Concurrency: `offer` waits for so long as was configured, for all layers of an image together, since containerd holds
locks through it; the work goes on in the worker. `settle` and `stack` wait for as long as it takes.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec
import trio

from nsfs.core import worker_api
from nsfs.core.manual import Lower
from nsfs.errors import CorruptError, UnreachableError, UnsupportedError
from nsfs.model.lazy import State
from nsfs.model.mounts import Driver, Host, choose_driver
from nsfs.model.policy import Domain, ScopeRequest
from nsfs.model.snapshot import Stacked

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nsfs.core.manual import Lowers, Workers
    from nsfs.core.scopes import Scopes
    from nsfs.model.lazy import LazyLayer

log = logging.getLogger(__name__)

_PULL: Final = 60.0
"""Seconds after its deadline when the pull of an image is taken for a new one."""
_LEAST: Final = 0.5
"""Seconds that every layer gets: enough for one that is known already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LazyConfig:
    """What an administrator decides."""

    wait: float
    """Seconds that a Prepare waits for a layer's index."""
    strict: bool
    """Accept only layers whose diff ID was verified, and none that is not indexed yet."""


class LazyLayers:
    """The service."""

    def __init__(self, workers: Workers, lowers: Lowers, host: Host, scopes: Scopes, config: LazyConfig) -> None:
        self._workers = workers
        self._lowers = lowers
        self._driver = choose_driver("auto", host)
        self._scopes = scopes
        self._config = config
        self._domains: dict[int, str] = {}
        """Where a snapshot's lowers are, by its ID."""
        self._deadlines: dict[tuple[str, str], float] = {}
        """Of pulls, by namespace and image."""

    @property
    def wait(self) -> float:
        """Seconds that calls may take which containerd makes under its locks."""
        return self._config.wait

    async def offer(self, namespace: str, layer: LazyLayer, *, over_local: bool) -> LazyLayer:
        """The layer, ready or pending; raises NsfsError where it cannot be served, or does not count yet.

        `over_local` says that it stands on a layer that containerd unpacked. Where it may not be pending, what is
        raised is an UnreachableError with `retry_after`.
        """
        domain = self._domain(namespace, [layer])
        begun = False
        with trio.move_on_at(self._deadline(namespace, layer)):
            await self._workers.call(domain, "Offer", _name(layer), worker_api.Empty)
            begun = True
            indexed = await self._workers.call(domain, "Await", _name(layer), worker_api.Indexed)
            self._check(indexed, over_local=over_local)
            return msgspec.structs.replace(layer, state=State.READY)
        if not begun:
            raise UnreachableError(f"its registry did not answer within {self._config.wait:g} s")
        if self._config.strict:
            raise UnreachableError(f"layer {layer.blob} is still being read for the first time", retry_after=1)
        return layer

    def _deadline(self, namespace: str, layer: LazyLayer) -> float:
        """Until when this pull waits: its layers come one after another, and share what the first one was given."""
        now = trio.current_time()
        self._deadlines = {pull: at for pull, at in self._deadlines.items() if at > now - _PULL}
        shared = self._deadlines.setdefault((namespace, layer.reference), now + self._config.wait)
        return max(shared, now + min(_LEAST, self._config.wait))

    def _check(self, indexed: worker_api.Indexed, *, over_local: bool) -> None:
        if over_local and indexed.needs_lower:
            raise UnsupportedError("it cannot be shown without a layer below that containerd unpacked")
        if self._config.strict and indexed.verified != "diff-id":
            raise UnsupportedError("its table of contents does not prove its diff ID, and only proof counts here")

    async def settle(self, namespace: str, layer: LazyLayer) -> LazyLayer:
        """What became of a pending layer: ready or fenced. Raises NsfsError where that is still open."""
        try:
            await self._workers.call(self._domain(namespace, [layer]), "Await", _name(layer), worker_api.Indexed)
        except CorruptError as error:
            return msgspec.structs.replace(layer, state=State.FENCED, reason=error.message)
        return msgspec.structs.replace(layer, state=State.READY)

    async def stack(
        self, snapshot: int, namespace: str, layers: Sequence[LazyLayer | None]
    ) -> tuple[list[Stacked | None], tuple[int, int] | None]:
        """The mounted views of `layers`, top first, None for each that is none; and who owns the top's root.

        They stay mounted until `snapshot` releases them.
        """
        domain = self._domain(namespace, [layer for layer in layers if layer is not None])
        names = [None if layer is None else _name(layer) for layer in reversed(layers)]
        answer = await self._workers.call(domain, "Stack", worker_api.Stack(layers=names), worker_api.Stacked)
        infos = iter(reversed(answer.maps))
        maps = [None if layer is None else next(infos) for layer in layers]
        views = list(dict.fromkeys(self._lower(domain, info) for info in maps if info is not None))
        async with self._lowers.locks[domain.name]:
            self._domains[snapshot] = domain.name
            paths = dict(zip(views, await self._lowers.acquire(views, _user(snapshot)), strict=True))
        stacked = [
            None if info is None else Stacked(paths[self._lower(domain, info)], info.marks, info.opaque)
            for info in maps
        ]
        return stacked, maps[0].owner if maps and maps[0] is not None else None

    async def release(self, snapshot: int) -> None:
        """Unmount what only that snapshot stacks."""
        domain = self._domains.get(snapshot)
        if domain is not None:
            async with self._lowers.locks[domain]:
                self._domains.pop(snapshot, None)
                await self._lowers.release(_user(snapshot))

    def stacked(self) -> set[int]:
        """The snapshots that have views mounted."""
        return set(self._domains)

    def _domain(self, namespace: str, layers: Sequence[LazyLayer]) -> Domain:
        if self._driver is Driver.FUSE:
            raise UnsupportedError("this kernel or configuration mounts no erofs", hint="see nsfs doctor")
        if not namespace:
            raise UnsupportedError("the caller has no namespace")
        references = tuple(dict.fromkeys(layer.reference for layer in layers))
        domain = self._scopes.domain(ScopeRequest(namespace=namespace, references=references))
        if domain.transient:
            raise UnsupportedError("a pod's domain begins with its mount, and a layer is pulled before")
        return domain

    def _lower(self, domain: Domain, info: worker_api.MapInfo) -> Lower:
        """Containers wait for their content without end: their views' names have no suffix."""
        return Lower(domain.name, info.id, self._driver)


def _name(layer: LazyLayer) -> worker_api.LayerName:
    return worker_api.LayerName(reference=layer.reference, blob=layer.blob, chain=layer.chain)


def _user(snapshot: int) -> str:
    return f"snapshot {snapshot}"
