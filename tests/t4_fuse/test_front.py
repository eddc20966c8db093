"""The front: a user's mount that reads the pool by itself and has the worker fill it."""

import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from mounting import arena, make_directory
from nsfs.core import worker_api
from nsfs.errors import CorruptError
from nsfs.format.erofs import render_erofs
from nsfs.model.layer import Kind, Node
from nsfs.serve import mounts, wire
from nsfs.serve.forkclient import ForkServer, launch_server, open_fork_server
from nsfs.serve.fronts import FrontArgs
from nsfs.store.layout import Layout
from nsfs.store.pool import Pool, open_pool
from nsfs.store.poolfiles import create_bitmap

__all__ = ["arena"]
ADDRESS = 1 << 30
CONTENT = random.Random(2).randbytes(300_000)
PADDED = CONTENT + bytes(-len(CONTENT) % 4096)
VIEW = "0123456789abcdef" * 2


class FakeWorker:
    """Makes blocks present from `CONTENT`, or refuses."""

    def __init__(self, pool: Pool, path: Path) -> None:
        self.pool = pool
        self.path = path
        self.asked: list[worker_api.Fetch] = []
        self.broken = False

    async def fetch(self, params: worker_api.Fetch, _report: wire.Report) -> worker_api.Empty:
        self.asked.append(params)
        if self.broken:
            raise CorruptError("blob is not what its digest says")
        start = (params.address - ADDRESS) & ~4095
        end = (params.address - ADDRESS + params.size + 4095) & ~4095
        self.pool.write(ADDRESS + start, PADDED[start:end])
        return worker_api.Empty()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        async def serve(stream: trio.SocketStream) -> None:
            async with wire.open_peer(stream, {"Fetch": (worker_api.Fetch, self.fetch)}, name="worker") as peer:
                await peer.wait_closed()

        self.path.unlink(missing_ok=True)
        listener = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
        await listener.bind(str(self.path))
        listener.listen()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, serve, [trio.SocketListener(listener)])
            yield
            nursery.cancel_scope.cancel()


class Stage:
    """A pool, a map, a worker that nobody has started yet, and a mount with its front."""

    def __init__(self, top: Path) -> None:
        layout = Layout(str(top / "root"), str(top / "run")).domain("shared")
        os.makedirs(layout.path)
        self.domain = layout.path
        self.bitmap = create_bitmap(layout)
        self.pool = open_pool(layout, self.bitmap)
        self.worker = FakeWorker(self.pool, top / "worker.sock")
        self.map = top / "map.erofs"
        self.map.write_bytes(render_map())
        self.target = make_directory(top / "mnt")
        self.fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        mounts.mount_fuse(str(self.target), self.fuse)

    async def start(self, server: ForkServer, suffix: str = "") -> None:
        args = FrontArgs(
            domain=self.domain,
            worker=str(self.worker.path),
            maps=(str(self.map),),
            views=(VIEW + suffix,),
            info={"reference": "example.org/image:1"},
        )
        receive, send = os.pipe()
        async with trio.lowlevel.FdStream(receive) as line:
            (await server.spawn("nsfs.front:main", args, [self.fuse, self.bitmap, send])).close()
            os.close(send)
            assert await line.receive_some(1) == b"1"

    async def read(self, name: str = "file") -> bytes:
        return await trio.to_thread.run_sync((self.target / name).read_bytes, abandon_on_cancel=True)

    def close(self) -> None:
        mounts.unmount(str(self.target), detach=True)
        self.pool.close()
        for fd in (self.bitmap, self.fuse):
            os.close(fd)


def render_map() -> bytearray:
    file = Node(Kind.REGULAR, 0o644)
    file.address, file.size = ADDRESS, len(CONTENT)
    root = Node(Kind.DIRECTORY, 0o755)
    root.children = {b"file": file, b"empty": Node(Kind.REGULAR, 0o600)}
    return render_erofs(root, disk_blocks=(1 << 32) - 1, uuid=bytes(16))


@asynccontextmanager
async def stage(top: Path, suffix: str = "") -> AsyncIterator[Stage]:
    with trio.fail_after(30):
        async with open_fork_server(launch_server(["nsfs.front"])) as server:
            on = Stage(top)
            try:
                await on.start(server, suffix)
                yield on
            finally:
                on.close()


def test_what_is_there_is_read_without_a_worker(arena: Path) -> None:
    async def body() -> None:
        async with stage(arena) as on:
            on.pool.write(ADDRESS, PADDED)
            assert await on.read() == CONTENT
            assert await on.read("empty") == b""
            assert b"example.org/image:1" in await on.read(".nsfs/mount.json")

    trio.run(body)


def test_what_is_absent_is_asked_for_once_and_then_there(arena: Path) -> None:
    async def body() -> None:
        async with stage(arena) as on, on.worker.listening():
            assert await on.read() == CONTENT
            assert {asked.view for asked in on.worker.asked} == {VIEW}
            assert sum(asked.size for asked in on.worker.asked) <= len(PADDED)
            asked = len(on.worker.asked)
            await trio.to_thread.run_sync(drop_caches, on.target / "file")
            assert await on.read() == CONTENT
            assert len(on.worker.asked) == asked

    trio.run(body)


def drop_caches(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def test_a_worker_that_is_started_again_is_found_again(arena: Path) -> None:
    async def body() -> None:
        async with stage(arena) as on, trio.open_nursery() as nursery:
            done = trio.Event()

            async def read() -> None:
                assert await on.read() == CONTENT
                done.set()

            nursery.start_soon(read)
            await trio.sleep(0.3)
            assert not done.is_set()
            async with on.worker.listening():
                await done.wait()
            on.pool.evict(ADDRESS, len(PADDED))
            await trio.to_thread.run_sync(drop_caches, on.target / "file")
            async with on.worker.listening():
                assert await on.read() == CONTENT

    trio.run(body)


@pytest.mark.parametrize(("suffix", "running"), [("~0", False), ("", True)])
def test_what_cannot_be_had_is_an_error(arena: Path, suffix: str, running: bool) -> None:
    async def body() -> None:
        async with stage(arena, suffix) as on:
            on.worker.broken = True
            if running:
                async with on.worker.listening():
                    with pytest.raises(OSError, match="Input/output error"):
                        await on.read()
            else:
                with pytest.raises(OSError, match="Input/output error"):
                    await on.read()

    trio.run(body)
