"""Who is let in at the daemon's socket, and that what they say arrives."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING

import pytest
import trio
import trio.socket
import trio.testing

from nsfs.errors import UsageError
from nsfs.serve.door import Door, listening, peer_of
from nsfs_daemon import run_daemon

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path


NOBODY = 65534
KNOCK = """
import os, socket, sys
os.setgroups([])
os.setresgid(*3 * [int(sys.argv[2])])
os.setresuid(*3 * [int(sys.argv[2])])
with socket.socket(socket.AF_UNIX) as knocking:
    knocking.settimeout(10)
    knocking.connect(sys.argv[1])
    try:
        knocking.sendall(b"PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n" + bytes(3) + b"\\x04" + bytes(5))
        print(len(knocking.recv(100)))
    except OSError as error:
        print(type(error).__name__)
"""
"""What gRPC begins a connection with, and how long the answer is."""


def knock(path: str, uid: int) -> str:
    command = [sys.executable, "-IS", "-c", KNOCK, path, str(uid)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def test_another_user_is_refused_whatever_the_modes_say() -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="nsfs-door-") as directory, run_daemon(directory) as daemon:
        assert os.stat(daemon.socket).st_mode & 0o777 == 0o600
        assert os.stat(daemon.run).st_mode & 0o777 == 0o700
        assert not [name for name in os.listdir(daemon.run) if name.startswith("tmp")], "gRPC's own socket has no name"
        for path, mode in ((directory, 0o711), (daemon.run, 0o711), (daemon.socket, 0o666)):
            os.chmod(path, mode)
        assert {knock(daemon.socket, NOBODY) for _ in range(3)} <= {"0", "BrokenPipeError", "ConnectionResetError"}
        assert int(knock(daemon.socket, 0)) > 0
        assert daemon.json("status")["domains"] == []
        assert daemon.tail().count(f"refused a connection: uid={NOBODY}") == 1


def with_door(path: Path, body: Callable[[trio.SocketListener], Awaitable[None]], *admitted: int) -> None:
    """`body` plays what is behind the door at `path`/door."""

    async def main() -> None:
        inside = await _inside(path)
        with trio.fail_after(60), listening(str(path / "door"), {}) as outside:
            async with trio.open_nursery() as nursery:
                door = Door(outside, str(path / "inside"), admitted)
                nursery.start_soon(door.serve, nursery)
                async with trio.SocketListener(inside) as listener:
                    await body(listener)
                nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_door_that_is_shut_keeps_who_is_inside_and_leaves_who_comes_to_the_next(tmp_path: Path) -> None:
    async def main() -> None:
        with trio.fail_after(60), listening(str(tmp_path / "door"), {}) as outside:
            async with trio.open_nursery() as nursery, trio.SocketListener(await _inside(tmp_path)) as listener:
                door = Door(outside, str(tmp_path / "inside"), {0})
                nursery.start_soon(door.serve, nursery)
                async with await trio.open_unix_socket(tmp_path / "door") as early, await listener.accept() as met:
                    door.shut()
                    await trio.testing.wait_all_tasks_blocked()
                    async with await trio.open_unix_socket(tmp_path / "door"):
                        await early.send_all(b"x")
                        assert await met.receive_some() == b"x"
                        waiting, _ = outside.accept()
                        waiting.close()
                nursery.cancel_scope.cancel()

    trio.run(main)


async def _inside(path: Path) -> trio.socket.SocketType:
    inside = trio.socket.socket(socket.AF_UNIX)
    await inside.bind(str(path / "inside"))
    inside.listen()
    return inside


def test_bytes_arrive_in_both_directions_and_wait_for_who_reads_slowly(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)

    async def body(listener: trio.SocketListener) -> None:
        outer = await trio.open_unix_socket(tmp_path / "door")
        inner = await listener.accept()
        assert peer_of(outer.socket) == (os.getpid(), os.getuid(), os.getgid())
        for source, sink in ((outer, inner), (inner, outer)):
            sent = trio.Event()

            async def send(into: trio.SocketStream, done: trio.Event) -> None:
                await into.send_all(data)
                done.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send, source, sent)
                await trio.sleep(0.1)
                assert not sent.is_set(), "nobody has read yet"
                assert await read_exactly(sink, len(data)) == data
        await outer.aclose()
        assert await inner.receive_some() == b""
        await inner.aclose()

    with_door(tmp_path, body, os.getuid())


async def read_exactly(stream: trio.SocketStream, size: int) -> bytes:
    read = bytearray()
    while len(read) < size:
        read += await stream.receive_some()
    return bytes(read)


def test_either_end_ends_both(tmp_path: Path) -> None:
    async def body(listener: trio.SocketListener) -> None:
        for _ in range(3):
            outer = await trio.open_unix_socket(tmp_path / "door")
            inner = await listener.accept()
            await inner.send_all(b"last words")
            await inner.aclose()
            assert await outer.receive_some() == b"last words"
            assert await outer.receive_some() == b""
            await outer.aclose()
        await listener.aclose()
        os.unlink(tmp_path / "inside")
        async with await trio.open_unix_socket(tmp_path / "door") as outer:
            assert await outer.receive_some() == b""

    with_door(tmp_path, body, os.getuid())


def test_who_is_not_admitted_is_led_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def body(listener: trio.SocketListener) -> None:
        for _ in range(2):
            async with await trio.open_unix_socket(tmp_path / "door") as outer:
                assert await outer.receive_some() == b""
        with trio.move_on_after(0.1) as scope:
            await listener.accept()
        assert scope.cancelled_caught

    with_door(tmp_path, body, os.getuid() + 1)
    assert caplog.messages == [f"refused a connection: uid={os.getuid()} gid={os.getgid()} pid={os.getpid()}"]


def test_a_place_that_cannot_be_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match=r"socket: cannot listen there: .*/none/door: No such file"),
        listening(str(tmp_path / "none" / "door"), {}),
    ):
        pass


def knocked(path: str) -> socket.socket:
    """A connection that waits to be accepted."""
    knocking = socket.socket(socket.AF_UNIX)
    knocking.settimeout(10)
    knocking.connect(path)
    return knocking


def test_who_comes_while_the_place_is_given_away_is_let_in_by_the_next(tmp_path: Path) -> None:
    path, environ = str(tmp_path / "door"), {"HOME": "/"}
    with listening(path, environ, lambda: True):
        pass
    with knocked(path) as knocking, listening(path, environ) as after:
        assert environ == {"HOME": "/"}
        assert not after.get_inheritable()
        after.setblocking(True)
        accepted, _ = after.accept()
        with accepted:
            accepted.send(b"in")
            assert knocking.recv(2) == b"in"
    assert not os.path.exists(path)


def test_a_place_elsewhere_takes_the_old_one_away(tmp_path: Path) -> None:
    environ: dict[str, str] = {}
    with listening(str(tmp_path / "old"), environ, lambda: True):
        pass
    with listening(str(tmp_path / "new"), environ):
        assert os.listdir(tmp_path) == ["new"]
