"""Processes that tests have forked by a fork server: a FUSE session over a plain file."""

import json
import os
from typing import Any

import msgspec
import trio
from msgspec import Struct

from nsfs.core.vfs import DomainFs
from nsfs.serve.fuse import FuseOperations
from nsfs.serve.session import Session

VIEW = "0123456789abcdef" * 2
MAP_BYTES = bytes(range(256)) * 40


class WorkerArgs(Struct, kw_only=True):
    """Descriptors: /dev/fuse, the file that the disk shows, and one for the INIT request that was read."""

    init: bytes = b""
    delay: float = 0.0


class CountingOperations(FuseOperations):
    """Remembers what it was asked."""

    def __init__(self, counts: dict[str, int], files: DomainFs) -> None:
        super().__init__(files)
        self.counts = counts

    async def flush(self, fh: Any) -> None:
        self.counts["flush"] += 1
        await super().flush(fh)

    async def read(self, fh: Any, off: int, size: int) -> bytes:
        self.counts["largest"] = max(self.counts["largest"], size)
        return bytes(await super().read(fh, off, size))


def serve(args: bytes, fds: list[int]) -> None:
    """Serve `disks/<VIEW>` from a file until unmounted."""
    fuse, backing, greeting = fds
    params = msgspec.msgpack.decode(args, type=WorkerArgs)
    counts = {"flush": 0, "largest": 0, "pid": os.getpid()}

    async def read(_view: str, address: int, size: int) -> bytes:
        if address == 13 << 30:
            raise RuntimeError("a bug")
        if params.delay:
            await trio.sleep(params.delay)
        data = os.pread(backing, size, address)
        return data + bytes(size - len(data))

    async def keep(init: bytes) -> None:
        os.write(greeting, init)

    files = DomainFs(read, {"counts.json": lambda: json.dumps(counts).encode()})
    files.add_map(VIEW, memoryview(MAP_BYTES))
    session = Session(CountingOperations(counts, files), fuse)
    trio.run(session.serve, params.init, keep)
