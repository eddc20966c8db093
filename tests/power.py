"""A disk that can lose its power: what was written is recorded, and any state that it might be found in is made.

Owns the model. A sector of 512 bytes may be in any state that it had since its file was last synced, whatever its
neighbours are in; so writes are lost, torn and done in another order. A name changes as a whole, in order, at the
latest when its directory is synced. What LMDB committed is there: it syncs itself.

One thread. Stands in for `os` in the modules that write; it does all that it records, so the files are real, too.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nsfs.store import files, poolfiles
from nsfs.store import pool as pool_module

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

    import pytest

SECTOR = 512


class Killed(BaseException):
    """The process that writes is gone; nobody may catch it."""


@dataclass(frozen=True, slots=True)
class Write:
    """Of whole sectors."""

    file: int
    offset: int
    data: bytes

    def sectors(self) -> Iterator[tuple[int, bytes]]:
        for at in range(0, len(self.data), SECTOR):
            yield self.offset + at, self.data[at : at + SECTOR]


@dataclass(frozen=True, slots=True)
class Punch:
    file: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Resize:
    file: int
    size: int


@dataclass(frozen=True, slots=True)
class Name:
    """From now on a file has this name, or with None nobody has."""

    path: str
    file: int | None


@dataclass(frozen=True, slots=True)
class Sync:
    """Of a file, or with a directory's path of its names."""

    what: int | str


@dataclass(frozen=True, slots=True)
class Note:
    """What the test itself knows from here on."""

    value: Any


Op = Write | Punch | Resize | Name | Sync | Note


@dataclass
class Disk:
    """Records; `forgets` names a file whose syncs do nothing."""

    forgets: str = ""
    ops: list[Op] = field(default_factory=list)
    kills: Callable[[Op], bool] = lambda _op: False
    """Whether the process dies instead of doing this."""
    on_kill: Callable[[], None] = lambda: None
    before_sync: Callable[[str], None] = lambda _path: None
    _by_inode: dict[int, int] = field(default_factory=dict)
    _names: dict[int, str] = field(default_factory=dict)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(pool_module, "os", self)
        patch.setattr(poolfiles, "os", self)
        patch.setattr(files, "os", self)
        patch.setattr(pool_module, "_libc", self)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def note(self, value: Any) -> None:
        """What a crash from here on finds beside the files, as one commit."""
        self._record(Note(value))

    def _record(self, op: Op) -> None:
        if self.kills(op):
            self.on_kill()
            raise Killed
        self.ops.append(op)

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        fd = os.open(path, flags, mode)
        if flags & os.O_CREAT:
            number = self._by_inode[os.fstat(fd).st_ino] = len(self._names)
            self._names[number] = path
            self._record(Name(path, number))
        return fd

    def _file(self, fd: int) -> int | None:
        return self._by_inode.get(os.fstat(fd).st_ino)

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        file = self._file(fd)
        if file is not None:
            self._record(Write(file, offset // SECTOR * SECTOR, _whole_sectors(fd, bytes(data), offset)))
        return os.pwrite(fd, data, offset)

    def ftruncate(self, fd: int, size: int) -> None:
        file = self._file(fd)
        if file is not None:
            self._record(Resize(file, size))
        os.ftruncate(fd, size)

    def fallocate(self, fd: int, flags: int, offset: int, size: int) -> int:
        file = self._file(fd)
        if file is not None:
            self._record(Punch(file, offset, size))
        return int(_fallocate(fd, flags, offset, size))

    def fsync(self, fd: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        file = self._file(fd)
        self.before_sync(path)
        if not self.forgets or os.path.basename(path) != self.forgets:
            self._record(Sync(path if file is None else file))

    fdatasync = fsync

    def rename(self, source: str, target: str) -> None:
        self._record(Name(target, self._by_inode[os.stat(source).st_ino]))
        self.ops.append(Name(source, None))
        os.rename(source, target)

    def unlink(self, path: str) -> None:
        os.stat(path)
        self._record(Name(path, None))
        os.unlink(path)


_fallocate = pool_module._libc.fallocate


def _whole_sectors(fd: int, data: bytes, offset: int) -> bytes:
    """`data` among what its first and its last sector have beside it."""
    low, end = offset // SECTOR * SECTOR, offset + len(data)
    reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    try:
        before, behind = os.pread(reader, offset - low, low), os.pread(reader, -end % SECTOR, end)
    finally:
        os.close(reader)
    return before + data + behind.ljust(-end % SECTOR, b"\0")


Choose = Callable[[int], int]
"""How many of so many changes were done before the power was lost; the last one of these counts."""


def _choices(rng: random.Random) -> Choose:
    """Nothing, everything, or anything."""
    return rng.choice([lambda _count: 0, _all, lambda count: rng.randint(0, count)])


def _all(count: int) -> int:
    return count


@dataclass
class _File:
    size: int = 0
    sizes: list[int] = field(default_factory=list)
    sectors: dict[int, bytes] = field(default_factory=dict)
    pending: dict[int, list[bytes]] = field(default_factory=lambda: defaultdict(list))

    def punch(self, offset: int, size: int) -> None:
        for at in {*self.sectors, *self.pending}:
            if offset <= at < offset + size:
                self.pending[at].append(bytes(SECTOR))

    def settle(self, choose: Choose) -> None:
        for at, versions in self.pending.items():
            if done := choose(len(versions)):
                self.sectors[at] = versions[done - 1]
        if done := choose(len(self.sizes)):
            self.size = self.sizes[done - 1]
        self.pending.clear()
        self.sizes.clear()


class Found:
    """What a disk may be found as that lost its power after these operations."""

    def __init__(self, ops: list[Op], rng: random.Random) -> None:
        self.notes: list[Any] = []
        self._files: dict[int, _File] = defaultdict(_File)
        self._names: dict[str, int | None] = {}
        self._renames: list[Name] = []
        for op in ops:
            self._do(op)
        for file in self._files.values():
            file.settle(_choices(rng))
        self._settle_names(_choices(rng))

    def _do(self, op: Op) -> None:
        match op:
            case Write():
                for at, data in op.sectors():
                    self._files[op.file].pending[at].append(data)
            case Punch():
                self._files[op.file].punch(op.offset, op.size)
            case Resize():
                self._files[op.file].sizes.append(op.size)
            case Name():
                self._renames.append(op)
            case Sync(what=str()):
                self._settle_names(_all)
            case Sync(what=int(file)):
                self._files[file].settle(_all)
            case Note():
                self.notes.append(op.value)

    def _settle_names(self, choose: Choose) -> None:
        self._names |= {name.path: name.file for name in self._renames[: choose(len(self._renames))]}
        self._renames.clear()

    def make(self, old: str, new: str) -> None:
        """Lay out below `new`, which exists, the files that were below `old`."""
        for path, number in self._names.items():
            if number is not None:
                _make_file(new + path.removeprefix(old), self._files[number])


def _make_file(path: str, file: _File) -> None:
    with open(path, "wb") as made:
        for at, data in file.sectors.items():
            if any(data):
                os.pwrite(made.fileno(), data, at)
        made.truncate(file.size)
