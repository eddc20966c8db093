"""What mounts share, what goes with the last of them, and what is left by daemons that end in one way or another."""

from __future__ import annotations

import os
import signal
from functools import partial
from typing import TYPE_CHECKING

import pytest

from images import Image, directory, file, gzip_layer
from nsfs.serve import mounts
from nsfs_daemon import Daemon, mortal_daemons, run_daemon
from users import is_dead, mounts_of, noise, push, read, views_of, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from meter import Meter
    from registry import Registry

BASE = noise(400_000, 200)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with run_daemon(str(tmp_path_factory.mktemp("daemon"))) as running:
        yield running


def push_pair(registry: Registry, path: Path, name: str) -> tuple[Image, Image]:
    """Two images on one base; their own layers repeat a file of it, too."""
    base = gzip_layer([directory("base"), file("base/data", BASE)])
    images = tuple(
        Image((base, gzip_layer([file(f"own-{n}", noise(50_000, 201 + n)), file("copy", BASE)]))) for n in range(2)
    )
    for number, image in enumerate(images):
        push(image, registry, path, f"{name}-{number}")
    return images[0], images[1]


def test_two_images_share_the_views_of_their_base(
    daemon: Daemon, registry: Registry, meter: Meter, arena: Path
) -> None:
    first, _ = push_pair(registry, arena, "pair")
    names = ("--namespace", "pair")
    one, two = str(arena / "one"), str(arena / "two")
    with daemon.mounted(f"{meter.host}/pair-0", one, *names):
        views = views_of(daemon)
        assert len(views) == 2
        with daemon.mounted(f"{meter.host}/pair-1", two, *names):
            assert len(views_of(daemon)) == 3
            assert views < views_of(daemon)
            assert lowers_of(one) & lowers_of(two)
            assert meter.served(first.layers[0].digest) == len(first.layers[0].blob)
            assert read(f"{one}/base/data") == read(f"{two}/base/data") == read(f"{two}/copy") == BASE
            status = daemon.json("status")
            (domain,) = [one for one in status["domains"] if one["name"] == "ns/pair"]
            assert domain["layers"] == 3
            assert len(BASE) + 100_000 < domain["local"] < len(BASE) + 120_000
            for mount in status["mounts"]:
                assert len(BASE) + 50_000 < mount["local"] < len(BASE) + 60_000
                assert mount["size"] == 2 * len(BASE) + 50_000
        assert views_of(daemon) == views
        assert read(f"{one}/own-0") == noise(50_000, 201)
    assert views_of(daemon) == set()
    assert [mount.target for mount in mounts_of(daemon)] == [f"{daemon.run}/domains/ns%2Fpair/fuse"]
    with daemon.mounted(f"{meter.host}/pair-1", two, *names):
        assert read(f"{two}/base/data") == BASE
    assert meter.served(first.layers[0].digest) == len(first.layers[0].blob)


def lowers_of(target: str) -> set[str]:
    """Devices of the filesystems that an overlay stacks, by st_dev; its options name them relative to a directory."""
    options = mounts.find_mount(target).super_options
    (lowers,) = [option for option in options.split(",") if option.startswith("lowerdir")]
    return set(lowers.partition("=")[2].split(":"))


def test_the_same_image_at_two_places(daemon: Daemon, registry: Registry, meter: Meter, arena: Path) -> None:
    push(Image((gzip_layer([file("a", b"a\n")]),)), registry, arena, "twice")
    one, two, names = str(arena / "one"), str(arena / "two"), ("--namespace", "twice")
    with daemon.mounted(f"{meter.host}/twice", one, *names):
        with daemon.mounted(f"{meter.host}/twice", two, *names, "--on-error", "eio"):
            assert len(views_of(daemon)) == 2  # their readers differ in patience
        with daemon.mounted(f"{meter.host}/twice", two, *names):
            assert len(views_of(daemon)) == 1
        assert read(f"{one}/a") == b"a\n"
        again = daemon.nsfs("mount", f"{meter.host}/twice", one, *names, check=False)
        assert again.returncode == 8
        assert f"nsfs has a mount there already: {one}" in again.stderr
        assert read(f"{one}/a") == b"a\n"
    assert views_of(daemon) == set()


def test_namespaces_apart_share_nothing(daemon: Daemon, registry: Registry, meter: Meter, arena: Path) -> None:
    image, _ = push_pair(registry, arena, "apart")
    red, blue = str(arena / "red"), str(arena / "blue")
    reference = f"{meter.host}/apart-0"
    with (
        daemon.mounted(reference, red, "--namespace", "red") as one,
        daemon.mounted(reference, blue, "--namespace", "blue") as two,
    ):
        assert (one["domain"], two["domain"]) == ("ns/red", "ns/blue")
        workers = daemon.workers()
        assert workers["ns/red"] != workers["ns/blue"]
        assert len({mount.connection for mount in mounts_of(daemon) if mount.fstype == mounts.FUSE_TYPE}) >= 2
        assert not lowers_of(red) & lowers_of(blue)
        assert meter.served(image.layers[0].digest) == 2 * len(image.layers[0].blob)
        with daemon.mounted(reference, str(arena / "shared"), "--namespace", "red", "--isolation", "shared") as pub:
            assert pub["domain"] == "shared"


def test_a_pod_s_domain_lives_and_dies_with_its_mount(
    daemon: Daemon, registry: Registry, meter: Meter, arena: Path
) -> None:
    push_pair(registry, arena, "pods")
    target = str(arena / "mnt")
    before = set(daemon.workers())
    for driver in ("erofs", "fuse"):
        with daemon.mounted(f"{meter.host}/pods-0", target, "--isolation", "pod", "--driver", driver) as report:
            domain = report["domain"]
            assert domain == f"pod/{report['id']}"
            worker = daemon.workers()[domain]
            root = f"{daemon.root}/domains/{domain.replace('/', '%2F')}"
            assert os.path.isdir(root)
            assert read(f"{target}/base/data") == BASE
        wait_until(partial(is_dead, worker), "the pod's worker ends")
        assert set(daemon.workers()) == before
        assert not os.path.exists(root)
        assert not os.path.exists(f"{daemon.run}/domains/{os.path.basename(root)}/fuse/maps")


def test_a_mount_that_somebody_else_takes_away_is_forgotten(
    daemon: Daemon, registry: Registry, meter: Meter, arena: Path
) -> None:
    push_pair(registry, arena, "others")
    target = arena / "mnt"
    target.mkdir()
    daemon.nsfs("mount", f"{meter.host}/others-0", str(target), "--namespace", "others")
    mounts.unmount(str(target))
    wait_until(lambda: not daemon.json("status")["mounts"], "the daemon notices")
    assert views_of(daemon) == set()


def test_ending_for_good_leaves_no_mount_where_somebody_works(registry: Registry, meter: Meter, arena: Path) -> None:
    push_pair(registry, arena, "ended")
    one, two = arena / "one", arena / "two"
    with mortal_daemons(str(arena / "d")) as start:
        daemon = start()
        for target, driver in ((one, "auto"), (two, "fuse")):
            target.mkdir()
            daemon.nsfs("mount", f"{meter.host}/ended-0", str(target), "--driver", driver)
        workers = daemon.workers()
        with open(one / "base/data", "rb") as held:
            os.kill(daemon.pid, signal.SIGINT)
            wait_until(lambda: is_dead(daemon.pid), "the daemon ends")
            assert [mount.target for mount in mounts.load_mounts() if str(arena) in mount.target] == []
            assert held.fileno() >= 0
        assert not os.path.exists(daemon.socket)
        wait_until(lambda: all(map(is_dead, workers.values())), "workers end")
        assert list(one.iterdir()) == []


def test_a_daemon_that_was_killed_is_followed_by_one_that_goes_on(
    registry: Registry, meter: Meter, arena: Path
) -> None:
    push_pair(registry, arena, "killed")
    reference = f"{meter.host}/killed-0"
    one, two = arena / "one", arena / "two"
    with mortal_daemons(str(arena / "d")) as start:
        daemon = start()
        for target, driver in ((one, "auto"), (two, "fuse")):
            target.mkdir()
            daemon.nsfs("mount", reference, str(target), "--driver", driver)
        workers = daemon.workers()
        daemon.nsfs("evict", reference)  # waits for checkpoints, and leaves absent blocks to be asked for
        assert read(one / "base/data") == BASE
        os.kill(daemon.pid, signal.SIGKILL)
        before = meter.served()
        assert read(two / "base/data") == BASE
        daemon = start()
        assert {mount["target"] for mount in daemon.json("status")["mounts"]} == {str(one), str(two)}
        assert daemon.workers() == workers
        assert meter.served() == before
        assert read(one / "own-0") == noise(50_000, 201)
        os.kill(daemon.pid, signal.SIGINT)
        wait_until(lambda: is_dead(daemon.pid), "the daemon ends")


def test_daemons_side_by_side(registry: Registry, meter: Meter, arena: Path) -> None:
    push_pair(registry, arena, "beside")
    reference, target = f"{meter.host}/beside-0", str(arena / "mnt")
    with run_daemon(str(arena / "a")) as one, run_daemon(str(arena / "b")) as two:
        assert one.root != two.root
        with one.mounted(reference, target):
            assert two.json("status")["mounts"] == []
            assert views_of(two) == set()
            stranger = two.nsfs("umount", target, check=False)
            assert stranger.returncode == 3
            other = two.nsfs("mount", reference, target, check=False)
            assert other.returncode == 8, other.stderr
            with two.mounted(reference, str(arena / "other")):
                assert read(f"{target}/own-0") == read(arena / "other/own-0")
        third = one.nsfs("serve", "--config", f"{arena}/a/config.toml", check=False)
        assert third.returncode == 8
        assert f"another daemon owns {one.root}" in third.stderr
