"""Every error that nsfs raises on purpose.

Owns: the classes, and for each its errno (what a FUSE reader sees), gRPC status name (what a client of a socket sees),
exit code (what a script sees) and whether trying again can help. Adapters read these attributes; nothing else maps
errors. An exception that is no `NsfsError` is a bug and is reported as one.

Exit codes: 0 success, 1 a bug, 2 usage, 3 not found, 4 denied, 5 registry unreachable, 6 corrupt, 7 no space, 8 busy,
9 not supported here.
"""

from __future__ import annotations

import errno
from typing import ClassVar


class NsfsError(Exception):
    """Something that can be told to a user in one sentence; `hint` says what to do about it."""

    code: ClassVar[str] = "INTERNAL"
    errno: ClassVar[int] = errno.EIO
    exit_code: ClassVar[int] = 1
    transient: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(NsfsError):
    """What was asked for makes no sense: a malformed reference, an unknown key."""

    code, errno, exit_code = "INVALID_ARGUMENT", errno.EINVAL, 2


class NotFoundError(NsfsError):
    """The registry, the layout, the image or the store has no such thing."""

    code, errno, exit_code = "NOT_FOUND", errno.ENOENT, 3


class DeniedError(NsfsError):
    """Credentials or policy do not allow it."""

    code, errno, exit_code = "PERMISSION_DENIED", errno.EACCES, 4


class UnreachableError(NsfsError):
    """A registry does not answer, or answers that it cannot now; trying again may help.

    `retry_after` is the number of seconds the registry asked us to wait, where it said so.
    """

    code, errno, exit_code, transient = "UNAVAILABLE", errno.EIO, 5, True

    def __init__(self, message: str, *, hint: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class CorruptError(NsfsError):
    """Bytes are not what their digest, their format or our own store says."""

    code, errno, exit_code = "DATA_LOSS", errno.EIO, 6


class NoSpaceError(NsfsError):
    """The pool, the address space or memory is full."""

    code, errno, exit_code, transient = "RESOURCE_EXHAUSTED", errno.ENOSPC, 7, True


class BusyError(NsfsError):
    """Somebody uses it."""

    code, errno, exit_code = "FAILED_PRECONDITION", errno.EBUSY, 8


class UnsupportedError(NsfsError):
    """This kernel, this user or this version cannot do it; the message says which and why."""

    code, errno, exit_code = "UNIMPLEMENTED", errno.EOPNOTSUPP, 9


class ExistsError(NsfsError):
    """There is one already."""

    code, errno, exit_code = "ALREADY_EXISTS", errno.EEXIST, 8


ERRORS: dict[str, type[NsfsError]] = {
    cls.code: cls
    for cls in (
        UsageError,
        NotFoundError,
        DeniedError,
        UnreachableError,
        CorruptError,
        NoSpaceError,
        BusyError,
        UnsupportedError,
        ExistsError,
    )
}
"""Error class by code, to raise again on this side of a socket what was raised on the other."""
