"""Images for pods: what of an image could be shown in a domain that does not exist yet.

A pod's domain begins with its mount, and its image is pulled before. So a pull learns no more than that every layer of
the image is of a kind that can be served on demand, from the image's documents, in a domain that ends with the question
and leaves nothing behind. Owns what was found out, for as long as a pull may last. Refuses images whole: one of which
containerd unpacks a part would have to be read as often as a part is unpacked.
"""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import trio

from nsfs.core import worker_api
from nsfs.errors import NotFoundError

if TYPE_CHECKING:
    from nsfs.core.manual import Workers
    from nsfs.core.scopes import Scopes
    from nsfs.model.lazy import LazyLayer
    from nsfs.model.policy import ScopeRequest

_PULL: Final = 60.0
"""Seconds for which an answer counts: the layers of a pull come one after another."""


class PodImages:
    """The service."""

    def __init__(self, workers: Workers, scopes: Scopes) -> None:
        self._workers = workers
        self._scopes = scopes
        self._found: dict[tuple[str, str, str], tuple[frozenset[tuple[str, str]], float]] = {}
        """Blobs and chain IDs of the layers, and until when that counts, by namespace, plugin name and image."""

    async def check(self, request: ScopeRequest, layer: LazyLayer) -> None:
        """Raise NsfsError where the image has no such layer, or one that cannot be served on demand."""
        now = trio.current_time()
        self._found = {image: found for image, found in self._found.items() if found[1] > now}
        image = (request.namespace, request.plugin, layer.reference)
        if image not in self._found:
            layers = await self._ask(request, layer.reference)
            self._found[image] = layers, trio.current_time() + _PULL
        if (layer.blob, layer.chain) not in self._found[image][0]:
            raise NotFoundError(f"the image has no layer {layer.blob} that makes {layer.chain}: {layer.reference}")

    async def _ask(self, request: ScopeRequest, reference: str) -> frozenset[tuple[str, str]]:
        domain = self._scopes.domain(replace(request, mount_id=f"pull-{secrets.token_hex(8)}"))
        try:
            name = worker_api.Name(reference=reference, owner=domain.owner)
            answer = await self._workers.call(domain, "Check", name, worker_api.Checked)
        finally:
            with trio.CancelScope(shield=True):
                await self._workers.end(domain)
        return frozenset((name.blob, name.chain) for name in answer.layers)
