"""Which daemon a command asks, and private daemons started by several commands at once."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from nsfs.cli import locate
from nsfs.errors import DeniedError, UnreachableError
from nsfs.serve.config import Config, parse_config

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_LISTEN = """
import os, socket, sys, time
path, started = sys.argv[1:]
open(f"{started}/{os.getpid()}", "w").close()
print("starting", flush=True)
time.sleep(0.1)
listener = socket.socket(socket.AF_UNIX)
listener.bind(path)
listener.listen(64)
listener.settimeout(20)
while os.path.isdir(started):
    listener.accept()[0].close()
"""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return parse_config(f"root = '{tmp_path}/root'\nrun = '{tmp_path}/run'")


@contextmanager
def listening(path: str) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(8)
        yield


def _command(config: Config, started: Path) -> tuple[str, ...]:
    return (sys.executable, "-c", _LISTEN, config.socket, str(started))


def _ensure(config: Config, log: str, command: tuple[str, ...]) -> None:
    locate.ensure_private(config, log, os.getuid(), command)


def test_one_daemon_is_started_however_many_ask(config: Config, tmp_path: Path) -> None:
    started = tmp_path / "started"
    started.mkdir()
    log = str(tmp_path / "state/daemon.log")
    arguments = (config, log, _command(config, started))
    context = multiprocessing.get_context("spawn")
    askers = [context.Process(target=_ensure, args=arguments) for _ in range(4)]
    try:
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join(60)
        assert [asker.exitcode for asker in askers] == [0] * 4
        assert len(list(started.iterdir())) == 1
        _ensure(config, log, (sys.executable, "-c", "raise SystemExit(1)"))
    finally:
        pids = [int(path.name) for path in started.iterdir()]
        for path in started.iterdir():
            path.unlink()
        started.rmdir()
        for pid in pids:
            os.kill(pid, 9)
    assert (tmp_path / "state/daemon.log").read_text() == "starting\n"
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700


def test_a_daemon_that_fails_shows_its_log(config: Config, tmp_path: Path) -> None:
    log = str(tmp_path / "daemon.log")
    code = "import sys; print(*range(9), sep='\\n'); sys.exit('no such disk')"
    with pytest.raises(UnreachableError) as caught:
        _ensure(config, log, (sys.executable, "-c", code))
    head, *lines = caught.value.message.splitlines()
    assert head == "the private daemon ended at its start:"
    assert len(lines) == 5
    assert "no such disk" in caught.value.message
    assert log in (caught.value.hint or "")


def test_a_daemon_that_never_listens_is_ended(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locate, "_DEADLINE", 2)
    with pytest.raises(UnreachableError, match="does not answer"):
        _ensure(config, str(tmp_path / "log"), ("sh", "-c", f"echo $$ > {tmp_path}/pid; exec sleep 60"))
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_run_directory_of_others_is_refused(tmp_path: Path) -> None:
    locate.make_private_directory(str(tmp_path / "run"), os.getuid())
    locate.make_private_directory(str(tmp_path / "run"), os.getuid())
    with pytest.raises(DeniedError, match="not a directory of yours alone"):
        locate.make_private_directory(str(tmp_path / "run"), os.getuid() + 1)
    (tmp_path / "run").chmod(0o755)
    with pytest.raises(DeniedError):
        locate.make_private_directory(str(tmp_path / "run"), os.getuid())
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "target").mkdir(0o700)
    with pytest.raises(DeniedError):
        locate.make_private_directory(str(tmp_path / "link"), os.getuid())
    with pytest.raises(DeniedError, match="no place"):
        locate.make_private_directory(str(tmp_path / "not/there"), os.getuid())


class TestWhichDaemon:
    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        found: list[str] = []

        @contextmanager
        def open_control(path: str) -> Iterator[str]:
            found.append(path)
            yield path

        monkeypatch.setattr(locate, "open_control", open_control)
        monkeypatch.setattr(locate, "ensure_private", lambda *_: None)
        return found

    def test_root_asks_the_system_where_it_answers(
        self, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(locate, "SYSTEM_SOCKET", str(tmp_path / "system"))
        environ = {"HOME": "/h", "XDG_RUNTIME_DIR": "/r"}
        with locate.open_daemon(None, environ, 0):
            pass
        with listening(str(tmp_path / "system")):
            for uid in (0, 1000):
                with locate.open_daemon(None, environ, uid):
                    pass
            with locate.open_daemon("/mine", environ, 0):
                pass
        assert asked == ["/r/nsfs/nsfs.sock", str(tmp_path / "system"), "/r/nsfs/nsfs.sock", "/mine"]

    def test_a_private_daemon_that_ends_meanwhile_is_started_again(
        self, asked: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:

        @contextmanager
        def gone_once(path: str) -> Iterator[str]:
            if not asked:
                asked.append("gone")
                raise UnreachableError("gone")
            asked.append(path)
            yield path

        monkeypatch.setattr(locate, "open_control", gone_once)
        with locate.open_daemon(None, {"HOME": "/h", "XDG_RUNTIME_DIR": "/r"}, 1000):
            pass
        assert asked == ["gone", "/r/nsfs/nsfs.sock"]


def test_probing_hangs_up(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        seen: list[bytes] = []

        def accept() -> None:
            with listener.accept()[0] as connection:
                seen.append(connection.recv(1))

        thread = threading.Thread(target=accept)
        thread.start()
        assert locate.answers(path)
        thread.join(60)
    assert seen == [b""]
    assert not locate.answers(path)
    assert not locate.answers("/" + "x" * 200)
