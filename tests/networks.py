"""Network namespaces of a test, in each of which there is nothing but loopback and what the test puts there.

Owns the namespace (a file that it is mounted on, as `ip netns` does it), and a name server of one name on its loopback.
All of it ends with the block.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import threading
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")
_NEW_NETWORK = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Network:
    """A network namespace."""

    path: str

    def run(self, work: Callable[[], T]) -> T:
        """Do `work` in a thread that is in there; what it opens, and threads that it starts, stay there."""
        results: list[T] = []

        def inside() -> None:
            self._enter()
            results.append(work())

        thread = threading.Thread(target=inside)
        thread.start()
        thread.join()
        return results[0]

    def _enter(self) -> None:
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if _libc.setns(fd, _NEW_NETWORK) < 0:
                raise OSError(ctypes.get_errno(), "setns")
        finally:
            os.close(fd)


@contextmanager
def network(path: str, names: tuple[str, ...] = ()) -> Iterator[Network]:
    """A namespace at `path`, whose loopback has a name server that says of `names` that they are there."""
    with ExitStack() as stack:
        with open(path, "x"):
            stack.callback(os.unlink, path)
        subprocess.run(["unshare", f"--net={path}", "ip", "link", "set", "lo", "up"], check=True)
        stack.callback(subprocess.run, ["umount", path], check=True)
        found = Network(path)
        if names:
            stack.enter_context(_name_server(found, names))
        yield found


@contextmanager
def _name_server(inside: Network, names: tuple[str, ...]) -> Iterator[None]:
    sock = inside.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    sock.bind(("127.0.0.1", 53))
    thread = threading.Thread(target=_answer, args=(sock, names))
    thread.start()
    try:
        yield
    finally:
        inside.run(lambda: _send(b"", ("127.0.0.1", 53)))
        thread.join()
        sock.close()


def _send(data: bytes, to: tuple[str, int]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(data, to)


def _answer(sock: socket.socket, names: tuple[str, ...]) -> None:
    """Answer questions (RFC 1035, section 4) until a message is empty: 127.0.0.1 for A, nothing for other types."""
    while True:
        query, asker = sock.recvfrom(4096)
        if not query:
            return
        end = query.index(0, 12)
        kind = query[end + 1 : end + 3]
        known = _name(query[12:end]) in names
        question = query[12 : end + 5]
        answer = b"\xc0\x0c\0\1\0\1\0\0\0\1\0\4\x7f\0\0\1" if known and kind == b"\0\1" else b""
        flags = b"\x81\x80" if known else b"\x81\x83"
        counts = b"\0\1" + (b"\0\1" if answer else b"\0\0") + b"\0\0\0\0"
        sock.sendto(query[:2] + flags + counts + question + answer, asker)


def _name(labels: bytes) -> str:
    parts = []
    while labels:
        parts.append(labels[1 : 1 + labels[0]].decode())
        labels = labels[1 + labels[0] :]
    return ".".join(parts)
