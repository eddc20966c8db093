"""The daemon's socket, from one daemon to the next, and who connects between the two."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
from typing import TYPE_CHECKING

import msgspec
import pytest

from nsfs.errors import UsageError
from nsfs.serve.entrance import listening
from nsfs.serve.http2 import GREETING
from nsfs.serve.porter import PorterArgs, relieve_porter, run_porter

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextlib.contextmanager
def posted(path: str, patience: float = 60, pid: int = 0) -> Iterator[int]:
    """A porter at the socket of a daemon that ended; the near end of its line."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with listening(path) as entrance:
        fds = [os.dup(entrance.listener.fileno()), far.detach()]
        entrance.is_left = True
    args = msgspec.msgpack.encode(PorterArgs(patience=patience, pid=pid))
    porter = threading.Thread(target=run_porter, args=(args, fds))
    porter.start()
    try:
        yield near.detach()
    finally:
        porter.join(60)
        assert not porter.is_alive()


def connected(path: str) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(60)
    client.connect(path)
    return client


def test_who_connects_between_two_daemons_is_greeted_and_let_in_by_the_next(tmp_path: Path) -> None:
    path = str(tmp_path / "door")
    with posted(path) as line, connected(path) as early, connected(path) as other:
        assert [each.recv(100) for each in (early, other)] == [GREETING, GREETING]
        with listening(path, lambda: relieve_porter(line)) as entrance:
            for client, server in zip((early, other), entrance.greeted, strict=True):
                server.sendall(b"in")
                assert client.recv(2) == b"in"
                server.close()
            entrance.listener.setblocking(True)
            with connected(path) as late, entrance.listener.accept()[0] as server:
                server.sendall(b"in")
                assert late.recv(2) == b"in"
    assert not os.path.exists(path)


def test_where_no_daemon_follows_who_waits_is_hung_up_on(tmp_path: Path) -> None:
    path = str(tmp_path / "door")
    with posted(path, patience=1) as line, connected(path) as client:
        assert client.recv(100) == GREETING
        assert client.recv(100) == b""
        assert relieve_porter(line) == []
    with socket.socket(socket.AF_UNIX) as client, pytest.raises(ConnectionRefusedError):
        client.connect(path)
    with listening(path), connected(path):
        pass


def test_where_the_daemon_to_be_ends_nobody_waits_for_it(tmp_path: Path) -> None:
    path = str(tmp_path / "door")
    with (
        subprocess.Popen(["sleep", "1000"]) as process,
        posted(path, pid=process.pid) as line,
        connected(path) as client,
    ):
        assert client.recv(100) == GREETING
        process.kill()
        assert client.recv(100) == b""
        assert relieve_porter(line) == []


def test_a_place_elsewhere_takes_the_old_one_away_and_who_waits_there_along(tmp_path: Path) -> None:
    with posted(str(tmp_path / "old")) as line, connected(str(tmp_path / "old")) as client:
        assert client.recv(100) == GREETING
        with listening(str(tmp_path / "new"), lambda: relieve_porter(line)) as entrance:
            assert os.listdir(tmp_path) == ["new"]
            (server,) = entrance.greeted
            server.close()
            assert client.recv(100) == b""


def test_a_place_that_cannot_be_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match=r"socket: cannot listen there: .*/none/door: No such file"),
        listening(str(tmp_path / "none" / "door")),
    ):
        pass
