"""The files of a pool: made where they are missing, and refused where they are not what they should be.

Owns the headers of `disk` and of `present`, which name the pool, its format and, where the domain has a key, a check
value of that; and the making of the live bitmap. Refuses a newer format, a damaged header, files of two pools, another
key. A file either is complete or does not exist, whatever happens while it is made.

Concurrency: blocks; for who starts a domain, before any process of it opens the pool.
"""

from __future__ import annotations

import errno
import os
import struct
import zlib
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

from nsfs.errors import CorruptError, DeniedError, NoSpaceError, NsfsError, UnsupportedError
from nsfs.store.crypt import CHECK_SIZE, SALT_SIZE
from nsfs.store.files import sync_directory
from nsfs.store.index import END_ADDRESS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nsfs.store.crypt import DomainKey
    from nsfs.store.layout import DomainLayout

VERSION = 2
"""Of the format of `disk`, where it is encrypted."""

PLAIN_VERSION = 1
"""Of the format of `disk` where it is not, and of `present`."""

BLOCK = 4096
DISK_SIZE = END_ADDRESS
BITMAP_SIZE = 1 << 29
"""A bit for each of the 2**32 - 1 blocks; bit n of the bitmap is bit n % 8 of byte n // 8."""

_HEADER = struct.Struct("<8sII16sI")
"""Magic, version, block size, id of the pool, crc32 of what is before it; zeros up to the end of the block."""

_CHECK_AT = _HEADER.size
"""Of an encrypted disk: the check value of its key, with the pool's id as salt, behind the header."""

_DISK_MAGIC = b"nsfsdisk"
_BITS_MAGIC = b"nsfsbits"
_TAG = b"Signature: 8a477f597d28d172789f06886806bc55\n# nsfs can fetch again what is in this directory\n"


class Header(NamedTuple):
    """What is said at the beginning of each file."""

    magic: bytes
    version: int
    block: int
    pool_id: bytes


def _render_header(magic: bytes, pool_id: bytes, key: DomainKey | None = None) -> bytes:
    packed = _HEADER.pack(magic, VERSION if key else PLAIN_VERSION, BLOCK, pool_id, 0)[:-4]
    check = key.check_value(pool_id) if key else b""
    return packed + zlib.crc32(packed).to_bytes(4, "little") + check


def _parse_header(data: bytes, magic: bytes, path: str) -> Header:
    if len(data) < _HEADER.size or data[:8] != magic:
        raise CorruptError(f"not a file of a pool: {path}")
    found = Header(*_HEADER.unpack(data[: _HEADER.size])[:4])
    if found.version > VERSION:
        raise UnsupportedError(
            f"the pool has a newer format: {path}: {found.version}",
            hint=f"this nsfs reads format {VERSION}; use the release that wrote it",
        )
    if zlib.crc32(data[: _HEADER.size - 4]) != int.from_bytes(data[_HEADER.size - 4 : _HEADER.size], "little"):
        raise CorruptError(f"the header of the pool is damaged: {path}")
    return found


def check_key(layout: DomainLayout, header: Header, data: bytes) -> None:
    """Refuse a disk that is not under the key which the domain has."""
    if header.version < VERSION:
        if layout.key is not None:
            raise CorruptError(f"the pool is not encrypted, and its domain has a key: {layout.path}")
        return
    if layout.key is None:
        raise DeniedError(f"the pool is encrypted, and its domain has no key: {layout.path}")
    if not layout.key.is_meant_by(data[_CHECK_AT : _CHECK_AT + CHECK_SIZE], header.pool_id):
        raise DeniedError(f"the key is not the one that the pool is encrypted with: {layout.path}")


def mapped_error(error: OSError, what: str) -> NsfsError:
    """What the filesystem said, about `what` was done."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return NoSpaceError(f"{what}: {error.strerror}")
    if error.errno in {errno.EFBIG, errno.EOPNOTSUPP}:
        return UnsupportedError(f"{what}: {error.strerror}", hint="pools need a filesystem such as ext4, xfs or btrfs")
    return CorruptError(f"{what}: {error.strerror}")


@contextmanager
def mapped_errors(what: str) -> Iterator[None]:
    """Errors of the filesystem become ours."""
    try:
        yield
    except OSError as error:
        raise mapped_error(error, what) from error


def _create_sparse(path: str, size: int, header: bytes) -> None:
    """Make a file that either is complete or does not exist, whatever happens meanwhile."""
    temporary = f"{path}.{os.getpid()}.tmp"
    with suppress(FileNotFoundError):
        os.unlink(temporary)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        _give_to_owner(fd, path)
        os.pwrite(fd, header, 0)
        os.ftruncate(fd, size)
        os.fsync(fd)
    except BaseException:
        os.unlink(temporary)
        raise
    finally:
        os.close(fd)
    os.rename(temporary, path)
    sync_directory(os.path.dirname(path))


def _give_to_owner(fd: int, path: str) -> None:
    """Have a new file belong to whom its directory does."""
    owner = os.stat(os.path.dirname(path))
    if owner.st_uid != os.geteuid():
        os.fchown(fd, owner.st_uid, owner.st_gid)


_PLAIN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
"""For files of a directory that may be somebody else's: nothing is followed or waited for."""


def _read_header(path: str) -> bytes | None:
    try:
        fd = os.open(path, _PLAIN)
    except FileNotFoundError:
        return None
    try:
        return os.pread(fd, BLOCK, 0)
    finally:
        os.close(fd)


def is_encrypted(layout: DomainLayout) -> bool:
    """Whether the domain has a pool, and that is under a key; raises CorruptError, UnsupportedError."""
    data = _read_header(layout.disk)
    return data is not None and _parse_header(data, _DISK_MAGIC, layout.disk).version == VERSION


def _ensure_files(layout: DomainLayout) -> None:
    """Make what is missing. A bitmap without its disk, or of another one, says nothing: it is made anew."""
    os.makedirs(layout.path, 0o700, exist_ok=True)
    with suppress(FileExistsError), open(layout.tag, "xb") as tag:
        _give_to_owner(tag.fileno(), layout.tag)
        tag.write(_TAG)
    data = _read_header(layout.disk)
    if data is None:
        data = _render_header(_DISK_MAGIC, os.urandom(SALT_SIZE), layout.key)
        _create_sparse(layout.disk, DISK_SIZE, data)
    disk = _parse_header(data, _DISK_MAGIC, layout.disk)
    check_key(layout, disk, data)
    present = _read_header(layout.present)
    if present is None or _parse_header(present, _BITS_MAGIC, layout.present).pool_id != disk.pool_id:
        _create_sparse(layout.present, BITMAP_SIZE, _render_header(_BITS_MAGIC, disk.pool_id))


def data_ranges(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Where a sparse file may have something else than zeros: (start, end)."""
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end


def create_bitmap(layout: DomainLayout) -> int:
    """Make the live bitmap of a domain, loaded from the durable one; returns a memfd of 512 MiB, which the caller owns.

    Makes the pool's files where there are none; they belong to whom the directory does. Call it once per domain and
    boot: the memfd is what tells the domain's processes apart from those of an earlier life.
    Raises UnsupportedError (a newer format, or a filesystem without large files), CorruptError, NoSpaceError, and
    DeniedError where the pool is under another key.
    """
    with mapped_errors(f"cannot make the pool: {layout.path}"), ExitStack() as stack:
        _ensure_files(layout)
        source = os.open(layout.present, _PLAIN)
        stack.callback(os.close, source)
        os.fdatasync(source)  # of processes that were killed: who finds bits cleared takes them for durably cleared
        bitmap = os.memfd_create("nsfs-present", os.MFD_CLOEXEC)
        undo = stack.enter_context(ExitStack())
        undo.callback(os.close, bitmap)
        os.ftruncate(bitmap, BITMAP_SIZE)
        for start, end in data_ranges(source, BITMAP_SIZE):
            _copy_range(source, bitmap, start, end)
        undo.pop_all()
        return bitmap


def _copy_range(source: int, target: int, start: int, end: int) -> None:
    while start < end:
        data = os.pread(source, min(end - start, 1 << 20), start)
        os.pwrite(target, data, start)
        start += len(data)


def check_headers(layout: DomainLayout, disk: int, present: int, bitmap_fd: int) -> Header:
    """The disk's header, if the others are of the same pool."""
    header, *others = (
        _parse_header(os.pread(fd, _HEADER.size, 0), magic, layout.path)
        for fd, magic in ((disk, _DISK_MAGIC), (present, _BITS_MAGIC), (bitmap_fd, _BITS_MAGIC))
    )
    if any(other.pool_id != header.pool_id for other in others):
        raise CorruptError(f"the bitmap is of another pool: {layout.path}", hint="stop the daemon and start it again")
    return header
