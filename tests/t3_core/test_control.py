"""The control calls: what is asked of whom, what is counted, and that status never waits."""

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import trio
import trio.testing
from msgspec import Struct

from mount_records import mount_record
from nsfs.core import worker_api
from nsfs.core.cache import Cache
from nsfs.core.manual import Made
from nsfs.core.scopes import Scopes
from nsfs.errors import DeniedError, NotFoundError, UnreachableError
from nsfs.model.cache import Limits
from nsfs.model.mounts import MountRecord
from nsfs.model.policy import Domain, Isolation, Policy
from nsfs.model.report import EntryReport, ImageReport, Phases
from nsfs.serve import api
from nsfs.serve.caching import Caching
from nsfs.serve.config import Config
from nsfs.serve.control import Control
from nsfs.serve.credentials import Keychain
from nsfs.store.layout import Layout
from trio_tests import run

T = TypeVar("T")


def record(number: int, domain: str) -> MountRecord:
    return mount_record(id=f"m{number}", target=f"/mnt/{number}", domain=domain, maps=[f"{number:032x}"])


class FakeMounts:
    """Three mounts in two domains."""

    def __init__(self) -> None:
        self.wishes: list[Any] = []
        self.gone: list[tuple[str, bool]] = []

    def records(self) -> list[MountRecord]:
        return [record(0, "a"), record(1, "b"), record(2, "a")]

    async def mount(self, wish: Any, report: Callable[[Struct], Any]) -> Made:
        self.wishes.append(wish)
        await report(wish)
        return Made(record(7, "a"), Phases(resolve=1.0, index=2.0, mount=3.0))

    async def umount(self, target: str, *, force: bool) -> None:
        self.gone.append((target, force))


class FakeSupervisor:
    """Domain a answers, b takes a second to say that it does not."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, Struct]] = []
        self.answers: dict[str, Struct] = {
            "Usage": worker_api.UsageReport(local=1, fetched=2, state="ready"),
            "Status": worker_api.WorkerStatus(layers=1, local=2, fetched=3, waiting=4, state="ready"),
            "Stat": EntryReport(path=b"/x", kind="file", mode=0, uid=0, gid=0, size=0, mtime_ns=0, links=1),
            "Evict": worker_api.Evicted(layers=2, freed=5),
            "Inspect": ImageReport(reference="r", digest="d", platform="p", size=1, domain="", layers=[]),
            "List": worker_api.Empty(),
        }

    async def call(self, domain: Domain, method: str, params: Struct, result: type[T], report: object = None) -> Any:
        await trio.sleep(5)
        self.calls.append((domain.name, method, params))
        answer = self.answers[method]
        assert isinstance(answer, result)
        return answer

    async def ask_now(self, domain: str, method: str, params: Struct, result: type[T]) -> Any:
        if domain == "b":
            await trio.sleep(1)
            raise UnreachableError("the worker does not answer")
        answer = self.answers[method]
        assert isinstance(answer, result)
        return answer

    def pids(self) -> dict[str, int]:
        return {"b": 0, "a": 5}


class Fixture:
    def __init__(self) -> None:
        mounts: Any = FakeMounts()
        supervisor: Any = FakeSupervisor()
        self.mounts, self.supervisor = mounts, supervisor
        config = Config(root="/r", run="/r", socket="/r/s", on_error="wait:5s")
        keychain = Keychain(config, Layout("/r", "/r"), {}, private=True)
        self.scopes = Scopes(Policy(Isolation.SHARED), lambda reference: f"docker.io/library/{reference}")
        disks: Any = None
        cache = Cache(supervisor, disks, Limits(1000, 0, 0.9, 0.8), {}, refuses=True)
        self.control = Control(config, mounts, supervisor, self.scopes, keychain, cache, private=True)
        self.handlers = self.control.handlers() | Caching(cache, self.control).handlers()
        self.told: list[object] = []

    async def ask(self, method: str, request: Struct) -> Any:
        return await self.handlers[method](request, self.tell)

    async def tell(self, body: object) -> None:
        self.told.append(body)


def test_every_method_of_the_api_has_a_handler() -> None:
    elsewhere = {"Explain", "Namespaces", "Namespace", "EndNamespace", "Drain", "Upgrade"}
    assert set(Fixture().handlers) == set(api.METHODS) - elsewhere


def test_status_asks_all_at_once_and_says_who_does_not_answer() -> None:
    async def body() -> None:
        report: api.StatusReport = await Fixture().ask("Status", api.Empty())
        assert trio.current_time() == pytest.approx(1)
        assert [(mount.id, mount.local, mount.state) for mount in report.mounts] == [
            ("m0", 1, "ready"),
            ("m1", 0, "the worker does not answer"),
            ("m2", 1, "ready"),
        ]
        assert [(each.name, each.pid, each.waiting, each.state) for each in report.domains] == [
            ("a", 5, 4, "ready"),
            ("b", 0, 0, "the worker does not answer"),
        ]

    run(body)


def test_a_mount_has_the_daemons_patience_where_it_names_none() -> None:
    async def body() -> None:
        fixture = Fixture()
        request = api.MountRequest(reference="r", target="/mnt/7")
        report = await fixture.ask("Mount", request)
        await fixture.ask("Mount", api.MountRequest(reference="r", target="/mnt/7", on_error="eio"))
        assert [wish.on_error for wish in fixture.mounts.wishes] == ["wait:5s", "eio"]
        assert (report.id, report.local, report.fetched) == ("m7", 1, 2)
        assert len(fixture.told) == 2
        await fixture.ask("Umount", api.UmountRequest(target="/mnt/7", force=True))
        assert fixture.mounts.gone == [("/mnt/7", True)]

    run(body)


def test_images_are_looked_at_in_the_domain_that_a_mount_would_use() -> None:
    async def body() -> None:
        fixture = Fixture()
        path = api.PathRequest(reference="r", namespace="team", isolation="isolated", path=b"/x", offset=3, length=4)
        entry = await fixture.ask("Stat", path)
        image = await fixture.ask("Inspect", api.ImageRequest(reference="r", platform="linux/arm64"))
        evicted = await fixture.ask("Evict", api.ImageRequest(reference="r"))
        assert await fixture.ask("List", api.PathRequest(reference="r", path=b"/")) == api.Empty()
        asked = [(domain, method) for domain, method, _ in fixture.supervisor.calls]
        assert asked == [("ns/team", "Stat"), ("shared", "Inspect"), ("shared", "Evict"), ("shared", "List")]
        params = fixture.supervisor.calls[0][2]
        assert (params.path, params.offset, params.length) == (b"/x", 3, 4)
        assert (entry.path, image.domain, evicted) == (b"/x", "shared", api.EvictReport(layers=2, freed=5))

    run(body)


def test_a_pod_that_does_not_exist_cannot_be_looked_into() -> None:
    async def body() -> None:
        with pytest.raises(DeniedError, match="pod"):
            await Fixture().ask("Inspect", api.ImageRequest(reference="r", isolation="pod"))

    run(body)


def test_calls_under_way_are_counted_whatever_their_end() -> None:
    async def body() -> None:
        fixture = Fixture()
        request = api.ImageRequest(reference="r")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fixture.ask, "Evict", request)
            nursery.start_soon(fixture.ask, "Status", api.Empty())
            await trio.testing.wait_all_tasks_blocked()
            assert fixture.control.running == 1
            nursery.cancel_scope.cancel()
        assert (fixture.control.running, fixture.control.handled) == (0, 1)
        fixture.supervisor.answers = {}
        fixture.supervisor.call = refuse
        with pytest.raises(NotFoundError):
            await fixture.ask("Evict", request)
        assert (fixture.control.running, fixture.control.handled) == (0, 2)

    run(body)


async def refuse(*_: object) -> None:
    raise NotFoundError("no such image")
