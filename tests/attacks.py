"""What somebody tries who runs code in a worker: each attack works for root outside of it, and raises inside.

Imported by tests, which do them in a child of their own, and by a daemon's zygote, whose workers then do them.
"""

from __future__ import annotations

import ctypes
import os
import resource
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

libc = ctypes.CDLL(None, use_errno=True)
_KEYCTL = {"x86_64": 250, "aarch64": 219}


@dataclass(frozen=True)
class Prey:
    """What an attacker is after. Paths, but for the last two."""

    own: str
    """Of the domain's own directory."""
    other: str
    """Of another domain's file, root's alone."""
    open_to_all: str
    """Of a file that everybody on the host may read."""
    socket: str
    """One that somebody listens on."""
    victim: int
    """Another process."""
    secret: int
    """Address of 16 bytes in it."""


def write_own(prey: Prey) -> None:
    Path(prey.own, "file").write_text("x")


def read_other(prey: Prey) -> None:
    Path(prey.other).read_bytes()


def read_host(prey: Prey) -> None:
    Path(prey.open_to_all).read_bytes()


def write_beside(prey: Prey) -> None:
    left = Path(prey.own).with_name("left")
    left.write_text("x")
    left.unlink()


def write_root(_prey: Prey) -> None:
    Path("/nsfs-test-left").write_text("x")
    Path("/nsfs-test-left").unlink()


def mount(prey: Prey) -> None:
    check(libc.mount(b"tmpfs", os.fsencode(prey.own), b"tmpfs", 0, None))
    check(libc.umount2(os.fsencode(prey.own), 0))


def open_fuse(_prey: Prey) -> None:
    os.close(os.open("/dev/fuse", os.O_RDWR))


def make_device(prey: Prey) -> None:
    os.mknod(f"{prey.own}/fuse", 0o20600, os.makedev(10, 229))
    os.unlink(f"{prey.own}/fuse")


def trace(prey: Prey) -> None:
    check(libc.ptrace(16, prey.victim, None, None))  # PTRACE_ATTACH


def read_memory(prey: Prey) -> None:
    buffer = ctypes.create_string_buffer(16)
    here = struct.pack("PN", ctypes.addressof(buffer), 16)
    there = struct.pack("PN", prey.secret, 16)
    check(libc.process_vm_readv(prey.victim, here, 1, there, 1, 0))
    assert any(buffer.raw)


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
    check(libc.syscall(ctypes.c_long(_KEYCTL[os.uname().machine]), 0, -3, 1))  # KEYCTL_GET_KEYRING_ID, session


def try_all(prey: Prey) -> dict[str, str]:
    """What became of each attack, by its name: "" if it worked, else the name of its error."""
    return {attack.__name__: _try(attack, prey) for attack in ATTACKS}


def _try(attack: Attack, prey: Prey) -> str:
    try:
        attack(prey)
    except (OSError, ValueError) as error:
        return type(error).__name__
    return ""


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
