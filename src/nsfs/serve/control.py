"""What each call of the control API means: which service is asked, and how its answer becomes a report.

Owns no state but the count of calls that are running, by which a private daemon knows whether it is needed. Images are
looked at in the worker of the domain that a mount by the same namespace and isolation would use.
"""

from __future__ import annotations

import os
import secrets
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import msgspec

from nsfs import __version__
from nsfs.core import worker_api
from nsfs.core.manual import ManualMounts, Wish
from nsfs.core.tasks import run_all
from nsfs.errors import DeniedError, NsfsError, UnsupportedError
from nsfs.model.policy import ScopeRequest
from nsfs.model.report import EntryReport, ImageReport, Note
from nsfs.remote.credentials import Credential
from nsfs.serve import api

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from msgspec import Struct

    from nsfs.core.cache import Cache
    from nsfs.core.scopes import Scopes
    from nsfs.model.mounts import MountRecord
    from nsfs.model.policy import Domain
    from nsfs.serve.config import Config
    from nsfs.serve.control_rpc import Handler, Report
    from nsfs.serve.credentials import Keychain
    from nsfs.serve.supervisor import Supervisor

T = TypeVar("T")


class Control:
    """The handlers of `api.METHODS`, but for those of `serve.tenancy`."""

    def __init__(
        self,
        config: Config,
        mounts: ManualMounts,
        supervisor: Supervisor,
        scopes: Scopes,
        keychain: Keychain,
        cache: Cache,
        *,
        private: bool,
    ) -> None:
        self._config = config
        self._scopes = scopes
        self._mounts = mounts
        self._supervisor = supervisor
        self._keychain = keychain
        self._cache = cache
        self._incarnation = secrets.token_hex(8)
        self.private = private
        self.running = 0
        """Calls under way, Status and Version aside."""
        self.handled = 0
        """Calls begun so far."""

    def handlers(self) -> dict[str, Handler]:
        """By method name."""
        return {
            "Version": self._version,
            "Status": self._status,
            "Mount": self.counted(self._mount),
            "Umount": self.counted(self._umount),
            "Index": self.counted(self._index),
            "Inspect": self.counted(self._inspect),
            "Export": self.counted(self._export),
            "List": self.counted(self._path("List", worker_api.Empty, api.Empty)),
            "Tree": self.counted(self._path("Tree", worker_api.Empty, api.Empty)),
            "Read": self.counted(self._path("Read", worker_api.Empty, api.Empty)),
            "Stat": self.counted(self._path("Stat", EntryReport, None)),
            "Login": self.counted(self._login),
            "Logout": self.counted(self._logout),
        }

    def counted(self, handler: Callable[..., Awaitable[Struct]]) -> Handler:
        """`handler`, among the calls under way while it runs."""

        async def counted(request: Struct, report: Report) -> Struct:
            self.running += 1
            self.handled += 1
            try:
                return await handler(request, report)
            finally:
                self.running -= 1

        return counted

    async def _version(self, _request: api.Empty, _report: Report) -> api.VersionReport:
        supervisor = self._supervisor
        return api.VersionReport(
            version=__version__,
            api=api.VERSION,
            pid=os.getpid(),
            private=self.private,
            incarnation=self._incarnation,
            build=supervisor.build,
            outdated=supervisor.outdated(),
            kept_back=supervisor.kept_back(),
        )

    async def _mount(self, request: api.MountRequest, report: Report) -> api.MountReport:
        wish = Wish(
            reference=request.reference,
            target=request.target,
            namespace=request.namespace,
            isolation=request.isolation,
            platform=request.platform,
            driver=request.driver,
            writable=request.writable,
            on_error=request.on_error or self._config.on_error,
            profile=request.profile,
        )
        made = await self._mounts.mount(wish, report)
        await self._say_if_large(made.record.size, report)
        found = await self._mount_report(made.record)
        found.phases = made.phases
        return found

    async def _umount(self, request: api.UmountRequest, report: Report) -> api.Empty:
        trouble = await self._mounts.umount(request.target, force=request.force)
        if trouble:
            await report(Note(text=f"it is unmounted, which is written down later: {trouble}"))
        return api.Empty()

    def domain(self, request: api.ImageRequest) -> Domain:
        """Where an image is looked at; raises DeniedError where that is a pod's."""
        asked = ScopeRequest(
            namespace=request.namespace,
            references=(request.reference,),
            plugin=request.plugin,
            wish=request.isolation,
            mount_id="inspect",
        )
        domain = self._scopes.domain(asked)
        if domain.transient:
            raise DeniedError(
                "a pod's domain lives and dies with its mount",
                hint="mount the image with --isolation pod and look there",
            )
        return domain

    async def ask(self, domain: Domain, method: str, params: Struct, result: type[T], report: Report) -> T:
        """Ask the worker of a domain."""
        return await self._supervisor.call(domain, method, params, result, report)

    async def _index(self, request: api.ImageRequest, report: Report) -> ImageReport:
        """Before containerd asks for the image's snapshots."""
        if self.private or not self._mounts.is_root:
            raise UnsupportedError("this daemon serves no layers to containerd", hint="see nsfs doctor")
        found = await self._report_image("Index", request, report)
        await self._say_if_large(sum(layer.stream_size for layer in found.layers), report)
        return found

    async def _say_if_large(self, size: int, report: Report) -> None:
        if note := self._cache.larger_than_all(size):
            await report(note)

    async def _inspect(self, request: api.ImageRequest, report: Report) -> ImageReport:
        return await self._report_image("Inspect", request, report)

    async def _export(self, request: api.ImageRequest, report: Report) -> api.ExportReport:
        domain = self.domain(request)
        found = await self.ask(domain, "Export", name_in(domain, request), worker_api.Exported, report)
        return api.ExportReport(reference=found.reference, digest=found.digest)

    async def _report_image(self, method: str, request: api.ImageRequest, report: Report) -> ImageReport:
        domain = self.domain(request)
        name = name_in(domain, request)
        found = await self.ask(domain, method, name, ImageReport, report)
        found.domain = domain.name
        return found

    def _path(
        self, method: str, result: type[Struct], instead: type[Struct] | None
    ) -> Callable[..., Awaitable[Struct]]:
        async def ask(request: api.PathRequest, report: Report) -> Struct:
            domain = self.domain(request)
            name = worker_api.PathName(
                owner=domain.owner,
                trust=domain.trust_index,
                reference=request.reference,
                platform=request.platform,
                path=request.path,
                offset=request.offset,
                length=request.length,
            )
            answer = await self.ask(domain, method, name, result, report)
            return instead() if instead else answer

        return ask

    async def _login(self, request: api.LoginRequest, _report: Report) -> api.LoginReport:
        credential = Credential(request.username, request.password)
        registry = await self._keychain.login(request.namespace, request.registry, credential)
        return api.LoginReport(registry=registry, namespace=request.namespace, username=request.username)

    async def _logout(self, request: api.LogoutRequest, _report: Report) -> api.Empty:
        await self._keychain.logout(request.namespace, request.registry)
        return api.Empty()

    async def _status(self, _request: api.Empty, _report: Report) -> api.StatusReport:
        """All mounts and domains, asked at once: one that does not answer says so, and holds up nobody else."""
        mounts: dict[str, api.MountReport] = {}
        domains: dict[str, api.DomainReport] = {}

        async def ask_mount(record: MountRecord) -> None:
            mounts[record.id] = await self._mount_report(record)

        async def ask_domain(name: str, pid: int) -> None:
            domains[name] = await self.domain_report(name, pid)

        records, pids = self._mounts.records(), self._supervisor.pids()
        await run_all(
            [
                *(partial(ask_mount, record) for record in records),
                *(partial(ask_domain, name, pid) for name, pid in pids.items()),
            ]
        )
        return api.StatusReport(
            version=__version__,
            private=self.private,
            root=self._config.root,
            pools=self.pools_report(),
            mounts=[mounts[record.id] for record in records],
            domains=[domains[name] for name in sorted(pids)],
        )

    def pools_report(self) -> api.PoolsReport:
        """How all pools stood at the last look."""
        room = self._cache.room
        return api.PoolsReport(
            used=room.used,
            cap=room.limits.most,
            free=room.free,
            reserve=room.limits.reserve,
            state=room.state,
        )

    async def _mount_report(self, record: MountRecord) -> api.MountReport:
        try:
            usage = await self._supervisor.ask_now(
                record.domain, "Usage", worker_api.Usage(maps=record.maps), worker_api.UsageReport
            )
        except NsfsError as error:
            usage = worker_api.UsageReport(local=0, fetched=0, state=str(error))
        return api.MountReport(
            id=record.id,
            target=record.target,
            reference=record.reference,
            digest=record.digest,
            namespace=record.namespace,
            domain=record.domain,
            driver=record.driver,
            writable=record.writable,
            files=record.files,
            size=record.size,
            **msgspec.structs.asdict(usage),
        )

    async def domain_report(self, name: str, pid: int) -> api.DomainReport:
        """How a domain stands, as far as its worker answers at once."""
        try:
            status = await self._supervisor.ask_now(name, "Status", worker_api.StatusRequest(), worker_api.WorkerStatus)
        except NsfsError as error:
            status = worker_api.WorkerStatus(layers=0, local=0, fetched=0, state=str(error))
        return api.DomainReport(name=name, pid=pid, **msgspec.structs.asdict(status))


def name_in(domain: Domain, request: api.ImageRequest) -> worker_api.Name:
    """What a request calls an image, for the worker of that domain."""
    return worker_api.Name(
        reference=request.reference, platform=request.platform, owner=domain.owner, trust=domain.trust_index
    )
