"""The writer against three readers: our own, fsck.erofs, and the kernel."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import subprocess
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import strategies
from kernel import DISK_BLOCKS, make_disk, mounted_erofs
from nsfs.errors import CorruptError
from nsfs.format.erofs import BLOCK, render_erofs
from nsfs.format.erofs_image import ErofsImage
from nsfs.model.layer import Entry, Kind, Node
from nsfs.model.tree import plan_tree
from strategies import device, directory, hardlink, place_entries, regular, symlink

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

UUID = bytes(range(16))
TREES = strategies.layers(max_size=20)


class Empty:
    def find(self, path: bytes) -> None: ...


def plan(entries: list[Entry]) -> Node:
    return plan_tree(entries, place_entries(entries), Empty()).root


def render(root: Node) -> bytes:
    return bytes(render_erofs(root, disk_blocks=DISK_BLOCKS, uuid=UUID))


def walk(node: Node, path: bytes = b"") -> Iterator[tuple[bytes, Node]]:
    yield path, node
    for name, child in (node.children or {}).items():
        yield from walk(child, path + b"/" + name)


def expected_links(node: Node) -> int:
    if node.children is None:
        return node.links
    return 2 + sum(child.kind is Kind.DIRECTORY for child in node.children.values())


def assert_reads_back(image: ErofsImage, root: Node) -> None:
    nids = {b"": image.root}
    for path, node in walk(root):
        nid = nids[path]
        inode = image.inode(nid)
        attributes = (node.kind, node.mode, node.uid, node.gid, node.mtime_ns, node.device, expected_links(node))
        assert attributes == (
            *(inode.kind, inode.mode, inode.uid, inode.gid, inode.mtime_ns, inode.device, inode.links),
        )
        assert image.xattrs(nid) == list(node.xattrs)
        if node.kind is Kind.REGULAR:
            assert image.extent(nid) == (node.address if node.size else 0, node.size)
        elif node.kind is Kind.SYMLINK:
            assert image.readlink(nid) == node.link
        elif node.children is not None:
            entries = list(image.readdir(nid))
            assert [entry.name for entry in entries] == sorted(node.children)
            assert [entry.kind for entry in entries] == [node.children[entry.name].kind for entry in entries]
            nids |= {path + b"/" + entry.name: entry.nid for entry in entries}
            for position, entry in list(enumerate(entries))[:: 1 + len(entries) // 100]:
                assert image.lookup(nid, entry.name) == entry.nid
                assert image.name_before(nid, entry.next) == entry.name
                assert list(image.readdir(nid, entry.next)) == entries[position + 1 :]
                assert list(image.readdir(nid, image.position(nid, entry.name))) == entries[position + 1 :]
    by_node: dict[Node, set[int]] = {}
    for path, node in walk(root):
        by_node.setdefault(node, set()).add(nids[path])
    assert all(len(nids) == 1 for nids in by_node.values())
    assert len(by_node) == image.inodes
    files = [(node.address, node.size, *nids) for node, nids in by_node.items() if node.kind is Kind.REGULAR]
    assert sorted(image.extents()) == sorted(file for file in files if file[1])


def assert_fsck_accepts(image: bytes, directory: Path) -> None:
    path, disk = directory / "map.erofs", directory / "disk"
    path.write_bytes(image)
    if not disk.exists():
        make_disk(disk)
    done = subprocess.run(["fsck.erofs", f"--device={disk}", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def crowded(count: int, length: int) -> Node:
    """One directory of `count` names of `length` bytes."""
    return plan([regular(b"%0*d" % (length, number), number % 3 * 4000, mtime_ns=number) for number in range(count)])


EVERYTHING = [
    directory(b"", 0o711, uid=1, gid=2, mtime_ns=1_600_000_000_123_456_789),
    directory(b"d", 0o1777, mtime_ns=-7_000_000_001),
    directory(b"d/e", 0, uid=0xFFFFFFFE, xattrs=((b"user.a", b""), (b"security.b", bytes(range(256))))),
    *[regular(b"d/e/%d" % size, size, 0o640, uid=size) for size in (0, 1, 4095, 4096, 4097, 8192, 100_000)],
    regular(b"setuid", 3, 0o6755, mtime_ns=1 << 33, xattrs=((b"user.big", b"b" * 60_000), (b"user.more", b"m"))),
    regular(b"\xff\xfe bytes\n", 5, xattrs=((b"user.x", b"1"),)),
    regular(b"!before the dots", 5),
    hardlink(b"d/link", b"setuid"),
    hardlink(b"link", b"d/e/4097"),
    symlink(b"short", b"d/e/1"),
    symlink(b"long", b"x" * 4095),
    symlink(b"two thirds", b"y" * 2800, xattrs=((b"security.z", b"z" * 1500),)),
    device(b"null", Kind.CHARACTER, (1, 3), 0o666),
    device(b"far", Kind.BLOCK, (4095, (1 << 20) - 1)),
    Entry(b"fifo", Kind.FIFO, 0o600, 0, 0, 0),
    Entry(b"socket", Kind.SOCKET, 0o755, 0, 0, 0),
    regular(b".wh.gone", 0),
    directory(b"many"),
    *[directory(b"many/%03d" % number) for number in range(600)],
    *[regular(b"many/" + b"%c" % letter * 255, 10) for letter in range(97, 123)],
]


@given(TREES)
def test_any_tree_reads_back(entries: list[Entry]) -> None:
    try:
        root = plan(entries)
    except CorruptError:
        return
    assert_reads_back(ErofsImage(render(root)), root)


@given(TREES)
@settings(max_examples=30)
def test_fsck_accepts_any_tree(tmp_path: Path, entries: list[Entry]) -> None:
    try:
        root = plan(entries)
    except CorruptError:
        return
    assert_fsck_accepts(render(root), tmp_path)


SHAPES = [
    (0, 1),
    (1, 255),
    (340, 1),
    (341, 1),
    (15, 255),
    (16, 255),
    (3000, 12),
    (255, 4),
    (256, 4),
    (129, 3),
    (130, 3),
]


@pytest.mark.parametrize(("count", "length"), SHAPES)
def test_directories_of_any_size_read_back(tmp_path: Path, count: int, length: int) -> None:
    root = crowded(count, max(length, len(str(count))))
    image = render(root)
    assert_reads_back(ErofsImage(image), root)
    assert_fsck_accepts(image, tmp_path)


def test_everything_at_once_reads_back(tmp_path: Path) -> None:
    root = plan(EVERYTHING)
    image = render(root)
    assert_reads_back(ErofsImage(image), root)
    assert_fsck_accepts(image, tmp_path)


def test_the_output_is_a_function_of_the_arguments() -> None:
    assert render(plan(EVERYTHING)) == render(plan(EVERYTHING))
    root = Node(Kind.DIRECTORY, 0o755)
    image = render_erofs(root, disk_blocks=5, uuid=UUID, volume=b"name")
    assert len(image) == BLOCK
    assert (ErofsImage(image).volume, ErofsImage(image).uuid) == (b"name", UUID)


@pytest.mark.parametrize(
    ("address", "size", "message"),
    [(1 << 30, 16 << 40, "not lie"), (0, 1, "not lie"), (4097, 1, "not lie"), (DISK_BLOCKS * 4096, 1, "not lie")],
)
def test_files_off_the_disk_are_refused(address: int, size: int, message: str) -> None:
    root = plan([regular(b"f")])
    assert root.children is not None
    root.children[b"f"].address, root.children[b"f"].size = address, size
    with pytest.raises(CorruptError, match=message):
        render(root)


def test_more_xattrs_than_an_inode_can_have_are_refused() -> None:
    root = plan([regular(b"f")])
    root.xattrs = tuple((b"user.%d" % number, bytes(65_000)) for number in range(5))
    with pytest.raises(CorruptError, match="too many"):
        render(root)


def test_the_largest_files_are_several_chunks(tmp_path: Path) -> None:
    root = plan([regular(b"f", 15 << 40), regular(b"g", (8 << 40) + 1), regular(b"h", 8 << 40)])
    for _, node in walk(root):
        node.address = 1 << 30
    image = render(root)
    assert_reads_back(ErofsImage(image), root)
    assert_fsck_accepts(image, tmp_path)
    with mounted_erofs(tmp_path / "map.erofs", tmp_path / "disk", tmp_path / "mnt") as mount:
        with (tmp_path / "disk").open("r+b") as disk:
            os.pwrite(disk.fileno(), b"far away", (1 << 30) + (9 << 40))
        with (mount / "f").open("rb") as file:
            assert os.pread(file.fileno(), 8, 9 << 40) == b"far away"


def content_of(node: Node) -> bytes:
    return hashlib.shake_128(node.address.to_bytes(8, "big")).digest(node.size)


def fill(disk: Path, root: Node) -> None:
    with disk.open("r+b") as file:
        for _, node in walk(root):
            if node.kind is Kind.REGULAR and node.size:
                os.pwrite(file.fileno(), content_of(node), node.address)


def assert_shows(path: bytes, node: Node) -> None:
    found = os.lstat(path)
    assert stat.S_IMODE(found.st_mode) == node.mode
    assert (found.st_uid, found.st_gid, found.st_mtime_ns) == (node.uid, node.gid, node.mtime_ns)
    assert found.st_nlink == expected_links(node)
    xattrs = {os.fsencode(name): os.getxattr(path, name, follow_symlinks=False) for name in _listxattr(path)}
    assert xattrs == dict(node.xattrs)
    match node.kind:
        case Kind.REGULAR:
            assert stat.S_ISREG(found.st_mode)
            with open(path, "rb") as file:
                assert file.read() == content_of(node)
        case Kind.DIRECTORY:
            assert sorted(os.listdir(path)) == sorted(node.children or {})
        case Kind.SYMLINK:
            assert os.readlink(path) == node.link
        case Kind.CHARACTER | Kind.BLOCK:
            assert (os.major(found.st_rdev), os.minor(found.st_rdev)) == node.device
            assert stat.S_ISCHR(found.st_mode) == (node.kind is Kind.CHARACTER)
        case Kind.FIFO:
            assert stat.S_ISFIFO(found.st_mode)
        case _:
            assert stat.S_ISSOCK(found.st_mode)


def _listxattr(path: bytes) -> list[str]:
    return os.listxattr(path, follow_symlinks=False)


def assert_kernel_shows(root: Node, scratch: Path) -> None:
    image, disk = scratch / "map.erofs", make_disk(scratch / "disk")
    image.write_bytes(render(root))
    fill(disk, root)
    with mounted_erofs(image, disk, scratch / "mnt") as mount:
        inodes: dict[Node, set[int]] = {}
        for path, node in walk(root):
            assert_shows(bytes(mount) + path, node)
            inodes.setdefault(node, set()).add(os.lstat(bytes(mount) + path).st_ino)
        assert all(len(numbers) == 1 for numbers in inodes.values())


def test_the_kernel_shows_everything(tmp_path: Path) -> None:
    assert_kernel_shows(plan(EVERYTHING), tmp_path)


@given(TREES)
@settings(max_examples=15)
def test_the_kernel_shows_any_tree(tmp_path: Path, entries: list[Entry]) -> None:
    try:
        root = plan(entries)
    except CorruptError:
        return
    assert_kernel_shows(root, tmp_path)


def test_a_hundred_thousand_entries(tmp_path: Path) -> None:
    entries = [directory(b"%d" % number) for number in range(100)]
    entries += [regular(b"%d/%d" % (number % 90, number), 100) for number in range(70_000)]
    entries += [regular(b"99/a name of some length, number %d" % number, 0) for number in range(30_000)]
    start = time.process_time()
    root = plan(entries)
    image = render(root)
    assert time.process_time() - start < 5
    assert_fsck_accepts(image, tmp_path)
    with mounted_erofs(tmp_path / "map.erofs", tmp_path / "disk", tmp_path / "mnt") as mount:
        assert len(os.listdir(mount / "99")) == 30_000
        assert (mount / "99" / "a name of some length, number 29999").stat().st_size == 0
        assert (mount / "7" / "69937").stat().st_size == 100
    view = ErofsImage(image)
    large = view.lookup(view.root, b"99")
    assert large is not None
    assert sum(1 for _ in view.readdir(large)) == 30_000


SMALL = render(plan([*EVERYTHING[:15], symlink(b"s", b"t")]))


def read_all(image: ErofsImage) -> None:
    """Every call on every inode, a corrupt tree's cycles left alone."""
    seen, pending = {image.root}, [image.root]
    while pending:
        nid = pending.pop()
        inode = image.inode(nid)
        image.xattrs(nid)
        if inode.kind is Kind.DIRECTORY:
            image.lookup(nid, b"d")
            image.position(nid, b"e")
            found = [entry.nid for entry in image.readdir(nid)]
            pending += set(found) - seen
            seen |= set(found)
        elif inode.kind is Kind.REGULAR:
            image.extent(nid)
        elif inode.kind is Kind.SYMLINK:
            image.readlink(nid)
    assert sum(1 for _ in image.extents()) <= image.inodes


def test_an_image_cut_off_anywhere_is_refused() -> None:
    read_all(ErofsImage(SMALL))
    for size in [*range(0, len(SMALL), 61), len(SMALL) - 1]:
        with pytest.raises(CorruptError):
            ErofsImage(SMALL[:size])


@given(st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.binary(min_size=1, max_size=9)), max_size=20))
@settings(max_examples=300)
def test_garbage_gives_a_clear_error_or_an_answer(damage: list[tuple[int, bytes]]) -> None:
    image = bytearray(SMALL)
    for at, garbage in damage:
        image[at : at + len(garbage)] = garbage
    image = image[: len(SMALL)]
    image[1024 + 8] &= ~1
    with contextlib.suppress(CorruptError):
        read_all(ErofsImage(image))


@given(st.integers(0, 7000), st.integers(0, 255))
@settings(max_examples=500)
def test_a_wrong_byte_anywhere_gives_a_clear_error_or_an_answer(at: int, value: int) -> None:
    image = bytearray(SMALL)
    image[1024 + at % (len(SMALL) - 1024)] = value
    image[1024 + 8] &= ~1
    with contextlib.suppress(CorruptError):
        read_all(ErofsImage(image))


def test_a_wrong_superblock_is_found_by_its_checksum() -> None:
    image = bytearray(SMALL)
    image[1024 + 50] ^= 1
    with pytest.raises(CorruptError, match="checksum"):
        ErofsImage(image)


@given(st.integers(-10, 1 << 64), st.integers(-10, 1 << 64))
def test_any_nid_and_position_is_bounds_checked(nid: int, position: int) -> None:
    image = ErofsImage(SMALL)
    for call in (
        lambda: image.inode(nid),
        lambda: image.extent(nid),
        lambda: image.readlink(nid),
        lambda: image.xattrs(nid),
        lambda: image.lookup(nid, b"d"),
        lambda: list(image.readdir(image.root, position)),
        lambda: image.name_before(image.root, position),
    ):
        with contextlib.suppress(CorruptError):
            call()
