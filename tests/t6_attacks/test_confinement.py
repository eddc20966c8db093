"""What code in a confined process can reach: each attack works in a free child of root, and fails in a confined one."""

import ctypes
import os
import resource
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from attacks import (
    ATTACKS,
    Attack,
    Prey,
    execute,
    listen,
    mount,
    open_fuse,
    read_host,
    read_memory,
    trace,
    write_beside,
    write_own,
)
from nsfs.errors import NsfsError
from nsfs.serve import landlock, seccomp
from nsfs.serve.sandbox import (
    Confinement,
    Place,
    confine,
    module_paths,
    plan_readable,
    plan_sandbox,
    plan_user_sandbox,
)

UID = 1_879_048_192 + 4711


@pytest.fixture
def prey(tmp_path: Path) -> Iterator[Prey]:
    for name in ("own", "other", "etc", "stage"):
        (tmp_path / name).mkdir()
    os.chown(tmp_path / "own", UID, UID)
    (tmp_path / "etc" / "resolv.conf").write_text("nameserver 192.0.2.1\n")
    (tmp_path / "other" / "disk").write_text("other's")
    (tmp_path / "other" / "disk").chmod(0o600)
    (tmp_path / "readable").write_text("everybody's")
    secret = ctypes.create_string_buffer(b"sixteen bytes...", 16)
    victim = os.fork()
    if victim == 0:
        signal.pause()
        os._exit(0)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "sock"))
        listener.listen()
        try:
            yield Prey(
                own=str(tmp_path / "own"),
                other=str(tmp_path / "other" / "disk"),
                open_to_all=str(tmp_path / "readable"),
                socket=str(tmp_path / "sock"),
                victim=victim,
                secret=ctypes.addressof(secret),
            )
        finally:
            os.kill(victim, signal.SIGKILL)
            os.waitpid(victim, 0)


def of_root(prey: Prey) -> Confinement:
    base = os.path.dirname(prey.own)
    readable = plan_readable(module_paths(sys.path, sys.argv[0]), os.environ)
    return plan_sandbox(readable, prey.own, uid=UID, etc=f"{base}/etc", stage=f"{base}/stage")


def of_user(prey: Prey) -> Confinement:
    readable = plan_readable(module_paths(sys.path, sys.argv[0]), os.environ)
    return plan_user_sandbox(readable, prey.own, prey.own)


def in_child(work: Callable[[], None], confinement: Confinement | None = None) -> str:
    """What became of `work` in a child: "" if it worked, else the name of its error; a bug is the whole traceback."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        said = ""
        try:
            if confinement is not None:
                confine(confinement)
            work()
        except (OSError, ValueError) as error:
            said = type(error).__name__
        except BaseException:  # noqa: BLE001 - told to the parent
            said = traceback.format_exc()
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as file:
        said = file.read()
    os.waitpid(pid, 0)
    return said


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_it_works_for_root_and_fails_in_a_confined_worker(prey: Prey, attack: Attack) -> None:
    assert in_child(lambda: attack(prey)) == ""
    refused = in_child(lambda: attack(prey), of_root(prey))
    assert refused in {"PermissionError", "FileNotFoundError", "OSError", "ValueError"}, refused


def test_a_confined_worker_keeps_what_it_needs(prey: Prey) -> None:
    def work() -> None:
        write_own(prey)
        os.rename(f"{prey.own}/file", f"{prey.own}/moved")
        assert os.stat(f"{prey.own}/moved").st_uid == os.getuid() == os.getgid() == UID
        assert Path("/etc/resolv.conf").read_text() == "nameserver 192.0.2.1\n"
        Path(os.devnull).write_text("x")
        fd = os.memfd_create("key")
        os.write(fd, b"pem")
        assert Path(f"/proc/self/fd/{fd}").read_bytes() == b"pem"
        with socket.socket() as sock:
            assert sock.connect_ex(("127.0.0.1", 1)) != 0
        child = os.fork()
        if child == 0:
            signal.pause()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert os.getgroups() == []
        assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)

    assert in_child(work, of_root(prey)) == ""


def test_a_users_worker_keeps_the_uid_and_is_held_by_landlock_and_the_filter(prey: Prey) -> None:
    os.chmod(os.path.dirname(prey.own), 0o755)
    beneath = [read_host, write_beside, open_fuse, trace, read_memory, execute, mount, listen]
    for attack in beneath:
        assert in_child(partial(attack, prey), of_user(prey)) == "PermissionError", attack
    assert in_child(partial(write_own, prey), of_user(prey)) == ""


def test_what_cannot_be_confined_is_not_started(prey: Prey) -> None:
    nowhere = Confinement(places=(), uid=UID, stage=prey.own, netns="/nonexistent")
    with pytest.raises(NsfsError, match="cannot be confined"):
        confine(nowhere)


def test_the_program_knows_its_architectures_and_ends_in_every_case() -> None:
    for architecture in seccomp.ARCHITECTURES.values():
        program = list(struct.iter_unpack("=HBBI", seccomp.plan_filter(architecture)))
        assert len(program) < 4096  # BPF_MAXINSNS
        for at, (code, yes, no, _) in enumerate(program):
            if code not in {0x20, 0x06}:
                assert at + 1 + max(yes, no) < len(program)
        assert program[-1] == (0x06, 0, 0, 0x7FFF0000)


def test_rights_grow_with_the_kernel() -> None:
    oldest, newest = landlock.plan_rights(1), landlock.plan_rights(7)
    assert (oldest.handled, oldest.tcp, oldest.scoped) == (0x1FFF, 0, 0)
    assert (newest.handled, newest.tcp, newest.scoped) == (0xFFFF, 1, 3)
    assert oldest.write & ~oldest.handled == 0
    assert not oldest.read & ~oldest.write


def test_what_is_read_follows_the_interpreter_and_its_environment() -> None:
    found = plan_readable(["/a/lib", "", "b"], {"SSL_CERT_FILE": "/x/ca.pem", "SSL_CERT_DIR": "rel"})
    paths = [place.path for place in found]
    assert "/a/lib" in paths
    assert "/x" in paths
    assert "" not in paths
    assert "b" not in paths
    assert [place for place in found if place.writable] == [Place("/dev/null", writable=True)]
