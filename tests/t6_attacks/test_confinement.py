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
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

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
libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Prey:
    """What an attacker is after."""

    own: Path
    other: Path
    """Another domain's file, root's alone."""
    open_to_all: Path
    socket: str
    victim: int
    """Another process."""
    secret: int
    """Address of 16 bytes in it."""


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
                tmp_path / "own",
                tmp_path / "other" / "disk",
                tmp_path / "readable",
                str(tmp_path / "sock"),
                victim,
                ctypes.addressof(secret),
            )
        finally:
            os.kill(victim, signal.SIGKILL)
            os.waitpid(victim, 0)


def write_own(prey: Prey) -> None:
    (prey.own / "file").write_text("x")


def read_other(prey: Prey) -> None:
    prey.other.read_text()


def read_host(prey: Prey) -> None:
    prey.open_to_all.read_text()


def write_beside(prey: Prey) -> None:
    (prey.own.parent / "left").write_text("x")


def write_root(_prey: Prey) -> None:
    Path("/nsfs-test-left").write_text("x")
    Path("/nsfs-test-left").unlink()


def mount(prey: Prey) -> None:
    check(libc.mount(b"tmpfs", os.fsencode(prey.own), b"tmpfs", 0, None))
    check(libc.umount2(os.fsencode(prey.own), 0))


def open_fuse(_prey: Prey) -> None:
    os.close(os.open("/dev/fuse", os.O_RDWR))


def make_device(prey: Prey) -> None:
    os.mknod(prey.own / "fuse", 0o20600, os.makedev(10, 229))
    os.unlink(prey.own / "fuse")


def trace(prey: Prey) -> None:
    check(libc.ptrace(16, prey.victim, None, None))  # PTRACE_ATTACH


def read_memory(prey: Prey) -> None:
    buffer = ctypes.create_string_buffer(16)
    here = struct.pack("PN", ctypes.addressof(buffer), 16)
    there = struct.pack("PN", prey.secret, 16)
    check(libc.process_vm_readv(prey.victim, here, 1, there, 1, 0))
    assert buffer.raw == b"sixteen bytes..."


def end(prey: Prey) -> None:
    os.kill(prey.victim, 0)


def look_at(prey: Prey) -> None:
    Path(f"/proc/{prey.victim}/cmdline").read_bytes()


def connect(prey: Prey) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(prey.socket)


def listen(_prey: Prey) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))


def sniff(_prey: Prey) -> None:
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close()


def execute(_prey: Prey) -> None:
    os.execv("/bin/true", ["true"])


def be_root_in_a_namespace(_prey: Prey) -> None:
    check(libc.unshare(0x10000000))


def be_root(_prey: Prey) -> None:
    os.setresuid(0, 0, 0)


def dump(_prey: Prey) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (1 << 20, 1 << 20))


def open_keys(_prey: Prey) -> None:
    check(libc.syscall(ctypes.c_long(seccomp.DENIED["keyctl"][0]), 0, -3, 1))  # KEYCTL_GET_KEYRING_ID, session


def check(result: int) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


Attack = Callable[[Prey], None]
ATTACKS: list[Attack] = [
    read_other,
    read_host,
    write_beside,
    write_root,
    mount,
    open_fuse,
    make_device,
    trace,
    read_memory,
    end,
    look_at,
    connect,
    listen,
    sniff,
    execute,
    be_root_in_a_namespace,
    be_root,
    dump,
    open_keys,
]


def of_root(prey: Prey) -> Confinement:
    base = prey.own.parent
    readable = plan_readable(module_paths(sys.path, sys.argv[0]), os.environ)
    return plan_sandbox(readable, str(prey.own), uid=UID, etc=str(base / "etc"), stage=str(base / "stage"))


def of_user(prey: Prey) -> Confinement:
    readable = plan_readable(module_paths(sys.path, sys.argv[0]), os.environ)
    return plan_user_sandbox(readable, str(prey.own), str(prey.own))


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
    assert not (prey.own.parent / "left").exists() or attack is write_beside


def test_a_confined_worker_keeps_what_it_needs(prey: Prey) -> None:
    def work() -> None:
        (prey.own / "file").write_text("x")
        (prey.own / "file").rename(prey.own / "moved")
        assert os.stat(prey.own / "moved").st_uid == os.getuid() == os.getgid() == UID
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
    os.chmod(prey.own.parent, 0o755)
    beneath = [read_host, write_beside, open_fuse, trace, read_memory, execute, mount, listen]
    for attack in beneath:
        assert in_child(partial(attack, prey), of_user(prey)) == "PermissionError", attack
    assert in_child(partial(write_own, prey), of_user(prey)) == ""


def test_what_cannot_be_confined_is_not_started(prey: Prey) -> None:
    nowhere = Confinement(places=(), uid=UID, stage=str(prey.own), netns="/nonexistent")
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
