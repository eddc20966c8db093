"""Jobs: what a process and its worker tell each other, and that none is left behind."""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import msgspec
import pytest
import trio
from msgspec import Raw, Struct

from nsfs.core import jobs
from nsfs.errors import CorruptError, NsfsError, UnreachableError
from nsfs.serve.forkclient import ForkServer, ServerProcess, open_fork_server
from nsfs.serve.forkserver import serve
from trio_tests import run


class Args(Struct):
    number: int


class Answer(Struct):
    number: int


class FakeProcess:
    """A child that does `work` with its end of the channel when it is spawned, and lives until then or until killed."""

    def __init__(self) -> None:
        self.ended = trio.Event()
        self.status = 0
        self.kills = self.waits = self.closes = 0
        self.dies = True

    async def wait(self) -> int:
        self.waits += 1
        await self.ended.wait()
        return self.status

    def kill(self) -> None:
        self.kills += 1
        if self.dies:
            self.ended.set()

    def close(self) -> None:
        self.closes += 1


class FakeSpawner:
    """Starts fake processes; `talk` is what each does first."""

    def __init__(self, talk: Callable[[socket.socket, FakeProcess], None]) -> None:
        self.talk = talk
        self.processes: list[FakeProcess] = []

    async def spawn(self, entry: str, args: Struct | None, fds: Sequence[int] = ()) -> FakeProcess:
        await trio.lowlevel.checkpoint()
        process = FakeProcess()
        self.processes.append(process)
        with socket.socket(fileno=os.dup(fds[0])) as channel:
            self.talk(channel, process)
        return process

    async def make_ready(self) -> None:
        await trio.lowlevel.checkpoint()


def say(channel: socket.socket, *messages: Struct) -> None:
    for message in messages:
        channel.send(msgspec.msgpack.encode(message))


def done(number: int) -> jobs.JobDone:
    return jobs.JobDone(Raw(msgspec.msgpack.encode(Answer(number))))


@contextmanager
def no_descriptor_is_left() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


def test_progress_comes_before_the_result() -> None:
    def talk(channel: socket.socket, process: FakeProcess) -> None:
        say(channel, jobs.JobProgress(1), jobs.JobProgress(2), done(7))
        process.ended.set()

    heard: list[int] = []

    async def hear(number: int) -> None:
        heard.append(number)

    async def body() -> None:
        spawner = FakeSpawner(talk)
        with no_descriptor_is_left():
            answer = await jobs.Jobs(spawner, 1, 1).run("m:f", Args(1), [], Answer, hear)
        assert (answer, heard) == (Answer(7), [1, 2])
        assert [(each.kills, each.closes) for each in spawner.processes] == [(0, 1)]

    run(body)


def test_a_job_that_dies_without_a_word_is_an_error() -> None:
    def talk(_channel: socket.socket, process: FakeProcess) -> None:
        process.status = -9
        process.ended.set()

    async def body() -> None:
        with no_descriptor_is_left(), pytest.raises(NsfsError, match=r"a job .*9"):
            await jobs.Jobs(FakeSpawner(talk), 1, 1).run("m:f", Args(1), [], Answer)

    run(body)


def test_a_cancelled_job_is_killed_and_its_end_waited_for() -> None:
    async def body() -> None:
        held: list[socket.socket] = []
        spawner = FakeSpawner(lambda channel, _: held.append(channel.dup()))
        with trio.move_on_after(1):
            await jobs.Jobs(spawner, 1, 1).run("m:f", Args(1), [], Answer)
        (process,) = spawner.processes
        assert (process.kills, process.waits, process.closes) == (1, 1, 1)
        held[0].close()

    run(body)


def test_a_job_that_cannot_be_killed_is_not_waited_for_without_end() -> None:
    async def body() -> None:
        held: list[socket.socket] = []

        def talk(channel: socket.socket, process: FakeProcess) -> None:
            process.dies = False
            held.append(channel.dup())

        begun = trio.current_time()
        with trio.move_on_after(1):
            await jobs.Jobs(FakeSpawner(talk), 1, 1).run("m:f", Args(1), [], Answer)
        assert trio.current_time() - begun < 10
        held[0].close()

    run(body)


def test_where_no_process_starts_nothing_is_left() -> None:
    class Broken:
        async def spawn(self, entry: str, args: Struct | None, fds: Sequence[int] = ()) -> FakeProcess:
            raise UnreachableError("cannot start a process")

        async def make_ready(self) -> None:
            raise UnreachableError("there is nobody to start one")

    async def body() -> None:
        service = jobs.Jobs(Broken(), 1, 1)
        await service.make_ready()
        with no_descriptor_is_left(), pytest.raises(UnreachableError, match="cannot start a process"):
            await service.run("m:f", Args(1), [], Answer)

    run(body)


def test_jobs_that_wait_for_bytes_hold_up_nobody_who_works() -> None:
    async def body() -> None:
        held: list[socket.socket] = []

        def talk(channel: socket.socket, process: FakeProcess) -> None:
            if len(held) < 2:
                held.append(channel.dup())
            else:
                say(channel, done(1))
                process.ended.set()

        service = jobs.Jobs(FakeSpawner(talk), 1, 2)
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(lambda: service.run("m:f", Args(1), [], Answer, is_fed=True))
            await trio.testing.wait_all_tasks_blocked()
            assert await service.run("m:f", Args(1), [], Answer) == Answer(1)
            nursery.cancel_scope.cancel()
        for each in held:
            each.close()

    run(body)


def double(args: Args, _fds: Sequence[int], channel: jobs.Channel) -> Answer:
    channel.progress(1)
    if args.number < 0:
        raise CorruptError("negative", hint="be positive")
    return Answer(2 * args.number)


def entry(args: bytes, fds: list[int]) -> int:
    return jobs.run_job(Args, double, args, fds)


def forked_server() -> ServerProcess:
    """Of this process, which knows `entry`."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            serve(theirs)
        finally:
            os._exit(0)
    theirs.close()
    return ServerProcess(ours, pid)


class Forked:
    """Starts real ones."""

    def __init__(self, server: ForkServer) -> None:
        self.spawn = server.spawn

    async def make_ready(self) -> None:
        await trio.lowlevel.checkpoint()


def test_a_real_process_answers_and_raises() -> None:
    server = forked_server()

    async def body() -> None:
        async with open_fork_server(server) as spawner:
            service = jobs.Jobs(Forked(spawner), 1, 1)
            name = "t3_core.test_jobs:entry"
            assert await service.run(name, Args(4), [], Answer) == Answer(8)
            with pytest.raises(CorruptError, match="negative") as caught:
                await service.run(name, Args(-4), [], Answer)
            assert caught.value.hint == "be positive"

    run(body, threads=True)
