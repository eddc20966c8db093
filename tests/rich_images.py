"""Images that have everything a layer can say, for comparing whole trees; each small, each a function of nothing.

`IMAGES` by name, for tests that take each in turn. What a layer may not say at all (and what refuses the image) is not
here: these must all mount and equal what unpacking gives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from images import (
    Image,
    Layer,
    block_device,
    character,
    directory,
    fifo,
    file,
    gzip_layer,
    hardlink,
    opaque,
    sample_content,
    sparse,
    symlink,
    tar_layer,
    whiteout,
    zstd_layer,
)

if TYPE_CHECKING:
    from collections.abc import Callable

SUBSECOND = 1_600_000_000_123_456_789


def everything() -> Image:
    """Every type, attribute and name that ordinary images have, and some that they don't, in one layer."""
    return Image(
        (
            gzip_layer(
                [
                    directory("./", 0o755, mtime_ns=SUBSECOND),
                    directory("etc", 0o755, xattrs={"user.dir": b"1"}),
                    file("etc/empty"),
                    file("etc/motd", b"hello\n", mtime_ns=SUBSECOND, uid=1000, gid=1001),
                    file("etc/shadow", b"root:*:\n", 0o000, gid=42),
                    file("bin/su", sample_content(5000, 1), 0o4755),
                    directory("tmp", 0o1777, mtime_ns=-1_000_000_000),
                    directory("srv/mail", 0o2775, uid=4_000_000_000, gid=3_000_000_000),
                    file(
                        "bin/ping",
                        b"ping",
                        0o755,
                        xattrs={"security.capability": bytes.fromhex("0100000200200000" + "00" * 12)},
                    ),
                    file("x", b"x", xattrs={"user.a": b"", "user.b": b"\0\xff\n=", "user.long": b"v" * 700}),
                    symlink("lib", "usr/lib"),
                    symlink("long-link", "a/" * 400 + "end"),
                    symlink("dangling", "/nowhere", mtime_ns=SUBSECOND, uid=7),
                    directory("usr/lib"),
                    file("lib/through-symlink", b"follows\n"),
                    file("missing/parents/all/the/way", b"down"),
                    character("dev/null", 1, 3),
                    character("dev/high", 4095, 1048575),
                    block_device("dev/sda", 8, 0),
                    fifo("dev/pipe", 0o620, uid=5),
                    file("a", sample_content(10_000, 2), 0o640),
                    hardlink("b", "a"),
                    hardlink("etc/c", "./b"),
                    hardlink("dev/null2", "dev/null"),
                    file("n" * 255, b"long name"),
                    file("d" * 200 + "/" + "e" * 200 + "/" + "f" * 200, b"long path"),
                    file("sp ace\nnew\tline'\"\\", b"odd"),
                    file(b"not-utf8-\xff\xfe", b"bytes"),
                    file("öäü-☃", "☃".encode()),
                    file("big", sample_content(3_000_000, 3)),
                    file("block", sample_content(4096, 4)),
                    file("block+1", sample_content(4097, 5)),
                    file("same", sample_content(4097, 5)),
                    sparse("holes", 5_000_000, [(4096, b"one"), (1_234_567, b"two"), (4_999_990, b"end")]),
                    sparse("all-hole", 70_000_001, []),
                    file("in-1969", b"", mtime_ns=-1),
                    file("in-2200", b"", mtime_ns=7_258_118_400 * 10**9 + 1),
                ]
            ),
        )
    )


def changes() -> Image:
    """Layers that remove, replace, merge, link and hide what is below."""
    base = [
        directory("etc", mtime_ns=SUBSECOND),
        file("etc/keep", b"keep"),
        file("etc/gone", b"gone"),
        file("etc/replaced", b"old"),
        directory("cache", 0o700, uid=9, xattrs={"user.below": b"1"}),
        file("cache/one", b"1"),
        file("cache/sub/two", b"2"),
        directory("tree"),
        file("tree/leaf", b"leaf"),
        file("becomes-dir", b"f"),
        directory("becomes-file"),
        file("becomes-file/inside", b"i"),
        symlink("link-becomes-dir", "etc"),
        directory("dir-becomes-link"),
        file("dir-becomes-link/inside", b"i"),
        file("target", sample_content(9000, 7), 0o755, mtime_ns=SUBSECOND),
        file("pair/one", b"pair"),
        hardlink("pair/two", "pair/one"),
        file("trio/one", b"trio"),
        hardlink("trio/two", "trio/one"),
        directory("merged", 0o755, mtime_ns=SUBSECOND),
        file("merged/below", b"below"),
        directory("usr/lib"),
        symlink("lib", "usr/lib"),
        symlink("abs", "/usr/lib"),
        file("usr/lib/a.so", b"a"),
        directory("back"),
        file("back/old", b"old"),
    ]
    second = [
        whiteout("etc/gone"),
        file("etc/replaced", b"new", 0o600),
        opaque("cache"),
        file("cache/three", b"3"),
        whiteout("tree"),
        whiteout("never-existed"),
        directory("becomes-dir"),
        file("becomes-dir/inside", b"i"),
        file("becomes-file", b"f"),
        directory("link-becomes-dir"),
        file("link-becomes-dir/inside", b"i"),
        symlink("dir-becomes-link", "etc"),
        hardlink("linked-up", "target", mode=0o755, mtime_ns=SUBSECOND),
        hardlink("merged/linked-up-too", "linked-up"),
        whiteout("pair/two"),
        hardlink("trio/three", "trio/two"),
        directory("merged", 0o711, uid=3, xattrs={"user.above": b"2"}),
        file("merged/above", b"above"),
        file("lib/b.so", b"b"),
        file("abs/c.so", b"c"),
        directory("back"),
        file("back/new", b"new"),
        whiteout("back"),
    ]
    third = [
        file("tree", b"a file now"),
        file("etc/gone", b"back again"),
        whiteout("cache/three"),
        hardlink("etc/again", "linked-up", mode=0o755, mtime_ns=SUBSECOND),
        whiteout("lib/a.so"),
        file("cache/sub/later", b"later"),
    ]
    return Image((gzip_layer(base), gzip_layer(second), gzip_layer(third)))


def compressions() -> Image:
    """One layer of each kind of compression, of one member or frame and of many."""
    contents = [
        [directory(f"l{n}"), file(f"l{n}/data", sample_content(700_000, n)), file("last", b"%d" % n)] for n in range(6)
    ]
    return Image(
        (
            tar_layer(contents[0]),
            gzip_layer(contents[1], level=9),
            gzip_layer(contents[2], members=7),
            zstd_layer(contents[3]),
            zstd_layer(contents[4], frames=5, skippable=b"not data"),
            gzip_layer(contents[5], level=1),
        )
    )


def hostile_marks() -> Image:
    """Overlay's own marks and the host's own labels as content of a layer: none may be obeyed, none may be seen."""
    marks = {
        "trusted.overlay.opaque": b"y",
        "trusted.overlay.redirect": b"/etc",
        "user.overlay.opaque": b"y",
        "user.overlay.whiteout": b"",
        "security.selinux": b"system_u:object_r:etc_t:s0",
        "trusted.other": b"1",
        "user.kept": b"1",
    }
    below = [directory("etc"), file("etc/passwd", b"root\n"), directory("d"), file("d/below", b"1")]
    above = [
        directory("d", xattrs=marks),
        file("d/above", b"2", xattrs=marks),
        file(
            "metacopy", b"content", xattrs={"trusted.overlay.metacopy": b"", "trusted.overlay.redirect": b"/etc/passwd"}
        ),
        file("/absolute", b"cleaned"),
        file("d/../d/dots", b"cleaned"),
    ]
    return Image((gzip_layer(below), gzip_layer(above)))


def stack(count: int, name: str = "stack") -> Image:
    """So many small layers, each adding, replacing and removing something."""
    return Image(tuple(_stack_layer(number, name) for number in range(count)))


def _stack_layer(number: int, name: str) -> Layer:
    items = [
        directory(name, 0o755, mtime_ns=SUBSECOND + number),
        file(f"{name}/own-{number}", b"%d\n" % number),
        file(f"{name}/top", b"%d\n" % number),
        directory(f"dir-{number}"),
        file(f"dir-{number}/file", sample_content(5000, number)),
        file(f"dir-{number % 7}/shared-{number}", b"%d\n" % number),
    ]
    if number % 5 == 4:
        items += [whiteout(f"{name}/own-{number - 1}"), whiteout(f"dir-{number - 2}")]
    if number % 9 == 8:
        items += [opaque(f"dir-{number % 7}")]
    return gzip_layer(items)


def repeated() -> Image:
    """The same layer three times, with others between."""
    again = gzip_layer([directory("d"), file("d/again", b"again"), file("e", b"e")])
    empty = gzip_layer([])
    return Image(
        (
            again,
            gzip_layer([whiteout("d/again"), file("d/x", b"x")]),
            again,
            empty,
            gzip_layer([whiteout("e")]),
            again,
            empty,
        )
    )


IMAGES: dict[str, Callable[[], Image]] = {
    "everything": everything,
    "changes": changes,
    "compressions": compressions,
    "hostile-marks": hostile_marks,
    "stack-10": lambda: stack(10),
    "repeated": repeated,
}
