"""A user who is not root: a daemon of their own, on demand, and what they are refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from typing import TYPE_CHECKING

import pytest

from images import Image, file, gzip_layer
from nsfs.serve import mounts
from private_user import User, private_user
from users import estargz_layer, is_dead, noise, push, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from meter import Meter
    from registry import Registry

BASE = noise(300_000, 500)
LAZY = noise(4_000_000, 501)
SHOWN = sorted(["base", "lazy", "own"])


@pytest.fixture
def user() -> Iterator[User]:
    with private_user() as somebody:
        yield somebody


def push_pair(registry: Registry, path: Path) -> tuple[Image, Image]:
    """Two images of three layers, the first two the same."""
    common = [gzip_layer([file("base", BASE)]), estargz_layer([file("lazy", LAZY)], 100_000)]
    images = [Image((*common, gzip_layer([file("own", b"%d\n" % number)]))) for number in range(2)]
    for number, image in enumerate(images):
        push(image, registry, path, f"private-{number}")
    return images[0], images[1]


def test_mounts_of_one_user_share_a_daemon_that_ends_with_them(
    user: User, registry: Registry, meter: Meter, arena: Path
) -> None:
    first, _ = push_pair(registry, arena)
    one, two = user.directory("one"), user.directory("two")
    assert user.daemon() == 0
    report = user.json("mount", f"{meter.host}/private-0", one)
    assert (report["driver"], report["domain"], report["writable"]) == ("fuse", "shared", False)
    daemon = user.daemon()
    user.nsfs("mount", f"{meter.host}/private-1", two)
    assert user.daemon() == daemon
    assert meter.served(first.layers[0].digest) == len(first.layers[0].blob)
    for target, own in ((one, "0\n"), (two, "1\n")):
        assert user.run("ls", target).stdout.split() == SHOWN
        assert user.run("cat", f"{target}/own").stdout == own
        assert user.run("sha256sum", f"{target}/base", f"{target}/lazy").returncode == 0
        mount = mounts.find_mount(target)
        assert (mount.fstype, mount.source) == (mounts.FUSE_TYPE, "nsfs")
        assert {"ro", "nosuid", "nodev"} <= set(mount.options.split(","))
    lazy = first.layers[1]
    assert meter.served(lazy.digest) < 1.3 * len(lazy.blob), "what one has fetched the other has"
    status = user.json("status")
    assert status["private"]
    assert status["root"] == f"{user.home}/.local/share/nsfs"
    assert {mount["target"] for mount in status["mounts"]} == {one, two}
    assert all(mount["local"] >= len(BASE) + len(LAZY) for mount in status["mounts"])
    described = json.loads(user.run("cat", f"{one}/.nsfs/mount.json").stdout)
    assert described["reference"] == f"{meter.host}/private-0:latest"
    assert ".nsfs" not in user.run("ls", "-a", one).stdout
    user.nsfs("umount", one)
    assert user.daemon() == daemon
    assert user.run("ls", two).stdout.split() == SHOWN
    user.run("fusermount3", "-u", two)
    wait_until(lambda: is_dead(daemon), "the daemon ends with its last mount")
    assert user.daemon() == 0
    assert not os.path.exists(user.socket)
    (worker,) = [domain["pid"] for domain in status["domains"]]
    wait_until(lambda: is_dead(worker), "its worker ends, too")
    before = meter.served()
    assert user.nsfs("cat", f"{meter.host}/private-1:/own").stdout == "1\n"
    assert meter.served() == before, "another daemon, the same pool"


def test_what_is_read_is_right_and_no_more_than_needed_is_fetched(
    user: User, registry: Registry, meter: Meter, arena: Path
) -> None:
    first, _ = push_pair(registry, arena)
    lazy = first.layers[1]
    target = user.directory("mnt")
    user.nsfs("mount", f"{meter.host}/private-0", target)
    before = meter.served(lazy.digest)
    copy = f"{user.home}/copy"
    user.run("dd", f"if={target}/lazy", f"of={copy}", "bs=4096", "count=1", "skip=150", "status=none")
    assert read_as_root(copy) == LAZY[150 * 4096 : 151 * 4096]
    assert 0 < meter.served(lazy.digest) - before < len(lazy.blob) / 2
    user.run("cp", f"{target}/lazy", copy)
    assert read_as_root(copy) == LAZY
    user.nsfs("umount", target)
    assert user.nsfs("evict", f"{meter.host}/private-0").stderr.endswith("of 3 layers\n")
    user.nsfs("mount", f"{meter.host}/private-0", target)
    user.run("cp", f"{target}/lazy", copy)
    assert read_as_root(copy) == LAZY
    user.run("cp", f"{target}/base", copy)
    assert read_as_root(copy) == BASE


def read_as_root(path: str) -> bytes:
    with open(path, "rb") as opened:
        return opened.read()


def test_what_a_user_cannot_have_is_refused_with_the_reason(user: User, registry: Registry, arena: Path) -> None:
    push_pair(registry, arena)
    reference, target = f"{registry.host}/private-0", user.directory("mnt")
    for options, code, says in (
        (("--driver", "erofs"), 4, "the erofs driver needs root"),
        (("--driver", "erofs-loop"), 4, "the erofs-loop driver needs root"),
        (("--rw",), 4, "a writable mount needs root"),
        (("--isolation", "isolated"), 4, "isolation needs root: isolated"),
        (("--isolation", "pod"), 4, "isolation needs root: pod"),
    ):
        refused = user.nsfs("mount", reference, target, *options, check=False)
        assert (refused.returncode, says in refused.stderr) == (code, True), refused.stderr
        assert "hint: " in refused.stderr
    assert user.nsfs("mount", reference, target, "--isolation", "shared", "--driver", "fuse").returncode == 0
    again = user.nsfs("mount", reference, target, check=False)
    assert again.returncode == 8
    theirs = user.nsfs("mount", reference, "/usr/share", check=False)
    assert (theirs.returncode, "may mount on: /usr/share" in theirs.stderr) == (4, True), theirs.stderr
    busy = user.run("sh", "-c", f"cd {target} && exec {user.python} -P -m nsfs.cli umount {target}", check=False)
    assert (busy.returncode, "busy" in busy.stderr) == (8, True), busy.stderr
    user.nsfs("umount", target)
    assert user.run("ls", target).stdout == ""


def test_a_device_that_a_user_may_not_open_is_said_with_a_remedy(user: User, registry: Registry, arena: Path) -> None:
    push_pair(registry, arena)
    mode = os.stat("/dev/fuse").st_mode
    os.chmod("/dev/fuse", 0o600)
    try:
        refused = user.nsfs("mount", f"{registry.host}/private-0", user.directory("mnt"), check=False)
        doctor = user.nsfs("doctor", check=False)
        assert user.nsfs("cat", f"{registry.host}/private-0:/own").stdout == "0\n", "looking takes no mount"
    finally:
        os.chmod("/dev/fuse", mode)
    assert refused.returncode == 4, refused.stderr
    assert refused.stderr.splitlines() == [
        "nsfs: /dev/fuse is not yours to open",
        "hint: as root: chmod 666 /dev/fuse, as udev sets it up",
    ]
    assert doctor.returncode == 9
    assert "chmod 666 /dev/fuse" in doctor.stdout


def test_commands_that_begin_together_start_one_daemon(user: User, registry: Registry, arena: Path) -> None:
    push_pair(registry, arena)
    targets = [user.directory(f"m{number}") for number in range(3)]
    failures: list[BaseException] = []

    def mount(target: str) -> None:
        try:
            user.nsfs("mount", f"{registry.host}/private-0", target)
        except RuntimeError as error:
            failures.append(error)

    threads = [threading.Thread(target=mount, args=(target,)) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert {mount["target"] for mount in user.json("status")["mounts"]} == set(targets)
    assert user.log().count("serves at") == 1


def test_worker_and_front_may_die(user: User, registry: Registry, meter: Meter, arena: Path) -> None:
    push_pair(registry, arena)
    target, copy = user.directory("mnt"), f"{user.home}/copy"
    user.nsfs("mount", f"{meter.host}/private-0", target)
    (domain,) = user.json("status")["domains"]
    os.kill(domain["pid"], signal.SIGKILL)
    user.run("cp", f"{target}/lazy", copy)
    assert read_as_root(copy) == LAZY
    wait_until(lambda: user.json("status")["domains"][0]["pid"] not in {0, domain["pid"]}, "the next worker")
    (front,) = user.fronts()
    os.kill(front, signal.SIGKILL)
    wait_until(lambda: is_dead(front), "the front is dead")
    assert user.run("cat", f"{target}/own").stdout == "0\n"
    user.run("cp", f"{target}/base", copy)
    assert read_as_root(copy) == BASE
    user.nsfs("umount", target)


def test_a_daemon_that_was_killed_is_followed_by_one_that_tidies_up(
    user: User, registry: Registry, meter: Meter, arena: Path
) -> None:
    push_pair(registry, arena)
    target = user.directory("mnt")
    user.nsfs("mount", f"{meter.host}/private-0", target)
    (domain,) = user.json("status")["domains"]
    os.kill(user.daemon(), signal.SIGKILL)
    wait_until(lambda: is_dead(domain["pid"]), "its worker ends, too")
    before = meter.served()
    assert user.nsfs("mount", f"{meter.host}/private-0", target).returncode == 0
    assert user.run("cat", f"{target}/own").stdout == "0\n"
    assert meter.served() == before
    assert len([mount for mount in mounts.load_mounts() if mount.target == target]) == 1


def test_foreground_and_a_place_in_tmp(user: User, registry: Registry, arena: Path) -> None:
    push_pair(registry, arena)
    target = user.directory("mnt")
    said = f"{user.home}/said"
    mounting = f"{user.python} -P -m nsfs.cli mount --foreground {registry.host}/private-0 {target} 2>{said}"
    waiting = f"for i in $(seq 100); do grep -q 'press Ctrl-C' {said} && break; sleep 0.1; done; cat {target}/own"
    done = user.run("sh", "-c", f"{mounting} & {waiting}; kill $!; wait $!; echo $?", XDG_RUNTIME_DIR="")
    assert done.stdout == "0\n0\n", done.stderr
    assert user.run("ls", target).stdout == ""
    assert user.daemon() == 0, "it is elsewhere"
    place = f"/tmp/nsfs-{os.stat(user.home).st_uid}"
    assert os.stat(place).st_mode & 0o777 == 0o700
    wait_until(lambda: not os.path.exists(f"{place}/nsfs.sock"), "the daemon ends")
    shutil.rmtree(place)
