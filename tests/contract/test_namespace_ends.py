"""`nsfs ns`: what each namespace has, and that nothing of it is left when it has ended."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import grpc
import pytest

import published
from fakes import FakeRegistry
from images import Image, directory, file, gzip_layer, sample_content
from mounting import swept
from nsfs_daemon import NSFS, mortal_daemons, run_daemon
from registry import PASSWORD, USER, run_registry
from snapshots_api import Backend, mounted

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from nsfs_daemon import Daemon


SETTINGS = {
    "prepare_wait": "20s",
    "namespace.red": {"quota": "3GiB"},
    'namespace."red/tenant"': {"quota": "1GiB"},
}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with run_daemon(str(tmp_path_factory.mktemp("daemon")), SETTINGS) as running:
        yield running


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as running:
        yield running


def image(seed: int) -> Image:
    return Image((gzip_layer([directory("d"), file("d/f", sample_content(100_000, seed))]),))


def namespaces(daemon: Daemon) -> dict[str, Any]:
    return {report["namespace"]: report for report in daemon.json("ns", "ls")["namespaces"]}


def domains(daemon: Daemon) -> set[str]:
    return set(os.listdir(f"{daemon.root}/domains"))


def keys(daemon: Daemon) -> set[str]:
    return set(os.listdir(f"{daemon.root}/keys"))


def test_a_namespace_ends_whole_and_alone(daemon: Daemon, registry: FakeRegistry, tmp_path: Path) -> None:
    ours, theirs = image(1), image(2)
    with Backend(daemon.socket, "nsfs") as backend:
        names = backend.pull("red", ours, published.publish(registry, ours, "ours"))
        kept = backend.pull("blue", theirs, published.publish(registry, theirs, "theirs"))
        with Backend(daemon.socket, "nsfs-tenant") as other:
            other.pull("red", ours, f"{registry.host}/ours:latest")
        report = daemon.json("ns", "show", "red")
        assert (report["containerd"], report["quota"]) == (True, 3 << 30)
        assert (report["snapshots"], report["containers"], report["mounts"]) == (2, [], [])
        assert [domain["name"] for domain in report["domains"]] == ["ns/red", "ns/red/tenant"]
        assert [domain["quota"] for domain in report["domains"]] == [3 << 30, 1 << 30]
        assert report["own"] == sum(domain["disk"] for domain in report["domains"]) > 100_000
        assert report["shared"] == 0
        assert all(domain["encrypted"] for domain in report["domains"])
        assert len({domain["uid"] for domain in report["domains"]} | {0}) == 3
        assert keys(daemon) >= {"ns%2Fred", "ns%2Fred%2Ftenant", "ns%2Fblue"}

        ended = daemon.json("ns", "rm", "red")
        assert (ended["snapshots"], ended["domains"]) == (2, ["ns/red", "ns/red/tenant"])
        assert ended["freed"] > 100_000
        assert "red" not in namespaces(daemon)
        assert daemon.nsfs("ns", "show", "red", check=False).returncode == 3
        assert not {name for name in domains(daemon) | keys(daemon) if name.startswith("ns%2Fred")}
        assert not {name for name in daemon.workers() if name.startswith("ns/red")}
        with pytest.raises(grpc.RpcError, match="no such snapshot"):
            backend.stat(names[-1])
        with mounted(backend.prepare(backend.name("blue", "c"), kept[-1]), tmp_path / "mnt") as root:
            assert (root / "d/f").read_bytes() == sample_content(100_000, 2)

        names = backend.pull("red", ours, f"{registry.host}/ours:latest")
        with mounted(backend.prepare(backend.name("red", "c"), names[-1]), tmp_path / "mnt") as root:
            assert (root / "d/f").read_bytes() == sample_content(100_000, 1)


def test_credentials_end_also_of_who_has_nothing_else(daemon: Daemon) -> None:
    """Else who gets the name next asks registries as who had it before."""
    kept = f"{daemon.root}/credentials"
    with run_registry(auth=True) as registry:
        for owner in ("keen", "keen/tenant", "keener"):
            command = [*NSFS, "--socket", daemon.socket, "login", "-n", owner, "-u", USER, "--password-stdin"]
            subprocess.run([*command, registry.host], check=True, input=PASSWORD, capture_output=True, text=True)
    assert namespaces(daemon)["keen"]["logins"] == ["keen", "keen/tenant"]
    assert "keen/tenant" in daemon.nsfs("ns", "show", "keen").stdout
    with open(f"{kept}/keen/config.json.1.tmp", "w") as left:
        left.write("of a daemon that was killed while it wrote")
    daemon.nsfs("ns", "rm", "keen")
    assert os.listdir(kept) == ["keener"]
    assert set(namespaces(daemon)) & {"keen", "keener"} == {"keener"}
    daemon.nsfs("ns", "rm", "keener")


def test_one_ends_while_another_has_a_pod(daemon: Daemon, registry: FakeRegistry, tmp_path: Path) -> None:
    """A pod's domain grants nobody anything, so it is not told who is no more."""
    reference = published.publish(registry, image(7), "pod")
    with daemon.mounted(reference, str(tmp_path / "mnt"), "--isolation", "pod", "--namespace", "podded") as mount:
        daemon.nsfs("cat", f"{reference}:/d/f", "--namespace", "leaving")
        daemon.nsfs("ns", "rm", "leaving")
        assert mount["domain"] in daemon.workers()
        assert (tmp_path / "mnt/d/f").read_bytes() == sample_content(100_000, 7)


def test_what_is_used_is_not_ended_unless_forced(daemon: Daemon, registry: FakeRegistry, tmp_path: Path) -> None:
    made = image(3)
    reference = published.publish(registry, made, "used")
    target = tmp_path / "mnt"
    target.mkdir()
    with Backend(daemon.socket, "nsfs") as backend:
        names = backend.pull("used", made, reference)
        key = backend.name("used", "container")
        backend.prepare(key, names[-1])
        daemon.nsfs("mount", "--namespace", "used", reference, str(target))
        refused = daemon.nsfs("ns", "rm", "used", check=False)
        assert refused.returncode == 8
        assert str(target) in refused.stderr
        assert key in refused.stderr
        assert (target / "d/f").read_bytes() == sample_content(100_000, 3)
        assert namespaces(daemon)["used"]["containers"] == [key]

        daemon.nsfs("ns", "rm", "--force", "used")
        assert "used" not in namespaces(daemon)
        assert not os.path.ismount(target)
        assert not {name for name in domains(daemon) | keys(daemon) if name.startswith("ns%2Fused")}
        with pytest.raises(grpc.RpcError, match="no such snapshot"):
            backend.stat(key)


def test_what_others_share_stays(daemon: Daemon, registry: FakeRegistry, tmp_path: Path) -> None:
    reference = published.publish(registry, image(4), "shared")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        daemon.nsfs("mount", "--isolation", "shared", "--namespace", name, reference, str(tmp_path / name))
    report = namespaces(daemon)["one"]
    assert [(domain["name"], domain["own"]) for domain in report["domains"]] == [("ns/one", True), ("shared", False)]
    assert report["own"] < 100_000 < report["shared"], "its own worker asks registries, and has no content"
    daemon.nsfs("ns", "rm", "--force", "one")
    assert (tmp_path / "two/d/f").read_bytes() == sample_content(100_000, 4)
    assert set(namespaces(daemon)) & {"one", "two"} == {"two"}
    daemon.nsfs("umount", str(tmp_path / "two"))


def test_each_is_told_what_it_has_of_what_is_shared(daemon: Daemon, registry: FakeRegistry, tmp_path: Path) -> None:
    """Nothing of what others alone had fetched; also when nothing is mounted any more, and no worker runs."""

    def told(name: str) -> tuple[int, int, list[tuple[str, int]]]:
        report = daemon.json("ns", "show", name)
        return report["shared"], report["own"], [(each["name"], each["grants"]) for each in report["domains"]]

    first, other = (published.publish(registry, image(seed), f"share{seed}") for seed in (40, 41))
    for name, reference in (("u1", first), ("u2", first), ("u3", other)):
        with daemon.mounted(reference, str(tmp_path / name), "--isolation", "shared", "--namespace", name):
            assert (tmp_path / name / "d/f").stat().st_size == 100_000
    daemon.nsfs("inspect", "--namespace", "u4", first)
    for name in ("u1", "u2", "u3"):
        used, own, domains = told(name)
        assert used == 25 * 4096
        assert domains == [(f"ns/{name}", 0), ("shared", 1)]
        assert own > 0
    assert told("u4")[0] == 0
    assert namespaces(daemon)["u1"]["shared"] == 25 * 4096
    (row,) = [each for each in daemon.json("ns", "show", "u1")["domains"] if not each["own"]]
    assert row["used"] < row["disk"]


def test_what_is_mounted_or_had_twice_counts_once(registry: FakeRegistry, tmp_path: Path) -> None:
    """As what of a shared domain a namespace uses: also what it may not have any more, and what two tenants have."""
    made, size = image(8), 25 * 4096
    reference = published.publish(registry, made, "both/x")
    (tmp_path / "policy.toml").write_text('[[rule]]\nimage = "*/both/*"\nscope = "shared"\n')
    settings = {"prepare_wait": "20s", "policy": str(tmp_path / "policy.toml"), "grant_ttl": "1s"}
    with run_daemon(str(tmp_path / "d"), settings) as daemon, ExitStack() as stack:

        def told() -> tuple[int, int]:
            (shared,) = [each for each in daemon.json("ns", "show", "pair")["domains"] if not each["own"]]
            return shared["used"], shared["grants"]

        backends = [stack.enter_context(Backend(daemon.socket, plugin)) for plugin in ("nsfs", "nsfs-tenant")]
        names = [backend.pull("pair", made, reference)[-1] for backend in backends]
        assert told()[0] == size
        assert daemon.json("ns", "show", "pair")["shared"] == size
        with mounted(backends[1].prepare("pair/9/c", names[1]), tmp_path / "container") as root:
            assert (root / "d/f").stat().st_size == 100_000
            with daemon.mounted(reference, str(tmp_path / "mount"), "--namespace", "pair"):
                registry.members["both/x"] = set()
                time.sleep(1.1)
                assert daemon.nsfs("inspect", reference, "-n", "pair", check=False).returncode == 3
                assert told() == (size, 0)
            assert told()[0] == size, "the container's"


def test_what_a_person_reads(daemon: Daemon, registry: FakeRegistry) -> None:
    with Backend(daemon.socket, "nsfs") as backend:
        backend.pull("seen", image(5), published.publish(registry, image(5), "seen"))
    listed = daemon.nsfs("ns", "ls").stdout.splitlines()
    assert listed[0].split()[0] == "NAMESPACE"
    assert any(line.split()[:4] == ["seen", "1", "0", "1"] for line in listed)
    shown = daemon.nsfs("ns", "show", "seen").stdout
    assert "ns/seen" in shown
    assert "its own" in shown
    said = daemon.nsfs("ns", "rm", "seen").stderr
    assert "namespace seen has ended: 1 domain" in said
    assert "containerd still lists" in said


DIES = """
import importlib, inspect, os, signal

def dies(method):
    def end(*args, **options):
        method(*args, **options)
        os.kill(os.getpid(), signal.SIGKILL)
    async def end_later(*args, **options):
        await method(*args, **options)
        os.kill(os.getpid(), signal.SIGKILL)
    return end_later if inspect.iscoroutinefunction(method) else end

if place := os.environ.get("NSFS_TEST_DIES"):
    module, _, path = place.partition(":")
    kind, _, name = path.partition(".")
    owner = getattr(importlib.import_module(module), kind)
    setattr(owner, name, dies(getattr(owner, name)))
"""
"""Imported by every interpreter of a daemon: it is killed as soon as it has done what the environment names."""
STEPS = (
    "nsfs.serve.relay:Broker.forget",
    "nsfs.serve.credentials:Keychain.forget",
    "nsfs.core.manual:Lowers.end",
    "nsfs.store.meta:Meta.forget_namespace",
)


def test_an_end_that_is_interrupted_anywhere_can_be_asked_for_again(
    registry: FakeRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook/sitecustomize.py").write_text(DIES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hook"), prepend=":")
    made = image(7)
    reference = published.publish(registry, made, "interrupted")
    granted = ("inspect", "--isolation", "shared", "--namespace", "red", reference)
    with swept(tmp_path), mortal_daemons(str(tmp_path / "d")) as start:
        for step in STEPS:
            monkeypatch.setenv("NSFS_TEST_DIES", step)
            daemon = start()
            before = len(registry.requests(path=made.layers[0].digest))
            daemon.nsfs(*granted)
            assert len(registry.requests(path=made.layers[0].digest)) > before, "a grant was left"
            os.makedirs(f"{daemon.root}/credentials/red", exist_ok=True)
            assert daemon.nsfs("ns", "rm", "red", check=False).returncode != 0
            monkeypatch.delenv("NSFS_TEST_DIES")
            daemon = start()
            assert daemon.nsfs("ns", "rm", "red", check=False).returncode in {0, 3}, "3: it had come to its end"
            assert "red" not in namespaces(daemon), step
            assert not [name for name in domains(daemon) | keys(daemon) if name.startswith("ns%2Fred")], step
            assert not os.path.exists(f"{daemon.root}/credentials/red"), step
            os.kill(daemon.pid, signal.SIGKILL)


def test_what_was_granted_is_forgotten_also_where_nobody_serves_it(registry: FakeRegistry, tmp_path: Path) -> None:
    """A registry is asked for each blob that is not granted, and for none that is."""
    made = image(6)
    ask = ("inspect", "--isolation", "shared", "--namespace", "red", published.publish(registry, made, "granted"))
    mount = tmp_path / "mnt"
    mount.mkdir()

    def proofs() -> int:
        return len(registry.requests(path=made.layers[0].digest))

    with run_daemon(str(tmp_path / "d")) as daemon:
        daemon.nsfs("mount", *ask[1:], str(mount))
        (shared,) = [each for each in daemon.json("ns", "show", "red")["domains"] if not each["own"]]
        assert (shared["name"], shared["grants"]) == ("shared", 1)
        before = proofs()
        daemon.nsfs(*ask)
        assert proofs() == before
        daemon.nsfs("umount", str(mount))
    with run_daemon(str(tmp_path / "d")) as daemon:
        assert "shared" not in daemon.workers()
        daemon.nsfs("ns", "rm", "red")
        daemon.nsfs(*ask)
        assert proofs() > before
