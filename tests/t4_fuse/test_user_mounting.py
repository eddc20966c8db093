"""`nsfs mount` and `umount` with every option, and with everything that can be wrong."""

from __future__ import annotations

import errno
import os
import re
import stat
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from images import Image, directory, file, gzip_layer, symlink, write_oci_layout
from nsfs.serve import mounts
from nsfs_daemon import Daemon, run_daemon
from registry import Registry, push_layout
from users import drop_pages, estargz_layer, mounts_of, noise, push, read, views_of, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from meter import Meter

DRIVERS = ("auto", "erofs", "erofs-loop", "fuse")
ITEMS = [
    directory("etc"),
    file("etc/keep", b"keep"),
    file("etc/gone", b"gone"),
    directory("d"),
    file("d/one", b"1"),
    file("d/two", b"2"),
    file("bin/tool", b"#!/bin/sh\n", 0o755),
    symlink("link", "etc/keep"),
]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with run_daemon(str(tmp_path_factory.mktemp("daemon"))) as running:
        yield running


@pytest.fixture(scope="module")
def small(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A reference to a small image of two layers."""
    image = Image((gzip_layer(ITEMS), gzip_layer([file("top", b"top")])))
    push(image, registry, tmp_path_factory.mktemp("small"), "small")
    return f"{registry.host}/small"


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_writable_mount_takes_everything_and_keeps_nothing(
    daemon: Daemon, small: str, arena: Path, driver: str
) -> None:
    target = arena / "mnt"
    with daemon.mounted(small, str(target), "--rw", "--driver", driver) as report:
        assert report["writable"]
        assert report["driver"] == ("erofs" if driver == "auto" else driver)
        (target / "etc/keep").write_bytes(b"changed")
        (target / "new").write_bytes(b"new")
        (target / "etc/gone").unlink()
        subprocess.run(["mv", target / "d", target / "renamed"], check=True)
        os.rename(target / "top", target / "etc/top")
        os.chown(target / "bin/tool", 5, 6)
        os.chmod(target / "bin/tool", 0o4711)
        os.setxattr(target / "bin/tool", "user.x", b"1")
        os.link(target / "bin/tool", target / "bin/tool2")
        (target / "renamed/three").mkdir()
        assert sorted(os.listdir(target)) == ["bin", "etc", "link", "new", "renamed"]
        assert sorted(os.listdir(target / "etc")) == ["keep", "top"]
        assert sorted(os.listdir(target / "renamed")) == ["one", "three", "two"]
        assert read(target / "link") == b"changed"
        found = os.stat(target / "bin/tool2")
        assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid, found.st_nlink) == (0o4711, 5, 6, 2)
        (mount,) = daemon.json("status")["mounts"]
        assert mount["writable"]
        assert mount["phases"] is None
        assert min(report["phases"][each] for each in ("resolve", "index", "mount")) > 0
        assert f"{report['driver']},rw" in daemon.nsfs("status").stdout
    assert os.listdir(target) == []
    assert os.listdir(f"{daemon.root}/uppers") == []
    with daemon.mounted(small, str(target), "--driver", driver):
        assert sorted(os.listdir(target)) == ["bin", "d", "etc", "link", "top"]
        assert read(target / "etc/keep") == b"keep"
        with pytest.raises(OSError, match="Read-only file system"):
            (target / "new").write_bytes(b"")


@pytest.mark.parametrize("driver", DRIVERS)
def test_what_the_kernel_shows_of_a_mount(daemon: Daemon, small: str, arena: Path, driver: str) -> None:
    target = str(arena / "mnt")
    with daemon.mounted(small, target, "--driver", driver):
        mount = mounts.find_mount(target)
        assert {"ro", "nosuid", "nodev"} <= set(mount.options.split(","))
        if driver == "fuse":
            assert views_of(daemon) == set()
        else:
            assert mount.fstype == "overlay"
            sources = [one.source for one in mounts_of(daemon) if one.fstype == "erofs"]
            assert len(sources) == 2
            assert all(source.startswith("/dev/loop") for source in sources) == (driver == "erofs-loop")
        (fuse,) = [one for one in mounts_of(daemon) if one.fstype == mounts.FUSE_TYPE and "default" in one.target]
        assert fuse.source == "nsfs"
        listed = subprocess.run(["ls", "-la", target], check=True, capture_output=True, text=True).stdout
        assert re.search(r"^-rw-r--r-- 1 root root +3 .* top$", listed, re.MULTILINE)


def test_an_index_of_two_platforms(daemon: Daemon, registry: Registry, meter: Meter, arena: Path) -> None:
    images = [
        Image((gzip_layer([file("arch", b"amd64\n")]),)),
        Image((gzip_layer([file("arch", b"arm64\n")]),), architecture="arm64", variant="v8"),
    ]
    push_layout(str(write_oci_layout(arena / "layout", *images)), registry, "platforms")
    reference, target = f"{meter.host}/platforms", str(arena / "mnt")
    for platform in ("linux/amd64", "linux/arm64", "linux/arm64/v8"):
        with daemon.mounted(reference, target, "--platform", platform):
            assert read(f"{target}/arch").decode() == platform.split("/")[1] + "\n"
    assert daemon.json("inspect", reference, "--platform", "linux/arm64")["platform"] == "linux/arm64"
    assert daemon.nsfs("cat", f"oci:{arena}/layout:/arch", "--platform", "linux/arm64").stdout == "arm64\n"
    refused = daemon.nsfs("mount", reference, target, "--platform", "linux/s390x", check=False)
    assert refused.returncode == 3
    assert "there is linux/amd64, linux/arm64/v8" in refused.stderr


def test_an_image_without_layers_is_an_empty_directory(daemon: Daemon, registry: Registry, arena: Path) -> None:
    push(Image(()), registry, arena, "empty")
    target = arena / "mnt"
    for driver in DRIVERS:
        with daemon.mounted(f"{registry.host}/empty", str(target), "--driver", driver) as report:
            assert (report["files"], report["size"], report["driver"]) == (0, 0, "fuse")
            assert os.listdir(target) == []
            assert mounts.find_mount(str(target)).fstype == mounts.FUSE_TYPE
    with daemon.mounted(f"{registry.host}/empty", str(target), "--rw"):
        (target / "a").write_bytes(b"a")
    assert os.listdir(target) == []
    assert daemon.nsfs("ls", f"{registry.host}/empty:/").stdout == ""
    assert daemon.nsfs("tree", f"{registry.host}/empty").stdout == "/\n"
    missing = daemon.nsfs("cat", f"{registry.host}/empty:/a", check=False)
    assert missing.returncode == 3


def test_an_image_whose_documents_are_missing_or_damaged(daemon: Daemon, registry: Registry, arena: Path) -> None:
    broken = Image((gzip_layer([file("a", b"a")]),), config={"Env": ["A=1"]})
    push(broken, registry, arena, "broken")
    config = registry.blob_path(str(broken.digest.__class__.of(broken.config_blob)))
    with open(config, "r+b") as damaged:
        damaged.write(b"[")
    refused = mount(daemon, f"{registry.host}/broken", arena)
    assert refused.returncode == 6
    assert "configuration" in refused.stderr or "digest" in refused.stderr
    os.unlink(config)
    refused = mount(daemon, f"{registry.host}/broken", arena)
    assert refused.returncode == 3, refused.stderr
    os.unlink(arena / "layout-broken/blobs" / str(broken.digest).replace(":", "/"))
    refused = mount(daemon, f"oci:{arena}/layout-broken", arena)
    assert refused.returncode == 3, refused.stderr


def test_a_layer_that_is_not_what_its_digest_says_is_refused(daemon: Daemon, registry: Registry, arena: Path) -> None:
    image = Image((gzip_layer([file("a", noise(200_000, 300))]),))
    push(image, registry, arena, "damaged")
    blob = registry.blob_path(image.layers[0].digest)
    with open(blob, "r+b") as damaged:
        damaged.seek(100_000)
        damaged.write(b"!")
    for _ in range(2):
        refused = mount(daemon, f"{registry.host}/damaged", arena)
        assert refused.returncode == 6, refused.stderr
        assert os.listdir(arena / "mnt") == []
    with open(blob, "wb") as mended:
        mended.write(image.layers[0].blob)
    assert mount(daemon, f"{registry.host}/damaged", arena).returncode == 0
    daemon.nsfs("umount", str(arena / "mnt"))


def mount(daemon: Daemon, reference: str, path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    (path / "mnt").mkdir(exist_ok=True)
    return daemon.nsfs("mount", reference, str(path / "mnt"), *options, check=False)


def test_targets_that_will_not_do(daemon: Daemon, small: str, arena: Path) -> None:
    (arena / "file").write_bytes(b"")
    (arena / "link").symlink_to("dir")
    (arena / "dir").mkdir()
    for name, (code, says) in {"nowhere": (3, "no such directory"), "file": (2, "not a directory")}.items():
        refused = daemon.nsfs("mount", small, str(arena / name), check=False)
        assert (refused.returncode, says in refused.stderr) == (code, True), refused.stderr
    daemon.nsfs("mount", small, str(arena / "link"))
    assert read(arena / "dir/top") == b"top"
    daemon.nsfs("umount", str(arena / "link"))
    assert os.listdir(arena / "dir") == []
    for options in (["--driver", "ext4"], ["--on-error", "perhaps"], ["--isolation", "none"]):
        refused = daemon.nsfs("mount", small, str(arena / "dir"), *options, check=False)
        assert refused.returncode == 2, refused.stderr
    (arena / "dir/own").mkdir()
    mounts._mount("tmpfs", str(arena / "dir"), "tmpfs", 0, None)
    (arena / "dir/theirs").mkdir()
    with daemon.mounted(small, str(arena / "dir")):
        assert read(arena / "dir/top") == b"top"
    assert os.listdir(arena / "dir") == ["theirs"]
    mounts.unmount(str(arena / "dir"))
    assert os.listdir(arena / "dir") == ["own"]
    odd = arena / "sp ace,\\x:y\n\u2603"
    with daemon.mounted(small, str(odd)):
        assert read(odd / "top") == b"top"


def test_a_mount_in_use_is_left_alone_unless_forced(daemon: Daemon, small: str, arena: Path) -> None:
    for driver in ("erofs", "fuse"):
        assert mount(daemon, small, arena, "--driver", driver).returncode == 0
        target = str(arena / "mnt")
        with open(f"{target}/top", "rb") as held:
            busy = daemon.nsfs("umount", target, check=False)
            assert (busy.returncode, "busy" in busy.stderr) == (8, True)
            assert "hint: " in busy.stderr
            assert read(f"{target}/etc/keep") == b"keep"
            assert len(daemon.json("status")["mounts"]) == 1
            daemon.nsfs("umount", "--force", target)
            assert os.listdir(target) == []
            assert daemon.json("status")["mounts"] == []
            assert held.fileno()
        assert views_of(daemon) == set()


def waiting(daemon: Daemon) -> int:
    """Reads that wait, of all domains."""
    return sum(domain["waiting"] for domain in daemon.json("status")["domains"])


@pytest.fixture
def dying(registry: Registry, meter: Meter, arena: Path) -> tuple[str, bytes]:
    """An image whose content nobody has read, as eStargz."""
    data = noise(600_000, 310)
    push(Image((estargz_layer([file("data", data)]),)), registry, arena, "dying")
    return f"{meter.host}/dying", data


@pytest.mark.parametrize(
    ("driver", "case"),
    [
        ("erofs", ("eio", False, 0.0)),
        ("fuse", ("eio", False, 0.0)),
        ("erofs", ("wait:2s", True, 1.9)),
        ("fuse", ("wait:2s", False, 1.9)),
    ],
)
def test_content_that_cannot_be_had(
    daemon: Daemon, meter: Meter, dying: tuple[str, bytes], arena: Path, driver: str, case: tuple[str, bool, float]
) -> None:
    reference, data = dying
    on_error, stalls, least = case
    target, names = str(arena / "mnt"), ("--namespace", f"dying-{driver}-{on_error.replace(':', '-')}-{stalls}")
    with daemon.mounted(reference, target, "--on-error", on_error, "--driver", driver, *names):
        if stalls:
            meter.hold_after = 0
        else:
            meter.down()
        begun = time.monotonic()
        with open(f"{target}/data", "rb") as opened, pytest.raises(OSError, match="Input/output") as failed:
            opened.read(4096)
        assert failed.value.errno == errno.EIO
        assert least <= time.monotonic() - begun < least + 30
        meter.hold_after = None
        if not stalls:
            meter.up()
        deadline = time.monotonic() + 60
        while True:
            try:
                drop_pages(f"{target}/data")
                assert read(f"{target}/data") == data
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.2)


def test_a_reader_that_waits_is_seen_and_goes_on(
    daemon: Daemon, meter: Meter, dying: tuple[str, bytes], arena: Path
) -> None:
    reference, data = dying
    target = str(arena / "mnt")
    with daemon.mounted(reference, target, "--on-error", "wait", "--namespace", "patient"):
        meter.down()
        with subprocess.Popen(["cat", f"{target}/data"], stdout=subprocess.PIPE) as reader:
            try:
                wait_until(lambda: "wait" in daemon.json("status")["mounts"][0]["state"], "the read is seen to wait")
                assert "reads wait, the longest for" in daemon.nsfs("status").stdout
                assert reader.poll() is None
                meter.up()
                assert reader.communicate(timeout=60)[0] == data
            finally:
                reader.kill()
        (seen,) = daemon.json("status")["mounts"]
        assert seen["state"] == "ready"


@pytest.mark.parametrize("driver", ["erofs", "fuse"])
def test_a_waiting_reader_does_not_keep_a_forced_umount(
    daemon: Daemon, meter: Meter, dying: tuple[str, bytes], arena: Path, driver: str
) -> None:
    reference, _ = dying
    options = ("--on-error", "wait", "--driver", driver, "--namespace", f"forced-{driver}")
    assert mount(daemon, reference, arena, *options).returncode == 0
    target = str(arena / "mnt")
    meter.hold_after = 0
    with subprocess.Popen(["cat", f"{target}/data"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as reader:
        try:
            wait_until(lambda: waiting(daemon) > 0, "a read waits")
            assert daemon.nsfs("umount", target, check=False).returncode == 8
            begun = time.monotonic()
            daemon.nsfs("umount", "--force", target)
            assert time.monotonic() - begun < 30
            assert reader.wait(60) == 1
        finally:
            reader.kill()
    assert views_of(daemon) == set()


def test_a_registry_that_is_down_when_mounting(daemon: Daemon, registry: Registry, meter: Meter, arena: Path) -> None:
    push(Image((gzip_layer([file("a", b"a")]),)), registry, arena, "down")
    meter.down()
    refused = mount(daemon, f"{meter.host}/down", arena, "--namespace", "down")
    assert refused.returncode == 5
    assert meter.host in refused.stderr
    meter.up()
    assert mount(daemon, f"{meter.host}/down", arena, "--namespace", "down").returncode == 0
    daemon.nsfs("umount", str(arena / "mnt"))
    meter.down()
    assert mount(daemon, f"{meter.host}/down", arena, "--namespace", "down").returncode == 0, "known and local"
    assert read(arena / "mnt/a") == b"a"
    daemon.nsfs("umount", str(arena / "mnt"))


def test_foreground_stays_and_takes_its_mount_along(daemon: Daemon, small: str, arena: Path) -> None:
    (arena / "mnt").mkdir()
    with daemon.started("mount", "--foreground", small, str(arena / "mnt")) as running:
        assert running.stderr is not None
        while "press Ctrl-C" not in (line := running.stderr.readline()):
            assert line
        assert read(arena / "mnt/top") == b"top"
        running.terminate()
        assert running.wait(60) == 0
    assert os.listdir(arena / "mnt") == []
    assert daemon.json("status")["mounts"] == []


def test_a_client_that_is_interrupted_leaves_no_mount(
    daemon: Daemon, registry: Registry, meter: Meter, arena: Path
) -> None:
    push(Image((gzip_layer([file("a", noise(300_000, 320))]),)), registry, arena, "interrupted")
    (arena / "mnt").mkdir()
    meter.hold_after = 10_000
    with daemon.started("mount", f"{meter.host}/interrupted", str(arena / "mnt")) as running:
        assert running.stderr is not None
        assert "to download" in running.stderr.readline()
        running.send_signal(2)
        assert running.wait(60) == 130
    meter.hold_after = None
    time.sleep(0.5)
    assert daemon.json("status")["mounts"] == []
    assert os.listdir(arena / "mnt") == []
    assert mount(daemon, f"{meter.host}/interrupted", arena).returncode == 0
    daemon.nsfs("umount", str(arena / "mnt"))
