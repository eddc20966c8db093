"""The filesystems that sessions show: numbers that last, bytes from the right place, memory that does not grow."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from nsfs.core import vfs
from nsfs.core.union import UnionTree
from nsfs.core.vfs import DomainFs, Entry, TreeFs, Vfs
from nsfs.errors import CorruptError, NotFoundError, UsageError
from nsfs.format.erofs import render_erofs
from nsfs.format.erofs_image import ErofsImage
from nsfs.model.layer import Kind, Node

MAP = "0123456789abcdef" * 2
OTHER = "f" * 32


def regular(address: int, size: int, *, mode: int = 0o644, links: int = 1, **more: object) -> Node:
    node = Node(Kind.REGULAR, mode, 1, 2, 1_700_000_000_123_456_789)
    node.address, node.size, node.links = address, size, links
    for name, value in more.items():
        setattr(node, name, value)
    return node


def directory(children: dict[bytes, Node], *, opaque: bool = False) -> Node:
    node = Node(Kind.DIRECTORY, 0o755)
    node.children = children
    if opaque:
        node.xattrs = ((b"trusted.overlay.opaque", b"y"),)
    return node


def whiteout() -> Node:
    return Node(Kind.CHARACTER, 0)


def rendered(root: Node) -> memoryview:
    return memoryview(bytes(render_erofs(root, disk_blocks=(1 << 32) - 1, uuid=bytes(16))))


def image(root: Node) -> ErofsImage:
    return ErofsImage(rendered(root))


async def no_reader(view: str, address: int, size: int) -> bytes:
    return f"{view}@{address}+{size}".encode()


def layers() -> list[ErofsImage]:
    """Two layers, top first."""
    shared = regular(1 << 30, 5, links=2)
    null = Node(Kind.CHARACTER, 0o666)
    null.device = (1, 3)
    link = Node(Kind.SYMLINK, 0o777)
    link.link = b"../etc/passwd"
    capable = regular(2 << 30, 9000, mode=0o4755, xattrs=((b"security.capability", b"\1\0\0\2"),))
    lower = directory(
        {
            b"etc": directory({b"passwd": shared, b"passwd-": shared, b"gone": regular(3 << 30, 1)}),
            b"bin": directory({b"ping": capable, b"link": link}),
            b"dev": directory({b"null": null}),
            b"var": directory({b"old": regular(3 << 30, 1)}),
        }
    )
    upper = directory(
        {
            b"etc": directory({b"gone": whiteout(), b"new": regular(4 << 30, 0)}),
            b"var": directory({b"new": regular(5 << 30, 7)}, opaque=True),
        }
    )
    return [image(upper), image(lower)]


def tree_fs(**more: Callable[[], bytes]) -> TreeFs:
    return TreeFs(UnionTree(layers()), [MAP + "~60", OTHER + "~60"], no_reader, state=more or None)


def walk(fs: Vfs, inode: int = vfs.ROOT, path: str = "") -> Iterator[tuple[str, Entry]]:
    for entry in list(fs.readdir(inode, 0)):
        here = f"{path}/{entry.name.decode()}"
        yield here, entry
        if stat.S_ISDIR(entry.attr.mode):
            yield from walk(fs, entry.attr.inode, here)


def find(fs: Vfs, path: str, inode: int = vfs.ROOT) -> int:
    for name in path.encode().split(b"/"):
        attr = fs.lookup(inode, name)
        assert attr is not None, path
        inode = attr.inode
    return inode


def read(fs: Vfs, inode: int, offset: int, size: int) -> bytes:
    return bytes(trio.run(fs.open(inode).read, offset, size))


def test_a_tree_is_the_union_without_whiteouts() -> None:
    paths = [path for path, _ in walk(tree_fs())]
    names = "bin bin/link bin/ping dev dev/null etc etc/new etc/passwd etc/passwd- var var/new"
    assert sorted(paths) == [f"/{name}" for name in names.split()]


def test_attributes_are_exact() -> None:
    fs = tree_fs()
    ping = fs.getattr(find(fs, "bin/ping"))
    assert (ping.mode, ping.size, ping.uid, ping.gid) == (stat.S_IFREG | 0o4755, 9000, 1, 2)
    assert ping.mtime_ns == 1_700_000_000_123_456_789
    assert fs.xattrs(ping.inode) == {b"security.capability": b"\1\0\0\2"}
    assert fs.getattr(find(fs, "dev/null")).device == (1, 3)
    assert fs.readlink(find(fs, "bin/link")) == b"../etc/passwd"
    assert find(fs, "etc/passwd") == find(fs, "etc/passwd-")
    assert fs.getattr(find(fs, "etc/passwd")).links == 2
    assert fs.lookup(find(fs, "etc"), b"gone") is None
    assert fs.xattrs(find(fs, "var")) == {}


def test_contents_are_asked_for_as_their_own_layer_at_their_own_address() -> None:
    fs = tree_fs()
    ping = find(fs, "bin/ping")
    assert read(fs, ping, 0, 1 << 20) == f"{OTHER}~60@{2 << 30}+9000".encode()
    assert read(fs, ping, 8192, 4096) == f"{OTHER}~60@{(2 << 30) + 8192}+808".encode()
    assert read(fs, ping, 9000, 4096) == b""
    assert read(fs, find(fs, "var/new"), 0, 7) == f"{MAP}~60@{5 << 30}+7".encode()
    assert read(fs, find(fs, "etc/new"), 0, 4096) == b""


def test_a_successor_understands_every_number() -> None:
    walked = list(walk(tree_fs()))
    for path, entry in walked:
        inode = entry.attr.inode
        successor = tree_fs()
        assert successor.getattr(inode) == entry.attr
        if stat.S_ISDIR(entry.attr.mode):
            listed = [each.name for each in successor.readdir(inode, 0)]
            assert listed == [each.name for other, each in walked if other.rsplit("/", 1)[0] == path]


def test_listings_go_on_from_any_position() -> None:
    fs = TreeFs(
        UnionTree([image(directory({b"%05d" % i: regular(1 << 30, 1) for i in range(2000)}))]), [MAP], no_reader
    )
    entries = list(fs.readdir(vfs.ROOT, 0))
    assert len(entries) == 2000
    for i in (0, 1, 700, 1999):
        assert list(fs.readdir(vfs.ROOT, entries[i].next)) == entries[i + 1 :]


def test_numbers_of_nobody_are_refused() -> None:
    fs = tree_fs()
    for inode in (7 << 27 | 40, 1 << 35, 1 << 60):
        with pytest.raises(NotFoundError):
            fs.getattr(inode)
    with pytest.raises(CorruptError):
        fs.getattr(3)
    with pytest.raises(UsageError):
        TreeFs(UnionTree(layers() * 129), [MAP] * 258, no_reader)


def test_state_of_a_users_mount_is_hidden_but_there() -> None:
    fs = tree_fs(**{"mount.json": lambda: json.dumps({"a": 1}).encode()})
    assert ".nsfs" not in [entry.name.decode() for entry in fs.readdir(vfs.ROOT, 0)]
    file = find(fs, ".nsfs/mount.json")
    assert fs.getattr(file).timeout == 0
    assert fs.open(file).direct
    assert json.loads(read(fs, file, 0, 4096)) == {"a": 1}
    assert [path for path, _ in walk(fs, find(fs, ".nsfs"))] == ["/mount.json"]


def test_an_image_may_have_the_hidden_name_itself() -> None:
    tree = UnionTree([image(directory({b".nsfs": regular(1 << 30, 3)}))])
    fs = TreeFs(tree, [MAP], no_reader, state={"x": lambda: b""})
    assert stat.S_ISREG(fs.getattr(find(fs, ".nsfs")).mode)


def domain_fs() -> DomainFs:
    fs = DomainFs(no_reader, {"status.json": lambda: b"{}"})
    fs.add_map(MAP, memoryview(MAP.encode()))
    fs.add_map(MAP, memoryview(b"not taken"))
    fs.add_tree("one", UnionTree(layers()), [MAP, OTHER])
    return fs


def test_a_domain_shows_disks_maps_and_trees() -> None:
    fs = domain_fs()
    assert [e.name for e in fs.readdir(vfs.ROOT, 0)] != []
    assert {e.name for e in fs.readdir(vfs.ROOT, 0)} == {b"disks", b"maps", b"trees", b"layers"}
    assert [e.name for e in fs.readdir(find(fs, "disks"), 0)] == [MAP.encode()]
    assert fs.getattr(find(fs, f"disks/{MAP}")).size == (16 << 40) - 4096
    assert read(fs, find(fs, f"maps/{MAP}"), 4, 8) == MAP[4:12].encode()
    assert read(fs, find(fs, f"disks/{MAP}"), 8192, 4096) == f"{MAP}@8192+4096".encode()
    assert read(fs, find(fs, "trees/one/bin/ping"), 0, 9000) == f"{OTHER}@{2 << 30}+9000".encode()
    assert read(fs, find(fs, ".nsfs/status.json"), 0, 100) == b"{}"
    assert len(list(walk(fs, find(fs, "trees/one")))) == 11


@pytest.mark.parametrize(
    "path", [f"disks/{OTHER}", f"maps/{OTHER}", "trees/two", f"maps/{MAP}~60", "disks/..x", "disks/\x00"]
)
def test_what_may_come_later_is_not_denied_for_ever(path: str) -> None:
    fs = domain_fs()
    folder, _, name = path.partition("/")
    with pytest.raises(NotFoundError):
        fs.lookup(find(fs, folder), name.encode())
    assert fs.lookup(vfs.ROOT, b"no such folder") is None


def test_what_is_removed_is_gone_and_comes_back_under_its_number() -> None:
    fs = domain_fs()
    disk, tree = find(fs, f"disks/{MAP}"), find(fs, "trees/one")
    fs.remove_map(MAP)
    fs.remove_tree("one")
    for inode in (disk, tree):
        with pytest.raises(NotFoundError):
            fs.getattr(inode)
    with pytest.raises(NotFoundError):
        fs.open(disk)
    again = domain_fs()
    assert (find(again, f"disks/{MAP}"), find(again, "trees/one")) == (disk, tree)


def layer_fs() -> DomainFs:
    gone = directory({b"gone": whiteout(), b"new": regular(4 << 30, 9)})
    gone.xattrs = ((b"trusted.overlay.origin", b""), (b"user.x", b"y"))
    changed = directory({b"d": gone, b"var": directory({b"new": regular(5 << 30, 7)}, opaque=True)})
    fs = DomainFs(no_reader, {})
    fs.add_map(OTHER, rendered(directory({b"d": directory({b"gone": regular(1 << 30, 1)})})))
    fs.add_map(MAP, rendered(changed))
    return fs


def test_a_layer_is_shown_with_its_marks_as_overlay_wants_them() -> None:
    fs = layer_fs()
    assert {e.name.decode() for e in fs.readdir(find(fs, "layers"), 0)} == {MAP, OTHER}
    root = find(fs, f"layers/{MAP}")
    assert [path for path, _ in walk(fs, root)] == ["/d", "/d/gone", "/d/new", "/var", "/var/new"]
    gone = fs.getattr(find(fs, "d/gone", root))
    assert (stat.S_ISCHR(gone.mode), gone.device) == (True, (0, 0))
    assert fs.xattrs(find(fs, "d", root)) == {b"trusted.overlay.origin": b"", b"user.x": b"y"}
    assert fs.xattrs(find(fs, "var", root)) == {b"trusted.overlay.opaque": b"y"}
    assert read(fs, find(fs, "var/new", root), 0, 100) == f"{MAP}@{5 << 30}+7".encode()
    assert fs.lookup(root, b"nothing") is None


def test_files_of_layers_have_numbers_of_their_own_that_last() -> None:
    fs = layer_fs()
    numbers = [entry.attr.inode for _, entry in walk(fs)]
    roots = [find(fs, f"layers/{view}") for view in (MAP, OTHER)]
    assert len(set(numbers)) == len(numbers)
    assert set(roots) <= set(numbers)
    assert max(numbers) < 1 << 60, "overlay's xino wants some bits"
    again = layer_fs()
    assert find(again, f"layers/{OTHER}/d/gone") == find(fs, f"layers/{OTHER}/d/gone")
    inode = find(fs, f"layers/{MAP}/d")
    assert again.getattr(inode) == fs.getattr(inode), "also where nobody looked it up before"
    fs.remove_map(MAP)
    with pytest.raises(NotFoundError):
        fs.getattr(inode)
    assert find(fs, f"layers/{OTHER}/d")


MEMORY = """
import mmap, sys
from nsfs.core.union import UnionTree
from nsfs.core.vfs import ROOT, TreeFs
from nsfs.format.erofs_image import ErofsImage

def private(kind):
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith(kind))

def walk(inode):
    found = 0
    for entry in fs.readdir(inode, 0):
        found += 1
        if entry.attr.mode >> 12 == 4:
            found += walk(entry.attr.inode)
    return found

with open(sys.argv[1], "rb") as file:
    fs = TreeFs(UnionTree([ErofsImage(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))]), ["x"], None)
before = private("Private_Dirty")
print(walk(ROOT), before, private("Private_Dirty"), private("Private_"))
"""


def test_a_large_image_costs_little_memory(tmp_path: Path) -> None:
    root = directory(
        {
            b"d%04d" % i: directory(
                {b"file%05d" % j: regular((1 << 30) + (i * 100 + j) * 4096, 4096) for j in range(99)}
            )
            for i in range(1000)
        }
    )
    path = tmp_path / "map.erofs"
    with path.open("wb") as file:
        file.write(render_erofs(root, disk_blocks=(1 << 32) - 1, uuid=bytes(16)))
        os.fsync(file.fileno())  # mapped pages that are not written out yet would count as ours
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, path], capture_output=True, text=True, check=True, env=environment()
    )
    files, before, after, with_map = map(int, done.stdout.split())
    print(f"{files} files: {before} KiB before, {after} KiB after a walk, {with_map} KiB with the map's pages")
    assert files == 100_000
    assert with_map < 40 * 1024
    assert after - before < 4 * 1024


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def test_each_tree_of_a_domain_tells_its_own_state_beside_files_of_its_own() -> None:
    fs = vfs.DomainFs(no_reader, {})
    for name in ("one", "two"):
        fs.add_tree(name, UnionTree(layers()), [MAP, OTHER], {"mount.json": name.encode})
    for name in ("one", "two"):
        root = find(fs, f"trees/{name}")
        state = find(fs, ".nsfs/mount.json", root)
        assert fs.getattr(state).size == len(name)
        assert read(fs, state, 0, 100) == name.encode()
        assert stat.S_ISDIR(fs.getattr(find(fs, ".nsfs", root)).mode)
        assert ".nsfs" not in {entry.name.decode() for entry in fs.readdir(root, 0)}
        paths = [entry.attr.inode for _, entry in walk(fs, root)]
        assert state not in paths
    assert find(fs, "trees/one/.nsfs") != find(fs, "trees/two/.nsfs")
