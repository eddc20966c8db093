"""eStargz: find the table of contents at a blob's end, and make the layer index and the spans of it.

Owns the footers, the table's JSON and its rules (stargz-snapshotter, docs/estargz.md and estargz/types.go, v0.19).
A blob is a concatenation of gzip members; a member begins at each chunk's payload, so a chunk is had from its offset
alone, and its digest is of what decompresses. The layer's stream is all chunks' payloads, by rising place in the blob.

The table is only as good as its digest, which the manifest's annotation states: without one it is refused. A digest
proves who wrote the table, not that it makes sense: offsets that overlap or lie outside of the payload, and chunks that
do not make up their file or have no digest, are a CorruptError. Everything is pure.
"""

from __future__ import annotations

import datetime as dt
import functools
import hashlib
import re
import tarfile
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Annotated, NamedTuple

import msgspec
from msgspec import Meta, Struct, field

from nsfs.errors import CorruptError, UnsupportedError
from nsfs.format.gzip import GzipInflater
from nsfs.format.paths import clean_path
from nsfs.format.spans import SPAN_MAX, is_decodable
from nsfs.model.layer import Codec, Covers, Entry, Kind, LayerIndex, Segment, Span, Spans

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from nsfs.model.digest import Digest

TOC_NAME = "stargz.index.json"
TOC_MAX = 150 << 20
"""Bytes of the largest table, compressed or not; containers/storage has the same limit."""
TAIL = 1 << 20
"""The most of a blob's end that is fetched to find footer and table at once: 1 MiB is about 10,000 entries."""
_LEAST_TAIL = 64 << 10

_PREFETCH = b".prefetch.landmark"
_HIDDEN = frozenset({_PREFETCH, b".no.prefetch.landmark", TOC_NAME.encode()})
"""Names at the root that tell the snapshotter something and are no part of the image."""


class TocLocation(NamedTuple):
    """The table's gzip member: `size` bytes at `offset` of the blob. The payload ends where it begins.

    A `size` of 0 says that the table is not in the blob but in another image ("External TOC").
    """

    offset: int
    size: int

    @property
    def is_external(self) -> bool:
        """Whether the table is in another image."""
        return not self.size

    def cut(self, tail: bytes, tail_offset: int) -> bytes | None:
        """Return the table out of `tail`, which is the blob from `tail_offset` on; None if it begins before that."""
        start = self.offset - tail_offset
        return tail[start : start + self.size] if start >= 0 else None


def plan_footer(size: int) -> tuple[int, int]:
    """Decide which range (offset, length) of a blob of `size` bytes to fetch first, to find the footer in its end.

    A sixteenth of the blob mostly has the table, too, and costs little where it is more than that.
    """
    length = min(size, TAIL, max(size // 16, _LEAST_TAIL))
    return size - length, length


_FOOTERS = (
    (51, re.compile(rb"\x1f\x8b\x08\x04.{6}\x1a\0SG\x16\0([0-9a-fA-F]{16})STARGZ", re.DOTALL)),
    (47, re.compile(rb"\x1f\x8b\x08\x04.{6}\x16\0([0-9a-fA-F]{16})STARGZ", re.DOTALL)),
)
"""Length and beginning of the footers: empty gzip members, the table's offset in the header's extra field."""
_EXTERNAL = (46, re.compile(rb"\x1f\x8b\x08\x04.{6}\x15\0SG\x11\0STARGZEXTERNALTOC", re.DOTALL))


def parse_footer(tail: bytes, size: int) -> TocLocation:
    """Find the table of a blob of `size` bytes by its last bytes, at least 51 of them if the blob has as many.

    Raises CorruptError if there is no footer or it points nowhere.
    """
    for length, pattern in _FOOTERS:
        if match := pattern.match(tail[-length:]):
            return _locate(int(match[1], 16), size - length)
    if _EXTERNAL[1].match(tail[-_EXTERNAL[0] :]):
        return TocLocation(size - _EXTERNAL[0], 0)
    raise CorruptError("the layer is not eStargz: its blob ends without a footer")


def _locate(offset: int, end: int) -> TocLocation:
    if not 0 < end - offset <= TOC_MAX:
        raise CorruptError(f"the eStargz footer points to no table of contents: byte {offset}, where its end is {end}")
    return TocLocation(offset, end - offset)


def parse_toc(member: bytes, location: TocLocation, digest: Digest) -> tuple[LayerIndex, Spans]:
    """Verify the table, the gzip `member` that was found at `location`, and make the layer's index and spans of it.

    Entries keep the table's order and its duplicates; directories that it implies stay implied. Their digests, like
    everything in the table, are claims of who wrote it. Raises CorruptError, and UnsupportedError for what is sound but
    not offered.
    """
    text = _unpack(member)
    if hashlib.new(digest.algorithm, text).hexdigest() != digest.hex:
        raise CorruptError(f"the layer's table of contents does not have the digest: {digest}")
    try:
        table = msgspec.json.decode(text, type=_Table)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptError(f"the layer's table of contents makes no sense: {error}") from None
    if table.version != 1:
        raise UnsupportedError(f"the layer's table of contents is of a version that is not known: {table.version}")
    return _index(list(_files(table.entries)), location.offset)


def _unpack(member: bytes) -> bytes:
    """The one file of the tar in `member`."""
    tar = bytearray()
    inflater = GzipInflater()
    for piece in inflater.feed(member):
        tar += piece
        if len(tar) > TOC_MAX + tarfile.RECORDSIZE:
            raise CorruptError(f"the layer's table of contents is larger than {TOC_MAX} bytes")
    inflater.finish()
    try:
        header = tarfile.TarInfo.frombuf(bytes(tar[: tarfile.BLOCKSIZE]), "utf-8", "surrogateescape")
    except tarfile.TarError as error:
        raise CorruptError(f"the layer's table of contents is not in a tar: {error}") from None
    if header.name != TOC_NAME or not 0 <= header.size <= len(tar) - tarfile.BLOCKSIZE:
        raise CorruptError(
            f"the tar of the layer's table of contents has another file: {header.name!r}, {header.size} bytes"
        )
    return bytes(memoryview(tar)[tarfile.BLOCKSIZE : tarfile.BLOCKSIZE + header.size])


_Size = Annotated[int, Meta(ge=0, le=1 << 62)]
_Id = Annotated[int, Meta(ge=0, lt=1 << 32)]


class _Row(Struct, gc=False):
    """One entry as the table has it; what is zero or empty is left out there."""

    name: str
    type: str
    size: _Size = 0
    modtime: str = ""
    link_name: str = field(default="", name="linkName")
    mode: int = 0
    uid: _Id = 0
    gid: _Id = 0
    offset: _Size = 0
    inner_offset: _Size = field(default=0, name="innerOffset")
    major: Annotated[int, Meta(ge=0, lt=1 << 12)] = field(default=0, name="devMajor")
    minor: Annotated[int, Meta(ge=0, lt=1 << 20)] = field(default=0, name="devMinor")
    xattrs: dict[str, bytes | None] = {}
    digest: str = ""
    chunk_offset: _Size = field(default=0, name="chunkOffset")
    chunk_size: _Size = field(default=0, name="chunkSize")
    chunk_digest: str = field(default="", name="chunkDigest")


class _Table(Struct):
    entries: list[_Row]
    version: int = 1


class _Chunk(Struct, gc=False):
    """A piece of a file: `size` bytes, `inner` bytes into the member at `offset`; its place in the stream follows."""

    offset: int
    inner: int
    size: int
    file_offset: int
    digest: bytes
    start: int = 0


class _File(NamedTuple):
    path: bytes
    row: _Row
    chunks: list[_Chunk]


def _files(rows: Sequence[_Row]) -> Iterator[_File]:
    """Every entry, with the chunks that its row and the rows behind it have."""
    at = 0
    while at < len(rows):
        end = at + 1
        while end < len(rows) and rows[end].type == "chunk":
            end += 1
        row = rows[at]
        path = clean_path(_raw(row.name))
        if row.type == "reg":
            yield _File(path, row, _chunks(path, row, rows[at:end]))
        elif end == at + 1 and row.type in _KINDS:
            yield _File(path, row, [])
        else:
            raise CorruptError(f"the table of contents has chunks of no file, or an unknown type: {row.type} {path!r}")
        at = end


def _chunks(path: bytes, row: _Row, parts: Sequence[_Row]) -> list[_Chunk]:
    """The chunks of a regular file, which must make it up without a gap, all of them with a digest."""
    chunks: list[_Chunk] = []
    position = 0
    for part in parts if row.size else ():
        size = part.chunk_size or row.size - part.chunk_offset
        if part.chunk_offset != position or size <= 0:
            raise CorruptError(f"the chunks of a file are not in order: {path!r}")
        digest = part.chunk_digest or (row.digest if len(parts) == 1 else "")
        if not digest:
            raise CorruptError(f"a chunk of a file cannot be verified, it has no digest: {path!r}")
        chunks.append(_Chunk(part.offset, part.inner_offset, size, position, _sha256(digest)))
        position += size
    if position != row.size:
        raise CorruptError(f"the chunks of a file do not make up its size: {path!r}")
    return chunks


def _index(files: Sequence[_File], payload_end: int) -> tuple[LayerIndex, Spans]:
    chunks = sorted((chunk for file in files for chunk in file.chunks), key=lambda chunk: (chunk.offset, chunk.inner))
    ends = _member_ends(chunks, payload_end)
    hidden = {id(chunk) for file in files if file.path in _HIDDEN for chunk in file.chunks}
    spans: list[Span] = []
    start = 0
    for chunk in chunks:
        if id(chunk) not in hidden:
            chunk.start = start
            spans.append(_span(chunk, ends[chunk.offset]))
            start += chunk.size
    entries = [_entry(file) for file in files if file.path not in _HIDDEN]
    prefetch = next((file.row.offset for file in files if file.path == _PREFETCH), 0)
    return LayerIndex(entries, start, min(prefetch, payload_end)), Spans(Codec.GZIP_MEMBER, Covers.STREAM, spans)


def _member_ends(chunks: Sequence[_Chunk], payload_end: int) -> dict[int, int]:
    """Where the range of each member ends that `chunks`, which are sorted, lie in."""
    for chunk, after in pairwise(chunks):
        if chunk.offset == after.offset and chunk.inner + chunk.size > after.inner:
            raise CorruptError(f"two chunks overlap in the gzip member at byte {chunk.offset}")
    offsets = [*dict.fromkeys(chunk.offset for chunk in chunks), payload_end]
    if len(offsets) > 1 and offsets[-2] >= payload_end:
        raise CorruptError(f"a chunk lies behind the payload, which has {payload_end} bytes: {offsets[-2]}")
    return dict(pairwise(offsets))


def _span(chunk: _Chunk, end: int) -> Span:
    length = min(end - chunk.offset, SPAN_MAX)  # a member may go on with much that is no payload
    span = Span(chunk.offset, length, chunk.start, chunk.size, chunk.inner, chunk.digest)
    if not is_decodable(span):
        raise UnsupportedError(f"a chunk, with what its member has before it, is over {SPAN_MAX} bytes: {chunk.offset}")
    return span


_KINDS = {
    "reg": Kind.REGULAR,
    "dir": Kind.DIRECTORY,
    "symlink": Kind.SYMLINK,
    "hardlink": Kind.HARDLINK,
    "char": Kind.CHARACTER,
    "block": Kind.BLOCK,
    "fifo": Kind.FIFO,
}


def _entry(file: _File) -> Entry:
    path, row, chunks = file
    kind = _KINDS[row.type]
    link = _raw(row.link_name)
    return Entry(
        path=path,
        kind=kind,
        mode=row.mode & 0o7777,
        uid=row.uid,
        gid=row.gid,
        mtime_ns=_parse_time(row.modtime) if row.modtime else 0,
        size=row.size if kind is Kind.REGULAR else 0,
        link=clean_path(link) if kind is Kind.HARDLINK else link if kind is Kind.SYMLINK else b"",
        device=(row.major, row.minor) if kind in (Kind.CHARACTER, Kind.BLOCK) else (0, 0),
        xattrs=tuple((_raw(name), value or b"") for name, value in row.xattrs.items()),
        segments=tuple(_segments(chunks)),
    )


def _segments(chunks: Iterable[_Chunk]) -> Iterator[Segment]:
    """The segments of a file, one for each run of chunks that are neighbours in the stream too."""
    for shift, run in groupby(chunks, key=lambda chunk: chunk.start - chunk.file_offset):
        parts = list(run)
        start = parts[0].file_offset
        yield Segment(start, start + shift, parts[-1].file_offset + parts[-1].size - start)


def _raw(text: str) -> bytes:
    return text.encode()


def _sha256(text: str) -> bytes:
    match = _DIGEST.fullmatch(text)
    if match is None:
        raise CorruptError(f"the table of contents has a digest that is no sha256: {text[:100]!r}")
    return bytes.fromhex(match[1])


_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_TIME = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9})\d*)?(Z|[+-]\d\d:\d\d)", re.ASCII)
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_SECOND = dt.timedelta(seconds=1)


@functools.lru_cache(maxsize=4096)
def _parse_time(text: str) -> int:
    """Nanoseconds since 1970 of an RFC 3339 time."""
    match = _TIME.fullmatch(text)
    try:
        time = dt.datetime.fromisoformat(match[1] + match[3]) if match else None
    except ValueError:
        time = None
    if match is None or time is None:
        raise CorruptError(f"the table of contents has a time that is none: {text[:100]!r}")
    seconds = (time - _EPOCH) // _SECOND
    return seconds * 1_000_000_000 + int((match[2] or "").ljust(9, "0"))
