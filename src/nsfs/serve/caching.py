"""What the control API says of what is kept: what pools hold, what goes, what is pinned, what needs no registry.

Translates requests and reports; decides nothing and owns nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import msgspec

from nsfs.core import worker_api
from nsfs.serve import api
from nsfs.serve.control import name_in

if TYPE_CHECKING:
    from nsfs.core.cache import Cache
    from nsfs.serve.control import Control
    from nsfs.serve.control_rpc import Handler, Report

T = TypeVar("T")


class Caching:
    """Its handlers."""

    def __init__(self, cache: Cache, control: Control) -> None:
        self._cache = cache
        self._control = control

    def handlers(self) -> dict[str, Handler]:
        """By method name."""
        counted = self._control.counted
        return {
            "Cache": self._list,
            "Prune": counted(self._prune),
            "Evict": counted(self._evict),
            "Pin": counted(self._pin),
            "Unpin": counted(self._unpin),
            "Offline": counted(self._offline),
        }

    async def _list(self, _request: api.Empty, _report: Report) -> api.CacheReport:
        await self._cache.look()
        pools = self._control.pools_report()
        return api.CacheReport(**msgspec.structs.asdict(pools), images=await self._cache.images())

    async def _prune(self, request: api.PruneRequest, _report: Report) -> api.PruneReport:
        pruned = await self._cache.prune(request.older, dry_run=request.dry_run)
        return api.PruneReport(layers=len(pruned.layers), freed=pruned.freed)

    async def _ask(self, request: api.ImageRequest, method: str, result: type[T], report: Report) -> T:
        domain = self._control.domain(request)
        name = name_in(domain, request)
        return await self._control.ask(domain, method, name, result, report)

    async def _evict(self, request: api.ImageRequest, report: Report) -> api.EvictReport:
        evicted = await self._ask(request, "Evict", worker_api.Evicted, report)
        return api.EvictReport(layers=evicted.layers, freed=evicted.freed)

    async def _pin(self, request: api.ImageRequest, report: Report) -> api.PinReport:
        return await self._change_pin(request, "Pin", report)

    async def _unpin(self, request: api.ImageRequest, report: Report) -> api.PinReport:
        return await self._change_pin(request, "Unpin", report)

    async def _change_pin(self, request: api.ImageRequest, method: str, report: Report) -> api.PinReport:
        pinned = await self._ask(request, method, worker_api.Pinned, report)
        return api.PinReport(reference=pinned.reference, digest=pinned.digest, absent=pinned.absent)

    async def _offline(self, request: api.ImageRequest, report: Report) -> api.OfflineReport:
        found = await self._ask(request, "Offline", worker_api.Offline, report)
        return api.OfflineReport(
            reference=found.reference, complete=not found.missing, missing=found.missing, absent=found.absent
        )
