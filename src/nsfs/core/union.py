"""The merged tree of an image: maps stacked as overlay stacks them, without mounting anything.

Owns overlay's rules of looking up (Linux, Documentation/filesystems/overlayfs.rst): the topmost name wins, directories
of one name merge down to the first opaque one, whiteouts hide; and what a single layer is where overlay follows these
rules itself. It keeps nothing per file: a `UnionNode` is a value that
the caller holds for as long as it needs it, and can be had again from its path. Immutable, hence safe from any thread;
nothing waits for anything but page faults of the maps.

Layers are numbered from the top. A tree may be *partial*, when only the top layers are known yet: what cannot be said
without those below then raises DeeperError.
"""

from __future__ import annotations

import heapq
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Final, NamedTuple

from msgspec import Struct

from nsfs.errors import CorruptError, NotFoundError
from nsfs.format.erofs import render_erofs
from nsfs.format.erofs_image import ErofsImage
from nsfs.model.layer import Kind, Node
from nsfs.model.tree import OPAQUE, UNNAMED_ROOT, Found

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from nsfs.format.erofs_image import Inode

MAX_SYMLINKS: Final = 40
"""Followed in one path, as Linux does (include/linux/namei.h, MAXSYMLINKS)."""
_MAX_DEPTH: Final = 4096
_OVERLAY_XATTRS: Final = b"trusted.overlay."
_PART: Final = 1 << 48
"""Positions in a merged directory are part * 2^48 + position in that part."""


class DeeperError(Exception):
    """The known layers do not decide this; more of them are needed."""


class UnionNode(Struct, frozen=True, gc=False):
    """One file of a merged tree. Of one tree, `layer` and `nid` alone tell files apart."""

    layer: int
    """The image that its attributes come from, 0 for the top."""
    nid: int
    kind: Kind
    parts: tuple[tuple[int, int], ...] = ()
    """Of a merged directory: layer and nid of all directories that its names come from, top first."""
    open: bool = False
    """Of a directory in a partial tree: layers that are not known yet may add to it."""


class UnionEntry(Struct, frozen=True, gc=False):
    """One name of a merged directory."""

    name: bytes
    node: UnionNode
    next: int
    """Position to go on from (`readdir`'s `start`)."""


class _Part(NamedTuple):
    """One layer's entry of a name, on its way into a merged one."""

    name: bytes
    layer: int
    nid: int
    kind: Kind
    next: int


_part_name = attrgetter("name")


_NOTHING: Final = bytes(render_erofs(Node(Kind.DIRECTORY, 0o755), disk_blocks=1, uuid=bytes(16)))
"""What an image without layers has: a root."""


class UnionTree:
    """`images` stacked, top first; none give an empty directory."""

    def __init__(self, images: Sequence[ErofsImage], *, partial: bool = False) -> None:
        self.images = tuple(images) or (ErofsImage(_NOTHING),)
        self._partial = partial
        self.root = self._merge_roots()

    def inode(self, node: UnionNode) -> Inode:
        """Attributes; the link count of a merged directory is its own layer's."""
        return self.images[node.layer].inode(node.nid)

    def readlink(self, node: UnionNode) -> bytes:
        """A symlink's target."""
        return self.images[node.layer].readlink(node.nid)

    def extent(self, node: UnionNode) -> tuple[int, int]:
        """Address on the disk, and size in bytes, of a regular file."""
        return self.images[node.layer].extent(node.nid)

    def xattrs(self, node: UnionNode) -> list[tuple[bytes, bytes]]:
        """Extended attributes without overlay's own."""
        xattrs = self.images[node.layer].xattrs(node.nid)
        return [(name, value) for name, value in xattrs if not name.startswith(_OVERLAY_XATTRS)]

    def lookup(self, directory: UnionNode, name: bytes) -> UnionNode | None:
        """What has `name` in `directory`, None if nothing has; DeeperError only from a partial tree."""
        parts = (self._find(layer, nid, name) for layer, nid in _directories(directory))
        return self._merge((part for part in parts if part is not None), partial=directory.open)

    def readdir(self, directory: UnionNode, start: int = 0) -> Iterator[UnionEntry]:
        """The entries of `directory` in the order of their names; `start` is 0 or the `next` of an entry.

        Raises DeeperError if layers that are not known may add to the directory.
        """
        if directory.open:
            raise DeeperError
        listings = [self._list(*part) for part in self._starts(directory, start)]
        merged = listings[0] if len(listings) == 1 else heapq.merge(*listings, key=_part_name)
        for name, group in groupby(merged, key=_part_name):
            parts = list(group)
            node = self._merge(parts, partial=False)
            if node is not None:
                yield UnionEntry(name, node, parts[0].next)

    def resolve(self, path: bytes, *, follow_last: bool = True) -> UnionNode:
        """The file at `path`, absolute or not, inside the root; symlinks are followed there, the last if asked to.

        Raises NotFoundError if there is none, or too many symlinks are on the way.
        """
        reached = [self.root]
        todo = path.split(b"/")[::-1]
        symlinks = 0
        while todo:
            name = todo.pop()
            if reached[-1].kind is not Kind.DIRECTORY:
                raise NotFoundError(f"a parent is no directory: {_show(path)}")
            if name == b"..":
                reached = reached[:-1] or reached
            elif name not in (b"", b"."):
                node = self.lookup(reached[-1], name)
                if node is None:
                    raise NotFoundError(f"no such file in the image: {_show(path)}")
                if node.kind is not Kind.SYMLINK or not (todo or follow_last):
                    reached.append(node)
                    continue
                symlinks += 1
                if symlinks > MAX_SYMLINKS:
                    raise NotFoundError(f"too many symlinks on the way: {_show(path)}")
                target = self.readlink(node)
                reached = reached[:1] if target.startswith(b"/") else reached
                todo += target.split(b"/")[::-1]
        return reached[-1]

    def walk(self, path: bytes = b"") -> Iterator[tuple[bytes, UnionNode]]:
        """`path` and everything under it, parents first, names in order; symlinks below `path` are not followed.

        Paths are given as `path` and the names below it, joined by slashes, without one at either end.
        """
        prefix = path.strip(b"/")
        node = self.resolve(path)
        yield prefix, node
        if node.kind is not Kind.DIRECTORY:
            return
        pending = [(prefix, self.readdir(node))]
        while pending:
            prefix, entries = pending[-1]
            entry = next(entries, None)
            if entry is None:
                pending.pop()
                continue
            child = prefix + b"/" + entry.name if prefix else entry.name
            yield child, entry.node
            if entry.node.kind is Kind.DIRECTORY:
                if len(pending) >= _MAX_DEPTH:
                    raise CorruptError(f"directories are nested too deeply: {_show(child)}")
                pending.append((child, self.readdir(entry.node)))

    def _merge_roots(self) -> UnionNode:
        """Names down to the first opaque root; attributes of the topmost layer that says what they are."""
        root = self._merge(
            (_Part(b"", layer, image.root, Kind.DIRECTORY, 0) for layer, image in enumerate(self.images)),
            partial=self._partial,
        )
        assert root is not None
        named = next((layer for layer, image in enumerate(self.images) if image.volume != UNNAMED_ROOT), 0)
        return UnionNode(named, self.images[named].root, Kind.DIRECTORY, _directories(root), root.open)

    def _merge(self, parts: Iterable[_Part], *, partial: bool) -> UnionNode | None:
        """What overlay makes of one name's entries, top first; `partial` if unknown layers may have it, too."""
        directories: list[tuple[int, int]] = []
        for part in parts:
            if part.kind is not Kind.DIRECTORY:
                if not directories:
                    return None if self._is_whiteout(part) else UnionNode(part.layer, part.nid, part.kind)
                partial = False
                break
            directories.append((part.layer, part.nid))
            if self.images[part.layer].xattr(part.nid, OPAQUE[0]) == OPAQUE[1]:
                partial = False
                break
        if directories:
            merged = tuple(directories) if len(directories) > 1 else ()
            return UnionNode(*directories[0], Kind.DIRECTORY, merged, partial)
        if partial:
            raise DeeperError
        return None

    def _is_whiteout(self, part: _Part) -> bool:
        return part.kind is Kind.CHARACTER and self.images[part.layer].inode(part.nid).is_whiteout

    def _find(self, layer: int, nid: int, name: bytes) -> _Part | None:
        found = self.images[layer].find(nid, name)
        return None if found is None else _Part(name, layer, found.nid, found.kind, 0)

    def _list(self, number: int, layer: int, nid: int, start: int) -> Iterator[_Part]:
        for entry in self.images[layer].readdir(nid, start):
            yield _Part(entry.name, layer, entry.nid, entry.kind, number * _PART + entry.next)

    def _starts(self, directory: UnionNode, start: int) -> list[tuple[int, int, int, int]]:
        """Number, layer, nid and first position of each part of a directory, to go on listing it from `start`."""
        directories = _directories(directory)
        number, position = divmod(start, _PART)
        if number >= len(directories):
            raise CorruptError(f"no position in a directory: {start}")
        if len(directories) == 1 or not start:
            return [(each, *part, position) for each, part in enumerate(directories)]
        layer, nid = directories[number]
        name = self.images[layer].name_before(nid, position)
        return [(each, *part, self.images[part[0]].position(part[1], name)) for each, part in enumerate(directories)]


class LayerTree(UnionTree):
    """One layer as overlay stacks it: whiteouts are character devices 0/0, overlay's own attributes are to be seen."""

    def __init__(self, image: ErofsImage) -> None:
        super().__init__([image])

    def xattrs(self, node: UnionNode) -> list[tuple[bytes, bytes]]:
        """Extended attributes, all of them."""
        return self.images[node.layer].xattrs(node.nid)

    def _is_whiteout(self, part: _Part) -> bool:  # noqa: ARG002  a name like any other
        return False


class LowerTree:
    """A merged tree as `model.tree.plan_tree` asks for what is below a layer; of no images, nothing."""

    def __init__(self, images: Sequence[ErofsImage]) -> None:
        self._tree = UnionTree(images) if images else None

    def find(self, path: bytes) -> Found | None:
        """What is at `path`, no symlink followed; its layer is its number in `images`."""
        if self._tree is None:
            return None
        node: UnionNode | None = self._tree.root
        for name in path.split(b"/"):
            if node is None or node.kind is not Kind.DIRECTORY:
                return None
            node = self._tree.lookup(node, name)
        return None if node is None else Found(_copy(self._tree, node), node.layer)


def decide(images: Sequence[ErofsImage], path: bytes, *, follow_last: bool = True, listing: bool = False) -> bool:
    """Whether the top `images` alone say what is at `path` (or that nothing is), whatever the layers below contain.

    With `listing`, whether they say so of all names in it, too, should it be a directory.
    """
    if not images:
        return False
    tree = UnionTree(images, partial=True)
    try:
        node = tree.resolve(path, follow_last=follow_last)
    except DeeperError:
        return False
    except NotFoundError:
        return True
    if node == tree.root and images[node.layer].volume == UNNAMED_ROOT:
        return False
    return not (listing and node.open)


def _directories(node: UnionNode) -> tuple[tuple[int, int], ...]:
    return node.parts or ((node.layer, node.nid),)


def _copy(tree: UnionTree, node: UnionNode) -> Node:
    inode = tree.inode(node)
    copy = Node(inode.kind, inode.mode, inode.uid, inode.gid, inode.mtime_ns)
    copy.device = inode.device
    copy.xattrs = tuple(tree.xattrs(node))
    if inode.kind is Kind.REGULAR:
        copy.address, copy.size = tree.extent(node)
    elif inode.kind is Kind.SYMLINK:
        copy.link = tree.readlink(node)
    return copy


def _show(path: bytes) -> str:
    return repr(path[:200])[1:]
