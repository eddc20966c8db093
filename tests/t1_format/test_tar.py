from __future__ import annotations

import time
import tracemalloc
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from images import (
    Item,
    block_device,
    character,
    checksummed,
    directory,
    fifo,
    file,
    hardlink,
    header,
    opaque,
    padded,
    pax_record,
    render_tar,
    sample_content,
    sparse,
    symlink,
    whiteout,
)
from nsfs.errors import CorruptError
from nsfs.format.tar import MAX_FILE, WHOLE, Begin, Event, Member, Piece, TarParser, parse_number
from nsfs.model.layer import Entry, Kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

END = bytes(1024)
SECOND = 10**9


def feed(pieces: Iterable[bytes]) -> list[Event]:
    parser = TarParser()
    events = [event for piece in pieces for event in parser.feed(piece)]
    parser.close()
    return events


def cut(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


def contents(events: Iterable[Event]) -> list[tuple[Entry, bytes]]:
    """Every entry with its content, however it arrived, checked against its digest and its segments."""
    found = []
    buffer: bytearray | None = None
    for event in events:
        match event:
            case Begin(_, size):
                assert buffer is None
                buffer = bytearray(size)
            case Piece(offset, data):
                assert buffer is not None
                assert not any(buffer[offset : offset + len(data)])
                buffer[offset : offset + len(data)] = data
            case Member(entry, content):
                assert (content is not None) == (entry.kind is Kind.REGULAR and buffer is None)
                found.append((entry, bytes(buffer if buffer is not None else content or b"")))
                assert len(found[-1][1]) == entry.size
                buffer = None
    assert buffer is None
    return found


def parse(data: bytes) -> list[tuple[Entry, bytes]]:
    found = contents(feed([data]))
    for entry, content in found:
        rebuilt = bytearray(entry.size)
        for segment in entry.segments:
            piece = data[segment.stream_offset : segment.stream_offset + segment.length]
            rebuilt[segment.file_offset : segment.file_offset + segment.length] = piece
        assert rebuilt == content
        assert entry.digest == (blake3(content).digest() if entry.kind is Kind.REGULAR else b"")
    return found


def entry_of(data: bytes) -> Entry:
    ((entry, _),) = parse(data)
    return entry


def pax(*records: tuple[bytes, bytes], kind: bytes = b"x") -> bytes:
    body = b"".join(pax_record(key, value) for key, value in records)
    return header(b"PaxHeaders/x", kind, size=len(body)) + padded(body)


def long(kind: bytes, value: bytes) -> bytes:
    return header(b"././@LongLink", kind, size=len(value) + 1) + padded(value + b"\0")


def with_field(block: bytes, start: int, value: bytes) -> bytes:
    return checksummed(block[:start] + value + block[start + len(value) :])


ITEMS = [
    directory("etc", 0o1777, uid=7, gid=8),
    file("etc/motd", b"hello\n" * 200, 0o4755, xattrs={"user.raw": b"\xff\0=\n", "security.capability": b"\1"}),
    file("etc/empty", mtime_ns=12_345_678_901),
    hardlink("etc/again", "./etc//motd"),
    symlink("etc/" + "s" * 120, "../" + "t" * 200),
    character("dev/null", 1, 3),
    block_device("dev/sda", 8, 300),
    fifo("dev/pipe"),
    sparse("hole", 30_000, [(0, b"begin"), (5_000, b"middle" * 100), (30_000, b"")]),
    whiteout("etc/issue"),
    opaque("etc"),
    file("big-owner", b"x" * 511, uid=3_000_000_000, gid=2**32 - 1),
    file("before-the-epoch", b"y" * 513, mtime_ns=-1_500_000_000),
]
EVERYTHING = render_tar(ITEMS)


def test_every_kind_of_entry() -> None:
    found = {entry.path: (entry, content) for entry, content in parse(EVERYTHING)}
    motd, content = found[b"etc/motd"]
    assert content == b"hello\n" * 200
    assert (motd.mode, motd.xattrs) == (0o4755, ((b"security.capability", b"\1"), (b"user.raw", b"\xff\0=\n")))
    assert found[b"etc"][0] == Entry(b"etc", Kind.DIRECTORY, 0o1777, 7, 8, 1_700_000_000 * SECOND)
    assert found[b"etc/empty"][0].mtime_ns == 12_345_678_901
    assert found[b"etc/empty"][0].segments == ()
    assert (found[b"etc/again"][0].kind, found[b"etc/again"][0].link) == (Kind.HARDLINK, b"etc/motd")
    assert found[b"etc/" + b"s" * 120][0].link == b"../" + b"t" * 200
    assert found[b"dev/null"][0].device == (1, 3)
    assert (found[b"dev/sda"][0].kind, found[b"dev/sda"][0].device) == (Kind.BLOCK, (8, 300))
    assert found[b"dev/pipe"][0].kind is Kind.FIFO
    assert [segment.file_offset for segment in found[b"hole"][0].segments] == [0, 5_000]
    assert {b"etc/.wh.issue", b"etc/.wh..wh..opq"} < found.keys()
    assert (found[b"big-owner"][0].uid, found[b"big-owner"][0].gid) == (3_000_000_000, 2**32 - 1)
    assert found[b"before-the-epoch"][0].mtime_ns == -1_500_000_000


@pytest.mark.parametrize("size", [1, 7, 511, 512, 513, 1024, 4096])
def test_cuts_do_not_matter(size: int) -> None:
    assert contents(feed(cut(EVERYTHING, size))) == parse(EVERYTHING)


def test_whole_or_in_pieces_is_a_matter_of_size_alone() -> None:
    tar = render_tar([file("small", bytes(WHOLE)), file("large", bytes(WHOLE + 1))])
    for size in (100_000, 1 << 20, len(tar)):
        events = feed(cut(tar, size))
        assert [type(event) for event in events if not isinstance(event, Piece)] == [Member, Begin, Member]
        assert [len(content) for _, content in contents(events)] == [WHOLE, WHOLE + 1]


def test_contents_are_not_copied() -> None:
    tar = render_tar([file("a", b"a" * 5000)])
    (event,) = TarParser().feed(tar)
    assert isinstance(event, Member)
    assert event.content is not None
    assert event.content.obj is tar


def test_every_cut_off_is_an_error_but_between_entries() -> None:
    parser = TarParser()
    clean = {0} | {len(render_tar(ITEMS[: index + 1], end=b"")) for index in range(len(ITEMS))}
    clean |= {max(clean) + 512, max(clean) + 1024}
    for size in range(len(EVERYTHING) + 1):
        if size in clean:
            parser.close()
        else:
            with pytest.raises(CorruptError, match="ends inside an entry"):
                parser.close()
        parser.feed(EVERYTHING[size : size + 1])


@pytest.mark.parametrize("end", [b"", bytes(512), END, END + b"garbage", END + EVERYTHING])
def test_ends(end: bytes) -> None:
    assert parse(EVERYTHING[:-1024] + end) == parse(EVERYTHING)


def test_zero_block_inside_is_refused() -> None:
    with pytest.raises(CorruptError, match="single zero block"):
        feed([bytes(512) + EVERYTHING])


def test_empty_stream() -> None:
    assert feed([]) == feed([b""]) == feed([END]) == []


# Names


@pytest.mark.parametrize(
    ("name", "path"),
    [
        (b"/etc/passwd", b"etc/passwd"),
        (b"./a//b/./c", b"a/b/c"),
        (b"a/../b", b"b"),
        (b"//x/", b"x"),
        (b"a/..b", b"a/..b"),
        (b"\xff\xfe", b"\xff\xfe"),
    ],
)
def test_names_are_cleaned(name: bytes, path: bytes) -> None:
    assert entry_of(header(name, b"0") + END).path == path
    assert entry_of(long(b"L", name) + header(b"short", b"0") + END).path == path


def test_the_root_is_a_directory_or_nothing() -> None:
    tar = header(b"./", b"5", mode=0o711) + header(b"/", b"0", size=3) + padded(b"abc") + header(b"", b"2", link=b"x")
    assert entry_of(tar + END) == Entry(b"", Kind.DIRECTORY, 0o711, 0, 0, 0)


@pytest.mark.parametrize("name", [b"../x", b"/..", b"a/../../b", b"a/" + b"n" * 256, b"n/" * 2049])
def test_names_that_cannot_be_are_refused(name: bytes) -> None:
    for tar in (long(b"L", name) + header(b"x", b"0"), pax((b"path", name)) + header(b"x", b"0")):
        with pytest.raises(CorruptError):
            feed([tar + END])


def test_hard_link_out_of_the_root_is_refused() -> None:
    with pytest.raises(CorruptError, match="leaves the root"):
        feed([header(b"x", b"1", link=b"../../etc/shadow") + END])


@pytest.mark.parametrize("target", [b"", b"t" * 4096])
def test_impossible_symlinks_are_refused(target: bytes) -> None:
    with pytest.raises(CorruptError, match="'link'"):
        feed([long(b"K", target) + header(b"link", b"2") + END])


def test_ustar_prefix() -> None:
    assert entry_of(header(b"name", b"0", prefix=b"some/dir") + END).path == b"some/dir/name"
    star = header(b"name", b"0", prefix=(b"p" * 131 + b"00000000000 00000000000 ").ljust(163, b"\0") + b"tar\0")
    assert entry_of(star + END).path == b"p" * 131 + b"/name"


def test_gnu_times_are_no_prefix() -> None:
    times = header(b"name", b"0", prefix=b"14742534321\x0014742534321\0", magic=b"ustar  \0")
    assert entry_of(times + END).path == b"name"
    old_go = header(b"name", b"0", prefix=b"some/dir", magic=b"ustar  \0")
    assert entry_of(old_go + END).path == b"some/dir/name"


def test_v7_header_has_neither_prefix_nor_device() -> None:
    found = entry_of(header(b"old", b"3", device=(5, 1), prefix=b"junk", magic=bytes(8)) + END)
    assert (found.path, found.device) == (b"old", (0, 0))


def test_old_directories_end_with_a_slash() -> None:
    assert entry_of(header(b"dir/", b"\0") + END).kind is Kind.DIRECTORY
    assert entry_of(header(b"file/", b"0") + END).kind is Kind.REGULAR


def test_gnu_long_names_win_over_pax() -> None:
    tar = pax((b"path", b"pax"), (b"linkpath", b"pax")) + long(b"L", b"n" * 150) + long(b"K", b"t" * 150)
    found = entry_of(tar + header(b"x", b"2", link=b"y") + END)
    assert (found.path, found.link) == (b"n" * 150, b"t" * 150)


# Numbers


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (b"0000644\0", 0o644),
        (b"   644 \0", 0o644),
        (b"\0\0\0\0\0\0\0\0", 0),
        (b"00000017", 0o17),
        (b"12\0junk\0", 0o12),
        (b"\x80\0\0\0\0\x01\0\0", 65536),
        (b"\xff\xff\xff\xff\xff\xff\xff\xfe", -2),
        (b"\x80\0\0\0\x7f" + b"\xff" * 7, 2**63 - 1),
    ],
)
def test_numbers(field: bytes, value: int) -> None:
    assert parse_number(field) == value


@pytest.mark.parametrize("field", [b"0o17\0\0\0\0", b"+7\0", b"1_0\0", b"9\0", b"0x10\0", b"\x80\0\0\0\x80" + bytes(7)])
def test_numbers_that_are_none(field: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_number(field)


def test_large_numbers_in_base_256() -> None:
    block = with_field(header(b"x", b"0", mtime=0), 108, b"\x80\0\0\0\xb2\xd0\x5e\0")
    block = with_field(block, 136, b"\x80" + (2**40).to_bytes(11, "big"))
    found = entry_of(block + END)
    assert (found.uid, found.mtime_ns) == (3_000_000_000, 0)
    block = with_field(header(b"x", b"0"), 136, b"\xff" * 11 + b"\xfe")
    assert entry_of(block + END).mtime_ns == -2 * SECOND


@pytest.mark.parametrize("size", [-1, -(2**60), 2**62, MAX_FILE + 1])
def test_impossible_sizes_are_refused(size: int) -> None:
    field = size.to_bytes(12, "big", signed=True) if size < 0 else b"\x80" + size.to_bytes(11, "big")
    for tar in (with_field(header(b"huge", b"0"), 124, field), pax((b"size", b"%d" % size)) + header(b"huge", b"0")):
        with pytest.raises(CorruptError, match="'huge'"):
            feed([tar + END])


def test_size_beyond_63_bits_is_refused() -> None:
    with pytest.raises(CorruptError, match="'huge'"):
        feed([with_field(header(b"huge", b"0"), 124, b"\x80" + b"\xff" * 11) + END])


@pytest.mark.parametrize("record", [(b"uid", b"-1"), (b"gid", b"4294967296")])
def test_impossible_owners_are_refused(record: tuple[bytes, bytes]) -> None:
    with pytest.raises(CorruptError, match="owner"):
        feed([pax(record) + header(b"x", b"0") + END])


def test_device_numbers_that_linux_has_not_are_refused() -> None:
    with pytest.raises(CorruptError, match="device number"):
        feed([header(b"x", b"3", device=(4096, 0)) + END])


@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"4", b"5", b"6"])
def test_what_is_no_file_has_no_payload(kind: bytes) -> None:
    tar = header(b"x", kind, size=700, link=b"target") + header(b"next", b"0", size=1) + padded(b"n") + END
    assert [(entry.path, entry.size) for entry, _ in parse(tar)] == [(b"x", 0), (b"next", 1)]


def test_volume_labels_are_ignored_and_unknown_types_refused() -> None:
    label = header(b"label", b"V", size=10) + padded(b"0123456789")
    assert entry_of(label + header(b"x", b"0") + END).path == b"x"
    with pytest.raises(CorruptError, match="type is unknown"):
        feed([header(b"x", b"M") + END])


def test_every_flipped_byte_of_a_header_is_noticed() -> None:
    block = header(b"name", b"0", size=5)
    for pos in range(512):
        bent = block[:pos] + bytes([block[pos] ^ 0x41]) + block[pos + 1 :]
        if not 148 <= pos < 156:
            with pytest.raises(CorruptError, match="checksum"):
                feed([bent + padded(b"12345") + END])


def test_signed_checksums_of_old_tars() -> None:
    block = header(b"\xe4\xf6\xfc", b"0")
    signed = sum(byte - 256 if byte > 127 else byte for byte in block) - sum(block[148:156]) + 256
    block = block[:148] + b"%06o\0 " % signed + block[156:]
    assert entry_of(block + END).path == b"\xe4\xf6\xfc"


def test_checksum_of_a_header_full_of_high_bytes() -> None:
    block = checksummed(b"\xff" * 100 + header(b"", b"0")[100:157] + b"\xff" * 100 + bytes(255))
    assert entry_of(block + END).path == b"\xff" * 100


# PAX


def test_pax_times() -> None:
    for text, nanoseconds in [
        (b"1.5", 1_500_000_000),
        (b"1.1234567899", 1_123_456_789),
        (b"-1.25", -1_250_000_000),
        (b"-0.5", -500_000_000),
        (b"7.", 7 * SECOND),
        (b"99999999999", 0),
    ]:
        assert entry_of(pax((b"mtime", text)) + header(b"x", b"0", mtime=3) + END).mtime_ns == nanoseconds


def test_global_records_persist_and_are_overruled() -> None:
    tar = pax((b"uid", b"5"), (b"mtime", b"9"), (b"path", b"everywhere"), kind=b"g")
    tar += header(b"a", b"0") + pax((b"uid", b"6")) + header(b"b", b"0") + header(b"c", b"0") + END
    assert [(entry.path, entry.uid, entry.mtime_ns) for entry, _ in parse(tar)] == [
        (b"a", 5, 9 * SECOND),
        (b"b", 6, 9 * SECOND),
        (b"c", 5, 9 * SECOND),
    ]


def test_empty_records_leave_the_header_alone() -> None:
    assert entry_of(pax((b"path", b""), (b"mtime", b"")) + header(b"x", b"0", mtime=4) + END).mtime_ns == 4 * SECOND


def test_pax_size_counts() -> None:
    tar = pax((b"size", b"00000000000000000000600")) + header(b"x", b"0", size=1) + padded(b"z" * 600) + END
    assert parse(tar)[0][1] == b"z" * 600


def test_xattrs_of_libarchive() -> None:
    records = [
        (b"LIBARCHIVE.xattr.user.a%3Db", b"/wA"),
        (b"LIBARCHIVE.xattr.user.c", b"AAAA"),
        (b"SCHILY.xattr.user.c", b"c"),
    ]
    assert entry_of(pax(*records) + header(b"x", b"0") + END).xattrs == ((b"user.a=b", b"\xff\0"), (b"user.c", b"c"))


@pytest.mark.parametrize(
    "body",
    [
        b"8 a=b\n\n",
        b"6 a=b",
        b"5 ab\n",
        b"6 =bc\n",
        b"99 a=b\n",
        b"-6 a=b\n",
        b"x a=b\n",
        b"1 ",
        b"17 path=a\0b......\n",
        b"99999999999999999999 a=b\n",
        pax_record(b"mtime", b"now"),
        pax_record(b"uid", b"0x10"),
        pax_record(b"GNU.sparse.name", b"a\0b"),
        pax_record(b"LIBARCHIVE.xattr.user.x", b"!"),
        pax_record(b"SCHILY.xattr." + b"n" * 256, b""),
        pax_record(b"SCHILY.xattr.user.v", bytes(65537)),
        pax_record(b"GNU.sparse.numbytes", b"1"),
    ],
)
def test_malformed_records_are_refused(body: bytes) -> None:
    with pytest.raises(CorruptError):
        feed([header(b"p", b"x", size=len(body)) + padded(body) + header(b"x", b"0") + END])


# Sparse files


def old_sparse(pieces: list[tuple[int, bytes]], size: int, *, stored: int | None = None) -> bytes:
    def table(part: list[tuple[int, bytes]], room: int, *, more: bool) -> bytes:
        entries = b"".join(b"%011o\0%011o\0" % (offset, len(data)) for offset, data in part)
        return entries.ljust(24 * room, b"\0") + bytes([more])

    first, rest = pieces[:4], pieces[4:]
    payload = b"".join(data for _, data in pieces)
    block = header(b"sparse", b"S", size=len(payload) if stored is None else stored, magic=b"ustar  \0")
    blocks = with_field(block, 386, table(first, 4, more=bool(rest)) + b"%011o\0" % size)
    while rest:
        blocks += table(rest[:21], 21, more=len(rest) > 21).ljust(512, b"\0")
        rest = rest[21:]
    return blocks + padded(payload)


@pytest.mark.parametrize("count", [0, 1, 4, 5, 25, 26, 60])
def test_old_gnu_sparse(count: int) -> None:
    pieces = [(index * 1000, b"%03d" % index * 100) for index in range(count)]
    expected = bytearray(count * 1000 + 77)
    for offset, data in pieces:
        expected[offset : offset + len(data)] = data
    tar = old_sparse(pieces, len(expected)) + header(b"next", b"0") + END
    assert parse(tar)[0][1] == expected
    assert contents(feed(cut(tar, 100))) == parse(tar)


def test_pax_sparse_0_0_and_0_1() -> None:
    head = header(b"GNUSparseFile.1/x", b"0", size=6) + padded(b"abcdef") + END
    common = [(b"GNU.sparse.size", b"9000"), (b"GNU.sparse.numblocks", b"2")]
    pairs = [(b"GNU.sparse.offset", b"10"), (b"GNU.sparse.numbytes", b"4"), (b"GNU.sparse.offset", b"8998")]
    first = pax(*common, *pairs, (b"GNU.sparse.numbytes", b"2"))
    second = pax(*common, (b"GNU.sparse.map", b"10,4,8998,2"), (b"GNU.sparse.name", b"real/name"))
    for prefix, path in ((first, b"GNUSparseFile.1/x"), (second, b"real/name")):
        ((entry, content),) = parse(prefix + head)
        assert entry.path == path
        assert content == bytes(10) + b"abcd" + bytes(8984) + b"ef"


@pytest.mark.parametrize(
    "tar",
    [
        old_sparse([(0, b"abc")], 2),
        old_sparse([(0, b"abc"), (2, b"d")], 10),
        old_sparse([(5, b"abc"), (0, b"d")], 10),
        old_sparse([(0, b"abc")], 10, stored=700),
        old_sparse([(9, b"abc")], 10),
        with_field(header(b"sparse", b"S"), 386, b"\0"),
        render_tar([sparse("s", 10, [(8, b"abc")])]),
        render_tar([sparse("s", 2**62, [(0, b"abc")])]),
        pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0")) + header(b"s", b"0", size=512) + padded(b"x\n"),
        pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0")) + header(b"s", b"0", size=512) + bytes(512),
        pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"))
        + header(b"s", b"0", size=9)
        + padded(b"99999\n1\n"),
        pax((b"GNU.sparse.map", b"0,1"), (b"GNU.sparse.numblocks", b"2")) + header(b"s", b"0", size=1) + padded(b"x"),
        pax((b"GNU.sparse.map", b"0,-1"), (b"GNU.sparse.numblocks", b"1")) + header(b"s", b"0", size=1) + padded(b"x"),
    ],
)
def test_malformed_sparse_files_are_refused(tar: bytes) -> None:
    with pytest.raises(CorruptError, match=r"sparse|'s'"):
        feed([tar + bytes(2048)])


def test_a_sparse_bomb_costs_nothing_and_has_no_digest() -> None:
    begin = time.process_time()
    bombs = [sparse(f"bomb{index}", 900 << 20, [(0, b"x")]) for index in range(50)]
    found = [
        event.entry for event in feed([render_tar([*bombs, sparse("huge", 10 << 40, [])])]) if isinstance(event, Member)
    ]
    assert time.process_time() - begin < 10
    assert [bool(entry.digest) for entry in found] == [True] + [False] * 50
    assert found[-1].size == 10 << 40


# Bounds


def feed_until_it_fails(parser: TarParser, piece: bytes) -> None:
    for _ in range(1000):
        parser.feed(piece)


def test_too_many_entries_are_refused() -> None:
    parser = TarParser(max_entries=1000)
    parser.feed(header(b"x", b"5") * 1000)
    with pytest.raises(CorruptError, match="too many entries"):
        parser.feed(header(b"x", b"5"))


def test_metadata_is_bounded() -> None:
    body = b"".join(pax_record(b"SCHILY.xattr.user.%d" % index, bytes(60000)) for index in range(17))
    one = header(b"p", b"x", size=len(body)) + padded(body) + header(b"x", b"0")
    parser = TarParser()
    with pytest.raises(CorruptError, match="too much metadata"):
        feed_until_it_fails(parser, one)


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_long_extended_headers_are_refused_before_they_are_read(kind: bytes) -> None:
    with pytest.raises(CorruptError, match="too long"):
        feed([header(b"p", kind, size=(1 << 20) + 1)])


def test_many_global_records_take_bounded_time() -> None:
    body = b"".join(pax_record(b"k%d" % index, b"v") for index in range(60_000))
    parser = TarParser()
    parser.feed(header(b"g", b"g", size=len(body)) + padded(body))
    begin = time.process_time()
    with pytest.raises(CorruptError, match="too much metadata"):
        feed_until_it_fails(parser, header(b"x", b"5") * 1000)
    assert time.process_time() - begin < 10


def test_a_million_entries_use_little_memory_in_the_parser() -> None:
    parser = TarParser()
    piece = b"".join(header(b"d/%d" % index, b"5", mtime=index) for index in range(2000))
    parser.feed(piece)
    tracemalloc.start()
    try:
        for _ in range(5):
            parser.feed(piece)
        assert tracemalloc.get_traced_memory()[0] < 2 << 20
    finally:
        tracemalloc.stop()


# Properties

names = st.lists(st.text("abc.é", min_size=1, max_size=90), min_size=1, max_size=4).map("/".join)
times = st.integers(-(2**40), 2**40).map(lambda number: number * 997)
attributes = st.dictionaries(
    st.from_regex(r"user\.[a-z=]{1,9}", fullmatch=True).filter(lambda n: "=" not in n), st.binary()
)
files = st.builds(
    lambda name, size, seed, **more: file(name, sample_content(size, seed), **more),
    names,
    st.integers(0, 3000),
    st.integers(0, 5),
    mode=st.integers(0, 0o7777),
    uid=st.integers(0, 2**32 - 1),
    mtime_ns=times,
    xattrs=attributes,
)
links = st.builds(symlink, names, st.text("/xyz.", min_size=1, max_size=300), mtime_ns=times)
holes = st.lists(st.integers(1, 5000), min_size=1, max_size=20).map(
    lambda steps: sparse(
        "s", sum(steps) + 10, [(sum(steps[:i]), sample_content(1 + steps[i] // 2)) for i in range(len(steps))]
    )
)


@settings(max_examples=60)
@given(items=st.lists(st.one_of(files, links, holes), max_size=6), cuts=st.lists(st.integers(0, 40_000), max_size=12))
def test_any_archive_any_cuts(items: list[Item], cuts: list[int]) -> None:
    kept = [item for item in items if not {b".", b".."} & set(item.path.split(b"/"))]
    tar = render_tar(kept)
    whole = parse(tar)
    assert [(entry.path, entry.mtime_ns) for entry, _ in whole] == [(item.path, item.mtime_ns) for item in kept]
    assert [entry.xattrs for entry, _ in whole] == [as_pairs(item.xattrs) for item in kept]
    bounds = [0, *sorted(min(one, len(tar)) for one in cuts), len(tar)]
    assert contents(feed(tar[a:b] for a, b in pairwise(bounds))) == whole


def as_pairs(xattrs: Mapping[str, bytes]) -> tuple[tuple[bytes, bytes], ...]:
    return tuple(sorted((name.encode(), value) for name, value in xattrs.items()))


@settings(max_examples=200)
@given(pos=st.integers(0, len(EVERYTHING) - 1), junk=st.binary(min_size=1, max_size=600))
def test_junk_is_an_error_or_an_archive_but_never_a_crash(pos: int, junk: bytes) -> None:
    try:
        feed([EVERYTHING[:pos] + junk + EVERYTHING[pos + len(junk) :]])
    except CorruptError:
        return
