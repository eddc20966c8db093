"""Files of a map that the kernel has mounted, opened by the numbers of their inodes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from kernel import DISK_BLOCKS, make_disk, mounted_erofs
from nsfs.format.erofs import render_erofs
from nsfs.format.erofs_image import ErofsImage
from nsfs.model.layer import Entry, Kind
from nsfs.model.tree import plan_tree
from nsfs.serve.handles import ViewFiles, render_handle
from strategies import device, directory, hardlink, place_entries, regular, symlink

if TYPE_CHECKING:
    from pathlib import Path

ENTRIES = [
    directory(b"d"),
    *[regular(b"d/%d" % number, 5000 + number, xattrs=((b"user.x", b"1" * number),)) for number in range(200)],
    hardlink(b"again", b"d/7"),
    symlink(b"link", b"d/1"),
    device(b"zero", Kind.CHARACTER, (1, 5), 0o666),
    Entry(b"fifo", Kind.FIFO, 0o600, 0, 0, 0),
]


class Empty:
    def find(self, path: bytes) -> None: ...


def test_regular_files_are_opened_by_number_and_nothing_else_is(tmp_path: Path) -> None:
    image, disk = tmp_path / "map.erofs", make_disk(tmp_path / "disk")
    tree = plan_tree(ENTRIES, place_entries(ENTRIES), Empty())
    image.write_bytes(render_erofs(tree.root, disk_blocks=DISK_BLOCKS, uuid=bytes(16)))
    with mounted_erofs(image, disk, tmp_path / "mnt") as mount:
        root = os.open(mount, os.O_RDONLY | os.O_DIRECTORY)
        try:
            files = ViewFiles(root)
            opened = {nid: files.open(nid) for _, _, nid in ErofsImage(image.read_bytes()).extents()}
            expected = {os.stat(mount / "d" / str(number)).st_ino: 5000 + number for number in range(200)}
            assert {nid: os.fstat(fd).st_size for nid, fd in opened.items()} == expected
            for fd in opened.values():
                os.close(fd)
            for name in ("", "d", "link", "zero", "fifo"):
                with pytest.raises(OSError, match="not a regular file"):
                    files.open(os.lstat(mount / name).st_ino)
            with pytest.raises(OSError, match="Errno"):
                files.open(1 << 40)
        finally:
            os.close(root)


def test_handles_have_numbers_of_64_bits_or_of_32_and_other_filesystems_have_none() -> None:
    assert render_handle(0x81, 0x1_0000_0002).hex() == "0c00000081000000" + "01000000" + "02000000" + "00000000"
    assert render_handle(0x01, 0x28).hex() == "0800000001000000" + "28000000" + "00000000"
    with pytest.raises(OSError, match="unknown type"):
        render_handle(0x4D, 1)
