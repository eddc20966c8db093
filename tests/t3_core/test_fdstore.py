"""Descriptors that outlive their daemon, in systemd's store and in a holder of our own."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from typing import TYPE_CHECKING

import pytest

from nodes import wait_until
from nsfs.errors import UnreachableError
from nsfs.serve.fdstore import HolderStore, Notifier, SystemdStore

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def memory(text: bytes) -> int:
    fd = os.memfd_create("test")
    os.write(fd, text)
    return fd


def text_of(fd: int) -> bytes:
    return os.pread(fd, 100, 0)


def look(path: str) -> dict[str, bytes]:
    """What a next daemon would get."""
    store = HolderStore(path)
    try:
        return {name: text_of(fd) for name, fd in store.take().items()}
    finally:
        store.close()


@contextlib.contextmanager
def ended(store: HolderStore, *names: str) -> Iterator[None]:
    """No holder is left behind."""
    try:
        yield
    finally:
        for name in names:
            store.drop(name)
        store.close()


def test_a_holder_keeps_what_the_next_daemon_takes(tmp_path: Path) -> None:
    path = str(tmp_path / "holder.sock")
    first = HolderStore(path)
    assert first.take() == {}
    first.keep("fuse.a", memory(b"one"))
    first.keep("b", memory(b"two"))
    first.keep("fuse.a", memory(b"three"))
    first.close()
    second = HolderStore(path)
    with ended(second, "fuse.a", "b"):
        found = second.take()
        assert {name: text_of(fd) for name, fd in found.items()} == {"fuse.a": b"three", "b": b"two"}
        second.drop("b")
        assert look(path) == {"fuse.a": b"three"}
    assert not os.path.exists(path)


def test_a_holder_that_was_killed_is_followed_by_one_that_has_the_same(tmp_path: Path) -> None:
    path = str(tmp_path / "holder.sock")
    store = HolderStore(path)
    store.take()
    store.keep("a", memory(b"one"))
    with ended(store, "a", "b"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
            other.connect(path)
            other.send(b"end")
            other.recv(16)
        store.keep("b", memory(b"two"))
        assert look(path) == {"a": b"one", "b": b"two"}


@pytest.fixture
def open_directory() -> Iterator[str]:
    """One that everybody may enter."""
    with tempfile.TemporaryDirectory(prefix="nsfs-holder-") as path:
        os.chmod(path, 0o755)
        yield path


def test_a_holder_answers_nobody_but_its_user(open_directory: str) -> None:
    path = f"{open_directory}/holder.sock"
    store = HolderStore(path)
    store.take()
    store.keep("a", memory(b"one"))
    os.chmod(path, 0o666)
    with ended(store, "a"):
        os.seteuid(65534)
        try:
            with pytest.raises(UnreachableError):
                look(path)
        finally:
            os.seteuid(0)
        assert look(path) == {"a": b"one"}


def test_a_holder_ends_when_what_it_keeps_has_failed_and_no_daemon_is_there(tmp_path: Path) -> None:
    path = str(tmp_path / "holder.sock")
    store = HolderStore(path)
    store.take()
    read, write = os.pipe()
    store.keep("fuse.a", write)
    os.close(write)
    store.close()
    assert answers(path)
    os.close(read)
    assert wait_until(lambda: not answers(path))


def answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as line:
        return line.connect_ex(path) == 0


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """The socket of a service manager."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(5)
        yield sock


def test_systemd_is_told_what_to_keep_and_what_to_forget(tmp_path: Path, manager: socket.socket) -> None:
    environ = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
    notifier = Notifier(environ)
    store = SystemdStore(notifier, environ)
    assert store.take() == {}
    notifier.tell("READY=1")
    assert manager.recv(100) == b"READY=1"
    store.keep("fuse.ns%2Fa", memory(b"one"))
    said, (fd,), _, _ = socket.recv_fds(manager, 100, 4)
    assert (said, text_of(fd)) == (b"FDSTORE=1\nFDPOLL=0\nFDNAME=fuse.ns%2Fa", b"one")
    store.drop("fuse.ns%2Fa")
    assert manager.recv(100) == b"FDSTOREREMOVE=1\nFDNAME=fuse.ns%2Fa"


def test_what_an_execve_carries_is_there_after_it() -> None:
    environ: dict[str, str] = {}
    before = SystemdStore(Notifier(environ), environ)
    before.keep("a", memory(b"one"))
    before.carry()
    after = SystemdStore(Notifier(environ), environ)
    assert {name: text_of(fd) for name, fd in after.take().items()} == {"a": b"one"}
    assert environ == {}


def test_descriptors_that_are_meant_for_another_process_are_left_alone() -> None:
    environ = {"LISTEN_PID": "1", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "a"}
    assert SystemdStore(Notifier(environ), environ).take() == {}
    assert environ == {}
