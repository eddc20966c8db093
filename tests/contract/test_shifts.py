"""Snapshots with the maps of a user namespace: who owns what is seen and written, what is refused, what goes again."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import grpc
import pytest

import published
from fakes import FakeRegistry
from images import Image, directory, file, gzip_layer, whiteout
from nsfs_daemon import mortal_daemons, run_daemon
from snapshots_api import REF, Backend, mounted, offers

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from nsfs_daemon import Daemon

UIDS, GIDS = "containerd.io/snapshot/uidmapping", "containerd.io/snapshot/gidmapping"
RED = {UIDS: "0:100000:65536", GIDS: "0:200000:65536"}
BLUE = {UIDS: "0:300000:1,1:400000:65535", GIDS: "0:300000:65536"}

PATIENT = {"prepare_wait": "30s"}
"""However slow the machine, a layer that is offered is read when its Prepare is answered."""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """Of which no start is recorded: that would have views of its own."""
    with run_daemon(str(tmp_path_factory.mktemp("daemon")), {**PATIENT, "containerd": {"profile": "use"}}) as running:
        yield running


@pytest.fixture(scope="module")
def layers() -> Iterator[tuple[Image, str]]:
    """Two layers, their roots and files of other owners, and where they are published."""
    base = gzip_layer([directory("", uid=5, gid=6), directory("etc"), file("etc/base", b"base", uid=1000, gid=1001)])
    top = gzip_layer([directory("", uid=5, gid=6), file("top", b"top"), whiteout("gone")])
    made = Image((base, top))
    with FakeRegistry() as registry:
        yield made, published.publish(registry, made, "shifted")


@pytest.fixture
def backend(daemon: Daemon) -> Iterator[Backend]:
    with Backend(daemon.socket) as opened:
        yield opened
        while left := opened.select():
            parents = {info.parent for info in left}
            for info in left:
                if info.name not in parents:
                    opened.remove(info.name)
        opened.cleanup()
    assert os.listdir(f"{daemon.root}/snapshots") == []
    assert below(daemon) == []


def below(daemon: Daemon) -> list[str]:
    """What is mounted under a short name."""
    with open("/proc/self/mountinfo") as mounts:
        targets = [line.split()[4] for line in mounts]
    return [target.rpartition("/")[2] for target in targets if target.startswith(f"{daemon.run}/l/")]


def owner(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_uid, found.st_gid


def prepare(backend: Backend, parent: str, labels: Mapping[str, str], name: str = "c") -> tuple[str, Any]:
    key = backend.name("ns", name)
    return key, backend.prepare(key, parent, labels=labels)


def refused(code: grpc.StatusCode, words: str) -> Any:
    return pytest.raises(grpc.RpcError, check=lambda error: error.code() is code and words in error.details())


def test_views_are_cloned_once_for_each_map(
    daemon: Daemon, backend: Backend, layers: tuple[Image, str], tmp_path: Path
) -> None:
    top = backend.pull("ns", *layers)[-1]
    first, given = prepare(backend, top, RED)
    assert not any("uidmap" in option for mount in given for option in mount.options)
    with mounted(given, tmp_path / "mnt") as root:
        assert [owner(root / name) for name in ("", "etc", "etc/base", "top")] == [
            (100005, 200006),
            (100000, 200000),
            (101000, 201001),
            (100000, 200000),
        ]
        (root / "etc/base").chmod(0o600)
    assert backend.mounts(first) == given
    assert sorted(below(daemon)) == ["0", "1", "i0", "i1"]
    second, other = prepare(backend, top, BLUE)
    with mounted(other, tmp_path / "mnt") as root:
        assert (owner(root / "etc/base"), owner(root / "top")) == ((400999, 301001), (300000, 300000))
    third, _ = prepare(backend, top, RED)
    plain, shown = prepare(backend, top, {})
    with mounted(shown, tmp_path / "mnt") as root:
        assert owner(root / "etc/base") == (1000, 1001)
    assert len(below(daemon)) == 6
    for key, left in ((first, 6), (third, 4), (plain, 4), (second, 0)):
        backend.remove(key)
        backend.cleanup()
        assert len(below(daemon)) == left


def test_a_view_of_a_layer_is_shifted_too(backend: Backend, layers: tuple[Image, str], tmp_path: Path) -> None:
    base = backend.pull("ns", *layers)[0]
    key = backend.name("ns", "v")
    given = backend.view(key, base, labels=RED)
    assert [mount.type for mount in given] == ["bind"]
    with mounted(given, tmp_path / "mnt") as root:
        assert owner(root / "etc/base") == (101000, 201001)


def test_what_was_written_by_one_map_is_seen_by_any_other(
    daemon: Daemon, backend: Backend, layers: tuple[Image, str], tmp_path: Path
) -> None:
    """A committed snapshot means the owners inside of whoever wrote it; unpacked layers lie between lazy ones."""
    image, reference = layers
    base = backend.pull("ns", *layers)[0]
    writer, given = prepare(backend, base, RED)
    with mounted(given, tmp_path / "mnt") as root:
        (root / "written").write_bytes(b"w")
        os.chown(root / "written", 100007, 200008)
    done = backend.name("ns", "done")
    backend.commit(done, writer)
    labels = offers(image, reference)[1]
    assert backend.offer("ns", done, labels)
    (top,) = backend.ask(labels[REF], done)
    for shift, seen, beside in (
        ({}, (7, 8), (1000, 1001)),
        (RED, (100007, 200008), (101000, 201001)),
        (BLUE, (400006, 300008), (400999, 301001)),
    ):
        for parent in (done, top):
            _, given = prepare(backend, parent, shift)
            with mounted(given, tmp_path / "mnt") as root:
                assert (owner(root / "written"), owner(root / "etc/base")) == (seen, beside)
                assert owner(root) == {7: (5, 6), 100007: (100005, 200006), 400006: (400004, 300006)}[seen[0]]
    assert len([name for name in below(daemon) if name.startswith("i")]) == 6


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ({UIDS: "0:1", GIDS: "0:1:1"}, "not a range"),
        ({UIDS: "0:1:1"}, "one is missing"),
        ({UIDS: "0:1000:10,5:2000:10", GIDS: "0:1:1"}, "overlap"),
        ({UIDS: "1:100000:1", GIDS: "0:1:1"}, "root has no counterpart"),
    ],
)
def test_maps_that_make_no_sense_are_refused(backend: Backend, labels: dict[str, str], words: str) -> None:
    with refused(grpc.StatusCode.INVALID_ARGUMENT, words):
        prepare(backend, "", labels)
    assert backend.select() == []


def test_labels_of_a_layer_that_is_unpacked_shift_nothing(backend: Backend, tmp_path: Path) -> None:
    """They may be annotations of its image."""
    _, given = prepare(backend, "", RED | {UIDS: "nonsense"}, "extract-1-x sha256:aa")
    with mounted(given, tmp_path / "mnt") as root:
        assert owner(root) == (0, 0)
    _, given = prepare(backend, "", RED)
    with mounted(given, tmp_path / "mnt") as root:
        assert owner(root) == (100000, 200000)


def test_labels_that_change_later_do_not_change_who_wrote_what(backend: Backend, tmp_path: Path) -> None:
    key, given = prepare(backend, "", RED)
    backend.update(key, BLUE)
    assert backend.mounts(key) == given
    done = backend.name("ns", "done")
    backend.commit(done, key)
    _, given = prepare(backend, done, {})
    with mounted(given, tmp_path / "mnt") as root:
        assert owner(root) == (0, 0)


def test_a_restart_goes_on_with_the_same_owners(layers: tuple[Image, str], tmp_path: Path) -> None:
    with run_daemon(str(tmp_path / "d"), PATIENT) as daemon, Backend(daemon.socket) as backend:
        key, _ = prepare(backend, backend.pull("ns", *layers)[-1], RED)
    with run_daemon(str(tmp_path / "d"), PATIENT) as daemon, Backend(daemon.socket) as backend:
        with mounted(backend.mounts(key), tmp_path / "mnt") as root:
            assert owner(root / "etc/base") == (101000, 201001)
        backend.remove(key)
        backend.cleanup()
        assert below(daemon) == []


def test_the_next_daemon_goes_on_with_views_and_not_with_clones(layers: tuple[Image, str], tmp_path: Path) -> None:
    with mortal_daemons(str(tmp_path / "d"), PATIENT) as start:
        daemon = start()
        with Backend(daemon.socket) as backend:
            writer, _ = prepare(backend, backend.pull("ns", *layers)[0], {})
            done = backend.name("ns", "done")
            backend.commit(done, writer)
            key, _ = prepare(backend, done, RED)
            assert sorted(below(daemon)) == ["0", "i0", "i1"]
        os.kill(daemon.pid, signal.SIGKILL)
        daemon = start()
        assert below(daemon) == ["0"]
        with Backend(daemon.socket) as backend:
            for labels, seen in (({}, (1000, 1001)), (RED, (101000, 201001))):
                with mounted(prepare(backend, done, labels)[1], tmp_path / "mnt") as root:
                    assert owner(root / "etc/base") == seen
            assert sorted(below(daemon)) == ["0", "i0", "i1"]
            with mounted(backend.mounts(key), tmp_path / "mnt") as root:
                assert owner(root / "etc/base") == (101000, 201001)
            assert sorted(below(daemon)) == ["0", "i0", "i1"]


@pytest.mark.parametrize("key", ["idmap", "erofs"])
def test_where_owners_cannot_be_shifted_nothing_is_made(layers: tuple[Image, str], tmp_path: Path, key: str) -> None:
    with (
        run_daemon(str(tmp_path / "d"), PATIENT | {"kernel": {key: False}}) as daemon,
        Backend(daemon.socket) as backend,
    ):
        top = backend.pull("ns", *layers)[-1]
        with refused(grpc.StatusCode.UNIMPLEMENTED, "remap-ids"):
            prepare(backend, top, RED)
        assert len(backend.select()) == 2
        with mounted(prepare(backend, top, {})[1], tmp_path / "mnt") as root:
            assert owner(root / "etc/base") == (1000, 1001)
        backend.cleanup()
        assert len(os.listdir(f"{daemon.root}/snapshots")) == 1
