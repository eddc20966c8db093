"""The control API's client: one call at a time from ordinary, blocking code.

Translates only: requests to messages, events to values, gRPC statuses back to the NsfsError that the daemon raised. Not
for trio; a call blocks its thread, and whatever ends it early (Ctrl-C, an exception of `listen`) cancels it on the
daemon, too. A call that is cut off because a daemon gave its place to another is asked of that one, where it may be.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import msgspec

from nsfs.errors import ERRORS, DeniedError, NsfsError, UnreachableError, UnsupportedError, UsageError
from nsfs.serve import api

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # before grpc is imported: its own log lines are not for our users

import grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nsfs.model.report import Data, Item, Note, Part, Progress

    Listener: TypeAlias = Callable[[Progress | Note | Data | Item | Part], None]

R = TypeVar("R", bound=msgspec.Struct)

_OPTIONS = [
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_metadata_size", 64 << 10),  # an error travels there, and may name long paths
    ("grpc.absolute_max_metadata_size", 64 << 10),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
]
_FOLLOWS = 60.0
"""Seconds for another daemon to serve."""
_LOOK = 1.0
"""Seconds for it to answer, before it is looked whether there still will be one."""
_PAUSE = 0.1
"""Seconds between two looks at least."""
_ONCE = frozenset({"Umount", "List", "Tree", "Read", "Export", "EndNamespace", "Drain", "Upgrade", "Login", "Logout"})
"""What is not asked again: part of the answer was given already, or another one would be."""
_decode_event = msgspec.msgpack.Decoder(api.Event).decode
_decode_failure = msgspec.json.Decoder(api.Failure).decode


class _LostError(UnreachableError):
    """Nobody said how the call ended."""


class Control:
    """A connection to one daemon, at the socket `path`; `version` is what it said of itself."""

    def __init__(self, channel: grpc.Channel, path: str) -> None:
        self._channel = channel
        self.path = path
        self.version = api.VersionReport(version="", api=0, pid=0, private=False)

    def call(self, method: str, request: msgspec.Struct, kind: type[R], listen: Listener | None = None) -> R:
        """Call `method`; the result is of `kind`, as `api.METHODS` says, events before it go to `listen` as they come.

        Raises what the daemon raised, UnreachableError when the connection breaks, UnsupportedError when the daemon
        does not know the method.
        """
        try:
            return self._ask(method, request, kind, listen)
        except _LostError:
            if method in _ONCE or not self._is_followed():
                raise
        return self._ask(method, request, kind, listen)

    def _is_followed(self) -> bool:
        """Whether another daemon answers where ours did: it inherits the socket, which is never gone meanwhile."""
        deadline = time.monotonic() + _FOLLOWS
        try:
            while time.monotonic() < deadline:
                probe(self.path)
                if self._is_answered():
                    return True
                time.sleep(_PAUSE)
        except NsfsError:
            return False
        return False

    def _is_answered(self) -> bool:
        """Whether a call gets through soon. A look at the channel's state would leave a thread of gRPC's behind."""
        start: grpc.UnaryStreamMultiCallable[bytes, bytes] = self._channel.unary_stream(f"/{api.SERVICE}/Version")
        stream = start(msgspec.msgpack.encode(api.Empty()), timeout=_LOOK, wait_for_ready=True)
        try:
            return next(stream, None) is not None
        except grpc.RpcError:
            return False
        finally:
            stream.cancel()

    def _ask(self, method: str, request: msgspec.Struct, kind: type[R], listen: Listener | None) -> R:
        start: grpc.UnaryStreamMultiCallable[bytes, bytes] = self._channel.unary_stream(f"/{api.SERVICE}/{method}")
        stream = start(msgspec.msgpack.encode(request))
        try:
            for data in stream:
                event = _decode_event(data)
                if isinstance(event, api.Done):
                    return msgspec.msgpack.decode(event.result, type=kind)
                if listen is not None:
                    listen(event)
        except grpc.RpcError as error:
            raise _translate(error, method, self.path) from None
        except msgspec.MsgspecError as error:
            raise UnsupportedError(f"the daemon's answer is not understood: {error}", hint=_RESTART) from None
        finally:
            stream.cancel()
        raise _LostError(f"the daemon ended a call without a result: {self.path}")


@contextmanager
def open_control(path: str) -> Iterator[Control]:
    """Connect to the daemon at the unix socket `path`, and check that it speaks our version.

    Raises UnreachableError, DeniedError, UnsupportedError.
    """
    probe(path)
    channel = grpc.insecure_channel(f"unix:{path}", options=_OPTIONS)
    try:
        control = Control(channel, path)
        control.version = _look(control)
        _check_version(control.version)
        yield control
    finally:
        channel.close()


def _look(control: Control) -> api.VersionReport:
    """Who answers. Where nobody came to, though somebody listened at first, it is as where nobody ever did."""
    try:
        return control.call("Version", api.Empty(), api.VersionReport)
    except _LostError:
        probe(control.path)
        raise


def probe(path: str) -> None:
    """Connect once and hang up; raises UnreachableError or DeniedError with the kernel's reason."""
    if len(os.fsencode(path)) > 107:
        raise UsageError(f"longer than the 107 bytes of a unix socket's name: {path}")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(5)
        try:
            connection.connect(path)
        except PermissionError:
            raise DeniedError(f"this daemon's socket is not for you: {path}") from None
        except OSError as error:
            raise UnreachableError(f"no daemon answers: {path}: {error.strerror or error}") from None


_RESTART = "daemon and command are of different versions: restart the daemon"


def _check_version(version: api.VersionReport) -> None:
    if not api.VERSION - 1 <= version.api <= api.VERSION + 1:
        raise UnsupportedError(
            f"the daemon speaks version {version.api} of the control API, this command {api.VERSION}", hint=_RESTART
        )


def _translate(error: grpc.RpcError, method: str, path: str) -> NsfsError:
    code, details = error.code().name, error.details() or ""
    try:
        failure = _decode_failure(details)
    except msgspec.MsgspecError:
        return _translate_plain(code, details, method, path)
    return ERRORS.get(failure.code, NsfsError)(failure.message, hint=failure.hint)


def _translate_plain(code: str, details: str, method: str, path: str) -> NsfsError:
    """For statuses that gRPC made, not the daemon."""
    if code == "UNIMPLEMENTED":
        return UnsupportedError(f"the daemon does not know this call: {method}", hint=_RESTART)
    if code in {"UNAVAILABLE", "CANCELLED", "DEADLINE_EXCEEDED"}:
        return _LostError(f"the connection to the daemon broke: {path}", hint="its log says why")
    return NsfsError(f"the call failed: {method}: {code}: {details[:200]}")
