"""Tar archives, as a push parser without IO: pieces of the stream in, entries and contents out.

Owns ustar, GNU and PAX headers, and the four ways to write a sparse file (old GNU; PAX 0.0, 0.1, 1.0). Where readers of
tar disagree, Go's archive/tar is followed, because it is what container runtimes unpack layers with: a hard link has no
payload whatever its size says, and what comes after two zero blocks is nobody's business.

Refuses, by CorruptError, what no such reader takes or no Linux filesystem holds, in time and memory bounded by the
limits below. Invariants: those of `model.layer.Entry`; events do not depend on how the stream was cut, except that
pieces of large files may be cut elsewhere; contents are views of the caller's bytes and are not copied, but for those
that a cut divides. One parser belongs to one thread.
"""

from __future__ import annotations

from struct import Struct as Layout
from typing import TYPE_CHECKING, Final, NoReturn, TypeAlias
from zlib import adler32

from blake3 import blake3
from msgspec import Struct

from nsfs.errors import CorruptError
from nsfs.format.paths import NAME_MAX, clean_path
from nsfs.format.pax import Records, parse_decimal, parse_pax, parse_time, parse_xattrs
from nsfs.format.sparse import SparseMap, count_1x0_lines, parse_map_0x1, parse_map_1x0, parse_old_gnu, plan_segments
from nsfs.model.layer import Entry, Kind, Segment

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK: Final = 512
WHOLE: Final = 1 << 20
"""A regular file of at most this size, unless sparse, arrives in one piece."""
MAX_FILE: Final = (1 << 44) - (1 << 30) - 4096
"""Bytes of a regular file: all the addresses of a disk that an ext4 file can hold."""
MAX_SPECIAL: Final = 1 << 20
"""Bytes of a PAX header, a GNU long name or a sparse map, as in Go's archive/tar and libarchive."""
MAX_ENTRIES: Final = 2_000_000
MAX_METADATA: Final = 256 << 20
"""Bytes of all paths, links, xattrs, segments (128 each) and visits of PAX records (32 each) together."""
MAX_HASHED_HOLES: Final = 1 << 30
"""Bytes of holes that are hashed per archive; a sparse file beyond that has no digest."""
_SEGMENT_COST: Final = 128
_RECORD_COST: Final = 32

_HEADER: Final = Layout("100s8s8s8s12s12s8sc100s8s64x8s8s155s8x4s")
_ZERO_BLOCK: Final = bytes(BLOCK)
_ZEROS: Final = bytes(1 << 20)
_NO_CONTENT: Final = blake3(b"").digest()
_ODD_NAMES: Final = frozenset((b"", b".", b".."))
_CACHED: Final = 4096
_ID_MAX: Final = (1 << 32) - 1
_TIME_MAX_NS: Final = (1 << 63) - 1

_KINDS: Final = {
    b"0": Kind.REGULAR,
    b"\0": Kind.REGULAR,
    b"7": Kind.REGULAR,
    b"S": Kind.REGULAR,
    b"1": Kind.HARDLINK,
    b"2": Kind.SYMLINK,
    b"3": Kind.CHARACTER,
    b"4": Kind.BLOCK,
    b"5": Kind.DIRECTORY,
    b"6": Kind.FIFO,
}
_OF_ONE_FILE: Final = (b"path", b"linkpath", b"size", b"GNU.sparse.")
"""Records that mean nothing in a global header, and are ignored there."""
_SPECIAL: Final = frozenset((b"x", b"g", b"L", b"K"))
_IGNORED: Final = frozenset((b"V",))


class Begin(Struct, frozen=True, gc=False):
    """A regular file comes in pieces now: it is larger than `WHOLE`, or sparse. Its `Member` comes after them."""

    path: bytes
    size: int


class Piece(Struct, frozen=True, gc=False):
    """Bytes of the file that began; in order, and what lies between two pieces is zeros."""

    file_offset: int
    data: memoryview


class Member(Struct, frozen=True, gc=False):
    """An entry is complete. `content` is a regular file's, unless it came in pieces."""

    entry: Entry
    content: memoryview | None = None


Event: TypeAlias = Begin | Piece | Member


class _Numbers(dict[bytes, int]):
    """Numeric header fields with their values; most repeat from header to header."""

    def __missing__(self, field: bytes) -> int:
        if len(self) >= _CACHED:
            self.clear()
        value = self[field] = parse_number(field)
        return value


class _Parents(dict[bytes, bytes]):
    """Directories as headers spell them, clean and ready to have a name appended."""

    def __missing__(self, raw: bytes) -> bytes:
        if len(self) >= _CACHED:
            self.clear()
        path = clean_path(raw)
        value = self[raw] = path + b"/" if path else b""
        return value


class _Fields(Struct):
    """A member's header while extended headers are applied to it."""

    name: bytes
    type: bytes
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int
    link: bytes
    device: tuple[int, int]
    xattrs: tuple[tuple[bytes, bytes], ...] = ()


class TarParser:
    """Feed it the stream, then `close` it. After an error it may not be used any more."""

    def __init__(self, *, max_entries: int = MAX_ENTRIES) -> None:
        self._max_entries = max_entries
        self._entries = 0
        self._metadata = 0
        self._offset = 0
        self._carry = bytearray()
        self._need = BLOCK
        self._skip = 0
        self._step: Callable[[memoryview, int], int] = self._read_header
        self._events: list[Event] = []
        self._numbers = _Numbers()
        self._parents = _Parents()
        self._globals: Records = {}
        self._records: Records | None = None
        self._long_name: bytes | None = None
        self._long_link: bytes | None = None
        self._special = b""
        self._fields: _Fields
        self._path = b""
        self._payload = 0
        self._map: SparseMap = []
        self._map_bytes = bytearray()
        self._map_lines = 0
        self._real_size = 0
        self._segments: tuple[Segment, ...] = ()
        self._segment = 0
        self._at = 0
        self._hash: blake3 | None = None
        self._hashed = 0
        self._holes_left = MAX_HASHED_HOLES

    def feed(self, data: bytes | memoryview) -> list[Event]:
        """What `data`, the next bytes of the stream, completes; raises CorruptError.

        The views in the events are of `data`, which must not change as long as they are used.
        """
        view = memoryview(data)
        while self._carry:
            missing = self._need - len(self._carry)
            self._carry += view[:missing]
            view = view[missing:]
            if len(self._carry) < self._need:
                break
            held, self._carry = self._carry, bytearray()
            self._run(memoryview(held).toreadonly())
        else:
            self._run(view)
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        """Check that the archive did not end inside an entry; raises CorruptError.

        The two zero blocks at the end may be missing, as other readers allow.
        """
        between = self._step in (self._read_header, self._read_second_zero, self._read_rest)
        held = self._carry or self._skip or self._records is not None
        if not between or held or self._long_name is not None or self._long_link is not None:
            raise CorruptError(f"the tar ends inside an entry: after {self._offset + len(self._carry)} bytes")

    def _run(self, view: memoryview) -> None:
        pos, end = 0, len(view)
        base = self._offset
        while True:
            if self._skip:
                step = min(self._skip, end - pos)
                self._skip -= step
                pos += step
            if end - pos < self._need or pos == end:
                break
            self._offset = base + pos
            pos = self._step(view, pos)
        self._offset = base + pos
        self._carry += view[pos:]

    def _expect(self, step: Callable[[memoryview, int], int], need: int = BLOCK) -> None:
        self._step, self._need = step, need

    def _read_header(self, view: memoryview, pos: int) -> int:
        raw = _HEADER.unpack_from(view, pos)
        name, mode, uid, gid, size, mtime, check, kind, link, magic, major, minor, prefix, trailer = raw
        if not _is_sum(check, view, pos):
            return self._read_odd_block(view, pos)
        number = self._numbers
        name = name.partition(b"\0")[0]
        if magic[:6] == b"ustar\0":
            if prefix[0]:
                name = _ustar_prefix(prefix, trailer) + b"/" + name
        elif magic == b"ustar  \0":
            if prefix[0]:
                name = _go17_prefix(prefix) + name
        else:
            major = minor = b""
        try:
            length, seconds = number[size], number[mtime]
            if kind in _SPECIAL:
                return self._begin_special(kind, name, length, pos)
            device = (number[major], number[minor]) if kind in b"34" else (0, 0)
            owner, group, bits = number[uid], number[gid], number[mode]
        except ValueError:
            self._fail(name, "a number in its header is none")
        link = link.partition(b"\0")[0]
        fields = _Fields(name, kind, bits & 0o7777, owner, group, seconds * 10**9, length, link, device)
        return self._begin_member(fields, view, pos)

    def _read_odd_block(self, view: memoryview, pos: int) -> int:
        if view[pos : pos + BLOCK] != _ZERO_BLOCK:
            raise CorruptError(f"a tar header has a bad checksum: at offset {self._offset}")
        self._expect(self._read_second_zero)
        return pos + BLOCK

    def _read_second_zero(self, view: memoryview, pos: int) -> int:
        if view[pos : pos + BLOCK] != _ZERO_BLOCK:
            raise CorruptError(f"a tar has a single zero block inside: before offset {self._offset}")
        self._expect(self._read_rest, 0)
        return pos + BLOCK

    def _read_rest(self, view: memoryview, _pos: int) -> int:
        return len(view)

    def _begin_special(self, kind: bytes, name: bytes, size: int, pos: int) -> int:
        if not 0 <= size <= MAX_SPECIAL:
            self._fail(name, f"an extended header is too long: {size} bytes")
        self._special = kind
        self._payload = size
        self._expect(self._read_special, size)
        return pos + BLOCK

    def _read_special(self, view: memoryview, pos: int) -> int:
        body = bytes(view[pos : pos + self._payload])
        if self._special == b"L":
            self._long_name = body.partition(b"\0")[0]
        elif self._special == b"K":
            self._long_link = body.partition(b"\0")[0]
        else:
            records = parse_pax(body)
            if self._special == b"x":
                self._records = records
            else:
                self._globals |= {key: value for key, value in records.items() if not key.startswith(_OF_ONE_FILE)}
                self._charge(len(body))
        self._skip_padding(self._payload)
        self._expect(self._read_header)
        return pos + self._payload

    def _begin_member(self, fields: _Fields, view: memoryview, pos: int) -> int:
        self._fields = fields
        sparse: Records | None = None
        if self._records is not None or self._globals or self._long_name is not None or self._long_link is not None:
            sparse = self._apply_extended(fields)
        name, kind = fields.name, _KINDS.get(fields.type)
        if fields.type == b"\0" and name.endswith(b"/"):
            kind = Kind.DIRECTORY
        if kind is None or kind is Kind.REGULAR:
            size = fields.size
            if not 0 <= size <= MAX_FILE:
                self._fail(name, f"its size is impossible: {size}")
        else:
            size = 0
        path = self._path = self._clean(name)
        if kind is None or not (path or kind is Kind.DIRECTORY):
            return self._ignore(fields, kind, size, pos)
        self._count(fields)
        if fields.type == b"S":
            return self._begin_old_sparse(view, pos)
        if kind is not Kind.REGULAR:
            return self._end_header_only(kind, pos)
        if sparse is not None:
            return self._begin_pax_sparse(sparse, pos)
        if size > WHOLE:
            self._begin_pieces([(0, size)], size, size, self._offset + BLOCK)
            return pos + BLOCK
        return self._begin_whole(view, pos, size)

    def _apply_extended(self, fields: _Fields) -> Records | None:
        """Apply what extended headers say; the records of a PAX sparse file, if it is one."""
        records = {**self._globals, **(self._records or {})}
        self._charge(_RECORD_COST * len(records))
        try:
            _apply_records(fields, records)
        except ValueError:
            self._fail(fields.name, "a PAX record is malformed")
        fields.name = self._long_name or fields.name
        fields.link = self._long_link or fields.link
        self._records = self._long_name = self._long_link = None
        if fields.xattrs:
            self._charge(sum(len(name) + len(value) for name, value in fields.xattrs))
        if not _is_sparse(records):
            return None
        fields.name = records.get(b"GNU.sparse.name") or fields.name
        return records

    def _clean(self, raw: bytes) -> bytes:
        raw = raw.rstrip(b"/")
        head, _, name = raw.rpartition(b"/")
        if len(raw) > NAME_MAX or name in _ODD_NAMES or b".." in raw:
            return clean_path(raw)
        return self._parents[head] + name

    def _ignore(self, fields: _Fields, kind: Kind | None, size: int, pos: int) -> int:
        if kind is None and fields.type not in _IGNORED:
            self._fail(fields.name, f"its type is unknown: {fields.type!r}")
        self._skip = size + -size % BLOCK
        self._expect(self._read_header)
        self._count(fields)
        return pos + BLOCK

    def _count(self, fields: _Fields) -> None:
        self._entries += 1
        if self._entries > self._max_entries:
            raise CorruptError(f"a tar has too many entries: more than {self._max_entries}")
        if not (0 <= fields.uid <= _ID_MAX and 0 <= fields.gid <= _ID_MAX):
            self._fail(fields.name, f"its owner is impossible: {fields.uid}:{fields.gid}")
        if not -_TIME_MAX_NS <= fields.mtime_ns <= _TIME_MAX_NS:
            fields.mtime_ns = 0  # what containerd makes of a time that 64 bits of nanoseconds do not hold
        self._charge(len(fields.name) + len(fields.link))

    def _charge(self, cost: int) -> None:
        self._metadata += cost
        if self._metadata > MAX_METADATA:
            raise CorruptError(f"a tar has too much metadata: more than {MAX_METADATA >> 20} MiB")

    def _end_header_only(self, kind: Kind, pos: int) -> int:
        fields = self._fields
        fields.size = 0
        if kind is Kind.HARDLINK:
            fields.link = clean_path(fields.link)
        elif kind is Kind.SYMLINK:
            if not 0 < len(fields.link) < 4096:
                self._fail(fields.name, f"a symlink's target has an impossible length: {len(fields.link)}")
        else:
            fields.link = b""
        major, minor = fields.device
        if not (0 <= major < 1 << 12 and 0 <= minor < 1 << 20):
            self._fail(fields.name, f"its device number is impossible: {major}:{minor}")
        self._emit(kind, (), b"")
        self._expect(self._read_header)
        return pos + BLOCK

    def _emit(
        self, kind: Kind, segments: tuple[Segment, ...], digest: bytes, content: memoryview | None = None
    ) -> None:
        f = self._fields
        entry = Entry(
            self._path, kind, f.mode, f.uid, f.gid, f.mtime_ns, f.size, f.link, f.device, f.xattrs, segments, digest
        )
        self._events.append(Member(entry, content))

    def _begin_whole(self, view: memoryview, pos: int, size: int) -> int:
        self._payload = size
        self._fields.link = b""
        pos += BLOCK
        self._offset += BLOCK
        if len(view) - pos >= size:
            return self._read_whole(view, pos)
        self._expect(self._read_whole, size)
        return pos

    def _read_whole(self, view: memoryview, pos: int) -> int:
        size = self._payload
        end = pos + size
        content = view[pos:end]
        if size:
            self._emit(Kind.REGULAR, (Segment(0, self._offset, size),), blake3(content).digest(), content)
        else:
            self._emit(Kind.REGULAR, (), _NO_CONTENT, content)
        self._skip_padding(size)
        self._expect(self._read_header)
        return end

    def _skip_padding(self, size: int) -> None:
        self._skip = -size % BLOCK

    def _begin_old_sparse(self, view: memoryview, pos: int) -> int:
        block = bytes(view[pos : pos + BLOCK])
        if block[257:265] != b"ustar  \0":
            self._fail(self._fields.name, "only GNU archives have sparse files of type S")
        self._map, self._payload = [], 0
        try:
            self._real_size = parse_number(block[483:495])
        except ValueError:
            self._fail(self._fields.name, "a number in its header is none")
        self._add_old_sparse(block[386:482], more=block[482])
        return pos + BLOCK

    def _read_sparse_extension(self, view: memoryview, pos: int) -> int:
        block = bytes(view[pos : pos + BLOCK])
        self._add_old_sparse(block[:504], more=block[504])
        return pos + BLOCK

    def _add_old_sparse(self, table: bytes, *, more: int) -> None:
        self._payload += BLOCK
        if self._payload > MAX_SPECIAL:
            self._fail(self._fields.name, "its sparse map is too long")
        try:
            self._map += parse_old_gnu(table, parse_number)
        except ValueError:
            self._fail(self._fields.name, "its sparse map is malformed")
        if more:
            self._expect(self._read_sparse_extension)
        else:
            self._begin_pieces(self._map, self._real_size, self._fields.size, self._offset + BLOCK)

    def _begin_pax_sparse(self, records: Records, pos: int) -> int:
        fields = self._fields
        try:
            size = records.get(b"GNU.sparse.size") or records.get(b"GNU.sparse.realsize")
            self._real_size = parse_decimal(size) if size else fields.size
            if records.get(b"GNU.sparse.major") == b"1":
                self._map_bytes, self._map_lines, self._payload = bytearray(), 0, fields.size
                self._expect(self._read_sparse_map)
            else:
                self._begin_pieces(parse_map_0x1(records), self._real_size, fields.size, self._offset + BLOCK)
        except ValueError:
            self._fail(fields.name, "its sparse map is malformed")
        return pos + BLOCK

    def _read_sparse_map(self, view: memoryview, pos: int) -> int:
        block = bytes(view[pos : pos + BLOCK])
        self._map_bytes += block
        self._map_lines += block.count(b"\n")
        try:
            complete = self._map_lines >= count_1x0_lines(self._map_bytes)
            entries = parse_map_1x0(self._map_bytes) if complete else []
        except ValueError:
            self._fail(self._fields.name, "its sparse map is malformed")
        left = self._payload - len(self._map_bytes)
        if left < 0 or len(self._map_bytes) > MAX_SPECIAL:
            self._fail(self._fields.name, "its sparse map is too long")
        if complete:
            self._begin_pieces(entries, self._real_size, left, self._offset + BLOCK)
        return pos + BLOCK

    def _begin_pieces(self, entries: SparseMap, size: int, stored: int, offset: int) -> None:
        """The file's `stored` bytes begin at `offset` of the stream; what they don't cover of its `size` is holes."""
        fields = self._fields
        fields.size, fields.link = size, b""
        try:
            self._segments = plan_segments(entries, size, stored, offset)
        except ValueError:
            self._fail(fields.name, "its sparse map does not fit its size")
        if size > MAX_FILE:
            self._fail(fields.name, f"its size is impossible: {size}")
        self._charge(_SEGMENT_COST * len(self._segments))
        holes = size - stored
        self._hash = blake3() if holes <= self._holes_left else None
        self._holes_left -= holes if self._hash else 0
        self._payload, self._segment, self._at, self._hashed = stored, 0, 0, 0
        self._events.append(Begin(self._path, size))
        self._expect(self._read_piece, 1)
        if not self._segments:
            self._end_pieces()

    def _read_piece(self, view: memoryview, pos: int) -> int:
        segment = self._segments[self._segment]
        data = view[pos : pos + segment.length - self._at]
        file_offset = segment.file_offset + self._at
        self._hash_zeros(file_offset)
        if self._hash:
            self._hash.update(data)
            self._hashed += len(data)
        self._events.append(Piece(file_offset, data))
        self._at += len(data)
        if self._at == segment.length:
            self._segment, self._at = self._segment + 1, 0
            if self._segment == len(self._segments):
                self._end_pieces()
        return pos + len(data)

    def _hash_zeros(self, until: int) -> None:
        while self._hash and self._hashed < until:
            zeros = _ZEROS[: until - self._hashed]
            self._hash.update(zeros)
            self._hashed += len(zeros)

    def _end_pieces(self) -> None:
        self._hash_zeros(self._fields.size)
        self._emit(Kind.REGULAR, self._segments, self._hash.digest() if self._hash else b"")
        self._skip_padding(self._payload)
        self._expect(self._read_header)

    def _fail(self, name: bytes, what: str) -> NoReturn:
        raise CorruptError(f"a tar entry is malformed: {name[:200]!r} at offset {self._offset}: {what}")


def parse_number(field: bytes) -> int:
    """A numeric header field: octal digits between blanks and NULs, or GNU's base-256; raises ValueError.

    Anything after a NUL that follows digits is ignored. Base-256 numbers may be negative and have at most 63 bits.
    """
    if field and field[0] & 0x80:
        return _parse_base256(field)
    digits = field.strip(b" \0").partition(b"\0")[0]
    if not digits:
        return 0
    if not digits.isdigit():
        raise ValueError(field)
    return int(digits, 8)


def _parse_base256(field: bytes) -> int:
    mask = (1 << (8 * len(field) - 1)) - 1
    number = int.from_bytes(field, "big")
    number = ~(~number & mask) if field[0] & 0x40 else number & mask
    if not -1 << 63 <= number < 1 << 63:
        raise ValueError(field)
    return number


def _is_sum(check: bytes, view: memoryview, pos: int) -> bool:
    """Whether `check` is the sum of the header's bytes, its own eight taken as blanks.

    The low half of an Adler-32 is one more than the sum of the bytes modulo 65,521, which 256 bytes cannot reach.
    """
    half = pos + BLOCK // 2
    first, second = adler32(view[pos:half]) & 0xFFFF, adler32(view[half : pos + BLOCK]) & 0xFFFF
    total = first + second - 2 - sum(check) + 8 * 0x20
    try:
        claimed = parse_number(check)
    except ValueError:
        return False
    return claimed == total or claimed == total - 256 * _count_high(view[pos : pos + BLOCK], check)


def _count_high(block: memoryview, check: bytes) -> int:
    """How many bytes of the header are negative to an old tar that takes them as signed."""
    return sum(byte >> 7 for byte in block) - sum(byte >> 7 for byte in check)


def _ustar_prefix(prefix: bytes, trailer: bytes) -> bytes:
    """The directory part of a ustar name; in star's variant two times follow it inside the same field."""
    return (prefix[:131] if trailer == b"tar\0" else prefix).partition(b"\0")[0]


def _go17_prefix(prefix: bytes) -> bytes:
    """What Go before 1.8 wrote as a prefix where the GNU format has two times (golang.org/issue/12594), and a slash."""
    try:
        parse_number(prefix[:12])
        if prefix[12]:
            parse_number(prefix[12:24])
    except ValueError:
        name = prefix.partition(b"\0")[0]
        return name + b"/" if name.isascii() else b""
    return b""


def _apply_records(fields: _Fields, records: Records) -> None:
    """Let non-empty PAX records replace what the header says; raises ValueError."""
    fields.name = records.get(b"path") or fields.name
    fields.link = records.get(b"linkpath") or fields.link
    if size := records.get(b"size"):
        fields.size = parse_decimal(size)
    if uid := records.get(b"uid"):
        fields.uid = parse_decimal(uid)
    if gid := records.get(b"gid"):
        fields.gid = parse_decimal(gid)
    if mtime := records.get(b"mtime"):
        fields.mtime_ns = parse_time(mtime)
    fields.xattrs = parse_xattrs(records)


def _is_sparse(records: Records) -> bool:
    version = records.get(b"GNU.sparse.major", b""), records.get(b"GNU.sparse.minor", b"")
    if version in ((b"0", b"0"), (b"0", b"1"), (b"1", b"0")):
        return True
    return version == (b"", b"") and bool(records.get(b"GNU.sparse.map"))
