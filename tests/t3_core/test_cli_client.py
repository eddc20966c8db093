"""The client against the real control server, over a real socket."""

from __future__ import annotations

import os
import socket
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import trio

from nsfs.errors import ERRORS, DeniedError, NsfsError, UnreachableError, UnsupportedError, UsageError
from nsfs.model.report import Data, Note, Progress
from nsfs.serve import api
from nsfs.serve.client import open_control, probe
from nsfs.serve.control_rpc import control_service
from nsfs.serve.entrance import listening
from nsfs.serve.rpc import serve_rpc

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

VERSION = api.VersionReport(version="1", api=api.VERSION, pid=1, private=False)


async def _version(_request: api.Empty, _report: Any) -> api.VersionReport:
    return VERSION


async def _at_once(_entrance: object) -> float:
    return 0.0


@contextmanager
def serving(path: str, **handlers: Any) -> Iterator[None]:
    """Serve in a thread until the block ends."""
    ready = threading.Event()
    scopes: list[tuple[trio.lowlevel.TrioToken, trio.CancelScope]] = []

    async def main() -> None:
        with trio.CancelScope() as scope:
            scopes.append((trio.lowlevel.current_trio_token(), scope))
            async with serve_rpc(listening(path), [control_service({"Version": _version} | handlers)], _at_once):
                ready.set()
                await trio.sleep_forever()

    thread = threading.Thread(target=trio.run, args=(main,))
    thread.start()
    try:
        assert ready.wait(60)
        yield
    finally:
        token, scope = scopes[0]
        token.run_sync_soon(scope.cancel)
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "s")


def test_events_and_a_result(path: str) -> None:
    events = [Progress(stage="index", what="x", done=1, total=2), Note(text="n"), Data(b"\xff" * 100_000)]

    async def read(request: api.PathRequest, report: Any) -> api.Empty:
        assert request.path == b"/\xff"
        for event in events:
            await report(event)
        return api.Empty()

    heard: list[object] = []
    with serving(path, Read=read), open_control(path) as control:
        assert control.version == VERSION
        request = api.PathRequest(reference="a", path=b"/\xff")
        assert control.call("Read", request, api.Empty, heard.append) == api.Empty()
    assert heard == events


@pytest.mark.parametrize("error", [cls("äh: x", hint="h") for cls in ERRORS.values()], ids=list(ERRORS))
def test_an_error_crosses_whole(path: str, error: NsfsError) -> None:
    async def status(_request: api.Empty, _report: Any) -> api.StatusReport:
        raise error

    with serving(path, Status=status), open_control(path) as control:
        with pytest.raises(NsfsError) as caught:
            control.call("Status", api.Empty(), api.StatusReport)
        assert type(caught.value) is type(error)
        assert (caught.value.message, caught.value.hint) == ("äh: x", "h")


def test_a_long_message_crosses(path: str) -> None:
    async def status(_request: api.Empty, _report: Any) -> api.StatusReport:
        raise UsageError("é" * 2000)

    with serving(path, Status=status), open_control(path) as control, pytest.raises(UsageError, match="éé"):
        control.call("Status", api.Empty(), api.StatusReport)


def test_whoever_stops_listening_cancels_the_call(path: str) -> None:
    cancelled = threading.Event()

    async def read(_request: api.PathRequest, report: Any) -> api.Empty:
        try:
            await report(Note(text="n"))
            await trio.sleep_forever()
        finally:
            cancelled.set()
        return api.Empty()

    def interrupt(_event: object) -> None:
        raise KeyboardInterrupt

    with serving(path, Read=read), open_control(path) as control:
        with pytest.raises(KeyboardInterrupt):
            control.call("Read", api.PathRequest(reference="a", path=b"/"), api.Empty, interrupt)
        assert cancelled.wait(60)


def test_a_daemon_of_another_version(path: str) -> None:
    async def version(_request: api.Empty, _report: Any) -> api.VersionReport:
        return api.VersionReport(version="9", api=api.VERSION + 2, pid=1, private=False)

    with serving(path, Version=version), pytest.raises(UnsupportedError, match="version"), open_control(path):
        pass


def test_a_call_the_daemon_does_not_know(path: str) -> None:
    with serving(path), open_control(path) as control, pytest.raises(UnsupportedError, match="Evict"):
        control.call("Evict", api.ImageRequest(reference="a"), api.EvictReport)


def test_nobody_there(path: str) -> None:
    with pytest.raises(UnreachableError, match="no daemon answers"), open_control(path):
        pass
    with pytest.raises(UsageError, match="107"):
        probe("/" + "x" * 107)


def test_a_socket_of_somebody_else(path: str) -> None:
    with serving(path):
        child = os.fork()
        if child == 0:
            os.setresuid(65534, 65534, 65534)
            try:
                probe(path)
            except DeniedError:
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0


def test_a_daemon_that_goes_away_in_the_middle(path: str) -> None:
    async def status(_request: api.Empty, _report: Any) -> api.StatusReport:
        await trio.sleep_forever()
        raise AssertionError

    def ask() -> None:
        with open_control(path) as control:
            control.call("Status", api.Empty(), api.StatusReport)

    failures: list[BaseException] = []

    def asker() -> None:
        try:
            ask()
        except UnreachableError as error:
            failures.append(error)

    with serving(path, Status=status):
        thread = threading.Thread(target=asker)
        thread.start()
        thread.join(0.3)
    thread.join(60)
    assert len(failures) == 1


def test_where_somebody_listened_and_no_daemon_came_it_is_as_where_none_is(path: str) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    gone = threading.Timer(0.5, listener.close)
    gone.start()
    try:
        with pytest.raises(UnreachableError, match="no daemon answers"), open_control(path):
            pass
    finally:
        gone.join()
