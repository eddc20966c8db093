"""Grants: who may have which blob of a domain that several owners share.

Owns the rule. Before such a domain says or gives anything of an image, whoever asks for it has read a byte of every
layer's blob, with its own credentials, from the repository that it named. That holds for a time and is asked again
then; what a registry refuses it refuses at once, with the registry's own words, and a grant there was is gone. The
proof is asked for whether or not the domain has the blob, before anything else is looked at: a refusal tells nothing.

What is proved is access at one registry, and a layer is one registry's (`model.pool.LayerKey.origin`): a registry that
says that it has what it does not have proves nothing about what another one gave.

A mount that was made stays: what it reads is there, or is asked of the registry as its owner.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING, Protocol

import trio

from nsfs.core import worker_api
from nsfs.core.blobs import Holder
from nsfs.core.tasks import run_all
from nsfs.core.worker_api import Share, SharesRequest
from nsfs.errors import CorruptError, DeniedError, NotFoundError, NsfsError
from nsfs.model.policy import namespace_of
from nsfs.model.pool import Access, GrantRecord

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence
    from typing import Any

    from msgspec import Struct

    from nsfs.core.blobs import Blobs
    from nsfs.core.images import Image, Layer
    from nsfs.model.digest import Digest
    from nsfs.model.pool import LayerKey, LayerRecord, MapRecord

    Methods = dict[str, tuple[type[Struct], Callable[[Any, Any], Awaitable[Struct]]]]

log = logging.getLogger(__name__)


class Ledger(Protocol):
    """Where grants are kept, durably. Writing may block."""

    def grant(self, owner: str, repository: str, blob: Digest) -> GrantRecord | None:
        """One, whether it still holds or not."""

    def put_grant(self, record: GrantRecord) -> None:
        """Keep one."""

    def delete_grant(self, owner: str, repository: str, blob: Digest) -> None:
        """Forget one, if there is one."""

    def delete_grants(self, owner: str) -> int:
        """Forget all of an owner."""


class Catalog(Protocol):
    """What the domain has, and what was granted of it."""

    def all_grants(self) -> list[GrantRecord]:
        """Of every owner, those that hold no more included."""

    def layers(self) -> list[LayerRecord]:
        """Every layer."""

    def map(self, map_id: str) -> MapRecord | None:
        """A map, if there is one."""

    def origins(self, blob: Digest, access: Access) -> list[tuple[str, str]]:
        """Repositories from which that owner named the blob, at that registry."""


class Contents(Protocol):
    """The pool, by layer."""

    def local_bytes(self, keys: Iterable[LayerKey]) -> int:
        """Bytes of these layers that are there."""


class Shares:
    """What each namespace has of the domain, for whoever administers it."""

    def __init__(self, catalog: Catalog, contents: Contents, clock: Callable[[], float] = time.time) -> None:
        self._catalog = catalog
        self._contents = contents
        self._clock = clock

    def methods(self) -> Methods:
        """What the daemon may call."""
        return {"Shares": (SharesRequest, self._take)}

    async def _take(self, params: SharesRequest, _report: object) -> worker_api.Shares:
        granted: defaultdict[str, list[GrantRecord]] = defaultdict(list)
        for grant in self._catalog.all_grants():
            granted[namespace_of(grant.owner)].append(grant)
        layers, shares = self._catalog.layers(), []
        for namespace in sorted({*granted, *params.used}):
            await trio.lowlevel.checkpoint()
            shares.append(self._share(namespace, granted[namespace], layers, params.used.get(namespace, [])))
        return worker_api.Shares(shares=shares)

    def _share(
        self, namespace: str, grants: Sequence[GrantRecord], layers: Sequence[LayerRecord], maps: Iterable[str]
    ) -> Share:
        owners: defaultdict[Digest, set[str]] = defaultdict(set)
        for grant in grants:
            owners[grant.blob].add(grant.owner)
        keys = {each.key for each in layers if any(self._is_named(owner, each) for owner in owners[each.blob])}
        keys |= {key for record in map(self._catalog.map, maps) if record for key in (record.key, *record.lowers)}
        now = self._clock()
        held = {grant.blob for grant in grants if grant.holds(now)}
        return Share(namespace=namespace, granted=len(held), local=self._contents.local_bytes(keys))

    def _is_named(self, owner: str, layer: LayerRecord) -> bool:
        """Whether the owner means this registry's layer, and not another's with that digest."""
        return bool(self._catalog.origins(layer.blob, Access(owner, layer.origin)))


class Grants:
    """The service: `core.images.Gate`."""

    def __init__(self, ledger: Ledger, blobs: Blobs, lifetime: float, clock: Callable[[], float] = time.time) -> None:
        self._ledger = ledger
        self._blobs = blobs
        self._lifetime = lifetime
        self._clock = clock

    async def admit(self, image: Image) -> None:
        """Return if `image.access.owner` may have all of it.

        Raises what the registry says of the lowest layer that it does not give, UnreachableError where it says nothing.
        """
        if not image.access.owner:
            raise DeniedError("this domain is shared, and the call does not say for whom it is")
        layers = list({layer.digest: layer for layer in image.layers}.values())
        failures: dict[int, NsfsError] = {}

        async def prove(number: int, layer: Layer) -> None:
            try:
                await self._prove(image, layer)
            except NsfsError as error:
                failures[number] = error

        await run_all(partial(prove, number, layer) for number, layer in enumerate(layers))
        if failures:
            raise failures[min(failures)]

    async def _prove(self, image: Image, layer: Layer) -> None:
        owner, repository = image.access.owner, image.repository
        known = self._ledger.grant(owner, repository, layer.digest)
        if known is not None and known.holds(self._clock()):
            return
        if layer.descriptor.size <= 0:
            raise CorruptError(f"a layer of no bytes: {layer.digest}")
        blob = await self._blobs.open(layer.digest, layer.descriptor.size, Holder(owner, repository))
        try:
            await blob.fetch(0, 1)
        except (DeniedError, NotFoundError):
            await trio.to_thread.run_sync(self._ledger.delete_grant, owner, repository, layer.digest)
            raise
        now = self._clock()
        record = GrantRecord(
            owner=owner, repository=repository, blob=layer.digest, proved=now, expires=now + self._lifetime
        )
        try:
            await trio.to_thread.run_sync(self._ledger.put_grant, record)
        except NsfsError as error:
            log.warning("a grant is not kept, and proved again: %s", error)
