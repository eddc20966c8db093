"""Metrics: how everything stands, as figures for Prometheus.

Owns their names, labels and meaning (docs/metrics.md lists them); keeps nothing between two scrapes. Names follow
https://prometheus.io/docs/practices/naming/. All workers are asked at once, and one that does not answer at once has
none of its figures in that scrape, and counts as not up. What takes long to find out (what pools hold) is as it was at
the last look.

Invariants: no label is a secret or names an image, and their values are bounded: pods' domains are all one, `pod`, and
without counters, since what ended pods counted would be missing from a sum; of each namespace's servers those that
sent most are named.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import partial, reduce
from typing import TYPE_CHECKING, Final, TypeAlias

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from nsfs import __version__
from nsfs.core import worker_api
from nsfs.core.tasks import run_all
from nsfs.errors import NsfsError
from nsfs.model.report import OTHERS, Cost

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from prometheus_client.core import Metric

    from nsfs.core.cache import Cache, Room
    from nsfs.core.namespaces import Namespaces
    from nsfs.model.namespaces import Holding
    from nsfs.serve.accounts import Accounts
    from nsfs.serve.logs import Bugs
    from nsfs.serve.supervisor import Supervisor

    Values: TypeAlias = Iterable[tuple[Sequence[str], float]]
    """By labels."""

_POD: Final = "pod"
"""Label of all pods' domains."""
_SERVERS: Final = 32
"""Servers that are named for each namespace."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """How things stand at one moment."""

    build: str
    holdings: Mapping[str, Holding]
    """By namespace."""
    costs: Mapping[str, Sequence[Cost]]
    """By namespace."""
    workers: Mapping[str, worker_api.WorkerStatus | None]
    """What each domain's worker said; None where it did not answer."""
    restarts: Mapping[str, int]
    """By domain."""
    sizes: Mapping[str, int]
    """Bytes on disk, by domain."""
    room: Room
    bugs: int
    """Of the daemon."""


class Metrics:
    """The service."""

    def __init__(
        self, supervisor: Supervisor, namespaces: Namespaces, accounts: Accounts, cache: Cache, bugs: Bugs
    ) -> None:
        self._supervisor = supervisor
        self._namespaces = namespaces
        self._accounts = accounts
        self._cache = cache
        self._bugs = bugs

    async def render(self, accept: str) -> tuple[bytes, str]:
        """All figures, in the best format that `accept` (as of HTTP) names, and that format's media type."""
        return render_figures(await self.take(), accept)

    async def take(self) -> Figures:
        """How things stand now; takes no longer than a worker has to answer."""
        holdings = self._namespaces.held(self._cache.sizes)
        workers: dict[str, worker_api.WorkerStatus | None] = {}
        costs: dict[str, Sequence[Cost]] = {}

        async def ask(domain: str) -> None:
            workers[domain] = await self._ask(domain)

        async def add_up(found: Holding) -> None:
            costs[found.namespace] = await self._accounts.known(found.owners)

        domains = self._supervisor.pids()
        works = [*(partial(ask, name) for name in domains), *(partial(add_up, each) for each in holdings.values())]
        await run_all(works)
        return Figures(
            build=self._supervisor.build,
            holdings=holdings,
            costs=costs,
            workers=workers,
            restarts=self._supervisor.restarts(),
            sizes=self._cache.sizes,
            room=self._cache.room,
            bugs=self._bugs.count,
        )

    async def _ask(self, domain: str) -> worker_api.WorkerStatus | None:
        request = worker_api.StatusRequest(measured=False)
        try:
            return await self._supervisor.ask_now(domain, "Status", request, worker_api.WorkerStatus)
        except NsfsError:
            return None


def render_figures(figures: Figures, accept: str) -> tuple[bytes, str]:
    """See Metrics.render."""
    registry = CollectorRegistry()
    registry.register(_Families(figures))
    ProcessCollector(registry=registry)
    encode, media_type = choose_encoder(accept)
    return encode(registry), media_type


class _Families(Collector):
    """One moment's."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        """See Collector."""
        figures = self._figures
        yield InfoMetricFamily("nsfs_build", "What serves.", {"version": __version__, "build": figures.build})
        yield from _holding_families(figures.holdings.values())
        yield from _cost_families(figures.costs)
        yield from _worker_families(figures)
        yield from _wait_families(figures.workers)
        yield from _pool_families(figures.room, figures.sizes)
        yield CounterMetricFamily("nsfs_daemon_bugs", "Errors of the daemon that were bugs.", figures.bugs)


def _holding_families(holdings: Iterable[Holding]) -> Iterator[Metric]:
    mounts = Counter(
        (mount.namespace, _label(mount.domain), mount.driver) for each in holdings for mount in each.mounts
    )
    yield _gauge("nsfs_mounts", "Mounts made by hand.", ("namespace", "domain", "driver"), mounts.items())
    snapshots = Counter((record.namespace, record.kind.name.lower()) for each in holdings for record in each.snapshots)
    yield _gauge("nsfs_snapshots", "Snapshots of containerd's.", ("namespace", "kind"), snapshots.items())


def _cost_families(costs: Mapping[str, Sequence[Cost]]) -> Iterator[Metric]:
    named = {(namespace, cost.server): cost for namespace, all_ in costs.items() for cost in plan_servers(all_)}
    requests = {labels: cost.requests for labels, cost in named.items()}
    received = {labels: cost.received for labels, cost in named.items()}
    labels = ("namespace", "server")
    yield _counter("nsfs_registry_requests", "Requests to registries and what they lead to.", labels, requests.items())
    yield _counter("nsfs_registry_received_bytes", "Bytes of bodies that these sent.", labels, received.items())


def plan_servers(costs: Sequence[Cost]) -> list[Cost]:
    """The servers that are named, those that sent most, and the sum of all others."""
    ranked = sorted(costs, key=lambda cost: (-cost.received, cost.server))
    named, others = ranked[:_SERVERS], ranked[_SERVERS:]
    if not others:
        return named
    return [*named, reduce(Cost.plus, others, Cost(server=OTHERS, requests=0, received=0))]


def _worker_families(figures: Figures) -> Iterator[Metric]:
    workers, answers = figures.workers, _answers(figures.workers)
    up = {domain: status is not None for domain, status in workers.items()}
    layers = {domain: status.layers for domain, status in answers.items()}
    fetched = {domain: status.fetched for domain, status in answers.items()}
    bugs = {domain: status.bugs for domain, status in answers.items()}
    yield _by_domain("nsfs_workers", "Domains in use, each with a worker.", dict.fromkeys(workers, 1))
    yield _by_domain("nsfs_workers_up", "Workers that answer at once.", up)
    yield _by_domain("nsfs_layers", "Layers that are indexed.", layers)
    unkept = {domain: bool(status.unkept) for domain, status in answers.items()}
    yield _by_domain("nsfs_unkept", "1 where what is fetched cannot be kept.", unkept)
    profiles = {domain: status.profiles for domain, status in answers.items()}
    yield _by_domain("nsfs_profiles", "Images of which it is known what a start reads.", profiles)
    recorded = {domain: status.recorded for domain, status in answers.items()}
    yield _by_domain("nsfs_recordings", "Starts that are recorded now.", recorded)
    prefetched = {domain: status.prefetched for domain, status in answers.items()}
    yield _lasting("nsfs_prefetched_bytes", "Bytes of profiles fetched ahead since the worker started.", prefetched)
    yield _lasting("nsfs_worker_restarts", "Workers that were started again.", figures.restarts)
    yield _lasting("nsfs_fetched_bytes", "Bytes of layers fetched since the worker started.", fetched)
    yield _lasting("nsfs_worker_bugs", "Errors since the worker started that were bugs.", bugs)


def _wait_families(workers: Mapping[str, worker_api.WorkerStatus | None]) -> Iterator[Metric]:
    answers = _answers(workers)
    reads = {domain: status.waiting for domain, status in answers.items()}
    longest = {domain: status.longest for domain, status in answers.items()}
    yield _by_domain("nsfs_waiting_reads", "Reads that wait for absent content.", reads)
    yield _by_domain("nsfs_longest_wait_seconds", "Since when the first of them waits.", longest, max)


def _pool_families(room: Room, sizes: Mapping[str, int]) -> Iterator[Metric]:
    yield _by_domain("nsfs_disk_bytes", "Bytes on disk, indexes included.", sizes)
    yield GaugeMetricFamily("nsfs_pool_used_bytes", "Bytes on disk of all domains.", room.used)
    yield GaugeMetricFamily("nsfs_pool_cap_bytes", "Bytes that they may take.", room.limits.most)
    yield GaugeMetricFamily("nsfs_pool_free_bytes", "Bytes that the filesystem has left.", room.free)
    yield GaugeMetricFamily("nsfs_pool_reserve_bytes", "Bytes of these that are not used.", room.limits.reserve)
    yield GaugeMetricFamily("nsfs_pool_excess_bytes", "Bytes that are to go; 0 where all is well.", room.need)
    yield GaugeMetricFamily("nsfs_pool_held_up", "1 where nothing is left that may go.", bool(room.held_up))


def _answers(workers: Mapping[str, worker_api.WorkerStatus | None]) -> dict[str, worker_api.WorkerStatus]:
    return {domain: status for domain, status in workers.items() if status is not None}


def _label(domain: str) -> str:
    return _POD if domain.startswith("pod/") else domain


def _by_domain(
    name: str, text: str, values: Mapping[str, float], join: Callable[[Iterable[float]], float] = sum
) -> Metric:
    """A gauge, for each domain; those of pods joined."""
    labelled: defaultdict[tuple[str], list[float]] = defaultdict(list)
    for domain, value in values.items():
        labelled[_label(domain),].append(value)
    return _gauge(name, text, ("domain",), [(labels, join(found)) for labels, found in labelled.items()])


def _lasting(name: str, text: str, values: Mapping[str, float]) -> Metric:
    """A counter, for each domain that is no pod's."""
    lasting = {(domain,): value for domain, value in values.items() if _label(domain) != _POD}
    return _counter(name, text, ("domain",), lasting.items())


def _gauge(name: str, text: str, labels: Sequence[str], values: Values) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    for where, value in values:
        family.add_metric(where, value)
    return family


def _counter(name: str, text: str, labels: Sequence[str], values: Values) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for where, value in values:
        family.add_metric(where, value)
    return family
