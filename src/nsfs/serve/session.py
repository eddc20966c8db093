"""One FUSE session over a /dev/fuse descriptor that outlives this process.

Owns: the handshake with the kernel, made so that a later process can go on where this one was killed, and the loop that
hands requests to pyfuse3. A session that is given the recorded INIT request is a successor. libfuse gets the INIT from
us, through a socket pair in the descriptor's place; its answer passes through `plan_reply` on its way to the kernel,
which drops it (ENOENT) if a predecessor has answered.

Concurrency: one session per process, because pyfuse3 keeps it in module globals, in the calling trio run. The
descriptor does not block: a request that is withdrawn between poll and read must not stop the loop.

Invariants: what this process had taken when it dies after the INIT was recorded is not lost (Linux 6.9) or fails once,
where it takes requests by a device of its own (`clone_device`). File handles are inode numbers, for a successor.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import select
import socket
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import pyfuse3
import trio

from nsfs.errors import UnreachableError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    _Waiting = Callable[[], Awaitable[bool]]

log = logging.getLogger(__name__)

MAX_TASKS: Final = 8192
"""Requests that are answered at a time; the rest stays in the kernel's queue."""
_BURST: Final = 0.002
"""Seconds for which requests are taken as they come, before anything else of the process has its turn."""
_IDLE_TASKS: Final = 16
"""Tasks that may wait for requests: a task that has answered is not started anew for the next one."""
_LARGEST_REQUEST: Final = (1 << 20) + (1 << 16)
_HIGH_FD: Final = 100

# include/uapi/linux/fuse.h
_IN_HEADER: Final = struct.Struct("<IIQQIIIHH")
_FUSE_INIT: Final = 26
_INIT_REPLY: Final = struct.Struct("<IiQIIIIHHIIHHII")
"""len, error, unique; major, minor, max_readahead, flags, max_background, congestion_threshold, max_write, time_gran,
max_pages, map_alignment, flags2, max_stack_depth."""
_CACHE_SYMLINKS: Final = 1 << 23
_ANY_READAHEAD: Final = 0xFFFFFFFF
"""The kernel takes the lower one of this and the mount's read_ahead_kb, which somebody may have raised already."""
_INIT_FLAGS2: Final = struct.Struct("<16xI")
"""Of the request: major, minor, max_readahead, flags; flags2."""
_HAS_RESEND_2: Final = 1 << 7
_CLONE: Final = 0x8004E500
_NOTIFY_RESEND: Final = struct.pack("<IiQ", 16, 7, 0)


@dataclass(frozen=True, slots=True)
class Limits:
    """What we ask of the kernel beside what libfuse asks.

    `max_background` is the number of reads of all views together that the kernel sends before the next one has to wait,
    present or not. Its default is 12; one answered INIT of root may set any number, a user's up to the sysctl-like
    module parameter max_user_bgreq (Linux fs/fuse/inode.c, process_init_limits).
    """

    max_background: int = 4096
    congestion_threshold: int = 3072


def plan_reply(reply: bytes, request: bytes, limits: Limits) -> bytes:
    """Complete an answer to INIT `request` for the kernel: with `limits`, and with symlinks cached if it can."""
    if len(reply) < _INIT_REPLY.size:
        return reply
    fields = list(_INIT_REPLY.unpack_from(reply))
    (offered,) = struct.unpack_from("<I", request, _IN_HEADER.size + 12)
    fields[5] = _ANY_READAHEAD
    fields[6] |= offered & _CACHE_SYMLINKS
    fields[7], fields[8] = limits.max_background, limits.congestion_threshold
    return _INIT_REPLY.pack(*fields) + reply[_INIT_REPLY.size :]


def offers_resend(init: bytes) -> bool:
    """Whether the kernel that sent this INIT repeats what was taken and not answered."""
    end = _IN_HEADER.size + _INIT_FLAGS2.size
    return len(init) >= end and bool(_INIT_FLAGS2.unpack_from(init, _IN_HEADER.size)[0] & _HAS_RESEND_2)


def clone_device(fuse_fd: int) -> int:
    """Another descriptor of a connection, with requests of its own: when its last copy is closed they fail.

    FUSE_DEV_IOC_CLONE, Linux 4.2; what was taken ends with ECONNABORTED (fs/fuse/dev.c, fuse_dev_release).
    """
    clone = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(clone, _CLONE, struct.pack("=I", fuse_fd))
    except OSError as error:
        os.close(clone)
        raise UnreachableError(f"no fuse connection: {error.strerror}") from error
    return clone


def is_connected(fuse_fd: int) -> bool:
    """Whether a connection is neither unmounted nor aborted (Linux fs/fuse/dev.c, fuse_dev_poll: EPOLLERR if it is)."""
    poll = select.poll()
    poll.register(fuse_fd, 0)
    return not poll.poll(0)


async def read_init(fuse_fd: int) -> bytes:
    """Take the kernel's INIT request, which comes once, right after mount(2).

    Whoever keeps the descriptor should read it before any worker exists; then there is no moment at which the death of
    a worker loses it. Raises UnreachableError if the descriptor's connection is gone or was greeted before.
    """
    await trio.lowlevel.wait_readable(fuse_fd)
    try:
        request = os.read(fuse_fd, _LARGEST_REQUEST)
    except OSError as error:
        raise UnreachableError(f"no fuse connection: {error.strerror}") from error
    if len(request) < _IN_HEADER.size or _IN_HEADER.unpack_from(request)[1] != _FUSE_INIT:
        raise UnreachableError("fuse connection was greeted before, and its first request is not known")
    return request


def widen_descriptors() -> None:
    """Have room for a session's descriptor, for a process that has no threads yet.

    A table of descriptors that threads share grows only after every processor has been through its scheduler (Linux
    fs/file.c, expand_fdtable): 9 to 20 ms of a worker's start, measured on two busy ones.
    """
    os.close(fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, _HIGH_FD))


class Session:
    """A session of `operations` over `fuse_fd`. There is one per process.

    With a `clone` of the descriptor requests are taken by that, and nothing is asked again of a predecessor's.
    """

    def __init__(
        self, operations: pyfuse3.Operations, fuse_fd: int, limits: Limits | None = None, *, clone: int | None = None
    ) -> None:
        self._fuse_fd = fuse_fd
        self._limits = limits or Limits()
        self._clone = clone
        ours, self._shim = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            self._session_fd = fcntl.fcntl(ours.fileno(), fcntl.F_DUPFD_CLOEXEC, _HIGH_FD)
        self._shim.setblocking(False)  # noqa: FBT003
        os.set_blocking(self._session_fd, False)
        _guard_session_loop()
        pyfuse3.init(operations, f"/dev/fd/{self._session_fd}", {"fsname=nsfs"})

    async def serve(
        self,
        init: bytes = b"",
        on_init: Callable[[bytes], Awaitable[None]] | None = None,
        on_ready: Callable[[], None] | None = None,
    ) -> None:
        """Answer requests until the filesystem is unmounted or its connection aborted.

        `init` is the recorded INIT request, empty if nobody has read it yet; then `on_init` gets it before the kernel
        is answered, so that a successor can have it. `on_ready` is called when requests begin to be taken. Cancelling
        leaves requests unanswered, for a successor.
        """
        if not init:
            init = await read_init(self._fuse_fd)
            if on_init is not None:
                await on_init(init)
        taken_over = self._answer(plan_reply(await self._negotiate(init), init, self._limits))
        device = self._fuse_fd if self._clone is None else self._clone
        os.set_blocking(device, False)
        os.dup2(device, self._session_fd, inheritable=False)
        if taken_over and self._clone is None:
            self._ask_again()
        if on_ready is not None:
            on_ready()
        _take_in_bursts(self._session_fd)
        await pyfuse3.main(min_tasks=_IDLE_TASKS, max_tasks=MAX_TASKS)
        pyfuse3.close(unmount=False)

    async def _negotiate(self, init: bytes) -> bytes:
        """Let libfuse answer `init`."""
        reply = b""
        with self._shim:
            self._shim.send(init)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pyfuse3.main)
                await trio.lowlevel.wait_readable(self._shim)
                reply = self._shim.recv(1 << 16)
                nursery.cancel_scope.cancel()
        return reply

    def _answer(self, reply: bytes) -> bool:
        """Give the kernel the answer to INIT; whether it had one already."""
        try:
            os.write(self._fuse_fd, reply)
        except FileNotFoundError:
            return True
        except OSError as error:
            raise UnreachableError(f"no fuse connection: {error.strerror}") from error
        return False

    def _ask_again(self) -> None:
        """Have the kernel queue again what a predecessor took and did not answer."""
        try:
            os.write(self._fuse_fd, _NOTIFY_RESEND)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise UnreachableError(f"no fuse connection: {error.strerror}") from error
            log.warning("reads that the last process had taken stay unanswered, because the kernel is older than 6.9")


def ask_again(fuse_fd: int) -> None:
    """Have the kernel queue again what a process took and did not answer (Linux 6.9); raises UnreachableError."""
    try:
        os.write(fuse_fd, _NOTIFY_RESEND)
    except OSError as error:
        raise UnreachableError(f"what was taken cannot be asked again: {error.strerror}") from error


def _guard_session_loop() -> None:
    """Make pyfuse3's loop go on after EAGAIN, which it takes for the end of the session.

    pyfuse3 looks the loop's name up in its module for each task that it starts.
    """
    loop: Callable[..., Awaitable[None]] = pyfuse3._session_loop  # type: ignore[attr-defined] # noqa: SLF001
    if getattr(loop, "is_guarded", False):
        return

    async def guarded(*args: Any) -> None:  # noqa: ANN401
        while True:
            try:
                await loop(*args)
            except OSError as error:
                if error.errno != errno.EAGAIN:
                    raise
            else:
                return

    guarded.is_guarded = True  # type: ignore[attr-defined]
    pyfuse3._session_loop = guarded  # type: ignore[attr-defined] # noqa: SLF001


def _take_in_bursts(session_fd: int) -> None:
    """Make pyfuse3's loop take requests that are there already without a turn of trio's loop for each.

    Its tasks take turns by a lock and by trio's epoll: with them a hit of 64 KiB costs a worker 75 to 100 us, without
    45 to 55, and as what is read together is then read from the disk at once, what is not in memory comes in half of
    the time (Linux 6.18, two cores).
    """
    waiting: _Waiting = pyfuse3._wait_fuse_readable  # type: ignore[attr-defined] # noqa: SLF001
    by_trio: _Waiting = getattr(waiting, "by_trio", waiting)
    ready = select.poll()
    ready.register(session_fd, select.POLLIN)
    until = 0.0

    async def wait() -> bool:
        nonlocal until
        if time.monotonic() < until and ready.poll(0):
            return True
        goes_on = await by_trio()
        until = time.monotonic() + _BURST
        return goes_on

    wait.by_trio = by_trio  # type: ignore[attr-defined]
    pyfuse3._wait_fuse_readable = wait  # type: ignore[attr-defined] # noqa: SLF001
