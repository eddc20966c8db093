"""The fork server: what children inherit, how they end, and what happens when anybody dies."""

import os
import select
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable

import msgspec
import pytest
import trio
from msgspec import Struct

from nsfs.core.tasks import open_tasks
from nsfs.errors import DeniedError, UnreachableError
from nsfs.serve.forkclient import ForkServer, ServerProcess, launch_server, open_fork_server
from nsfs.serve.forking import MAX_MESSAGE
from nsfs.serve.joblending import ENTRY, JobServerArgs

ME = "test_forkserver_entries"


class Text(Struct):
    text: str


@pytest.fixture(scope="module", autouse=True)
def entries(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Entry points live in a module of their own, as they do in the daemon."""
    folder = tmp_path_factory.mktemp("entries")
    (folder / f"{ME}.py").write_text(ENTRIES)
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)


ENTRIES = """
import os, signal, sys, time
import msgspec
from nsfs.errors import DeniedError

warmed = []

def warm_up():
    warmed.append(os.getpid())

def count_warmed(args, fds):
    return len(warmed) if os.getpid() not in warmed else 100

def nothing(args, fds):
    pass

def seven(args, fds):
    return 7

def denied(args, fds):
    raise DeniedError("not for you")

def bug(args, fds):
    raise RuntimeError("a bug")

def sleep(args, fds):
    time.sleep(60)

def shout(args, fds):
    os.write(fds[0], msgspec.msgpack.encode({
        "args": msgspec.msgpack.decode(args)["text"],
        "fds": sorted(int(name) for name in os.listdir("/proc/self/fd"))[:-1],
        "given": fds,
        "mask": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
        "interrupt": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
        "leader": os.getsid(0) == os.getpid(),
        "stdin": os.readlink("/proc/self/fd/0"),
        "second": os.read(fds[1], 5),
    }))
"""


def with_server(
    body: Callable[[ForkServer], Awaitable[None]],
    process: ServerProcess | None = None,
    relaunch: Callable[[], ServerProcess] | None = None,
) -> None:
    async def limited() -> None:
        with trio.fail_after(60):
            async with open_fork_server(process or launch_server([ME]), relaunch) as server:
                await body(server)

    trio.run(limited)


def test_exit_statuses() -> None:
    async def body(server: ForkServer) -> None:
        assert await server.run(f"{ME}:nothing", None) == 0
        assert await server.run(f"{ME}:seven", None) == 7
        assert await server.run(f"{ME}:denied", None) == DeniedError.exit_code
        assert await server.run(f"{ME}:bug", None) == 1
        assert await server.run("no.such:thing", None) == 1

    with_server(body)


def test_what_a_server_did_first_its_children_find_done() -> None:
    async def body(server: ForkServer) -> None:
        assert await server.run(f"{ME}:count_warmed", None) == 1
        assert await server.run(f"{ME}:count_warmed", None) == 1

    with_server(body, launch_server([f"{ME}:warm_up"]))


def test_a_child_gets_its_arguments_and_descriptors_and_nothing_else() -> None:
    async def body(server: ForkServer) -> None:
        out_read, out_write = os.pipe()
        in_read, in_write = os.pipe()
        os.write(in_write, b"hello")
        child = await server.spawn(f"{ME}:shout", Text("words"), [out_write, in_read], session=True)
        assert await child.wait() == 0
        child.close()
        told = msgspec.msgpack.decode(os.read(out_read, 65536))
        for fd in (out_read, out_write, in_read, in_write):
            os.close(fd)
        assert told["args"] == "words"
        assert told["second"] == b"hello"
        assert told["fds"] == sorted([0, 1, 2, *told["given"]])
        assert told["mask"] == []
        assert told["interrupt"]
        assert told["leader"]
        assert told["stdin"] == "/dev/null"

    with_server(body)


def test_children_can_be_killed_and_are_reaped() -> None:
    async def body(server: ForkServer) -> None:
        child = await server.spawn(f"{ME}:sleep", None)
        child.kill()
        assert await child.wait() == -signal.SIGKILL
        with pytest.raises(ProcessLookupError):
            os.kill(child.pid, 0)
        child.kill()
        child.close()

    with_server(body)


def test_a_cancelled_job_is_killed() -> None:
    async def body(server: ForkServer) -> None:
        with trio.move_on_after(0.1):
            await server.run(f"{ME}:sleep", None)
        assert server.children == 0
        with trio.CancelScope() as scope:
            scope.cancel()
            await server.spawn(f"{ME}:sleep", None)
        assert await server.run(f"{ME}:nothing", None) == 0
        while server.children:  # noqa: ASYNC110 - the server offers no event for it
            await trio.sleep(0.01)

    with_server(body)


def test_tied_children_die_with_the_server_and_others_do_not() -> None:
    async def body(server: ForkServer) -> None:
        tied = await server.spawn(f"{ME}:sleep", None, tied=True)
        free = await server.spawn(f"{ME}:sleep", None, tied=False)
        os.kill(process.pid, signal.SIGKILL)
        for child in (tied, free):
            with pytest.raises(UnreachableError):
                await child.wait()
        with pytest.raises(UnreachableError):
            await server.spawn(f"{ME}:nothing", None)
        assert select.select([tied.pidfd], [], [], 5)[0]
        assert not select.select([free.pidfd], [], [], 0.05)[0]
        free.kill()
        tied.close()
        free.close()

    process = launch_server([ME])
    with_server(body, process)


def test_a_server_that_died_is_followed_by_another(caplog: pytest.LogCaptureFixture) -> None:
    launched: list[ServerProcess] = []

    def launch() -> ServerProcess:
        launched.append(launch_server([ME]))
        return launched[-1]

    async def body(server: ForkServer) -> None:
        for _ in range(2):
            child = await server.spawn(f"{ME}:sleep", None)
            os.kill(launched[-1].pid, signal.SIGKILL)
            with pytest.raises(UnreachableError):
                await child.wait()
            with pytest.raises(UnreachableError):
                await server.run(f"{ME}:nothing", None)
            assert select.select([child.pidfd], [], [], 5)[0]
            child.close()
            assert await until_answered(server) == 7

    with_server(body, launch(), launch)
    assert len(launched) == 3
    assert caplog.text.count("another one follows") == 2
    for process in launched:
        with pytest.raises(ProcessLookupError):
            os.kill(process.pid, 0)


async def until_answered(server: ForkServer) -> int:
    while True:
        try:
            return await server.run(f"{ME}:seven", None)
        except UnreachableError:
            await trio.sleep(0.02)


def test_a_child_can_be_a_server_and_ends_with_its_client() -> None:
    async def body(server: ForkServer) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            child = await server.spawn(ENTRY, JobServerArgs(log_format="text", log_level="info"), [theirs.fileno()])
        below = ForkServer(is_apart=True)
        async with open_tasks() as tasks:
            with trio.socket.from_stdlib_socket(ours) as sock:
                await tasks.start(below.talk, sock)
                assert await below.run(f"{ME}:seven", None) == 7
                killed = await below.spawn(f"{ME}:sleep", None)
                killed.kill()
                assert await killed.wait() == -signal.SIGKILL
                killed.kill()
                killed.close()
                job = await below.spawn(f"{ME}:sleep", None)
            assert await child.wait() == 0
            await job.wait_gone()
        assert not below.is_alive
        child.close()
        job.close()

    with_server(body)


def children_of(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        return [int(child) for child in file.read().split()]


async def spare_of(process: ServerProcess) -> int:
    """The child that waits for its request, once there is one."""
    while not (found := children_of(process.pid)):  # noqa: ASYNC110 - the server tells nobody of it
        await trio.sleep(0.01)
    return found[0]


def test_a_spare_is_the_next_child_and_another_follows() -> None:
    process = launch_server([ME])

    async def body(server: ForkServer) -> None:
        assert await server.run(f"{ME}:nothing", None) == 0  # what it starts on its way up is over
        spare = await spare_of(process)
        child = await server.spawn(f"{ME}:seven", None)
        assert child.pid == spare
        assert await child.wait() == 7
        child.close()
        assert await spare_of(process) != spare

    with_server(body, process)
    assert not os.path.exists(f"/proc/{process.pid}")


def test_a_spare_that_is_killed_is_missed_by_nobody_and_none_outlives_its_server() -> None:
    process, spares = launch_server([ME]), []

    async def body(server: ForkServer) -> None:
        assert await server.run(f"{ME}:nothing", None) == 0
        for _ in range(3):
            spares.append(await spare_of(process))
            os.kill(spares[-1], signal.SIGKILL)
            while spares[-1] in children_of(process.pid):  # noqa: ASYNC110
                await trio.sleep(0.01)
            assert await server.run(f"{ME}:seven", None) == 7
        spares.append(await spare_of(process))

    with_server(body, process)
    deadline = time.monotonic() + 30
    while any(os.path.exists(f"/proc/{pid}") for pid in spares):
        assert time.monotonic() < deadline, "a spare is left"
        time.sleep(0.01)


def test_requests_that_are_too_large_are_refused() -> None:
    async def body(server: ForkServer) -> None:
        with pytest.raises(ValueError, match="too large"):
            await server.spawn(f"{ME}:nothing", Text("x" * MAX_MESSAGE))
        assert await server.run(f"{ME}:nothing", Text("x" * (MAX_MESSAGE - 200))) == 0

    with_server(body)


def test_a_child_starts_within_milliseconds() -> None:
    async def body(server: ForkServer) -> None:
        await server.run(f"{ME}:nothing", None)
        times = []
        for _ in range(20):
            begin = time.perf_counter()
            assert await server.run(f"{ME}:nothing", None) == 0
            times.append(time.perf_counter() - begin)
        print(f"median {sorted(times)[10] * 1e3:.1f} ms")
        assert sorted(times)[10] < 0.1

    with_server(body)
