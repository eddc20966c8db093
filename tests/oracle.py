"""What an image's tree must look like, found out without any code of nsfs.

Owns: reading a tree from a mount (`snapshot`), unpacking layers by the OCI image specification's rules (layer.md,
"Changeset"; whiteouts of a layer apply to lower layers only, whatever their place in the tar), and comparing two trees
(`difference`). Names, types, modes, owners, sizes, contents, targets, devices, xattrs and mtimes come from unpacking
the tars in order into one directory (`umoci unpack` does the same, and a test says so); link counts and groups come
from an overlayfs of the layers, each unpacked on top of its parents, since overlayfs cannot join names across layers.

Directories' sizes and link counts are the filesystem's own business and are left out. Needs root; not thread-safe.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import posixpath
import shutil
import stat
import subprocess
import tarfile
from collections import defaultdict
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import IO, TYPE_CHECKING, cast

import zstandard

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

DROPPED_XATTRS = (b"trusted.", b"user.overlay.", b"security.selinux", b"security.ima", b"security.evm")
"""Prefixes of what a layer may not set."""

ESTARGZ_FILES = (b"stargz.index.json", b".prefetch.landmark", b".no.prefetch.landmark")
"""In the root of an eStargz layer: parts of the format, not of the image."""

_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "character",
    stat.S_IFBLK: "block",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


@dataclass(frozen=True, slots=True)
class File:
    """One name of a tree. None is "not compared"."""

    kind: str
    mode: int | None
    uid: int | None
    gid: int | None
    mtime_ns: int | None
    size: int = 0
    digest: str = ""
    target: bytes = b""
    device: tuple[int, int] = (0, 0)
    xattrs: tuple[tuple[str, bytes], ...] = ()
    links: int | None = None
    group: bytes | None = None
    """The first of the names of a regular file's inode."""


Tree = dict[bytes, File]
"""Files by path relative to the root, which itself is b"."."""


def snapshot(root: str) -> Tree:
    """Read the whole tree at `root`, every byte of it."""
    tree: Tree = {}
    inodes: dict[tuple[int, int], list[bytes]] = defaultdict(list)
    for name, path in _walk(os.fsencode(root)):
        status = os.lstat(path)
        tree[name] = _file(path, status)
        if stat.S_ISREG(status.st_mode):
            inodes[status.st_dev, status.st_ino].append(name)
    for names in inodes.values():
        for name in names:
            tree[name] = replace(tree[name], group=min(names))
    return tree


def _walk(root: bytes) -> Iterator[tuple[bytes, bytes]]:
    yield b".", root
    todo = [b""]
    while todo:
        directory = todo.pop()
        with os.scandir(root + b"/" + directory) as entries:
            for entry in entries:
                name = directory + entry.name
                yield name, root + b"/" + name
                if entry.is_dir(follow_symlinks=False):
                    todo.append(name + b"/")


def _file(path: bytes, status: os.stat_result) -> File:
    kind = _KINDS[stat.S_IFMT(status.st_mode)]
    device = (os.major(status.st_rdev), os.minor(status.st_rdev))
    return File(
        kind=kind,
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        mtime_ns=status.st_mtime_ns,
        size=status.st_size if kind == "file" else 0,
        digest=_digest(path) if kind == "file" else "",
        target=os.readlink(path) if kind == "symlink" else b"",
        device=device if kind in {"character", "block"} else (0, 0),
        xattrs=_xattrs(path),
        links=None if kind == "directory" else status.st_nlink,
    )


def _digest(path: bytes) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _xattrs(path: bytes) -> tuple[tuple[str, bytes], ...]:
    names = sorted(os.listxattr(path, follow_symlinks=False))
    return tuple((name, os.getxattr(path, name, follow_symlinks=False)) for name in names)


def difference(expected: Tree, actual: Tree, *, limit: int = 40) -> str:
    """What differs, a line for each name, at most `limit` lines; empty if nothing does."""
    lines = [line for name in sorted(expected.keys() | actual.keys()) if (line := _line(name, expected, actual))]
    if len(lines) > limit:
        lines[limit:] = [f"and {len(lines) - limit} more"]
    return "\n".join(lines)


def _line(name: bytes, expected: Tree, actual: Tree) -> str:
    if name not in actual:
        return f"{name!r}: missing"
    if name not in expected:
        return f"{name!r}: not in the image: {actual[name].kind}"
    facts = []
    for key in File.__slots__:
        want, have = getattr(expected[name], key), getattr(actual[name], key)
        if want is not None and want != have:
            facts.append(f"{key} is {have!r}, should be {want!r}")
    return f"{name!r}: {'; '.join(facts)}" if facts else ""


def without(tree: Tree, names: Sequence[bytes]) -> Tree:
    """`tree` without some names of its root directory."""
    return {name: file for name, file in tree.items() if name not in names}


def find_layers(layout: str, tag: str | None = None) -> list[str]:
    """The layers' blobs of an image in an OCI layout, lowest first."""
    with open(f"{layout}/index.json", "rb") as file:
        manifests = json.load(file)["manifests"]
    key = "org.opencontainers.image.ref.name"
    chosen = [m for m in manifests if tag is None or m.get("annotations", {}).get(key) == tag]
    manifest = json.loads(_read_blob(layout, chosen[0]["digest"]))
    if "manifests" in manifest:
        manifest = json.loads(_read_blob(layout, manifest["manifests"][0]["digest"]))
    return [_blob_path(layout, layer["digest"]) for layer in manifest["layers"]]


def _blob_path(layout: str, digest: str) -> str:
    return f"{layout}/blobs/{digest.replace(':', '/')}"


def _read_blob(layout: str, digest: str) -> bytes:
    with open(_blob_path(layout, digest), "rb") as file:
        return file.read()


def expected_tree(layers: Sequence[str], scratch: str) -> Tree:
    """What the image of these layers (paths of blobs, lowest first) must look like; works in the directory `scratch`.

    A directory that no layer names has no expected owner, mode and mtime but those that unpackers give it: 0755, root.
    """
    flat = f"{scratch}/flat"
    os.mkdir(flat)
    unpacked = Unpacked(flat)
    for layer in layers:
        unpacked.apply(layer)
    unpacked.finish()
    tree = unpacked.tree()
    with overlay_of(layers, f"{scratch}/stack") as merged:
        linked = snapshot(merged)
    return {name: replace(file, links=linked[name].links, group=linked[name].group) for name, file in tree.items()}


@contextlib.contextmanager
def overlay_of(layers: Sequence[str], scratch: str) -> Iterator[str]:
    """A read-only overlayfs mount of `layers`, each unpacked into a directory as the upper of those below."""
    directories = unpack_stack(layers, scratch)
    target = f"{scratch}/m"
    with mounted_overlay(scratch, [os.path.relpath(d, scratch) for d in reversed(directories)], target):
        yield target


def unpack_stack(layers: Sequence[str], scratch: str) -> list[str]:
    """Unpack every layer on top of its parents; returns the uppers, lowest first, as directories `scratch`/<n>."""
    os.makedirs(f"{scratch}/m")
    os.mkdir(f"{scratch}/e")
    os.mkdir(f"{scratch}/w")
    for number, layer in enumerate(layers):
        os.mkdir(f"{scratch}/{number}")
        lowers = [str(below) for below in reversed(range(number))]
        with mounted_overlay(scratch, lowers, f"{scratch}/m", upper=str(number)):
            unpacked = Unpacked(f"{scratch}/m")
            unpacked.apply(layer)
            unpacked.finish()
        shutil.rmtree(f"{scratch}/w/work", ignore_errors=True)
    return [f"{scratch}/{number}" for number in range(len(layers))]


@contextlib.contextmanager
def mounted_overlay(directory: str, lowers: Sequence[str], target: str, *, upper: str | None = None) -> Iterator[None]:
    """An overlayfs at `target`; `lowers` (topmost first) and `upper` are short names below `directory`.

    Names are relative so that 128 of them fit into the one page that mount(2) takes.
    """
    stack = [*lowers, "e"]  # overlayfs wants two lowers, or an upper
    options = [f"lowerdir={':'.join(stack)}", "xino=on", "redirect_dir=nofollow", "metacopy=off", "index=off"]
    if upper is not None:
        options += [f"upperdir={upper}", "workdir=w"]
    command = ["mount", "-t", "overlay", "-o", ",".join(options), "overlay", target]
    subprocess.run(command, cwd=directory, check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", target], check=True)


@dataclass
class Unpacked:
    """A directory into which layers are unpacked, lowest first; `finish` when all are."""

    root: str
    mtimes: dict[bytes, int | None] = field(default_factory=dict)
    """Of directories, to be set at the end; None where no layer names the directory."""
    named: set[bytes] = field(default_factory=set)

    def apply(self, layer: str) -> None:
        """Unpack one layer: first what it removes, then what it brings."""
        with open_layer(layer) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            directories = {}
            whiteouts = []
            for member in archive:
                name = clean(member.name)
                if posixpath.basename(name).startswith(b".wh."):
                    whiteouts.append(name)
                else:
                    directories[name] = member.isdir()
        for name in whiteouts:
            self._white_out(name, directories)
        with open_layer(layer) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                if not posixpath.basename(clean(member.name)).startswith(b".wh."):
                    self._extract(archive, member)

    def finish(self) -> None:
        """Set what adding and removing names disturbed: the times of directories."""
        for path, mtime_ns in self.mtimes.items():
            if mtime_ns is not None and os.path.isdir(path) and not os.path.islink(path):
                os.utime(path, ns=(mtime_ns, mtime_ns))

    def tree(self) -> Tree:
        """The tree with what no layer says left open, and without what a layer may not say."""
        tree = {name: _allowed(file) for name, file in snapshot(self.root).items()}
        root = os.fsencode(self.root)
        if root not in self.named:
            tree[b"."] = replace(tree[b"."], mode=None, uid=None, gid=None, mtime_ns=None)
        for path, mtime_ns in self.mtimes.items():
            name = os.path.relpath(path, root)
            if mtime_ns is None and name in tree:
                tree[name] = replace(tree[name], mtime_ns=None)
        return tree

    def _white_out(self, name: bytes, directories: Mapping[bytes, bool]) -> None:
        parent, base = posixpath.split(name)
        if self._replaced(parent, directories):
            return
        where = self._resolve(parent)
        if base == b".wh..wh..opq":
            for child in os.listdir(where) if os.path.isdir(where) else []:
                self._remove(where + b"/" + child)
        elif not base.startswith(b".wh..wh."):
            self._remove(where + b"/" + base.removeprefix(b".wh."))

    def _replaced(self, parent: bytes, directories: Mapping[bytes, bool]) -> bool:
        """Whether the layer itself brings `parent` as a directory where below there is none."""
        while parent:
            if directories.get(parent) and not _is_directory(self._resolve(posixpath.dirname(parent)), parent):
                return True
            parent = posixpath.dirname(parent)
        return False

    def _resolve(self, name: bytes) -> bytes:
        """The path of directory `name`, symlinks followed inside the root; what is missing stays as it is."""
        root = os.fsencode(self.root)
        path: list[bytes] = []
        todo = name.split(b"/")[::-1]
        hops = 0
        while todo:
            part = todo.pop()
            if part in {b"", b"."}:
                continue
            if part == b"..":
                path = path[:-1]
                continue
            here = b"/".join([root, *path, part])
            if os.path.islink(here) and hops < 40:
                hops += 1
                target = os.readlink(here)
                path = [] if target.startswith(b"/") else path
                todo += target.split(b"/")[::-1]
            else:
                path.append(part)
        return b"/".join([root, *path])

    def _extract(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        name = clean(member.name)
        parent, base = posixpath.split(name)
        where = self._resolve(parent)
        self._make_parents(where)
        path = where + b"/" + base if base else os.fsencode(self.root)
        if os.path.lexists(path) and not (member.isdir() and _is_directory(where, base)):
            self._remove(path)
        self._touch(where)
        self._create(archive, member, path)
        if not member.islnk():  # a link has no attributes but its target's, and its header need not repeat these
            _set_attributes(path, member)
        if member.isdir():
            self.mtimes[path] = mtime_ns(member)
            self.named.add(path)

    def _create(self, archive: tarfile.TarFile, member: tarfile.TarInfo, path: bytes) -> None:
        if member.isdir():
            if not os.path.isdir(path):
                os.mkdir(path)
        elif member.issym():
            os.symlink(os.fsencode(member.linkname), path)
        elif member.islnk():
            self._link(clean(member.linkname), path)
        elif member.ischr() or member.isblk():
            kind = stat.S_IFCHR if member.ischr() else stat.S_IFBLK
            os.mknod(path, kind | 0o600, os.makedev(member.devmajor, member.devminor))
        elif member.isfifo():
            os.mkfifo(path)
        else:
            with open(path, "xb") as file:
                shutil.copyfileobj(cast("IO[bytes]", archive.extractfile(member)), file)

    def _link(self, target: bytes, path: bytes) -> None:
        """Link `path` to `target`; overlayfs copies a lower `target` up, and so parts it from its other lower names."""
        parent, base = posixpath.split(target)
        os.link(self._resolve(parent) + b"/" + base, path, follow_symlinks=False)

    def _make_parents(self, where: bytes) -> None:
        if os.path.isdir(where):
            return
        self._make_parents(posixpath.dirname(where))
        if os.path.lexists(where):
            self._remove(where)
        self._touch(posixpath.dirname(where))
        os.mkdir(where, 0o755)
        self.mtimes[where] = None

    def _remove(self, path: bytes) -> None:
        if not os.path.lexists(path):
            return
        self._touch(posixpath.dirname(path))
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)
        for known in [known for known in self.mtimes if known == path or known.startswith(path + b"/")]:
            del self.mtimes[known]
            self.named.discard(known)

    def _touch(self, directory: bytes) -> None:
        """Remember the time of a directory that is about to change."""
        if directory not in self.mtimes:
            self.mtimes[directory] = os.stat(directory).st_mtime_ns


def clean(name: str) -> bytes:
    """A tar member's name relative to the root, with nothing that leads out of it; b"" is the root."""
    return posixpath.normpath(b"/" + os.fsencode(name)).lstrip(b"/")


def mtime_ns(member: tarfile.TarInfo) -> int:
    """The member's mtime; tarfile's own is a float, too coarse for nanoseconds."""
    text = member.pax_headers.get("mtime")
    return int(Decimal(text) * 10**9) if text is not None else int(member.mtime) * 10**9


@contextlib.contextmanager
def open_layer(path: str) -> Iterator[IO[bytes]]:
    """A layer's tar, whatever its compression."""
    with open(path, "rb") as file:
        magic = file.read(4)
        file.seek(0)
        if magic[:2] == b"\x1f\x8b":
            with gzip.open(file) as stream:
                yield cast("IO[bytes]", stream)
        elif magic == b"\x28\xb5\x2f\xfd" or magic[1:] == b"\x2a\x4d\x18":
            with zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True) as stream:
                yield cast("IO[bytes]", stream)
        else:
            yield file


def _set_attributes(path: bytes, member: tarfile.TarInfo) -> None:
    os.chown(path, member.uid, member.gid, follow_symlinks=False)
    if not member.issym():
        os.chmod(path, member.mode & 0o7777)
    for name in os.listxattr(path, follow_symlinks=False):
        os.removexattr(path, name, follow_symlinks=False)
    for key, value in member.pax_headers.items():
        name = key.removeprefix("SCHILY.xattr.")
        if name != key and not os.fsencode(name).startswith(DROPPED_XATTRS):
            os.setxattr(path, name, os.fsencode(value), follow_symlinks=False)
    if not member.isdir():
        os.utime(path, ns=(mtime_ns(member), mtime_ns(member)), follow_symlinks=False)


def _allowed(file: File) -> File:
    return replace(file, xattrs=tuple(x for x in file.xattrs if not os.fsencode(x[0]).startswith(DROPPED_XATTRS)))


def _is_directory(where: bytes, base: bytes) -> bool:
    path = where + b"/" + posixpath.basename(base)
    return os.path.isdir(path) and not os.path.islink(path)
