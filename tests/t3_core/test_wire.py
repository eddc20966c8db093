"""The wire: every way a call can end, and what a bad peer can do."""

import logging
import math
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import msgspec
import pytest
import trio
import trio.lowlevel
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw, Struct

from nsfs.errors import NotFoundError, NsfsError, UnreachableError, UnsupportedError
from nsfs.serve import wire


class Number(Struct):
    value: int


class Piece(Struct):
    data: bytes


async def double(params: Number, _report: wire.Report) -> Number:
    return Number(params.value * 2)


@asynccontextmanager
async def pair(methods: wire.Methods, back: wire.Methods | None = None) -> AsyncIterator[tuple[wire.Peer, wire.Peer]]:
    near, far = trio.testing.memory_stream_pair()
    opened: dict[str, wire.Peer] = {}

    async def serve(task_status: trio.TaskStatus[None]) -> None:
        async with wire.open_peer(far, methods, name="server") as peer:
            opened["server"] = peer
            task_status.started()
            await peer.wait_closed()

    async with trio.open_nursery() as nursery:

        async def start(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
            await serve(task_status)

        async def client() -> None:
            async with wire.open_peer(near, back or {}, name="client") as peer:
                opened["client"] = peer
                ready.set()
                await trio.sleep_forever()

        ready = trio.Event()
        nursery.start_soon(client)
        await nursery.start(start)
        await ready.wait()
        yield opened["client"], opened["server"]
        nursery.cancel_scope.cancel()


def run(body: Callable[[], Any]) -> None:
    async def limited() -> None:
        with trio.fail_after(60):
            try:
                await body()
            except ExceptionGroup as group:
                raise group.exceptions[0] from None

    trio.run(limited)


def test_both_sides_call_and_serve() -> None:
    async def body() -> None:
        async with pair({"double": (Number, double)}, {"double": (Number, double)}) as (client, server):
            assert await client.call("double", Number(21), Number) == Number(42)
            assert await server.call("double", Number(4), Number) == Number(8)
            assert (client.name, server.name) == ("server", "client")

    run(body)


def test_errors_arrive_as_their_class_with_hint_and_delay() -> None:
    async def missing(_params: Number, _report: wire.Report) -> None:
        raise NotFoundError("no such thing: x", hint="look elsewhere")

    async def limited(_params: Number, _report: wire.Report) -> None:
        async with trio.open_nursery():
            raise UnreachableError("slow down", retry_after=1.5)

    async def body() -> None:
        async with pair({"missing": (Number, missing), "limited": (Number, limited)}) as (client, _):
            with pytest.raises(NotFoundError, match="no such thing: x") as caught:
                await client.call("missing", Number(1), Number)
            assert caught.value.hint == "look elsewhere"
            with pytest.raises(UnreachableError, match="slow down") as delayed:
                await client.call("limited", Number(1), Number)
            assert delayed.value.retry_after == 1.5
            with pytest.raises(UnsupportedError, match="no such method: other"):
                await client.call("other", Number(1), Number)

    run(body)


def test_a_bug_is_logged_here_and_opaque_there(caplog: pytest.LogCaptureFixture) -> None:
    async def bug(_params: Number, _report: wire.Report) -> None:
        raise RuntimeError("secret path /x")

    async def body() -> None:
        async with pair({"bug": (Number, bug)}) as (client, _):
            with pytest.raises(NsfsError, match="internal error: RuntimeError") as caught:
                await client.call("bug", Number(1), Number)
            assert type(caught.value) is NsfsError
            assert "secret" not in str(caught.value)

    with caplog.at_level(logging.ERROR):
        run(body)
    assert "secret path /x" in caplog.text
    caplog.clear()


def test_a_slow_listener_holds_up_only_its_own_handler() -> None:
    sent = 0

    async def stream(params: Number, report: wire.Report) -> None:
        nonlocal sent
        for _ in range(params.value):
            await report(Piece(b"x" * 1000))
            sent += 1

    async def body() -> None:
        gate = trio.Event()
        got: list[Piece] = []

        async def slowly(piece: Piece) -> None:
            await gate.wait()
            got.append(piece)

        async with pair({"stream": (Number, stream), "double": (Number, double)}) as (client, _):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.call, "stream", Number(100), type(None), slowly, Piece)
                await trio.testing.wait_all_tasks_blocked()
                assert sent == wire.WINDOW
                assert await client.call("double", Number(1), Number) == Number(2)
                gate.set()
            assert len(got) == 100

    run(body)


def test_progress_without_a_listener_is_not_sent() -> None:
    async def talk(_params: Number, report: wire.Report) -> Number:
        for _ in range(100):
            await report(Piece(b""))
        return Number(1)

    async def body() -> None:
        async with pair({"talk": (Number, talk)}) as (client, _):
            assert await client.call("talk", Number(0), Number) == Number(1)

    run(body)


def test_cancelling_a_call_cancels_its_handler_and_nothing_else() -> None:
    async def body() -> None:
        cancelled = trio.Event()

        async def wait(_params: Number, _report: wire.Report) -> None:
            try:
                await trio.sleep_forever()
            finally:
                cancelled.set()

        async with pair({"wait": (Number, wait), "double": (Number, double)}) as (client, _):
            with trio.move_on_after(0.01) as scope:
                await client.call("wait", Number(0), Number)
            assert scope.cancelled_caught
            await cancelled.wait()
            assert await client.call("double", Number(1), Number) == Number(2)

    run(body)


def test_a_listener_that_raises_cancels_the_handler() -> None:
    async def body() -> None:
        cancelled = trio.Event()

        async def stream(_params: Number, report: wire.Report) -> None:
            try:
                while True:
                    await report(Piece(b""))
            finally:
                cancelled.set()

        async def refuse(_piece: Piece) -> None:
            raise LookupError

        async with pair({"stream": (Number, stream)}) as (client, _):
            with pytest.raises(LookupError):
                await client.call("stream", Number(0), type(None), refuse, Piece)
            await cancelled.wait()

    run(body)


def test_death_of_a_peer_ends_every_call_and_handler() -> None:
    async def body() -> None:
        near, far = trio.testing.memory_stream_pair()
        ended = trio.Event()

        async def hang(_params: Number, _report: wire.Report) -> None:
            try:
                await trio.sleep_forever()
            finally:
                ended.set()

        async def expect_death(peer: wire.Peer) -> None:
            with pytest.raises(UnreachableError, match="gone"):
                await peer.call("hang", Number(0), Number)

        await far.send_all(wire.render_frame(wire.Hello(1, 1, "mortal")))
        async with wire.open_peer(near, {"hang": (Number, hang)}, name="survivor") as peer:
            await far.send_all(wire.render_frame(wire.Request(1, "hang", Raw(msgspec.msgpack.encode(Number(1))))))
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(expect_death, peer)
                await trio.testing.wait_all_tasks_blocked()
                await far.aclose()
            await ended.wait()
            await peer.wait_closed()
            with pytest.raises(UnreachableError):
                await peer.call("hang", Number(0), Number)

    run(body)


@pytest.mark.parametrize(
    "evil",
    [
        b"\xff\xff\xff\xff",
        b"\x01\x00\x00\x00\xc1",
        wire.render_frame(wire.Hello(1, 1, "again")),
        wire.render_frame(wire.Taken(1)),
        wire.render_frame(wire.Progress(1, Raw(b"\xc0"))),
    ],
    ids=["oversized", "no message", "second hello", "unearned window", "uncalled progress"],
)
def test_a_peer_that_breaks_the_protocol_counts_as_dead(evil: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async def hang(_params: Number, _report: wire.Report) -> None:
        await trio.sleep_forever()

    async def body() -> None:
        near, far = trio.testing.memory_stream_pair()
        request = wire.Request(1, "hang", Raw(msgspec.msgpack.encode(Number(1))), 1)
        await far.send_all(wire.render_frame(wire.Hello(1, 1, "evil")) + wire.render_frame(request))
        async with wire.open_peer(near, {"hang": (Number, hang)}, name="good") as peer, trio.open_nursery() as nursery:

            async def call() -> None:
                with pytest.raises(UnreachableError):
                    await peer.call("anything", Number(0), Number)

            nursery.start_soon(call)
            await trio.testing.wait_all_tasks_blocked()
            await far.send_all(evil)

    run(body)
    assert "broke the protocol: evil" in caplog.text
    caplog.clear()


@pytest.mark.parametrize(("version", "oldest", "agreed"), [(1, 1, 1), (9, 1, 1), (9, 2, None), (0, 0, None)])
def test_versions_are_agreed_on_or_refused(version: int, oldest: int, agreed: int | None) -> None:
    async def body() -> None:
        near, far = trio.testing.memory_stream_pair()
        await far.send_all(wire.render_frame(wire.Hello(version, oldest, "other")))
        if agreed is None:
            with pytest.raises(UnsupportedError, match="another version: other"):
                async with wire.open_peer(near, {}, name="us"):
                    pass
        else:
            async with wire.open_peer(near, {}, name="us") as peer:
                assert peer.version == agreed

    run(body)


def test_no_hello_is_no_peer() -> None:
    async def body() -> None:
        near, far = trio.testing.memory_stream_pair()
        await far.aclose()
        with pytest.raises(UnreachableError):
            async with wire.open_peer(near, {}, name="us"):
                pass

    run(body)


def test_frames_over_the_cap_fail_the_call_and_keep_the_peer(caplog: pytest.LogCaptureFixture) -> None:
    async def large(params: Number, _report: wire.Report) -> Piece:
        return Piece(bytes(params.value))

    async def body() -> None:
        async with pair({"large": (Number, large)}) as (client, _):
            with pytest.raises(NsfsError, match="internal error"):
                await client.call("large", Number(wire.MAX_FRAME), Piece)
            with pytest.raises(ValueError, match="larger than"):
                await client.call("large", Piece(bytes(wire.MAX_FRAME)), Piece)
            assert len((await client.call("large", Number(wire.MAX_FRAME - 100), Piece)).data) == wire.MAX_FRAME - 100

    run(body)
    caplog.clear()


messages = st.one_of(
    st.builds(wire.Hello, st.integers(0, 9), st.integers(0, 9), st.text()),
    st.builds(wire.Error, st.integers(0, math.trunc(2**40)), st.text(), st.text(), st.none() | st.text()),
    st.builds(lambda n, data: wire.Result(n, Raw(msgspec.msgpack.encode(data))), st.integers(0, 9), st.binary()),
)


@given(st.lists(messages, max_size=5), st.integers(1, 7))
def test_frames_survive_any_cut(sent: list[wire.Message], size: int) -> None:
    data = b"".join(map(wire.render_frame, sent))
    parser = wire.FrameParser()
    got = [message for i in range(0, len(data), size) for message in parser.feed(data[i : i + size])]
    assert list(map(wire.render_frame, got)) == list(map(wire.render_frame, sent))


class Files(wire.Passing):
    name: str


@asynccontextmanager
async def passing_pair(methods: wire.Methods) -> AsyncIterator[tuple[wire.Peer, wire.PassingStream]]:
    """A peer that sends descriptors, and the stream of one that serves `methods`."""
    ours, theirs = socket.socketpair()
    near, far = wire.PassingStream(ours, only_sends=True), wire.PassingStream(theirs)

    async def serve(task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        async with wire.open_peer(far, methods, name="server") as peer:
            await peer.wait_closed()

    async with trio.open_nursery() as nursery:
        await nursery.start(serve)
        async with wire.open_peer(near, {}, name="client") as peer:
            yield peer, far


def test_descriptors_go_with_their_requests() -> None:
    async def read(params: Files, _report: wire.Report) -> Piece:
        (fd,) = params.fds
        try:
            await trio.lowlevel.checkpoint()
            return Piece(f"{params.name} {os.pread(fd, 100, 0).decode()}".encode())
        finally:
            os.close(fd)

    async def body() -> None:
        async with passing_pair({"Read": (Files, read), "Double": (Number, double)}) as (peer, _):
            before = len(os.listdir("/proc/self/fd"))

            async def ask(number: int) -> None:
                with tempfile.TemporaryFile() as file:
                    file.write(str(number).encode() * 10)
                    file.flush()
                    found = await peer.call("Read", Files(name=f"{number}"), Piece, fds=[file.fileno()])
                    assert found.data == f"{number} {str(number) * 10}".encode()
                    assert (await peer.call("Double", Number(number), Number)).value == 2 * number

            async with trio.open_nursery() as nursery:
                for number in range(50):
                    nursery.start_soon(ask, number)
            assert len(os.listdir("/proc/self/fd")) == before

    run(body)


def test_descriptors_that_nobody_takes_are_closed() -> None:
    async def refuse(_params: Number, _report: wire.Report) -> Number:
        raise NotFoundError("nothing")

    async def body() -> None:
        before = len(os.listdir("/proc/self/fd"))
        async with passing_pair({"Refuse": (Number, refuse)}) as (peer, far):
            with tempfile.TemporaryFile() as file:
                with pytest.raises(NotFoundError):
                    await peer.call("Refuse", Number(1), Number, fds=[file.fileno()])
                with pytest.raises(UnsupportedError):
                    await peer.call("Unknown", Files(name=""), Number, fds=[file.fileno(), file.fileno()])
            assert far.take(5) == []
        assert len(os.listdir("/proc/self/fd")) == before

    run(body)


def test_who_only_sends_descriptors_gets_none() -> None:
    async def body() -> None:
        ours, theirs = socket.socketpair()
        async with wire.PassingStream(ours, only_sends=True) as near, wire.PassingStream(theirs) as far:
            before = len(os.listdir("/proc/self/fd"))
            await far.send_with(b"x", [0, 0])
            assert await near.receive_some() == b"x"
            assert near.take(2) == []
            assert len(os.listdir("/proc/self/fd")) == before

    run(body)


def test_a_request_whose_descriptors_did_not_come_breaks_the_protocol(caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        ours, theirs = socket.socketpair()
        near = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        await near.send_all(wire.render_frame(wire.Hello(wire.VERSION, wire.OLDEST, "client")))
        await near.send_all(wire.render_frame(wire.Request(1, "Read", Raw(b"\xc0"), 0, 3)))
        async with near, wire.open_peer(wire.PassingStream(theirs), {}, name="server") as peer:
            await peer.wait_closed()

    with caplog.at_level(logging.ERROR):
        run(body)
    assert "descriptors that did not come" in caplog.text


def test_who_asks_too_much_at_a_time_is_not_served_any_more() -> None:
    async def hang(_params: Struct, _report: object) -> Struct:
        await trio.sleep_forever()
        raise AssertionError

    async def body() -> None:
        ours, theirs = trio.testing.memory_stream_pair()
        async with trio.open_nursery() as nursery:

            async def serve() -> None:
                async with wire.open_peer(ours, {"Hang": (Number, hang)}, name="server", most=3) as peer:
                    await peer.wait_closed()

            nursery.start_soon(serve)
            async with wire.open_peer(theirs, {}, name="client") as peer:
                for _ in range(3):
                    nursery.start_soon(ask, peer)
                await trio.testing.wait_all_tasks_blocked()
                assert not peer.is_closed
                await ask(peer)
                assert peer.is_closed
            nursery.cancel_scope.cancel()

    async def ask(peer: wire.Peer) -> None:
        with suppress(UnreachableError):
            await peer.call("Hang", Number(1), Number)

    run(body)
