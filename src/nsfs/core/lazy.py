"""Lazy layers for snapshots: which worker serves them, when they count, where their views are mounted.

Owns the way from a layer's names to its view: `core.scopes` says in which domain a snapshot's layers are, that domain's
worker indexes them, and `core.manual.Lowers` mounts each view once for all who stack it: as EROFS or, where that cannot
be, as a FUSE tree of that one layer. A record names no domain: the snapshot that is mounted decides, for its whole
stack. Refuses, with the reason, what cannot be served: `offer` raises, and the caller has containerd unpack that layer.

Concurrency: `offer` waits for so long as was configured, for all layers of an image together, since containerd holds
locks through it; the work goes on in the worker. `settle` and `stack` wait for as long as it takes.
"""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import msgspec
import trio

from nsfs.core import worker_api
from nsfs.core.pods import PodImages
from nsfs.errors import CorruptError, UnreachableError, UnsupportedError
from nsfs.model.lazy import State
from nsfs.model.mounts import Host, Lower, choose_driver
from nsfs.model.policy import domain_named, parse_view_name, view_name
from nsfs.model.profile import ProfileUse, least_use
from nsfs.model.snapshot import Stacked

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from nsfs.core.clones import Clones
    from nsfs.core.manual import Lowers, Workers
    from nsfs.core.scopes import Scopes
    from nsfs.model.lazy import LazyLayer
    from nsfs.model.policy import Domain, ScopeRequest
    from nsfs.model.shift import Shift

log = logging.getLogger(__name__)

_PULL: Final = 60.0
"""Seconds after its deadline when the pull of an image is taken for a new one."""
_USER: Final = "snapshot "
_DOCUMENTS: Final = 5.0
"""Seconds for an image's manifest and configuration, where `wait` is less: without them nothing can be promised."""
_LEAST: Final = 0.5
"""Seconds that every layer gets: enough for one that is known already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LazyConfig:
    """What an administrator decides."""

    wait: float
    """Seconds that a Prepare waits for a layer's index."""
    strict: bool
    """Accept only layers whose diff ID was verified, and none that is not indexed yet."""
    profile: ProfileUse
    """What is done at most with what a container's start reads."""


class LazyLayers:
    """The service. What an earlier daemon mounted has been adopted before."""

    def __init__(
        self, workers: Workers, lowers: Lowers, clones: Clones, host: Host, scopes: Scopes, config: LazyConfig
    ) -> None:
        self._workers = workers
        self._lowers = lowers
        self._clones = clones
        self._driver = choose_driver("auto", host)
        self._scopes = scopes
        self._config = config
        self._pods = PodImages(workers, scopes)
        self._domains = _snapshots(lowers.users())
        """Where a snapshot's lowers are, by its ID. What an earlier daemon mounted has no owner until somebody asks."""
        self._deadlines: dict[tuple[str, str], float] = {}
        """Of pulls, by namespace and image."""

    @property
    def wait(self) -> float:
        """Seconds that calls may take which containerd makes under its locks."""
        return self._config.wait

    def is_guest(self, request: ScopeRequest) -> bool:
        """Whether nothing of an image may be on this host; raises NsfsError for who may not ask so."""
        return self._scopes.is_guest(request)

    async def offer(self, request: ScopeRequest, layer: LazyLayer, *, over_local: bool) -> LazyLayer:
        """The layer, ready, pending or unread; raises NsfsError where it cannot be served, or does not count yet.

        `over_local` says that it stands on a layer that containerd unpacked. Where it may not be pending, what is
        raised is an UnreachableError with `retry_after`.
        """
        if self.is_guest(request):
            return msgspec.structs.replace(layer, state=State.UNREAD)
        domain = self._domain(request)
        limit = max(self._config.wait, _DOCUMENTS)
        with trio.move_on_after(limit) as looking:
            if domain.transient:
                return await self._offer_to_pods(request, layer, over_local=over_local)
            await self._workers.call(domain, "Offer", _name(layer, domain), worker_api.Empty)
        if looking.cancelled_caught:
            raise UnreachableError(f"its registry did not answer within {limit:g} s")
        with trio.move_on_at(self._deadline(request.namespace, layer)):
            indexed = await self._workers.call(domain, "Await", _name(layer, domain), worker_api.Indexed)
            self._check(indexed, over_local=over_local)
            return msgspec.structs.replace(layer, state=State.READY)
        if self._config.strict:
            raise UnreachableError(f"layer {layer.blob} is still being read for the first time", retry_after=1)
        return layer

    async def _offer_to_pods(self, request: ScopeRequest, layer: LazyLayer, *, over_local: bool) -> LazyLayer:
        """A layer that each pod will read for itself."""
        if self._config.strict:
            raise UnsupportedError("in pods' domains nothing is proved at the pull, and only proof counts here")
        if over_local:
            raise UnsupportedError("in pods' domains an image is served as a whole or not at all")
        await self._pods.check(request, layer)
        return msgspec.structs.replace(layer, state=State.UNREAD)

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

    async def settle(self, request: ScopeRequest, layer: LazyLayer) -> LazyLayer:
        """What became of a pending layer: ready or fenced; raises NsfsError where that is still open.

        What is wrong is read once more before it is fenced: it may have been the registry that sent something else.
        What would be a pod's is read in a domain that ends with the question, and stays unread or is fenced.
        """
        domain = self._domain(replace(request, mount_id=f"doubt-{secrets.token_hex(8)}"))
        try:
            try:
                await self._workers.call(domain, "Await", _name(layer, domain), worker_api.Indexed)
            except CorruptError as error:
                log.warning("layer %s of %s is read again: %s", layer.blob, layer.reference, error)
                await self._workers.call(domain, "Await", _name(layer, domain), worker_api.Indexed)
        except CorruptError as error:
            return msgspec.structs.replace(layer, state=State.FENCED, reason=error.message)
        finally:
            if domain.transient:
                with trio.CancelScope(shield=True):
                    await self._lowers.end(domain)
        return msgspec.structs.replace(layer, state=State.UNREAD if domain.transient else State.READY)

    async def stack(
        self,
        snapshot: int,
        request: ScopeRequest,
        layers: Sequence[LazyLayer | None],
        shift: Shift | None,
        profile: ProfileUse,
    ) -> tuple[list[Stacked | None], tuple[int, int] | None]:
        """The mounted views of `layers`, top first, None for each that is none; and who owns the top's root.

        With a `shift`, the views' clones; the owner is the one in the image. `profile` is what may be done at most
        with what is read first. The first call for a snapshot is its start: later ones give the same views.

        They stay mounted until `snapshot` releases them.
        """
        domain = self._domains[snapshot] = self._domain_of(snapshot, request)
        await self._prove(domain, layers)
        held = {parse_view_name(lower.view).recording for lower in self._lowers.held(_user(snapshot))}
        use = ProfileUse.OFF if held else self._use(profile, domain)
        names = [None if layer is None else _name(layer, domain) for layer in reversed(layers)]
        params = worker_api.Stack(layers=names, starter=_user(snapshot), profile=use)
        answer = await self._workers.call(domain, "Stack", params, worker_api.Stacked)
        worker_api.check_maps(answer, domain.owner)
        recording = next(iter(held), answer.recording)
        infos = iter(reversed(answer.maps))
        maps = [None if layer is None else next(infos) for layer in layers]
        views = [None if info is None else self._lower(domain, info, recording) for info in maps]
        paths = await self._mount(domain, [view for view in dict.fromkeys(views) if view], snapshot, shift, answer)
        stacked = [
            None if info is None or view is None else Stacked(paths[view], info.marks, info.opaque)
            for info, view in zip(maps, views, strict=True)
        ]
        return stacked, maps[0].owner if maps and maps[0] is not None else None

    def _use(self, profile: ProfileUse, domain: Domain) -> ProfileUse:
        """A domain that ends with its pod keeps no profile."""
        return least_use(profile, self._config.profile, ProfileUse.USE if domain.transient else ProfileUse.FIRST)

    async def _mount(
        self, domain: Domain, views: Sequence[Lower], snapshot: int, shift: Shift | None, answer: worker_api.Stacked
    ) -> dict[Lower, str]:
        """Where each view, or its clone, is mounted for the snapshot."""
        async with self._lowers.locks[domain.name]:
            self._domains[snapshot] = domain
            mounted = await self._lowers.acquire(views, _user(snapshot), read_ahead=answer.read_ahead, warm=answer.warm)
            paths = dict(zip(views, mounted, strict=True))
            return paths if shift is None else await self._clones.acquire(paths, shift, snapshot)

    async def _prove(self, domain: Domain, layers: Sequence[LazyLayer | None]) -> None:
        """Have proved what no pull proved: layers that were meant for a guest."""
        if self._config.strict:
            for layer in layers:
                if layer is not None and layer.state is State.UNREAD:
                    indexed = await self._workers.call(domain, "Await", _name(layer, domain), worker_api.Indexed)
                    self._check(indexed, over_local=False)

    async def release(self, snapshot: int) -> None:
        """Unmount what only that snapshot stacks; a domain that was its alone ends."""
        domain = self._domains.get(snapshot)
        if domain is None:
            return
        try:
            async with self._lowers.locks[domain.name]:
                self._domains.pop(snapshot, None)
                try:
                    await self._clones.release(snapshot)
                finally:
                    await self._lowers.release(_user(snapshot))
        finally:
            if domain.transient:
                with trio.CancelScope(shield=True):
                    await self._lowers.end(domain)

    def shown(self) -> Mapping[int, Domain]:
        """The domains of snapshots that have views mounted, or a domain of their own, by ID."""
        return self._domains

    def stacked(self) -> Mapping[int, Collection[str]]:
        """The maps of the views that snapshots have mounted, by ID."""
        held = self._lowers.stacks()
        found = {snapshot: held.get(_user(snapshot), ()) for snapshot in self._domains}
        return {snapshot: {parse_view_name(each.view).map_id for each in lowers} for snapshot, lowers in found.items()}

    def _domain(self, request: ScopeRequest) -> Domain:
        if not request.namespace:
            raise UnsupportedError("the caller has no namespace")
        return self._scopes.domain(request)

    def _domain_of(self, snapshot: int, request: ScopeRequest) -> Domain:
        """Where a snapshot is that is shown already, whatever the policy says by now; on behalf of who asks."""
        held = self._domains.get(snapshot)
        if held is not None and held.owner:
            return held
        decided = self._domain(request)
        return decided if held is None or held.name == decided.name else replace(held, owner=decided.owner)

    def _lower(self, domain: Domain, info: worker_api.MapInfo, recording: str) -> Lower:
        """Containers wait for their content without end: their views' names have no suffix."""
        return Lower(domain.name, view_name(info.id, "", info.reader, recording), self._driver)


def _name(layer: LazyLayer, domain: Domain) -> worker_api.LayerName:
    return worker_api.LayerName(
        reference=layer.reference, blob=layer.blob, chain=layer.chain, owner=domain.owner, trust=domain.trust_index
    )


def _user(snapshot: int) -> str:
    return f"{_USER}{snapshot}"


def _snapshots(users: Mapping[str, str]) -> dict[int, Domain]:
    """Those of `users` that are snapshots."""
    snapshots = {user.removeprefix(_USER): domain for user, domain in users.items() if user.startswith(_USER)}
    return {int(snapshot): domain_named(domain) for snapshot, domain in snapshots.items()}
