"""Where the daemon listens: a unix socket that is its own, made anew or taken over from the daemon before.

Owns the socket's file. Concurrency: blocks for moments, while a porter hands over (`serve.porter`).
"""

from __future__ import annotations

import os
import socket
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from nsfs.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_WAITING: Final = 1024
"""Connections that nobody accepted yet."""


@dataclass(slots=True)
class Entrance:
    """The listening socket."""

    listener: socket.socket
    greeted: Sequence[socket.socket] = ()
    """Who connected while no daemon served, and was greeted."""
    is_left: bool = False
    """It stays where it is for who comes after us."""


@contextmanager
def listening(path: str, relieve: Callable[[], list[socket.socket]] = list) -> Iterator[Entrance]:
    """The daemon's socket at `path`: what `relieve` gives, the connections behind it, or a new one; raises UsageError.

    At the end it is closed and, where it is not left to somebody, gone.
    """
    entrance = _take_over(path, relieve())
    try:
        yield entrance
    finally:
        _close(entrance.listener, unlink=not entrance.is_left)


def _take_over(path: str, found: list[socket.socket]) -> Entrance:
    """What was handed on, if that is still the socket at `path`; else one there, for who waits at the old, too."""
    if not found:
        return Entrance(listen_unix(path, "socket"))
    listener, *greeted = found
    if listener.getsockname() == path and os.path.exists(path):
        return Entrance(listener, greeted)
    _close(listener, unlink=True)
    return Entrance(listen_unix(path, "socket"), greeted)


def _close(listener: socket.socket, *, unlink: bool) -> None:
    path = listener.getsockname()
    listener.close()
    if unlink:
        with suppress(FileNotFoundError):
            os.unlink(path)


def listen_unix(path: str, key: str) -> socket.socket:
    """The socket, 0600; what was there before is gone. Raises UsageError about the `key` that says where."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    mask = os.umask(0o177)
    try:
        if os.path.lexists(path):
            os.unlink(path)
        listener.bind(path)
        listener.listen(_WAITING)
    except OSError as error:
        listener.close()
        raise UsageError(f"{key}: cannot listen there: {path}: {error.strerror}") from None
    finally:
        os.umask(mask)
    return listener
