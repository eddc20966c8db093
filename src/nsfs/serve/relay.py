"""Relays: how a domain of several owners reaches each owner's own worker, and what it asks there.

Owns, in a shared domain's worker, one relay per owner, made when it is first needed: the daemon makes a socket pair,
gives one end to each of the two, and is out of it; and the name under which a registry's layers are known there.
Refuses nothing by itself: the daemon makes relays for those owners alone for whom somebody called into the domain.

Concurrency: trio. Relays are kept in the worker's nursery; one that broke is made anew by who needs it next.
"""

from __future__ import annotations

import logging
import socket
from collections import defaultdict
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

import trio
from msgspec import Struct

from nsfs.core.grants import Grants
from nsfs.core.images import Located
from nsfs.core.relay import RelaySource, relay_methods
from nsfs.core.tasks import run_all
from nsfs.core.worker_api import Costs, Empty, Share, Shares, SharesRequest
from nsfs.errors import DeniedError, NsfsError, UnreachableError
from nsfs.model.policy import Domain, Isolation, check_owner, domain_named, own_domain, owner_of
from nsfs.model.pool import Access, origin_of
from nsfs.model.report import Cost
from nsfs.remote.reference import LayoutReference, parse_reference
from nsfs.serve.wire import Passing, open_peer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from nsfs.core.blobs import Blobs
    from nsfs.core.grants import Ledger
    from nsfs.core.images import Gate, Sources
    from nsfs.core.ports import Source
    from nsfs.model.namespaces import Standing
    from nsfs.model.oci import Traffic
    from nsfs.remote.hosts import Hosts
    from nsfs.serve.config import Config
    from nsfs.serve.lending import Uplink
    from nsfs.serve.wire import Methods, Peer, Report

T = TypeVar("T")
_ANSWERS: Final = 2.0
"""Seconds that a shared domain's worker has, its start included, to say who has what of it."""
log = logging.getLogger(__name__)


class RelayRequest(Struct, kw_only=True):
    """Names an owner: for Relay, which a shared domain's worker asks (answered by RelayMade), and for ForgetGrants."""

    owner: str


class RelayMade(Struct, kw_only=True):
    """It was given by TakeRelay before."""

    network: str
    """Where that worker asks registries; empty for the host's."""


class TakeRelay(Passing, kw_only=True):
    """The daemon to a shared domain's worker: one end of it, to ask over."""

    owner: str


class ServeRelay(Passing, kw_only=True):
    """The daemon to an owner's own worker: the other end, to answer over."""


class Relays:
    """A shared domain's worker's relays, by owner."""

    def __init__(self, uplink: Uplink, nursery: trio.Nursery) -> None:
        self._uplink = uplink
        self._nursery = nursery
        self._relays: dict[str, Peer] = {}
        self._networks: dict[str, str] = {}
        self._locks: defaultdict[str, trio.Lock] = defaultdict(trio.Lock)

    def methods(self) -> Methods:
        """What the daemon may call."""
        return {"TakeRelay": (TakeRelay, self._take)}

    async def reach(self, owner: str) -> Peer:
        """The way to the own worker of `owner`; raises UnreachableError, DeniedError."""
        async with self._locks[owner]:
            found = self._relays.get(owner)
            if found is None or found.is_closed:
                made = await self._uplink.call("Relay", RelayRequest(owner=owner), RelayMade)
                self._networks[owner] = made.network
                found = self._relays[owner]
            return found

    async def network(self, owner: str) -> str:
        """Where that worker asks registries."""
        await self.reach(owner)
        return self._networks[owner]

    async def _take(self, params: TakeRelay, _report: Report) -> Empty:
        (fd,) = params.fds
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(socket.socket(fileno=fd)))
        self._relays[params.owner] = await self._nursery.start(_keep, stream)
        return Empty()


async def _keep(stream: trio.SocketStream, task_status: trio.TaskStatus[Peer]) -> None:
    async with open_peer(stream, {}, name="a shared domain's worker") as peer:
        task_status.started(peer)
        await peer.wait_closed()


def serving_methods(blobs: Blobs, nursery: trio.Nursery) -> Methods:
    """What the daemon may call at an owner's own worker: to answer over relays, with this worker's own access."""
    methods = relay_methods(blobs)

    async def answer(fd: int) -> None:
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(socket.socket(fileno=fd)))
        try:
            async with open_peer(stream, methods, name="an owner's worker") as peer:
                await peer.wait_closed()
        except NsfsError as error:
            log.info("a relay is not understood: %s", error)

    async def serve(params: ServeRelay, _report: Report) -> Empty:
        for fd in params.fds:
            nursery.start_soon(answer, fd)
        return Empty()

    return {"ServeRelay": (ServeRelay, serve)}


class Workers(Protocol):
    """The domains' workers, as `serve.supervisor.Supervisor`."""

    async def call(
        self,
        domain: Domain,
        method: str,
        params: Struct,
        result: type[T],
        report: Callable[[Any], Awaitable[None]] | None = None,
        fds: Sequence[int] = (),
    ) -> T:
        """Ask the worker of `domain`."""

    def pids(self) -> dict[str, int]:
        """The worker of each domain that has one."""

    def owners(self, domain: str) -> set[str]:
        """On whose behalf somebody called into a domain, or has a view there."""


def _shared(domains: Iterable[str]) -> list[Domain]:
    """Those of several owners."""
    named = map(domain_named, domains)
    return [domain for domain in named if not domain.transient and not owner_of(domain)]


class Broker:
    """The daemon's part: it makes relays, and sees nothing of what goes over them."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._workers: Workers | None = None

    def connect(self, workers: Workers) -> None:
        """Reach workers by these from now on."""
        self._workers = workers

    def methods(self, domain: str) -> Methods:
        """What the worker of a shared domain may ask: for relays to owners for whom somebody called there."""

        async def relay(asked: RelayRequest, _report: Report) -> RelayMade:
            assert self._workers is not None, "workers are started after that"
            if not asked.owner or asked.owner not in self._workers.owners(domain):
                raise DeniedError(f"nobody called into domain {domain} on behalf of {asked.owner[:200]!r}")
            await self._join(self._workers, domain, asked.owner)
            return RelayMade(network=self._config.of_namespace(asked.owner).netns)

        return {"Relay": (RelayRequest, relay)}

    async def forget(self, owner: str, domains: Iterable[str]) -> None:
        """Have those of `domains` that are shared forget what `owner` was granted: it is no more."""
        assert self._workers is not None, "nobody ends before"
        for domain in _shared(domains):
            await self._workers.call(domain, "ForgetGrants", RelayRequest(owner=owner), Empty)

    async def shares(self, domains: Iterable[str], standing: Standing) -> dict[str, dict[str, Share]]:
        """What each namespace has of those of `domains` that are shared, by domain and name; without who is silent.

        `standing` is what mounts stand on. Starts workers that do not run: who was granted something may have nothing
        mounted.
        """
        found: dict[str, dict[str, Share]] = {}

        async def ask(domain: Domain) -> None:
            assert self._workers is not None, "nobody asks before"
            with trio.move_on_after(_ANSWERS), suppress(NsfsError):
                asked = SharesRequest(used=standing.get(domain.name, {}))
                said = await self._workers.call(domain, "Shares", asked, Shares)
                found[domain.name] = {share.namespace: share for share in said.shares}

        await run_all([partial(ask, domain) for domain in _shared(domains)])
        return found

    async def _join(self, workers: Workers, domain: str, owner: str) -> None:
        own = Domain(own_domain(check_owner(owner)), Isolation.ISOLATED, owner)
        asking, answering = socket.socketpair()
        with asking, answering:
            await workers.call(own, "ServeRelay", ServeRelay(), Empty, fds=[answering.fileno()])
            shared = Domain(domain, Isolation.SHARED, owner)
            await workers.call(shared, "TakeRelay", TakeRelay(owner=owner), Empty, fds=[asking.fileno()])


class Reach(Protocol):
    """How a worker reaches registries."""

    @property
    def sources(self) -> Sources:
        """Repositories."""

    def gate(self, ledger: Ledger, blobs: Blobs) -> Gate | None:
        """Who may have which image; None where that is no question."""

    def methods(self, blobs: Blobs) -> Methods:
        """What the daemon may call."""


class OwnReach:
    """How a worker that is one owner's reaches registries: itself, and for domains in which that owner shares."""

    def __init__(self, sources: Sources, nursery: trio.Nursery, take_bill: Callable[[], dict[str, Traffic]]) -> None:
        self._sources = sources
        self._take_bill = take_bill
        self._nursery = nursery

    @property
    def sources(self) -> Sources:
        """Repositories, with this worker's own credentials."""
        return self._sources

    def gate(self, ledger: Ledger, blobs: Blobs) -> Gate | None:
        """Nobody is kept out of what is his own."""
        del ledger, blobs
        return None

    def methods(self, blobs: Blobs) -> Methods:
        """What the daemon may call."""
        return {**serving_methods(blobs, self._nursery), "TakeCosts": (Empty, self._take_costs)}

    async def _take_costs(self, _asked: Empty, _report: Report) -> Costs:
        bill = self._take_bill()
        return Costs(
            costs=[Cost(server=host, requests=each.requests, received=each.received) for host, each in bill.items()]
        )


class SharedReach:
    """How the worker of several owners reaches registries: as each of them, and not before a grant."""

    def __init__(self, local: Sources, hosts: Hosts, uplink: Uplink, nursery: trio.Nursery, grant_ttl: float) -> None:
        self._relays = Relays(uplink, nursery)
        self._grant_ttl = grant_ttl
        self._ledger: Ledger | None = None
        self._sources = RelaySources(self._relays, hosts, local)

    @property
    def sources(self) -> Sources:
        """Repositories, as each owner's own worker sees them."""
        return self._sources

    def gate(self, ledger: Ledger, blobs: Blobs) -> Gate:
        """Grants."""
        self._ledger = ledger
        return Grants(ledger, blobs, self._grant_ttl)

    def methods(self, blobs: Blobs) -> Methods:
        """What the daemon may call."""
        del blobs
        return {
            **self._relays.methods(),
            "ForgetGrants": (RelayRequest, self._forget),
        }

    async def _forget(self, gone: RelayRequest, _report: Report) -> Empty:
        if self._ledger is not None:
            await trio.to_thread.run_sync(self._ledger.delete_grants, gone.owner)
        return Empty()


class RelaySources:
    """`core.images.Sources` for a domain of several owners: registries by relays, layouts as this worker sees them."""

    def __init__(self, relays: Relays, hosts: Hosts, local: Sources) -> None:
        self._relays = relays
        self._hosts = hosts
        self._local = local

    async def locate(self, reference: str, owner: str) -> Located:
        """See Sources."""
        parsed = parse_reference(reference)
        found = await self._local.locate(reference, owner)
        if isinstance(parsed, LayoutReference):
            origin = origin_of(found.repository)
        else:
            origin = origin_of(parsed.registry, await self._network(parsed.registry, owner))
        source = await self.open(found.repository, owner)
        return Located(found.reference, found.repository, found.tag, found.version, source, Access(owner, origin))

    async def _network(self, registry: str, owner: str) -> str:
        """Where that name means that registry; "" for one that proves by TLS who it is, wherever it is asked."""
        network = await self._relays.network(owner)
        if not network:
            return ""
        endpoints = await self._hosts.endpoints(registry)
        return network if any(each.plain or each.tls.skip_verify for each in endpoints) else ""

    async def open(self, repository: str, owner: str) -> Source:
        """See Sources."""
        if isinstance(parse_reference(repository), LayoutReference):
            return await self._local.open(repository, owner)
        if not owner:
            raise UnreachableError(f"nobody is known in whose name {repository} could be asked")
        return RelaySource(partial(self._relays.reach, owner), repository)
