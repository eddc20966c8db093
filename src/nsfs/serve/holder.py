"""The holder: a process that keeps descriptors by name for the daemon to come, and does nothing else.

Started by the daemon where systemd keeps none (sd_notify(3), FDSTORE). It answers on a socket that it was given, of
which each client must have its own uid: SOCK_SEQPACKET, one command a message, `keep NAME` with one descriptor, `drop
NAME`, `take`, `end`. Each is answered by `ok`, `take` by `fd NAME` with a descriptor for each before. A name is kept
once: another `keep` replaces it. What has failed is given up, as an aborted FUSE connection, before it is taken and
while no daemon is there; when no connection is left then, the holder ends.

One thread, the standard library alone: there is nothing in here that could fail but memory. Refuses to wait for what it
keeps: a FUSE connection wakes all who poll it for each of its requests (Linux fs/fuse/dev.c), and whoever is woken so
takes a processor from the worker that is to answer.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import sys
from contextlib import suppress
from typing import Final

MAX_NAME: Final = 512
LASTING: Final = ("fuse.", "porter")
"""What names begin with for which a daemon will come: a domain's connection, and who waits for that daemon."""
_LOOK_EVERY_MS: Final = 1000
_UCRED: Final = struct.Struct("iII")


class _Holder:
    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._poll = select.poll()
        self._poll.register(listener, select.POLLIN)
        self._clients: dict[int, socket.socket] = {}
        self._kept: dict[str, int] = {}

    def run(self) -> None:
        """Until a client says so, or nobody can come for anything."""
        self._accept()
        while self._clients or any(name.startswith(LASTING) for name in self._kept):
            for fd, _ in self._poll.poll(None if self._clients else _LOOK_EVERY_MS):
                if fd == self._listener.fileno():
                    self._accept()
                elif not self._answer(self._clients[fd]):
                    return
            if not self._clients:
                self._lose_failed()

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        _, uid, _ = _UCRED.unpack(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        if uid != os.geteuid():
            client.close()
            return
        self._clients[client.fileno()] = client
        self._poll.register(client, select.POLLIN)

    def _answer(self, client: socket.socket) -> bool:
        """Do one command; whether to go on."""
        try:
            data, fds, _, _ = socket.recv_fds(client, MAX_NAME, 1, socket.MSG_CMSG_CLOEXEC)
            command, _, name = data.decode().partition(" ")
            if command:
                self._do(command, name, fds, client)
                client.send(b"ok")
                return command != "end"
        except OSError:
            pass
        self._forget(client)
        return True

    def _do(self, command: str, name: str, fds: list[int], client: socket.socket) -> None:
        if command == "keep":
            self._drop(name)
            self._kept[name] = fds[0]
        elif command == "drop":
            self._drop(name)
        elif command == "take":
            self._lose_failed()
            for kept, fd in self._kept.items():
                socket.send_fds(client, [f"fd {kept}".encode()], [fd])

    def _drop(self, name: str) -> None:
        if name in self._kept:
            os.close(self._kept.pop(name))

    def _lose_failed(self) -> None:
        for name in [name for name, fd in self._kept.items() if _has_failed(fd)]:
            self._drop(name)

    def _forget(self, client: socket.socket) -> None:
        self._poll.unregister(client)
        del self._clients[client.fileno()]
        client.close()


def _has_failed(fd: int) -> bool:
    """Whether nobody is at its other end."""
    poll = select.poll()
    poll.register(fd, 0)
    return bool(poll.poll(0))


def _stay_alive() -> None:
    """Be the last that a host without memory kills, where we may ask for that; no terminal ends us."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("-999")


def main() -> None:
    """`python -m nsfs.serve.holder FD`, of the listening socket."""
    _stay_alive()
    _Holder(socket.socket(fileno=int(sys.argv[1]))).run()


if __name__ == "__main__":
    main()
