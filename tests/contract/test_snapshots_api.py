"""What containerd's own suite leaves out of the snapshots API: layers on demand, namespaces, errors, restarts, waiting.

A real daemon, workers and mounts; `snapshots_api` plays containerd, the registry fails by script.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import threading
import time
from typing import TYPE_CHECKING, Any

import grpc
import pytest

import published
from fakes import FakeRegistry
from images import Image, Layer, directory, file, gzip_layer, hardlink, sample_content, whiteout
from nodes import wait_until
from nsfs_daemon import run_daemon
from snapshots_api import REF, Backend, mounted, offers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from nsfs_daemon import Daemon

MB = 1_000_000


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with run_daemon(str(tmp_path_factory.mktemp("daemon")), {"prepare_wait": "20s"}) as running:
        yield running


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as running:
        yield running


@pytest.fixture
def backend(daemon: Daemon) -> Iterator[Backend]:
    with Backend(daemon.socket) as opened:
        yield opened


@pytest.fixture(autouse=True)
def emptied(daemon: Daemon) -> Iterator[None]:
    yield
    with Backend(daemon.socket) as backend:
        empty(backend)
        backend.cleanup()
    assert os.listdir(f"{daemon.root}/snapshots") == []
    assert views(daemon) == []


def empty(backend: Backend) -> None:
    while left := backend.select():
        parents = {info.parent for info in left}
        for info in left:
            if info.name not in parents:
                backend.remove(info.name)


def views(daemon: Daemon) -> list[str]:
    """Where views are mounted."""
    with open("/proc/self/mountinfo") as mounts:
        targets = [line.split()[4] for line in mounts]
    return [target for target in targets if target.startswith(f"{daemon.run}/l/")]


def image(name: str, *, size: int = MB) -> Image:
    """Two layers: a base, and a change of it."""
    base = gzip_layer([directory("etc"), file("etc/base", name.encode()), file("big", sample_content(size, len(name)))])
    change = gzip_layer([file("etc/top", b"top"), whiteout("etc/gone"), file("small", b"s")])
    return Image((base, change))


def refused(code: grpc.StatusCode) -> Any:
    return pytest.raises(grpc.RpcError, check=lambda error: error.code() is code)


def test_a_container_runs_on_layers_that_nobody_unpacked(
    daemon: Daemon, registry: FakeRegistry, backend: Backend, tmp_path: Path
) -> None:
    made = image("lazy")
    names = backend.pull("red", made, published.publish(registry, made, "lazy"))
    assert all(name.startswith("red/lazy/nsfs/sha256:") for name in names)
    assert backend.stat(names[1]).parent == names[0]
    key = backend.name("red", "container")
    given = backend.prepare(key, names[-1])
    assert given == backend.mounts(key)
    with mounted(given, tmp_path / "mnt") as root:
        assert (root / "etc/base").read_bytes() == b"lazy"
        assert (root / "etc/top").read_bytes() == b"top"
        assert (root / "big").read_bytes() == sample_content(MB, 4)
        (root / "etc/new").write_bytes(b"written")
        assert (root.stat().st_mode & 0o7777, root.stat().st_uid) == (0o755, 0)
    assert backend.usage(key).inodes == 3
    assert backend.usage(names[0]).size == 0
    view = backend.name("red", "view")
    with mounted(backend.view(view, names[0]), tmp_path / "view") as root:
        assert (root / "etc/base").read_bytes() == b"lazy"
        assert not (root / "etc/top").exists()
    assert len(views(daemon)) == 3, "two of the container, which is recorded, and one of the view"


def test_views_go_when_nobody_stacks_them(daemon: Daemon, registry: FakeRegistry, backend: Backend) -> None:
    made = image("going")
    names = backend.pull("red", made, published.publish(registry, made, "going"))
    keys = [backend.name("red", f"c{number}") for number in range(3)]
    for key in keys:
        backend.prepare(key, names[-1])
    assert len(views(daemon)) == 4, "two of the first start, which is recorded, and two of the others"
    with refused(grpc.StatusCode.FAILED_PRECONDITION):
        backend.remove(names[0])
    for key in keys[1:]:
        backend.remove(key)
    backend.cleanup()
    assert len(views(daemon)) == 2
    backend.remove(keys[0])
    assert len(views(daemon)) == 2
    backend.cleanup()
    assert views(daemon) == []


def test_each_namespace_has_its_own_records(registry: FakeRegistry, backend: Backend) -> None:
    made = image("two")
    reference = published.publish(registry, made, "two")
    red, blue = backend.pull("red", made, reference), backend.pull("blue", made, reference)
    assert not set(red) & set(blue)
    assert {info.name for info in backend.select()} == {*red, *blue}
    for name in reversed(red):
        backend.remove(name)
    assert {info.name for info in backend.select()} == set(blue)


def test_nobody_is_answered_with_anothers_snapshot(registry: FakeRegistry, daemon: Daemon) -> None:
    """Without headers, at the same moment: the second waits until the first has asked."""
    made = image("race")
    labels = offers(made, published.publish(registry, made, "race"))[0]
    found: dict[str, list[str]] = {}

    def pull(namespace: str) -> None:
        with Backend(daemon.socket) as backend:
            assert backend.offer(namespace, "", labels)
            time.sleep(0.05)
            found[namespace] = backend.ask(labels[REF], "")

    threads = [threading.Thread(target=pull, args=(f"ns{number}",)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {namespace: [name.split("/")[0] for name in names] for namespace, names in found.items()} == {
        f"ns{number}": [f"ns{number}"] for number in range(6)
    }


def test_an_exchange_ends_without_its_question(registry: FakeRegistry, daemon: Daemon, backend: Backend) -> None:
    made = image("late")
    labels = offers(made, published.publish(registry, made, "late"))[0]
    assert backend.offer("red", "", labels)
    start = time.monotonic()
    assert backend.offer("blue", "", labels)
    assert 1.5 < time.monotonic() - start < 20
    assert [name.split("/")[0] for name in backend.ask(labels[REF], "")] == ["blue"]
    assert backend.ask(labels[REF], "") == []
    with Backend(daemon.socket, namespace="red") as red:
        assert [name.split("/")[0] for name in red.ask(labels[REF], "")] == ["red"]


def test_a_header_must_agree_and_limits_what_is_found(registry: FakeRegistry, daemon: Daemon, backend: Backend) -> None:
    made = image("header")
    reference = published.publish(registry, made, "header")
    with Backend(daemon.socket, namespace="red") as red, Backend(daemon.socket, namespace="blue") as blue:
        names = red.pull("red", made, reference)
        assert blue.select() == []
        assert len(red.select()) == len(backend.select()) == 2
        with refused(grpc.StatusCode.NOT_FOUND):
            blue.stat(names[0])
        with refused(grpc.StatusCode.PERMISSION_DENIED):
            blue.prepare("red/1/x")
        with refused(grpc.StatusCode.NOT_FOUND):
            blue.prepare("blue/1/x", names[-1])


def test_a_claimed_chain_finds_only_what_the_claimers_blobs_hold(
    registry: FakeRegistry, backend: Backend, tmp_path: Path
) -> None:
    """Somebody's configuration says the diff IDs of a private image; their blob is an eStargz of something else."""
    secret = Image((gzip_layer([file("secret", b"private")]),))
    (secret_name,) = backend.pull("victim", secret, published.publish(registry, secret, "private"))
    other = published.estargz_layer([file("secret", b"forged")])
    forged = Image((Layer(secret.layers[0].tar, other.blob, other.media_type, other.annotations),))
    (name,) = backend.pull("thief", forged, published.publish(registry, forged, "forged"))
    assert name != secret_name
    for namespace, parent, content in (("victim", secret_name, b"private"), ("thief", name, b"forged")):
        with mounted(backend.prepare(backend.name(namespace, "c"), parent), tmp_path / namespace) as root:
            assert (root / "secret").read_bytes() == content


def test_a_plain_layer_that_is_not_what_its_image_says_is_not_lazy(
    registry: FakeRegistry, daemon: Daemon, backend: Backend
) -> None:
    layer = gzip_layer([file("a", b"a")])
    forged = Image((Layer(gzip_layer([file("a", b"b")]).tar, layer.blob, layer.media_type),))
    labels = offers(forged, published.publish(registry, forged, "liar"))[0]
    assert not backend.offer("red", "", labels)
    assert "not lazy: namespace=red" in daemon.tail()


@pytest.mark.parametrize(
    "change",
    [
        {"containerd.io/snapshot/cri.layer-digest": ""},
        {"containerd.io/snapshot/cri.layer-digest": "sha256:" + "0" * 64},
        {"containerd.io/snapshot/cri.manifest-digest": "sha256:" + "0" * 64},
        {"containerd.io/snapshot/cri.image-ref": "oci:/etc"},
        {"containerd.io/snapshot/cri.image-ref": "127.0.0.1:1/nothing:latest"},
        {REF: "sha256:" + "0" * 64},
        {REF: "no digest"},
    ],
)
def test_what_makes_no_sense_is_an_ordinary_snapshot(
    registry: FakeRegistry, backend: Backend, change: dict[str, str]
) -> None:
    made = image("sense")
    labels = offers(made, published.publish(registry, made, "sense"))[0]
    assert not backend.offer("red", "", labels | change)


def test_layers_that_containerd_unpacked_stack_with_lazy_ones(
    registry: FakeRegistry, backend: Backend, tmp_path: Path
) -> None:
    middle = Layer(b"", b"not for us", "application/x-unknown")
    made = Image(
        (
            gzip_layer([directory("d"), file("d/low", b"low"), file("d/gone", b"x")]),
            middle,
            gzip_layer([directory("d"), file("d/high", b"high")]),
            gzip_layer([hardlink("d/linked", "d/low")]),
        )
    )
    labels = offers(made, published.publish(registry, made, "mixed"))
    assert backend.offer("red", "", labels[0])
    (low,) = backend.ask(labels[0][REF], "")
    assert not backend.offer("red", low, labels[1])
    (extract,) = (info.name for info in backend.select("kind==active"))
    with mounted(backend.mounts(extract), tmp_path / "unpack") as root:
        (root / "d/middle").write_bytes(b"middle")
        (root / "d/gone").unlink()
    local = backend.name("red", labels[1][REF])
    backend.commit(local, extract)
    assert backend.offer("red", local, labels[2])
    (high,) = backend.ask(labels[2][REF], local)
    with mounted(backend.prepare(backend.name("red", "c"), high), tmp_path / "mnt") as root:
        assert sorted(os.listdir(root / "d")) == ["high", "low", "middle"]
        assert (root / "d/middle").read_bytes() == b"middle"
        assert (root / "d/high").read_bytes() == b"high"
    assert not backend.offer("red", high, labels[3])


@contextlib.contextmanager
def impatient(path: Path, wait: str, registry: FakeRegistry) -> Iterator[tuple[Daemon, Backend]]:
    """A daemon for which a layer is pending soon, with a worker that is there: a loaded host is slow to start one."""
    awake = published.publish(registry, image("awake"), "awake")
    with run_daemon(str(path / "impatient"), {"prepare_wait": wait}) as daemon, Backend(daemon.socket) as backend:
        daemon.nsfs("ls", f"{awake}:/etc", "--namespace", "red")
        yield daemon, backend


def test_a_slow_layer_is_pending_and_mounts_wait(registry: FakeRegistry, tmp_path: Path) -> None:
    with impatient(tmp_path, "0.7s", registry) as (daemon, backend):
        check_slow_layer(registry, daemon, backend, tmp_path)


def check_slow_layer(registry: FakeRegistry, daemon: Daemon, backend: Backend, tmp_path: Path) -> None:
    made = image("slow")
    registry.script, registry.faults_on = "H", str(made.layers[0].digest)
    start = time.monotonic()
    names = backend.pull("red", made, published.publish(registry, made, "slow"))
    key = backend.name("red", "container")
    (placeholder,) = backend.prepare(key, names[-1])
    assert time.monotonic() - start < 20
    assert not os.path.exists(placeholder.source)
    with refused(grpc.StatusCode.UNAVAILABLE):
        backend.prepare(backend.name("red", "extract-1-x sha256:ff"), names[-1])
    waiting = [backend.start_mounts(key) for _ in range(200)]
    time.sleep(0.5)
    with Backend(daemon.socket) as other:
        other.stat(names[0])
        times = sorted(_seconds(lambda: other.stat(names[0])) for _ in range(50))
        assert statistics.median(times) < 0.05, times
        neighbour = sorted(_seconds(lambda: other.prepare(other.name("blue", "x"))) for _ in range(10))
        assert statistics.median(neighbour) < 1, neighbour
    assert not any(call.done() for call in waiting)
    for call in waiting[1:]:
        call.cancel()
    registry.go_on.set()
    with mounted(waiting[0].result(timeout=60).mounts, tmp_path / "mnt") as root:
        assert (root / "big").read_bytes() == sample_content(MB, 4)


def _seconds(what: Any) -> float:
    start = time.perf_counter()
    what()
    return time.perf_counter() - start


def test_the_layers_of_an_image_share_one_wait(tmp_path: Path, registry: FakeRegistry) -> None:
    layers = [gzip_layer([file(f"f{number}", sample_content(MB, number))]) for number in range(6)]
    made = Image(layers)
    registry.script, registry.faults_on = "H" * 6, "|".join(str(layer.digest) for layer in layers)
    with impatient(tmp_path, "2s", registry) as (_, backend):
        start = time.monotonic()
        backend.pull("red", made, published.publish(registry, made, "shared-wait"))
        assert 2 < time.monotonic() - start < 6 * 2
        registry.go_on.set()
        empty(backend)


def test_a_pending_layer_that_turns_out_wrong_is_fenced_off(registry: FakeRegistry, tmp_path: Path) -> None:
    layer = gzip_layer([file("a", sample_content(MB))])
    forged = Image((Layer(gzip_layer([file("a", b"b")]).tar, layer.blob, layer.media_type),))
    registry.script, registry.faults_on = "H", str(layer.digest)
    with impatient(tmp_path, "0.7s", registry) as (_, backend):
        (name,) = backend.pull("red", forged, published.publish(registry, forged, "fenced"))
        key = backend.name("red", "container")
        backend.prepare(key, name)
        waiting = backend.start_mounts(key)
        registry.go_on.set()
        assert waiting.exception(timeout=60).code() is grpc.StatusCode.DATA_LOSS
        with refused(grpc.StatusCode.DATA_LOSS):
            backend.mounts(key)
        with refused(grpc.StatusCode.DATA_LOSS):
            backend.prepare(backend.name("red", "another"), name)
        labels = offers(forged, f"{registry.host}/fenced:latest")[0]
        assert not backend.offer("red", "", labels)


def test_a_pending_layer_that_came_damaged_once_is_read_again(tmp_path: Path, registry: FakeRegistry) -> None:
    made = image("damaged")
    registry.script, registry.faults_on = "C", str(made.layers[0].digest)
    with impatient(tmp_path, "0s", registry) as (daemon, backend):
        names = backend.pull("red", made, published.publish(registry, made, "damaged"))
        assert wait_until(lambda: "is read again" in daemon.tail())
        key = backend.name("red", "c")
        backend.prepare(key, names[-1])
        with mounted(backend.mounts(key), tmp_path / "mnt") as root:
            assert (root / "big").read_bytes() == sample_content(MB, 7)
        assert "fenced" not in daemon.tail()
        empty(backend)


def test_statuses(backend: Backend) -> None:
    with refused(grpc.StatusCode.NOT_FOUND):
        backend.stat("red/1/nothing")
    with refused(grpc.StatusCode.NOT_FOUND):
        backend.prepare("red/1/x", "red/1/nothing")
    with refused(grpc.StatusCode.INVALID_ARGUMENT):
        backend.select("name=x")
    backend.prepare("red/1/x")
    with refused(grpc.StatusCode.ALREADY_EXISTS):
        backend.view("red/1/x")
    with refused(grpc.StatusCode.INVALID_ARGUMENT):
        backend.prepare("red/2/y", "red/1/x")
    backend.commit("red/3/done", "red/1/x")
    for key in ("red/3/done",):
        with refused(grpc.StatusCode.FAILED_PRECONDITION):
            backend.mounts(key)
    backend.plugin = ""
    with refused(grpc.StatusCode.INVALID_ARGUMENT):
        backend.stat("red/3/done")
    backend.plugin = "nsfs"


def test_plugin_names_do_not_meet(daemon: Daemon, backend: Backend) -> None:
    with Backend(daemon.socket, "nsfs-other") as other:
        backend.prepare("red/1/x")
        other.prepare("red/1/x")
        assert len(other.select()) == len(backend.select()) == 1
        other.remove("red/1/x")
        assert backend.stat("red/1/x").name == "red/1/x"


def test_lists_come_in_batches(backend: Backend) -> None:
    for number in range(250):
        backend.view(f"red/{number}/v")
    batches = backend.batches()
    assert [len(batch) for batch in batches] == [100, 100, 50]
    assert len({info.name for batch in batches for info in batch}) == 250


def test_a_restart_changes_nothing(tmp_path: Path, registry: FakeRegistry) -> None:
    made = image("restart")
    with run_daemon(str(tmp_path / "d")) as daemon, Backend(daemon.socket) as backend:
        names = backend.pull("red", made, published.publish(registry, made, "restart"))
        key = backend.name("red", "container")
        with mounted(backend.prepare(key, names[-1]), tmp_path / "mnt") as root:
            (root / "written").write_bytes(b"w")
        before = {info.name: info for info in backend.select()}
    with run_daemon(str(tmp_path / "d")) as daemon, Backend(daemon.socket) as backend:
        assert {info.name: info for info in backend.select()} == before
        with mounted(backend.mounts(key), tmp_path / "mnt") as root:
            assert (root / "written").read_bytes() == b"w"
            assert (root / "etc/base").read_bytes() == b"restart"
        backend.remove(key)
        backend.cleanup()
        assert views(daemon) == []


def test_strict_counts_only_what_is_proved(tmp_path: Path, registry: FakeRegistry) -> None:
    settings = {"prepare": "strict", "prepare_wait": "3s"}
    made = image("strict")
    stargz = Image((published.estargz_layer([file("a", b"a")]),))
    registry.script, registry.faults_on = "H", str(made.layers[0].digest)
    with run_daemon(str(tmp_path / "d"), settings) as daemon, Backend(daemon.socket) as backend:
        labels = offers(made, published.publish(registry, made, "strict"))[0]
        with refused(grpc.StatusCode.UNAVAILABLE):
            backend.offer("red", "", labels)
        registry.go_on.set()
        deadline = time.monotonic() + 60
        while True:
            try:
                assert backend.offer("red", "", labels)
                break
            except grpc.RpcError:
                assert time.monotonic() < deadline
        assert len(backend.ask(labels[REF], "")) == 1
        assert not backend.offer("red", "", offers(stargz, published.publish(registry, stargz, "stargz"))[0])
        empty(backend)
