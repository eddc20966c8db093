"""On what terms workers are started: uids, what is lent, network namespaces and cgroups that are not there."""

import os
import shutil
import socket
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from nsfs.core import worker_api
from nsfs.errors import DeniedError, NotFoundError, NsfsError, UsageError
from nsfs.remote.hosts import HostsDirectory
from nsfs.serve import terms
from nsfs.serve.config import Config, Namespace, parse_config
from nsfs.serve.hostfiles import HostFiles
from nsfs.serve.lending import Borrowing, Lending, Uplink
from nsfs.serve.terms import Lender, RootTerms, check_namespaces, check_uids
from nsfs.serve.wire import open_peer
from nsfs.store.layout import Layout
from nsfs.store.meta import Meta, open_meta

FIRST = 1_879_048_192


class Nothing:
    def methods(self, _owner: str) -> dict[str, Any]:
        return {}


class Site:
    """Root's terms over a directory."""

    def __init__(self, base: Path, meta: Meta, **settings: Any) -> None:
        self.layout = Layout(f"{base}/root", f"{base}/run")
        self.meta = meta
        self.lending = Lending(HostsDirectory(), meta)
        config = Config(root=self.layout.root, run=self.layout.run, socket="/s", **settings)
        self.terms = RootTerms(
            config, self.layout, meta, (), Lender(self.lending, Nothing(), Nothing()), HostFiles(), None
        )

    def uid(self, domain: str, owner: str = "") -> int:
        found = trio.run(self.terms.confinement, domain, owner).uid
        assert found is not None
        return found

    def path(self, domain: str) -> Path:
        return Path(self.layout.domain(domain).path)


@pytest.fixture
def meta(tmp_path: Path) -> Iterator[Meta]:
    with open_meta(str(tmp_path / "meta")) as opened:
        yield opened


@pytest.fixture
def site(tmp_path: Path, meta: Meta) -> Site:
    return Site(tmp_path, meta)


def test_every_domain_has_a_uid_that_it_keeps(tmp_path: Path, site: Site, meta: Meta) -> None:
    assert [site.uid("ns/a"), site.uid("ns/b"), site.uid("ns/a")] == [FIRST, FIRST + 1, FIRST]
    again = Site(tmp_path, meta)
    assert [again.uid("ns/b"), again.uid("ns/a"), again.uid("ns/c")] == [FIRST + 1, FIRST, FIRST + 2]
    assert os.stat(site.path("ns/a")).st_uid == os.stat(site.path("ns/a")).st_gid == FIRST


def test_what_an_earlier_release_wrote_is_given_to_the_uid_and_nothing_else_is(tmp_path: Path, site: Site) -> None:
    outside = tmp_path / "outside"
    outside.write_text("root's")
    deep = site.path("ns/a") / "layers/x"
    deep.mkdir(parents=True)
    (deep / "index").write_text("i")
    (site.path("ns/a") / "link").symlink_to(outside)
    uid = site.uid("ns/a")
    assert {os.lstat(path).st_uid for path in site.path("ns/a").rglob("*")} == {uid}
    assert os.stat(outside).st_uid == 0


def test_a_uid_is_not_given_again_while_files_of_its_owner_are_there(tmp_path: Path, site: Site, meta: Meta) -> None:
    site.uid("ns/a")
    site.uid("ns/b")
    trio.run(site.terms.ended, "ns/a")
    assert meta.uids()["ns/a"] == FIRST
    shutil.rmtree(site.path("ns/a"))
    trio.run(site.terms.ended, "ns/a")
    assert "ns/a" not in meta.uids()
    assert site.uid("ns/c") == FIRST + 2
    small = Site(tmp_path, meta, uid_range=f"{FIRST}-{FIRST + 2}")
    assert small.uid("ns/d") == FIRST
    with pytest.raises(NsfsError, match="every uid of the range"):
        small.uid("ns/e")


@pytest.mark.parametrize("database", ["pwd.getpwuid", "grp.getgrgid"])
def test_a_number_that_a_name_service_knows_is_not_given(
    tmp_path: Path, meta: Meta, monkeypatch: pytest.MonkeyPatch, database: str
) -> None:
    """As those of containers that run, or of a directory server: they are in no file, and come and go."""

    def look(number: int) -> object:
        if number == FIRST:
            return object()
        raise KeyError(number)

    monkeypatch.setattr(f"nsfs.serve.terms.{database}", look)
    assert Site(tmp_path, meta).uid("ns/a") == FIRST + 1
    with pytest.raises(NsfsError, match="every uid of the range"):
        Site(tmp_path, meta, uid_range=f"{FIRST}-{FIRST}").uid("ns/b")


def test_a_directory_whose_record_was_lost_keeps_its_uid_to_itself(site: Site) -> None:
    site.path("ns/old").mkdir(parents=True)
    os.chown(site.path("ns/old"), FIRST, FIRST)
    assert site.uid("ns/new") == FIRST + 1
    assert site.uid("ns/old") == FIRST


def test_a_start_forgets_domains_that_are_gone(site: Site, meta: Meta) -> None:
    site.uid("ns/a")
    site.uid("ns/b")
    shutil.rmtree(site.path("ns/a"))
    site.terms.sweep()
    assert list(meta.uids()) == ["ns/b"]


def test_a_worker_is_spared_where_that_is_allowed(site: Site) -> None:
    """Lowering a score takes CAP_SYS_RESOURCE (proc(5)); without it, a worker starts all the same."""

    def score(pid: int) -> str:
        return Path(f"/proc/{pid}/oom_score_adj").read_text().strip()

    may = subprocess.run(["sh", "-c", "echo -999 > /proc/self/oom_score_adj"], check=False, stderr=subprocess.DEVNULL)
    with subprocess.Popen(["sleep", "60"]) as worker:
        before = score(worker.pid)
        site.terms.started("ns/a", "a", worker.pid)
        found = score(worker.pid)
        worker.kill()
    assert found == ("-999" if may.returncode == 0 else before)


def test_a_range_that_somebody_has_is_refused() -> None:
    with pytest.raises(UsageError, match=r"overlaps .*passwd.*: daemon:1") as caught:
        check_uids(Config(uid_range="1-1"))
    assert caught.value.hint
    check_uids(Config())


@pytest.mark.parametrize("name", ["passwd", "subuid", "group", "subgid"])
def test_each_of_the_hosts_files_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The files of users are not those of groups, nor are numbers that are handed on those of accounts."""
    pairs = (("passwd", "subuid"), ("group", "subgid"))
    monkeypatch.setattr(terms, "_ACCOUNTS", tuple((f"{tmp_path}/{one}", f"{tmp_path}/{two}") for one, two in pairs))
    check_uids(Config())
    (tmp_path / name).write_text(f"ann:{FIRST - 5}:10\n" if name.startswith("sub") else f"ann:x:{FIRST}:\n")
    with pytest.raises(UsageError, match=f"overlaps .*{name}.*: ann:"):
        check_uids(Config())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"netns": "/nonexistent/netns"}, "namespace.team-a.netns: no such network namespace: /nonexistent/netns"),
        ({"netns": "/etc/passwd"}, "namespace.team-a.netns: no network namespace: /etc/passwd"),
        ({"netns": "/proc/self/ns/mnt"}, "namespace.team-a.netns: no network namespace: /proc/self/ns/mnt"),
        ({"cgroup": "/nsfs-test-none"}, "namespace.team-a.cgroup: no such cgroup: /nsfs-test-none"),
        ({"resolv_conf": "/nonexistent"}, "namespace.team-a.resolv_conf: no such file: /nonexistent"),
    ],
)
def test_what_is_not_there_is_named_by_its_key(
    tmp_path: Path, meta: Meta, settings: dict[str, Any], message: str
) -> None:
    site = Site(tmp_path, meta, namespace={"team-a": Namespace(**settings)})
    with pytest.raises(NsfsError) as caught:
        site.uid("ns/team-a", "team-a")
    assert caught.value.message == message
    site.uid("ns/team-b", "team-b")
    with pytest.raises(type(caught.value)):
        check_namespaces(Config(namespace={"team-a": Namespace(**settings)}))


def test_a_netns_of_ours_will_do() -> None:
    check_namespaces(parse_config('[namespace.a]\nnetns = "/proc/self/ns/net"'))


def with_worker(site: Site, domain: str, body: Callable[[Borrowing], Awaitable[None]]) -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_serve, site, domain, ours)
            async with open_peer(_stream(theirs), {}, name="worker") as peer:
                uplink = Uplink()
                uplink.connect(peer)
                await body(Borrowing(uplink))
            nursery.cancel_scope.cancel()

    trio.run(main)


def _stream(sock: socket.socket) -> trio.SocketStream:
    return trio.SocketStream(trio.socket.from_stdlib_socket(sock))


async def _serve(site: Site, domain: str, sock: socket.socket) -> None:
    async with open_peer(_stream(sock), site.terms.lent(domain, ""), name="daemon") as peer:
        await peer.wait_closed()


def test_a_worker_reads_the_layouts_that_were_named_for_it(tmp_path: Path, site: Site) -> None:
    for name in ("mine", "theirs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "index.json").write_text(name)

    async def body(borrowing: Borrowing) -> None:
        asked = worker_api.Name(reference=f"oci:{tmp_path}/mine:tag")
        await site.terms.asked("ns/a", asked)
        await site.terms.asked("ns/a", worker_api.Name(reference="python:3.12"))
        await site.terms.asked("ns/b", worker_api.Name(reference=f"oci:{tmp_path}/theirs"))
        piece = await borrowing.layout(f"{tmp_path}/mine").read("", 1, 2)
        assert piece == (b"in", 4)
        for directory in (f"{tmp_path}/theirs", f"{tmp_path}", f"{tmp_path}/mine/../theirs", "/etc"):
            with pytest.raises(DeniedError, match="not this domain's"):
                await borrowing.layout(directory).read("", 0, 10)
        for name in ("../theirs/index.json", "sha256:../../x", "index.json"):
            with pytest.raises(UsageError):
                await borrowing.layout(f"{tmp_path}/mine").read(name, 0, 10)
        with pytest.raises(UsageError, match="not a piece"):
            await borrowing.layout(f"{tmp_path}/mine").read("", 0, 1 << 30)
        with pytest.raises(NotFoundError):
            await borrowing.layout(f"{tmp_path}/mine").read("sha256:" + "0" * 64, 0, 10)
        assert [endpoint.host for endpoint in await borrowing.endpoints("localhost:5000")] == ["localhost:5000"]

    with_worker(site, "ns/a", body)


def test_copies_of_the_hosts_files_follow_them(tmp_path: Path) -> None:
    etc, copy = tmp_path / "etc", tmp_path / "copy"
    etc.mkdir()
    (etc / "resolv.conf").write_text("nameserver 192.0.2.1\n")
    (etc / "shadow").write_text("secret")
    files = HostFiles(str(etc))
    files.make(str(copy))
    assert os.listdir(copy) == ["resolv.conf"]
    (etc / "new").write_text("nameserver 192.0.2.2\n")
    (etc / "new").rename(etc / "resolv.conf")
    (etc / "hosts").write_text("192.0.2.3 a\n")
    files.refresh()
    assert (copy / "resolv.conf").read_text() == "nameserver 192.0.2.2\n"
    assert sorted(os.listdir(copy)) == ["hosts", "resolv.conf"]
    assert os.stat(copy / "hosts").st_mode & 0o777 == 0o644
    (etc / "hosts").unlink()
    files.refresh()
    assert os.listdir(copy) == ["resolv.conf"]
    files.make(str(tmp_path / "own"), str(etc / "shadow"))
    assert (tmp_path / "own" / "resolv.conf").read_text() == "secret"
    with pytest.raises(NotFoundError, match=r"no such resolv\.conf"):
        files.make(str(tmp_path / "own"), "/nonexistent")
