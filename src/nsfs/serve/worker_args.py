"""What a daemon and its workers say to each other at a worker's start; all else is in `core.worker_api`."""

from __future__ import annotations

import msgspec
from msgspec import Struct

from nsfs.core import worker_api  # noqa: TC001  msgspec looks it up


class WorkerArgs(Struct, kw_only=True):
    """What a worker is started with.

    Its descriptors: the socket to the daemon, the bitmap, the key, where `fuse` the FUSE connection, where `clone`
    another one of its own, and where `line` the end of a pair over which it gets its next socket, to the next daemon;
    without, it ends with its daemon.
    """

    domain: str
    config: bytes
    """`serve.config.pack_config`."""
    build: str
    """Of what code the daemon is (`serve.build`), which started the worker from the same."""
    fuse: bool
    memory: int = 0
    """Bytes of private memory that it, and each of its jobs, may have; 0 for no limit of its own."""
    clone: bool = False
    """Requests are taken by a device of its own, since the kernel does not repeat, or shall not, what it took."""
    is_shared: bool = False
    """By several owners, as whose own workers it asks registries."""
    line: bool = False
    init: bytes = b""
    """The connection's INIT request."""
    is_trial: bool = False
    """The last worker is still there, stopped, with its jobs: nothing of theirs is cleared up."""
    views: list[str] = msgspec.field(default_factory=list)
    trees: list[worker_api.Tree] = msgspec.field(default_factory=list)


class Ready(Struct, kw_only=True):
    """Worker to daemon: requests are being served."""

    build: str = ""
    """As it was told when it was started."""
