"""Who is let in at the daemon's socket, and that what they say arrives."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING

import trio
import trio.socket
import trio.testing

from nsfs.serve.door import Door, peer_of
from nsfs.serve.entrance import listening
from nsfs.serve.http2 import GREETING, PREFACE, Kind, render_frame
from nsfs_daemon import run_daemon

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    import pytest


ACK = render_frame(Kind.SETTINGS, flags=1)
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
        with trio.fail_after(60), listening(str(path / "door")) as outside:
            async with trio.open_nursery() as nursery:
                door = Door(outside.listener, str(path / "inside"), admitted)
                nursery.start_soon(door.serve, nursery)
                async with trio.SocketListener(inside) as listener:
                    await body(listener)
                nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_door_that_is_shut_lets_calls_end_and_leaves_others_to_the_next(tmp_path: Path) -> None:
    call, answer = render_frame(Kind.HEADERS, b"a", stream=1), render_frame(Kind.HEADERS, b"b", flags=1, stream=1)
    other = render_frame(Kind.HEADERS, b"c", stream=3)

    async def body(door: Door, listener: trio.SocketListener, nursery: trio.Nursery) -> None:
        early = await trio.open_unix_socket(tmp_path / "door")
        met = await listener.accept()
        await early.send_all(PREFACE + call)
        assert await read_exactly(met, len(PREFACE + call)) == PREFACE + call
        nursery.start_soon(door.shut, 60)
        await trio.testing.wait_all_tasks_blocked()
        await met.send_all(GREETING)
        assert await read_exactly(early, len(GREETING)) == GREETING, "nothing comes before it"
        await early.send_all(ACK)
        assert await read_exactly(met, len(ACK)) == ACK
        assert await read_exactly(early, 17) == render_frame(Kind.GOAWAY, bytes([0, 0, 0, 1]) + bytes(4))
        async with await trio.open_unix_socket(tmp_path / "door") as late:
            await early.send_all(other)
            await met.send_all(answer)
            assert await read_exactly(early, len(answer)) == answer
            await early.aclose()
            assert await met.receive_some() == b""
            await late.send_all(b"unheard")
        await met.aclose()

    _with_open_door(tmp_path, body)


def test_a_door_that_is_shut_waits_no_longer_than_it_may(tmp_path: Path) -> None:
    async def body(door: Door, listener: trio.SocketListener, _nursery: trio.Nursery) -> None:
        async with await trio.open_unix_socket(tmp_path / "door") as early, await listener.accept() as met:
            await early.send_all(PREFACE + render_frame(Kind.HEADERS, stream=1))
            await read_exactly(met, len(PREFACE) + 9)
            await door.shut(0.1)

    _with_open_door(tmp_path, body)


def test_who_hears_nothing_any_more_when_the_door_is_shut_is_no_trouble(tmp_path: Path) -> None:
    async def body(door: Door, listener: trio.SocketListener, _nursery: trio.Nursery) -> None:
        async with await trio.open_unix_socket(tmp_path / "door") as client, await listener.accept() as met:
            await client.send_all(PREFACE + ACK)
            await read_exactly(met, len(PREFACE + ACK))
            client.socket.shutdown(socket.SHUT_RD)
            await door.shut(60)

    _with_open_door(tmp_path, body)


def test_who_was_greeted_by_others_is_let_in(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    said = [PREFACE, GREETING, render_frame(Kind.SETTINGS, flags=1), render_frame(Kind.HEADERS, b"x", stream=1)]

    async def body(_door: Door, listener: trio.SocketListener, _nursery: trio.Nursery) -> None:
        async with trio.SocketStream(trio.socket.from_stdlib_socket(ours)) as client:
            await client.send_all(b"".join(said))
            async with await listener.accept() as met:
                heard = PREFACE + GREETING + said[-1]
                assert await read_exactly(met, len(heard)) == heard

    _with_open_door(tmp_path, body, theirs)


def _with_open_door(
    path: Path, body: Callable[[Door, trio.SocketListener, trio.Nursery], Awaitable[None]], *greeted: socket.socket
) -> None:
    async def main() -> None:
        with trio.fail_after(60), listening(str(path / "door")) as outside:
            async with trio.open_nursery() as nursery, trio.SocketListener(await _inside(path)) as listener:
                door = Door(outside.listener, str(path / "inside"), {os.getuid()})
                nursery.start_soon(door.serve, nursery, greeted)
                await body(door, listener, nursery)
                nursery.cancel_scope.cancel()

    trio.run(main)


async def _inside(path: Path) -> trio.socket.SocketType:
    inside = trio.socket.socket(socket.AF_UNIX)
    await inside.bind(str(path / "inside"))
    inside.listen()
    return inside


def test_bytes_arrive_in_both_directions_and_wait_for_who_reads_slowly(tmp_path: Path) -> None:
    data = b"".join(render_frame(Kind.DATA, os.urandom(16_000), stream=1) for _ in range(200))

    async def body(listener: trio.SocketListener) -> None:
        outer = await trio.open_unix_socket(tmp_path / "door")
        inner = await listener.accept()
        assert peer_of(outer.socket) == (os.getpid(), os.getuid(), os.getgid())
        await outer.send_all(PREFACE)
        assert await read_exactly(inner, len(PREFACE)) == PREFACE
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
            await inner.send_all(GREETING)
            await inner.aclose()
            assert await outer.receive_some() == GREETING
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
