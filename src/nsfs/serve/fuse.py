"""FUSE requests to a `Vfs` and back. Translates; decides nothing.

Owns: pyfuse3's types, errno, how long the kernel may keep what. A file handle is an inode number, so that a session
that is taken over by another process stays valid; open files are remembered only to spare looking them up again.

Concurrency: pyfuse3 calls from one trio run, each request in a task of its own. Only `read` waits for anything.

Invariants: an NsfsError is answered with its errno; anything else is a bug, logged with its traceback, and
answered with EIO. A read gives all the bytes that were asked for, up to the end of the file.
"""

from __future__ import annotations

import errno
import logging
import os
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, TypeVar

import pyfuse3
from pyfuse3 import EntryAttributes, FileHandleT, FileInfo, FUSEError, InodeT, StatvfsData

from nsfs.core.vfs import FOREVER, Attr
from nsfs.errors import NsfsError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence

    from pyfuse3 import FileNameT, FlagT, ReaddirToken, RequestContext, XAttrNameT

    from nsfs.core.vfs import Handle, Vfs

P = ParamSpec("P")
R = TypeVar("R")
log = logging.getLogger(__name__)

_BLOCK: Final = 4096
_SECTOR: Final = 512
_MAX_HANDLES: Final = 4096
_NEVER: Final = EntryAttributes()
_NEVER.st_ino = 0
_NEVER.entry_timeout = FOREVER


def _answered(
    method: Callable[Concatenate[FuseOperations, P], Awaitable[R]],
) -> Callable[Concatenate[FuseOperations, P], Coroutine[Any, Any, R]]:
    """Every exception of `method` becomes the FUSEError that the kernel gets."""

    async def wrapper(self: FuseOperations, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await method(self, *args, **kwargs)
        except FUSEError:
            raise
        except NsfsError as error:
            raise FUSEError(error.errno) from error
        except Exception as error:
            log.exception("fuse request failed: %s", method.__name__)
            raise FUSEError(errno.EIO) from error

    return wrapper


class FuseOperations(pyfuse3.Operations):
    """Serves `vfs`."""

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(self, vfs: Vfs) -> None:
        super().__init__()
        self._vfs = vfs
        self._handles: dict[int, Handle] = {}

    @_answered
    async def lookup(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> EntryAttributes:  # noqa: ARG002
        """An entry, or that there never will be one."""
        attr = self._vfs.lookup(parent_inode, name)
        return _NEVER if attr is None else _translate(attr)

    @_answered
    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:  # noqa: ARG002
        """Attributes."""
        return _translate(self._vfs.getattr(inode))

    @_answered
    async def readlink(self, inode: InodeT, ctx: RequestContext) -> FileNameT:  # noqa: ARG002
        """A symlink's target."""
        return self._vfs.readlink(inode)

    @_answered
    async def getxattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> bytes:  # noqa: ARG002
        """One extended attribute."""
        value = self._vfs.xattrs(inode).get(name)
        if value is None:
            raise FUSEError(errno.ENODATA)
        return value

    @_answered
    async def listxattr(self, inode: InodeT, ctx: RequestContext) -> Sequence[XAttrNameT]:  # noqa: ARG002
        """Names of all extended attributes."""
        return list(self._vfs.xattrs(inode))

    @_answered
    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:  # noqa: ARG002
        """No state."""
        return inode

    @_answered
    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        """As many entries, with attributes, as fit."""
        for entry in self._vfs.readdir(fh, start_id):
            if not pyfuse3.readdir_reply(token, entry.name, _translate(entry.attr), entry.next):
                return

    @_answered
    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:  # noqa: ARG002
        """A file for reading, whose pages the kernel keeps from one open to the next."""
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise FUSEError(errno.EROFS)
        handle = self._open(inode)
        return FileInfo(fh=inode, keep_cache=not handle.direct, direct_io=handle.direct)

    @_answered
    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes | memoryview:  # type: ignore[override]
        """Bytes of a file; pyfuse3 takes any buffer."""
        handle = self._handles.get(fh) or self._open(fh)
        return await handle.read(off, size)

    def _open(self, inode: int) -> Handle:
        if len(self._handles) >= _MAX_HANDLES:
            del self._handles[next(iter(self._handles))]
        handle = self._handles[inode] = self._vfs.open(inode)
        return handle

    @_answered
    async def flush(self, fh: FileHandleT) -> None:  # noqa: ARG002
        """Not there: after the first ENOSYS the kernel closes files without asking (Linux fs/fuse/file.c)."""
        raise FUSEError(errno.ENOSYS)

    async def release(self, fh: FileHandleT) -> None:
        """Forget the content; another who has the same inode open makes it be looked up again."""
        self._handles.pop(fh, None)

    async def releasedir(self, fh: FileHandleT) -> None:
        """Nothing."""

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        """Nothing: inode numbers mean something for ever."""

    @_answered
    async def statfs(self, ctx: RequestContext) -> StatvfsData:  # noqa: ARG002
        """A filesystem without room."""
        data = StatvfsData()
        data.f_bsize = data.f_frsize = _BLOCK
        data.f_namemax = 255
        return data


def _translate(attr: Attr) -> EntryAttributes:
    entry = EntryAttributes()
    entry.st_ino = attr.inode
    entry.st_mode = attr.mode
    entry.st_nlink = attr.links
    entry.st_uid = attr.uid
    entry.st_gid = attr.gid
    entry.st_rdev = os.makedev(*attr.device)
    entry.st_size = attr.size
    entry.st_blksize = _BLOCK
    entry.st_blocks = (attr.size + _SECTOR - 1) // _SECTOR
    entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = attr.mtime_ns
    entry.entry_timeout = entry.attr_timeout = attr.timeout
    return entry
