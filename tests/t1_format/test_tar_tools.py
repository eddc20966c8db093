"""Archives that other programs wrote: every GNU tar format and Python's tarfile, against the files themselves."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import tarfile
from typing import TYPE_CHECKING

import pytest
from blake3 import blake3

from nsfs.format.tar import Member, TarParser
from nsfs.model.layer import Entry, Kind

if TYPE_CHECKING:
    from pathlib import Path

KINDS = {
    stat.S_IFREG: Kind.REGULAR,
    stat.S_IFDIR: Kind.DIRECTORY,
    stat.S_IFLNK: Kind.SYMLINK,
    stat.S_IFCHR: Kind.CHARACTER,
    stat.S_IFBLK: Kind.BLOCK,
    stat.S_IFIFO: Kind.FIFO,
}


def parse(data: bytes) -> dict[bytes, Entry]:
    parser = TarParser()
    events = [event for start in range(0, len(data), 10_007) for event in parser.feed(data[start : start + 10_007])]
    parser.close()
    return {event.entry.path: event.entry for event in events if isinstance(event, Member)}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "dir" / ("d" * 70)).mkdir(parents=True)
    (root / "dir" / ("d" * 70) / ("f" * 90)).write_bytes(b"nested\n" * 1000)
    (root / "setuid").write_bytes(b"#!/bin/sh\n")
    (root / "setuid").chmod(0o4755)
    os.chown(root / "dir", 1234, 5678)
    os.link(root / "setuid", root / "zz-link")
    (root / "symlink").symlink_to("t" * 180)
    os.mknod(root / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    os.mknod(root / "disk", 0o660 | stat.S_IFBLK, os.makedev(259, 1000))
    os.mkfifo(root / "fifo")
    (root / "empty").touch()
    (root / "üñî\n").write_bytes(b"odd name")
    with (root / "sparse").open("wb") as file:
        for offset in range(0, 40 << 20, 4 << 20):
            file.seek(offset)
            file.write(b"data at %d" % offset)
        file.truncate(41 << 20)
    os.setxattr(root / "setuid", "user.raw", b"\xff\n=\x01")
    for number, path in enumerate(sorted(root.rglob("*"))):
        os.utime(path, ns=(0, 1_234_567_890_123_456_789 + number), follow_symlinks=False)
    return root


def expected(root: Path, path: bytes) -> tuple[object, ...]:
    full = os.path.join(os.fsencode(root), path)
    info = os.lstat(full)
    kind = KINDS[stat.S_IFMT(info.st_mode)]
    device = (os.major(info.st_rdev), os.minor(info.st_rdev)) if kind in (Kind.CHARACTER, Kind.BLOCK) else (0, 0)
    with open(full, "rb") if kind is Kind.REGULAR else io.BytesIO() as file:
        digest = blake3(file.read()).digest() if kind is Kind.REGULAR else b""
    link = os.readlink(full) if kind is Kind.SYMLINK else b""
    size = info.st_size if kind is Kind.REGULAR else 0
    return path, kind, stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid, size, link, device, digest


def found(entry: Entry) -> tuple[object, ...]:
    return entry.path, entry.kind, entry.mode, entry.uid, entry.gid, entry.size, entry.link, entry.device, entry.digest


def paths(root: Path) -> set[bytes]:
    return {b""} | {os.fsencode(path.relative_to(root)) for path in root.rglob("*")}


FORMATS = [
    ("v7", []),
    ("ustar", []),
    ("oldgnu", []),
    ("oldgnu", ["--sparse"]),
    ("gnu", ["--sparse"]),
    ("pax", []),
    ("pax", ["--sparse"]),
    ("pax", ["--sparse", "--sparse-version=0.0"]),
    ("pax", ["--sparse", "--sparse-version=0.1"]),
]


@pytest.mark.parametrize(("form", "sparse"), FORMATS)
def test_gnu_tar(tree: Path, form: str, sparse: list[str]) -> None:
    if form in ("ustar", "v7"):
        for name in ("symlink", "dir/" + "d" * 70 + "/" + "f" * 90, "disk"):
            (tree / name).unlink()
    if form == "v7":
        for name in ("null", "fifo"):
            (tree / name).unlink()
    xattrs = ["--xattrs"] if form == "pax" else []
    command = ["tar", "-C", str(tree), f"--format={form}", "--sort=name", *xattrs, *sparse, "-cf", "-", "."]
    entries = parse(subprocess.run(command, check=True, capture_output=True).stdout)
    assert entries.keys() == paths(tree)
    assert (entries[b"zz-link"].kind, entries[b"zz-link"].link) == (Kind.HARDLINK, b"setuid")
    for path, entry in entries.items():
        if path != b"zz-link":
            assert found(entry) == expected(tree, path)
        grain = 1 if form == "pax" else 10**9
        assert entry.mtime_ns == os.lstat(os.path.join(os.fsencode(tree), path)).st_mtime_ns // grain * grain
    assert len(entries[b"sparse"].segments) == (10 if sparse else 1)
    assert entries[b"setuid"].xattrs == (((b"user.raw", b"\xff\n=\x01"),) if xattrs else ())


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_python_tarfile(tree: Path, form: int) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        archive.add(tree, arcname=".")
    entries = parse(buffer.getvalue())
    buffer.seek(0)
    assert entries.keys() == paths(tree)
    with tarfile.open(fileobj=buffer) as archive:
        for info in archive:
            entry = entries[os.fsencode(os.path.normpath(info.name)).removeprefix(b".")]
            assert (entry.mode, entry.uid, entry.gid, entry.size) == (info.mode, info.uid, info.gid, info.size)
            if entry.kind is Kind.REGULAR and entry.size:
                assert entry.segments[0].stream_offset == info.offset_data
