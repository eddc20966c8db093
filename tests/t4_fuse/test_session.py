"""The session: one connection, many processes that serve it one after the other, and readers who never notice."""

import errno
import json
import os
import random
import select
import struct
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import pytest
import trio

import mounting
from mounting import arena, make_directory
from nsfs.serve import mounts, session
from nsfs.serve.forkclient import Child, ForkServer, ServerProcess, launch_server, open_fork_server
from users import wait_until
from workers import MAP_BYTES, VIEW, WorkerArgs

__all__ = ["arena"]
SIZE = 16 << 20
TESTS = str(Path(__file__).parent.parent)


@pytest.fixture(scope="module")
def launched() -> Callable[[], ServerProcess]:
    def launch() -> ServerProcess:
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [TESTS, *sys.path]))
        try:
            return launch_server(["workers"])
        finally:
            if before is None:
                del os.environ["PYTHONPATH"]
            else:
                os.environ["PYTHONPATH"] = before

    return launch


class Stage:
    """A mounted connection, and the workers that serve it in turn."""

    def __init__(self, server: ForkServer, top: Path) -> None:
        self.server = server
        self.target = make_directory(top / "mnt")
        self.disk = str(self.target / "disks" / VIEW)
        self.content = random.Random(1).randbytes(SIZE)
        self.backing = os.open(top / "backing", os.O_RDWR | os.O_CREAT)
        os.write(self.backing, self.content)
        self.fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        self.greeting, self._greeted = os.pipe()
        mounts.mount_fuse(str(self.target), self.fuse)

    async def start(self, init: bytes = b"", delay: float = 0.0) -> Child:
        args = WorkerArgs(init=init, delay=delay)
        return await self.server.spawn("workers:serve", args, [self.fuse, self.backing, self._greeted])

    def counts(self) -> dict[str, int]:
        with (self.target / ".nsfs" / "counts.json").open("rb") as file:
            found: dict[str, int] = json.loads(file.read())
            return found

    def close(self) -> None:
        for fd in (self.backing, self.fuse, self.greeting, self._greeted):
            os.close(fd)


@asynccontextmanager
async def stage(launched: Callable[[], ServerProcess], top: Path) -> AsyncIterator[Stage]:
    async with open_fork_server(launched()) as server:
        opened = Stage(server, top)
        try:
            yield opened
        finally:
            mounts.unmount(str(opened.target), detach=True)
            opened.close()


def run(body: Callable[[], Awaitable[None]], seconds: float = 60) -> None:
    async def limited() -> None:
        with trio.fail_after(seconds):
            await body()

    trio.run(limited)


async def in_thread(function: Callable[[], object]) -> None:
    await trio.to_thread.run_sync(function, abandon_on_cancel=True)


@contextmanager
def opened(path: str, flags: int = 0) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | flags)
    try:
        yield fd
    finally:
        os.close(fd)


def test_a_fresh_session_serves_and_gives_the_init_away(launched: Callable[[], ServerProcess], arena: Path) -> None:
    async def body() -> None:
        async with stage(launched, arena) as on:
            worker = await on.start()

            def look() -> None:
                assert (on.target / "maps" / VIEW).read_bytes() == MAP_BYTES
                with opened(on.disk) as fd:
                    assert os.pread(fd, 100_000, 4097) == on.content[4097:104_097]
                    assert os.pread(fd, 10, (16 << 40) - 4096 - 5) == bytes(5)
                with pytest.raises(FileNotFoundError):
                    os.stat(on.target / "disks" / "other")
                with pytest.raises(OSError, match="Read-only"):
                    os.open(on.disk, os.O_RDWR)

            await in_thread(look)
            init = os.read(on.greeting, 4096)
            assert struct.unpack_from("<II", init)[1] == 26
            mounts.unmount(str(on.target))
            assert await worker.wait() == 0
            worker.close()

    run(body)


def test_readers_do_not_notice_that_workers_are_killed(launched: Callable[[], ServerProcess], arena: Path) -> None:
    kills, longest, reads = 12, 0.0, 0

    def check(on: Stage, until: Callable[[], bool]) -> None:
        nonlocal longest, reads
        while not until():
            offset, begin = random.randrange(SIZE >> 12) << 12, time.monotonic()
            with opened(on.disk) as fd:
                got = os.pread(fd, 65536, offset)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            wanted = on.content[offset : offset + 65536]
            assert got == wanted + bytes(65536 - len(wanted))
            longest = max(longest, time.monotonic() - begin)
            reads += 1

    def more_reads() -> Callable[[], bool]:
        enough = reads + 5
        return lambda: reads >= enough

    async def body() -> None:
        async with stage(launched, arena) as on:
            init = await session.read_init(on.fuse)
            done = False
            async with trio.open_nursery() as nursery:
                worker = await on.start(init, delay=0.002)
                for _ in range(3):
                    nursery.start_soon(in_thread, lambda: check(on, lambda: done))
                for _ in range(kills):
                    await in_thread(lambda: wait_until(more_reads(), "readers get on"))
                    await trio.sleep(random.uniform(0, 0.05))
                    worker.kill()
                    await worker.wait()
                    worker.close()
                    worker = await on.start(init, delay=0.002)
                done = True
            worker.close()

    run(body)
    print(f"{kills} kills, {reads} reads, longest {longest:.3f} s")


def test_a_worker_that_died_before_it_greeted_loses_nothing(launched: Callable[[], ServerProcess], arena: Path) -> None:
    async def body() -> None:
        async with stage(launched, arena) as on:
            init = await session.read_init(on.fuse)
            first = await on.start(init)
            first.kill()
            await first.wait()
            first.close()
            second = await on.start(init)
            await in_thread(lambda: os.stat(on.disk))
            second.close()

    run(body)


def steal_requests(fuse: int, until: float) -> int:
    """Take requests away between a worker's poll and its read, as a caller does that is killed then."""
    stolen = 0
    while time.monotonic() < until:
        if not select.select([fuse], [], [], 0.1)[0]:
            continue
        with suppress(BlockingIOError):
            request = os.read(fuse, 1 << 21)
            _, opcode, unique = struct.unpack_from("<IIQ", request)
            if opcode not in (2, 42):  # FORGET and BATCH_FORGET want no answer
                os.write(fuse, struct.pack("<IiQ", 16, -errno.EINTR, unique))
            stolen += 1
    return stolen


def read_whatever_comes(path: str, until: float) -> None:
    while time.monotonic() < until:
        with suppress(OSError), opened(path, os.O_DIRECT) as fd:
            os.pread(fd, 4096, 0)


def test_requests_that_vanish_before_they_are_read_do_not_end_the_loop(
    launched: Callable[[], ServerProcess], arena: Path
) -> None:
    async def body() -> None:
        async with stage(launched, arena) as on:
            worker = await on.start(await session.read_init(on.fuse))
            await in_thread(lambda: os.stat(on.disk))
            until = time.monotonic() + 0.7
            async with trio.open_nursery() as nursery:
                for _ in range(2):
                    nursery.start_soon(in_thread, lambda: read_whatever_comes(on.disk, until))
                assert await trio.to_thread.run_sync(steal_requests, on.fuse, until, abandon_on_cancel=True) > 10
            assert (await trio.to_thread.run_sync(on.counts))["pid"] == worker.pid
            worker.close()

    run(body)


def test_limits_reach_the_kernel(launched: Callable[[], ServerProcess], arena: Path) -> None:
    async def body() -> None:
        async with stage(launched, arena) as on:
            mount = mounts.find_mount(str(on.target))
            mounts.set_read_ahead(mount.device, 4096)
            worker = await on.start()

            def look() -> None:
                os.stat(on.disk)
                with mounting.control_of(mount.connection) as folder:
                    assert (folder / "max_background").read_text() == "4096\n"
                    assert (folder / "congestion_threshold").read_text() == "3072\n"
                with opened(on.disk) as fd:
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
                    for offset in range(0, SIZE, 1 << 20):
                        os.pread(fd, 1 << 20, offset)
                assert on.counts()["largest"] == 1 << 20

            await in_thread(look)
            worker.close()

    run(body)


def test_closing_files_asks_nobody(launched: Callable[[], ServerProcess], arena: Path) -> None:
    async def body() -> None:
        async with stage(launched, arena) as on:
            worker = await on.start()

            def look() -> None:
                for _ in range(20):
                    with opened(on.disk):
                        pass
                assert on.counts()["flush"] == 1

            await in_thread(look)
            worker.close()

    run(body)


def test_a_bug_is_eio_for_one_request(
    launched: Callable[[], ServerProcess], arena: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async def body() -> None:
        async with stage(launched, arena) as on:
            worker = await on.start()

            def look() -> None:
                with opened(on.disk, os.O_DIRECT) as fd:
                    with pytest.raises(OSError, match="Input/output error"):
                        os.pread(fd, 4096, 13 << 30)
                    assert os.pread(fd, 4096, 0) == on.content[:4096]

            await in_thread(look)
            worker.close()

    run(body)
    capfd.readouterr()


def test_an_aborted_connection_ends_its_session(launched: Callable[[], ServerProcess], arena: Path) -> None:
    async def body() -> None:
        async with stage(launched, arena) as on:
            init = await session.read_init(on.fuse)
            worker = await on.start(init)
            await in_thread(lambda: os.stat(on.disk))
            mounting.abort_connection(mounts.find_mount(str(on.target)).connection)
            assert await worker.wait() == 0
            late = await on.start(init)
            assert await late.wait() == 0
            for child in (worker, late):
                child.close()

    run(body)


def test_an_answer_to_init_gets_our_limits() -> None:
    request = struct.pack("<IIQQIIIHH", 104, 26, 2, 0, 0, 0, 1, 0, 0) + struct.pack("<IIII", 7, 45, 131072, 0x800000)
    fields = (80, 0, 2, 7, 38, 131072, 0x10, 0, 0, 1 << 20, 1, 256, 0, 0, 0)
    reply = session._INIT_REPLY.pack(*fields) + bytes(16)
    patched = session.plan_reply(reply, request, session.Limits(max_background=7, congestion_threshold=5))
    assert patched[-16:] == bytes(16)
    assert session._INIT_REPLY.unpack_from(patched) == (*fields[:5], 0xFFFFFFFF, 0x800010, 7, 5, *fields[9:])
    error = struct.pack("<IiQ", 16, -errno.EPROTO, 2)
    assert session.plan_reply(error, request, session.Limits()) == error
