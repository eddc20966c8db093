"""`nsfs bench` as a user has it: every way measured over a real registry's line, and nothing of it left."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest

import busybox
from nsfs.bench.command import Command, run_command, with_config
from nsfs.bench.journal import NAME
from nsfs.bench.line import Shape, run_line
from nsfs.cli.exits import INTERRUPTED
from nsfs.errors import NsfsError
from nsfs_daemon import NSFS
from users import push

if TYPE_CHECKING:
    from pathlib import Path

    from registry import Registry

WORDS = len(busybox.WORDS)


def command(reference: str, arena: Path, *more: str) -> list[str]:
    # The arena's absent socket is no containerd; nsfs then fetches and copies for the eager way.
    places = ["--directory", str(arena), "--output", str(arena / "out"), "--containerd", str(arena / "none")]
    # Other tests run beside it: their caches are theirs.
    options = ["--forget", "image", "--bandwidth", "0", "--rtt", "1ms"]
    return [*NSFS, "bench", reference, *options, *places, *more]


def bench(reference: str, arena: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(reference, arena, *more), check=False, capture_output=True, text=True)


def check_nothing_left(arena: Path) -> None:
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        assert str(arena / "nsfs-bench") not in file.read()
    assert not list(arena.glob("nsfs-bench-*"))
    deadline = time.monotonic() + 30
    while left := [line for line in processes() if str(arena / "nsfs-bench") in line]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)  # what was killed ends soon


def processes() -> list[str]:
    """What each process of this machine was started with."""
    lines = []
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            lines.append(file.read().replace(b"\0", b" ").decode(errors="replace"))
    return lines


@pytest.mark.timeout(300)
def test_every_way_is_proven(registry: Registry, arena: Path) -> None:
    push(busybox.image(), registry, arena, "bench")
    reference = f"{registry.host}/bench:latest"
    ran = bench(reference, arena, "--cmd", "sh -c 'cat /data/words > /dev/null; echo up'", "--samples", "1", "--json")
    assert ran.returncode == 0, ran.stderr
    report: dict[str, Any] = json.loads(ran.stdout)
    ways = {way["way"]: way for way in report["ways"]}
    assert set(ways) == {"eager", "first", "indexed", "profile", "local", "overlay"}
    assert ways["overlay"]["received"] == 0
    assert ways["local"]["received"] < WORDS < ways["indexed"]["received"]  # manifests are asked for
    assert ways["profile"]["received"] > WORDS
    assert min(ways["eager"]["received"], ways["first"]["received"]) > report["image"]["size"]
    assert all(sample["cached"] < 1 << 20 for sample in report["samples"])
    assert report["limit"]["touched"] >= WORDS
    assert report["limit"]["seconds"] >= report["limit"]["run"] + 4 * 0.001
    assert json.loads((arena / "out/report.json").read_text()) == report
    assert {path.name for path in (arena / "out").iterdir()} >= {"phases.png", "phases.svg", "bytes.png", "bytes.svg"}
    assert f"seed {report['seed']}" in ran.stderr
    check_nothing_left(arena)


@pytest.mark.timeout(300)
def test_who_interrupts_goes_on(registry: Registry, arena: Path) -> None:
    push(busybox.image(), registry, arena, "bench")
    asked = (f"{registry.host}/bench:latest", arena, "--cmd", "echo up", "--way", "local", "--seed", "7", "--samples")
    with subprocess.Popen(command(*asked, "1000"), stderr=subprocess.PIPE, text=True, start_new_session=True) as first:
        try:
            assert first.stderr is not None
            assert any("local 1:" in line for line in first.stderr)
        finally:
            os.killpg(first.pid, signal.SIGINT)  # as a terminal does, to whatever it runs just then
        first.stderr.read()
    assert first.returncode == INTERRUPTED
    check_nothing_left(arena)
    written = (arena / "out" / NAME).read_bytes()
    kept = written[: written.rfind(b"\n") + 1]
    taken = kept.count(b'"sample"')
    assert 1 <= taken < 1000
    again = bench(*asked, str(taken + 1), "--json")
    assert again.returncode == 0, again.stderr
    assert len(json.loads(again.stdout)["samples"]) == taken + 1
    assert (arena / "out" / NAME).read_bytes().startswith(kept)
    check_nothing_left(arena)


@pytest.fixture
def root(arena: Path) -> str:
    """A tree with a shell, and a user."""
    for name in ("bin", "etc"):
        (arena / "root" / name).mkdir(parents=True)
    shutil.copy("/usr/bin/busybox", arena / "root/bin/busybox")
    (arena / "root/bin/sh").symlink_to("busybox")
    (arena / "root/etc/passwd").write_text("ann:x:1234:1235::/:/bin/sh\n")
    return str(arena / "root")


def shell(script: str, wait_for: str = "", user: str = "") -> Command:
    return with_config(("sh", "-c", script), wait_for, {"User": user, "Env": ["PATH=/bin", "GREETING=hi"]})


def test_a_command_is_up_when_it_says_what_is_waited_for(root: str) -> None:
    began = time.monotonic()
    up = run_command(root, shell("echo $GREETING; exec busybox sleep 600", wait_for="hi"), timeout=30)
    assert began < up < time.monotonic() < began + 30
    run_command(root, shell("busybox id", wait_for="uid=1234(ann) gid=1235", user="ann"), timeout=30)
    run_command(root, shell("test -c /dev/null -a -d /proc/1 && ! test -e /proc/2000000"), timeout=30)
    assert subprocess.run(["findmnt", "--submounts", root], check=False, capture_output=True).stdout == b""


@pytest.mark.parametrize(
    ("script", "wait_for", "timeout", "message"),
    [
        ("echo no; exit 3", "", 30, "ended with 3: no"),
        ("echo other", "up", 30, "ended with 0: other"),
        ("exec busybox sleep 600", "", 0.3, "not up after 0.3 s: it said nothing"),
    ],
)
def test_a_command_that_does_not_come_up_is_an_error(
    root: str, script: str, wait_for: str, timeout: float, message: str
) -> None:
    with pytest.raises(NsfsError, match=message):
        run_command(root, shell(script, wait_for), timeout=timeout)


def test_an_image_of_no_registry_is_refused(arena: Path) -> None:
    ran = bench("oci:/nowhere", arena)
    assert (ran.returncode, "not an image of a registry" in ran.stderr) == (2, True)


def test_a_command_that_no_shell_would_split_is_refused(arena: Path) -> None:
    ran = bench("registry.example/app", arena, "--cmd", "sh -c 'echo up")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "not a command: " in ran.stderr


@pytest.mark.parametrize("connect", [False, True], ids=["to one server", "as a proxy"])
def test_a_line_delays_and_counts_what_a_server_sends(connect: bool) -> None:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        address = f"127.0.0.1:{server.getsockname()[1]}"
        line = stack.enter_context(run_line(None if connect else address, Shape(1e6, 0.1)))
        host, port = line.host.split(":")
        began = time.monotonic()
        client = stack.enter_context(socket.create_connection((host, int(port))))
        if connect:
            client.sendall(f"CONNECT {address} HTTP/1.1\r\n\r\n".encode())
            assert client.recv(1024).startswith(b"HTTP/1.1 200")
        peer = stack.enter_context(server.accept()[0])
        peer.sendall(os.urandom(200_000))
        peer.close()
        received = sum(map(len, iter(lambda: client.recv(1 << 16), b"")))
        assert (received, line.received) == (200_000, 200_000)
        assert time.monotonic() - began >= 0.2 + 0.1
        assert line.trace[-1][1] == 200_000
