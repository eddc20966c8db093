"""What a fork server and its client say to each other: one msgpack message each, by SOCK_SEQPACKET.

Descriptors come beside a message by SCM_RIGHTS (unix(7)). A request is answered once, by Spawned or Failed, and a child
that was spawned is reported once more, by Exited. Refuses nothing: both ends are of one program.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import msgspec
from msgspec import Struct

from nsfs.serve.sandbox import Confinement  # noqa: TC001  msgspec decodes it

MAX_MESSAGE: Final = 128 << 10
"""Bytes of one request; larger arguments belong in a descriptor (unix(7): a datagram must fit the send buffer)."""
MAX_FDS: Final = 64


class Spawn(Struct, tag="spawn", array_like=True):
    """Client to server, with the child's descriptors: fork one."""

    id: int
    entry: str
    args: bytes
    session: bool
    """In a session of its own."""
    tied: bool
    """SIGKILL when the server dies."""
    confinement: Confinement | None = None
    """What it is held to before it runs."""


class Kill(Struct, tag="kill", array_like=True):
    """Client to server: send a signal to a child, for a client that may not do it itself."""

    id: int
    number: int


class Spawned(Struct, tag="spawned", array_like=True):
    """Server to client, with a pidfd."""

    id: int
    pid: int


class Failed(Struct, tag="failed", array_like=True):
    """Server to client: there was no fork."""

    id: int
    reason: str


class Exited(Struct, tag="exited", array_like=True):
    """Server to client: a child has ended and is reaped; `status` as subprocess has it, negative for a signal."""

    id: int
    status: int


Reply: TypeAlias = Spawned | Failed | Exited

request_decoder: msgspec.msgpack.Decoder[Spawn | Kill] = msgspec.msgpack.Decoder(Spawn | Kill)
reply_decoder: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
