"""Metrics: what a moment's figures are called, and that nobody who scrapes badly harms anybody."""

import logging
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
import trio
from msgspec import Struct
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from mount_records import mount_record
from nsfs.core import worker_api
from nsfs.core.cache import Room
from nsfs.errors import CorruptError, UnreachableError, UsageError
from nsfs.model.cache import Limits
from nsfs.model.mounts import MountRecord
from nsfs.model.namespaces import Holding
from nsfs.model.report import Cost
from nsfs.model.snapshot import Kind, Record
from nsfs.serve.logs import Bugs, counted_bugs
from nsfs.serve.metrics import Figures, Metrics, plan_servers, render_figures
from nsfs.serve.scrapes import serve_scrapes
from trio_tests import run

T = TypeVar("T")


def status(**fields: Any) -> worker_api.WorkerStatus:
    idle = worker_api.WorkerStatus(layers=1, local=0, fetched=0, state="ready")
    return msgspec.structs.replace(idle, **fields)


def mount(number: int, domain: str, driver: str = "erofs") -> MountRecord:
    about = {"reference": "registry.example/secret:tag", "namespace": "team"}
    return mount_record(id=f"m{number}", target=f"/mnt/{number}", domain=domain, driver=driver, **about)


def snapshot(number: int, kind: Kind) -> Record:
    return Record(
        snapshotter="nsfs",
        name=f"team/{number}/x",
        namespace="team",
        id=number,
        kind=kind,
        parent="",
        labels={},
        created=0,
        updated=0,
    )


STARTS = {"profiles": 6, "recorded": 1, "prefetched": 1 << 20}


def figures(**fields: Any) -> Figures:
    holding = Holding(namespace="team", own={"ns/team", "ns/team/a"})
    holding.mounts = [mount(0, "ns/team"), mount(1, "ns/team"), mount(2, "pod/m2"), mount(3, "pod/m3", "fuse")]
    holding.snapshots = [snapshot(1, Kind.COMMITTED), snapshot(2, Kind.COMMITTED), snapshot(3, Kind.ACTIVE)]
    made: dict[str, Any] = {
        "build": "b1",
        "holdings": {"team": holding},
        "costs": {"team": [Cost(server='reg"istry:443', requests=3, received=1 << 40)]},
        "workers": {
            "ns/team": status(layers=7, fetched=99, waiting=2, longest=12.5, bugs=4, unkept="disk full", **STARTS),
            "shared": None,
            "pod/m2": status(waiting=1, longest=3, fetched=5),
            "pod/m3": status(waiting=4, longest=9, fetched=6),
        },
        "restarts": {"ns/team": 2, "shared": 0, "pod/m2": 1},
        "sizes": {"ns/team": 4096, "pod/m2": 10, "pod/m3": 20},
        "room": Room(950, 50, Limits(1000, 100, 0.9, 0.8), "what is left is pinned"),
        "bugs": 6,
    }
    return Figures(**made | fields)


def samples(text: bytes) -> dict[tuple[str, ...], float]:
    """Values by name and the values of their labels, in the order of the labels' names."""
    families = text_string_to_metric_families(text.decode())
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_every_figure_has_its_name() -> None:
    text, media_type = render_figures(figures(), "")
    assert media_type.startswith("text/plain")
    found = {key: value for key, value in samples(text).items() if key[0].startswith("nsfs_")}
    version = next(key[2] for key in found if key[0] == "nsfs_build_info")
    assert found == {
        ("nsfs_build_info", "b1", version): 1,
        ("nsfs_mounts", "ns/team", "erofs", "team"): 2,
        ("nsfs_mounts", "pod", "erofs", "team"): 1,
        ("nsfs_mounts", "pod", "fuse", "team"): 1,
        ("nsfs_snapshots", "committed", "team"): 2,
        ("nsfs_snapshots", "active", "team"): 1,
        ("nsfs_registry_requests_total", "team", 'reg"istry:443'): 3,
        ("nsfs_registry_received_bytes_total", "team", 'reg"istry:443'): 1 << 40,
        ("nsfs_workers", "ns/team"): 1,
        ("nsfs_workers", "shared"): 1,
        ("nsfs_workers", "pod"): 2,
        ("nsfs_workers_up", "ns/team"): 1,
        ("nsfs_workers_up", "shared"): 0,
        ("nsfs_workers_up", "pod"): 2,
        ("nsfs_layers", "ns/team"): 7,
        ("nsfs_layers", "pod"): 2,
        ("nsfs_worker_restarts_total", "ns/team"): 2,
        ("nsfs_worker_restarts_total", "shared"): 0,
        ("nsfs_fetched_bytes_total", "ns/team"): 99,
        ("nsfs_worker_bugs_total", "ns/team"): 4,
        ("nsfs_profiles", "ns/team"): 6,
        ("nsfs_profiles", "pod"): 0,
        ("nsfs_recordings", "ns/team"): 1,
        ("nsfs_recordings", "pod"): 0,
        ("nsfs_prefetched_bytes_total", "ns/team"): 1 << 20,
        ("nsfs_waiting_reads", "ns/team"): 2,
        ("nsfs_waiting_reads", "pod"): 5,
        ("nsfs_longest_wait_seconds", "ns/team"): 12.5,
        ("nsfs_longest_wait_seconds", "pod"): 9,
        ("nsfs_unkept", "ns/team"): 1,
        ("nsfs_unkept", "pod"): 0,
        ("nsfs_disk_bytes", "ns/team"): 4096,
        ("nsfs_disk_bytes", "pod"): 30,
        ("nsfs_pool_used_bytes",): 950,
        ("nsfs_pool_cap_bytes",): 1000,
        ("nsfs_pool_free_bytes",): 50,
        ("nsfs_pool_reserve_bytes",): 100,
        ("nsfs_pool_excess_bytes",): 150,
        ("nsfs_pool_held_up",): 1,
        ("nsfs_daemon_bugs_total",): 6,
    }
    assert b"secret" not in text


def test_the_documents_table_lists_what_there_is() -> None:
    text, _ = render_figures(figures(), "")
    names = {f"{family.name}_total" if family.type == "counter" else family.name
             for family in text_string_to_metric_families(text.decode())}  # fmt: skip
    document = (Path(__file__).parents[2] / "docs/metrics.md").read_text()
    listed = {line.split("`")[1] for line in document.splitlines() if line.startswith("| `")}
    assert listed == {name for name in names if name.startswith("nsfs_")}


def test_there_is_openmetrics_for_who_asks_for_it() -> None:
    text, media_type = render_figures(figures(), "application/openmetrics-text; version=1.0.0")
    assert media_type.startswith("application/openmetrics-text")
    parse: Any = openmetrics.text_string_to_metric_families
    names = {family.name for family in parse(text.decode())}
    assert {"nsfs_waiting_reads", "process_resident_memory_bytes"} <= names


def test_few_servers_of_a_namespace_are_named() -> None:
    costs = [Cost(server=f"s{number:03}", requests=1, received=number) for number in range(100)]
    named = plan_servers(costs)
    assert [cost.server for cost in named[:2]] == ["s099", "s098"]
    assert (len(named), named[-1].server, named[-1].requests) == (33, "others", 68)
    assert sum(cost.received for cost in named) == sum(cost.received for cost in costs)
    assert plan_servers(costs[:32])[-1].server == "s000"


def test_bugs_are_what_is_logged_with_an_exception_that_nobody_meant(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("nsfs.somewhere")
    with counted_bugs() as bugs:
        for error in (KeyError("k"), CorruptError("a layer is not what its digest says"), None):
            log.error("it failed", exc_info=error)
        log.warning("nobody waited any more", exc_info=KeyError("k"))
    log.error("it failed", exc_info=KeyError("k"))
    assert bugs.count == 2
    caplog.clear()


class FakeSupervisor:
    """Ten workers that say nothing, within their second, and one that answers."""

    build = "b"

    async def ask_now(self, domain: str, method: str, params: Struct, result: type[T]) -> Any:
        assert (method, params) == ("Status", worker_api.StatusRequest(measured=False))
        if domain != "ns/well":
            await trio.sleep(1)
            raise UnreachableError("the worker does not answer")
        return status(waiting=3)

    def pids(self) -> dict[str, int]:
        return dict.fromkeys([*(f"ns/{number}" for number in range(10)), "ns/well"], 1)

    def restarts(self) -> dict[str, int]:
        return {}


class FakeNamespaces:
    def held(self, domains: Any) -> dict[str, Holding]:
        return {"well": Holding(namespace="well", own={"ns/well", "ns/well/tenant"})}


class FakeAccounts:
    async def known(self, owners: list[str]) -> list[Cost]:
        return [Cost(server=owner, requests=1, received=2) for owner in owners]


class FakeCache:
    sizes: dict[str, int] = {}  # noqa: RUF012  nobody changes it
    room = Room(0, 1, Limits(1, 1, 0.9, 0.8))


def test_workers_are_asked_at_once_and_the_silent_are_left_out() -> None:
    async def body() -> None:
        parts: Any = (FakeSupervisor(), FakeNamespaces(), FakeAccounts(), FakeCache(), Bugs())
        found = await Metrics(*parts).take()
        assert trio.current_time() == pytest.approx(1)
        assert [domain for domain, said in found.workers.items() if said] == ["ns/well"]
        assert [cost.server for cost in found.costs["well"]] == ["well", "well/tenant"]

    run(body)


async def give(accept: str) -> tuple[bytes, str]:
    return f"figures for {accept}\n".encode(), "text/plain"


async def say(path: str, what: bytes) -> bytes:
    """All that is answered to `what`, which need not have been read."""
    answer = b""
    with suppress(trio.BrokenResourceError):
        async with await trio.open_unix_socket(path) as stream:
            await stream.send_all(what)
            async for piece in stream:
                answer += piece
    return answer


def test_one_path_is_served(tmp_path: Path) -> None:
    path = f"{tmp_path}/metrics.sock"

    async def body() -> None:
        async with serve_scrapes(f"unix:{path}", give):
            assert Path(path).stat().st_mode & 0o777 == 0o600
            well = await say(path, b"GET /metrics?x HTTP/1.1\r\nHost: x\r\nAccept: a\r\nAccept: b\r\n\r\n")
            assert well.startswith(b"HTTP/1.1 200 OK\r\n")
            assert well.endswith(b"\r\n\r\nfigures for a,b\n")
            head = await say(path, b"HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"200 OK" in head
            assert head.endswith(b"\r\n\r\n")
            assert b" 404 " in await say(path, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b" 405 " in await say(path, b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
            assert await say(path, b"\x16\x03\x01 no HTTP\r\n\r\n") == b""
            assert await say(path, b"GET /" + b"x" * (1 << 15)) == b""
        assert not Path(path).exists()

    run(body, threads=True)


def test_who_sends_nothing_is_let_go_and_many_are_refused(tmp_path: Path) -> None:
    path = f"{tmp_path}/metrics.sock"

    async def body() -> None:
        async with serve_scrapes(f"unix:{path}", give):
            silent = [await trio.open_unix_socket(path) for _ in range(16)]
            assert await say(path, b"") == b""
            for stream in silent:
                assert await stream.receive_some() == b""
                await stream.aclose()
            assert b"200 OK" in await say(path, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")

    run(body)


def test_what_cannot_be_found_out_is_said(tmp_path: Path) -> None:
    async def fail(_accept: str) -> tuple[bytes, str]:
        raise CorruptError("a record cannot be read")

    async def body() -> None:
        path = f"{tmp_path}/metrics.sock"
        async with serve_scrapes(f"unix:{path}", fail):
            said = await say(path, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b" 503 " in said
            assert said.endswith(b"a record cannot be read\n")

    run(body)


def test_a_port_that_is_taken_is_named() -> None:
    async def body(port: int) -> None:
        with pytest.raises(UsageError, match=rf"metrics.listen: cannot listen there: 127.0.0.1 port {port}"):
            async with serve_scrapes(f"127.0.0.1:{port}", give):
                pass

    with socket.create_server(("127.0.0.1", 0)) as taken:
        run(lambda: body(taken.getsockname()[1]))
