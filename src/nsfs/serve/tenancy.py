"""What the control API says of tenants: what the policy decides for them, what each has here, how it ends.

Translates requests and reports; decides nothing and owns nothing.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from nsfs.core.tasks import run_all
from nsfs.model.explain import follows_of, sharers_of
from nsfs.model.policy import ScopeRequest
from nsfs.serve import api

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Protocol

    from nsfs.core.namespaces import Namespaces
    from nsfs.core.scopes import Scopes
    from nsfs.core.worker_api import Share
    from nsfs.model.namespaces import Holding, Standing
    from nsfs.serve.accounts import Accounts
    from nsfs.serve.config import Config
    from nsfs.serve.control import Control
    from nsfs.serve.control_rpc import Handler, Report
    from nsfs.serve.supervisor import Supervisor

    Shares = Mapping[str, Mapping[str, Share]]
    """Of shared domains, by domain and namespace."""

    class Sharing(Protocol):
        """Who has what of domains that several share."""

        async def shares(self, domains: Iterable[str], standing: Standing) -> Shares:
            """Of those of `domains` that are, and on whose maps mounts stand so."""


class Tenancy:
    """Its handlers."""

    def __init__(
        self,
        config: Config,
        scopes: Scopes,
        namespaces: Namespaces,
        supervisor: Supervisor,
        control: Control,
        accounts: Accounts,
        sharing: Sharing,
    ) -> None:
        self._accounts = accounts
        self._sharing = sharing
        self._config = config
        self._scopes = scopes
        self._namespaces = namespaces
        self._supervisor = supervisor
        self._control = control

    def handlers(self) -> dict[str, Handler]:
        """By method name."""
        return {
            "Explain": self._explain,
            "Namespaces": self._all,
            "Namespace": self._one,
            "EndNamespace": self._end,
        }

    async def _explain(self, request: api.ExplainRequest, _report: Report) -> api.ExplainReport:
        asked = ScopeRequest(
            namespace=request.namespace,
            references=(request.reference,),
            plugin=request.plugin,
            wish=request.isolation,
            label=request.label,
            mount_id="<mount>",
        )
        decision = self._scopes.decide(asked)
        return api.ExplainReport(
            reference=self._scopes.complete(request.reference),
            namespace=request.namespace,
            plugin=request.plugin,
            scope=decision.scope,
            domain=decision.domain.name if decision.domain else "",
            rule=decision.rule,
            reasons=list(decision.reasons),
            policy=self._config.policy,
            follows=follows_of(decision, self._config.encrypt),
            sharers=sharers_of(self._scopes.policy, decision),
        )

    async def _all(self, _request: api.Empty, _report: Report) -> api.NamespacesReport:
        """All at once: a worker that does not answer holds up nobody else."""
        holdings = await self._namespaces.holdings()
        shares = await self._shares()
        reports: dict[str, api.NamespaceReport] = {}

        async def ask(name: str, found: Holding) -> None:
            reports[name] = await self._report(found, shares)

        await run_all([partial(ask, name, found) for name, found in holdings.items()])
        return api.NamespacesReport(namespaces=[reports[name] for name in holdings])

    async def _one(self, request: api.NamespaceRequest, _report: Report) -> api.NamespaceReport:
        return await self._report(await self._namespaces.holding(request.namespace), await self._shares())

    async def _end(self, request: api.NamespaceRequest, _report: Report) -> api.NamespaceEnded:
        ended = await self._namespaces.end(request.namespace, force=request.force)
        return api.NamespaceEnded(
            namespace=request.namespace,
            mounts=ended.mounts,
            snapshots=ended.snapshots,
            domains=ended.domains,
            freed=ended.freed,
        )

    async def _shares(self) -> Shares:
        return await self._sharing.shares(await self._namespaces.domains(), self._namespaces.standing())

    async def _report(self, found: Holding, shares: Shares) -> api.NamespaceReport:
        granted = {name for name, by_namespace in shares.items() if found.namespace in by_namespace}
        names = sorted(found.own | found.shared | granted)
        domains = [await self._domain(found, name, shares.get(name, {}).get(found.namespace)) for name in names]
        return api.NamespaceReport(
            namespace=found.namespace,
            containerd=found.namespace in await self._namespaces.came_by_containerd(),
            domains=domains,
            mounts=found.targets,
            snapshots=len(found.snapshots),
            containers=found.containers,
            logins=sorted(found.logins),
            quota=int(self._config.of_namespace(found.namespace).quota),
            own=sum(domain.disk for domain in domains if domain.own),
            shared=sum(domain.used for domain in domains if not domain.own),
            fetched=sum(domain.fetched for domain in domains if domain.own),
            costs=await self._accounts.of(found.owners),
        )

    async def _domain(self, of: Holding, name: str, share: Share | None) -> api.NamespaceDomain:
        pid = self._supervisor.pids().get(name, 0)
        report = await self._control.domain_report(name, pid)
        found = await self._namespaces.measure(name)
        used = share.local if share else 0
        return api.NamespaceDomain(
            name=name,
            own=name in of.own,
            pid=pid,
            uid=found.uid,
            encrypted=found.is_encrypted,
            disk=found.size,
            fetched=report.fetched,
            used=found.size if name in of.own else used,
            grants=share.granted if share else 0,
            quota=int(self._config.of_namespace(name.removeprefix("ns/")).quota) if name in of.own else 0,
            state=report.state,
        )
