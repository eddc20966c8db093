"""What a FUSE session shows: the Protocol that adapters serve, and the two trees that nsfs has.

Owns: inode numbers, and which inode is backed by which bytes. `DomainFs` is the inside of a domain, for root:
`disks/<view>`, `maps/<view>`, `layers/<view>/…` for kernels without EROFS, `trees/<tree>/…` and a hidden `.nsfs/`.
`TreeFs` is one image, the union of its layers' maps, or one layer. A `Reader` is asked for (view, address, size).

Everything but `Handle.read` is synchronous and quick, served from memory maps; nothing is kept per file, and of merged
directories a bounded number. All methods raise NsfsError only; its errno is what a process sees.

Invariants: an inode number is a function of names (a view's, a tree's) and of positions in maps, never of the order of
requests, so that a process that takes over a session understands the numbers which its predecessor gave out. The same
number always has the same attributes and bytes; so names of views and trees are never used again for something else.
"""

from __future__ import annotations

import hashlib
import stat
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

from msgspec import Struct

from nsfs.core.ports import BLOCK
from nsfs.core.union import LayerTree, UnionNode
from nsfs.errors import CorruptError, ExistsError, NotFoundError, UsageError
from nsfs.format.erofs import FILE_TYPES
from nsfs.format.erofs_image import ErofsImage
from nsfs.model.layer import Kind

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence

    from nsfs.core.ports import Content
    from nsfs.core.union import UnionTree

ROOT: Final = 1
"""The inode number of every root."""
FOREVER: Final = 86400.0
"""Seconds for which the kernel may keep what cannot change."""
DISK_SIZE: Final = (16 << 40) - BLOCK

Reader: TypeAlias = "Callable[[str, int, int], Awaitable[bytes | memoryview]]"
"""`await reader(view name, address, size)`: exactly that many bytes of the disk, as that view sees it."""


class Attr(Struct, frozen=True, gc=False, kw_only=True):
    """What stat(2) tells of an inode, and for how many seconds that is true."""

    inode: int
    mode: int
    """With the file type's bits."""
    size: int = 0
    links: int = 1
    uid: int = 0
    gid: int = 0
    device: tuple[int, int] = (0, 0)
    mtime_ns: int = 0
    timeout: float = FOREVER
    """For the attributes and for the name under which they were found."""


class Entry(Struct, frozen=True, gc=False):
    """One name of a directory. `next` is the position to go on from, never 0, stable for as long as the inode is."""

    name: bytes
    attr: Attr
    next: int


class Handle(Protocol):
    """An open file's content."""

    @property
    def direct(self) -> bool:
        """Nothing of it may be cached, and its size is not what the attributes say."""

    async def read(self, offset: int, size: int) -> bytes | memoryview:
        """Bytes from `offset`, `size` of them unless the file ends before."""


class Vfs(Protocol):
    """A read-only tree of files, as a FUSE session needs it. Its root is inode 1."""

    def lookup(self, parent: int, name: bytes) -> Attr | None:
        """The entry of a directory; None if there never will be one, NotFoundError if there is none now."""

    def getattr(self, inode: int) -> Attr:
        """Attributes."""

    def readdir(self, inode: int, start: int) -> Iterator[Entry]:
        """Entries after position `start` (0: all), without `.` and `..`."""

    def readlink(self, inode: int) -> bytes:
        """A symlink's target."""

    def xattrs(self, inode: int) -> Mapping[bytes, bytes]:
        """All extended attributes."""

    def open(self, inode: int) -> Handle:
        """The content of a regular file."""


class BytesHandle:
    """Content that is there at once."""

    def __init__(self, data: Content, *, direct: bool) -> None:
        self._data = data
        self.direct = direct

    async def read(self, offset: int, size: int) -> bytes | memoryview:
        """See Handle."""
        return bytes(self._data[offset : offset + size])


class ExtentHandle:
    """Content that lies on the disk from `address` on, as `view` sees it."""

    direct = False

    def __init__(self, reader: Reader, view: str, address: int, size: int) -> None:
        self._reader = reader
        self._view = view
        self._address = address
        self._size = size

    async def read(self, offset: int, size: int) -> bytes | memoryview:
        """See Handle."""
        size = min(size, self._size - offset)
        return await self._reader(self._view, self._address + offset, size) if size > 0 else b""


# Numbers: 4 zero bits (overlay's xino wants some), 2 bits of kind, then 58 that the kind explains.

_KIND_SHIFT: Final = 58
_KIND_LAYER, _KIND_DISK, _KIND_MAP, _KIND_TREE = range(4)
"""Layers share the first kind with the folders: no layer's number is as small as theirs."""
_NAME_MASK: Final = (1 << _KIND_SHIFT) - 1
"""Of a disk and a map: a hash of the view's name."""
_NID_BITS: Final = 27
_TREE_SHIFT: Final = 35
"""Of a file in a tree: 23 bits of the tree's id, 8 of layer, 27 of nid; in a layer, 31 of the view and 27 of nid."""
_TREE_MASK: Final = (1 << _KIND_SHIFT - _TREE_SHIFT) - 1
_NID_MASK: Final = (1 << _NID_BITS) - 1
_LAYER_MASK: Final = (1 << _KIND_SHIFT - _NID_BITS) - 1
MAX_LAYERS: Final = 1 << _TREE_SHIFT - _NID_BITS

_DIRECTORY: Final = stat.S_IFDIR | 0o555
_FILE: Final = stat.S_IFREG | 0o444
_HIDDEN: Final = b".nsfs"
_KEPT_DIRECTORIES: Final = 4096
_MAX_DEPTH: Final = 4096


def _hash_bits(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big")


class StateFiles:
    """The hidden directory `.nsfs/`: files whose content is made when they are asked for.

    Its inode number is `first`, those of the files follow; that is stable for as long as the names are the same.
    """

    def __init__(self, files: Mapping[str, Callable[[], bytes]], first: int) -> None:
        self.inode = first
        self._numbers = {name.encode(): first + 1 + i for i, name in enumerate(sorted(files))}
        self._makers = {self._numbers[name.encode()]: make for name, make in files.items()}

    def owns(self, inode: int) -> bool:
        """The inode is the directory or in it."""
        return inode == self.inode or inode in self._makers

    def lookup(self, name: bytes) -> Attr | None:
        """One file."""
        return self.getattr(self._numbers[name]) if name in self._numbers else None

    def getattr(self, inode: int) -> Attr:
        """The directory or one file; sizes are as of now."""
        if inode == self.inode:
            return Attr(inode=inode, mode=_DIRECTORY, links=2)
        return Attr(inode=inode, mode=_FILE, size=len(self._makers[inode]()), timeout=0)

    def readdir(self, start: int) -> Iterator[Entry]:
        """All files."""
        for position, (name, inode) in enumerate(self._numbers.items(), 1):
            if position > start:
                yield Entry(name, self.getattr(inode), position)

    def open(self, inode: int) -> Handle:
        """The content as of now."""
        return BytesHandle(self._makers[inode](), direct=True)


class TreeFs:
    """`tree`, whose contents are read as `views` (one for each of its images, top first).

    `base` is the part of the inode numbers that tells trees of one filesystem apart; with 0 the tree is a filesystem
    of its own, whose root is inode 1. Its root has the hidden `.nsfs/` with `state`, unless the image has that name
    itself; these files have numbers that no map uses (its superblock is there).
    """

    def __init__(
        self,
        tree: UnionTree,
        views: Sequence[str],
        reader: Reader,
        *,
        base: int = 0,
        state: Mapping[str, Callable[[], bytes]] | None = None,
    ) -> None:
        if len(tree.images) > MAX_LAYERS:
            raise UsageError(f"too many layers for one tree: {len(tree.images)}")
        self._tree = tree
        self._views = tuple(views)
        self._reader = reader
        self._base = base
        self._state = None if state is None else StateFiles(state, base | ROOT + 1)
        self._directories: dict[int, UnionNode] = {}
        self.root = self._number(tree.root)

    def lookup(self, parent: int, name: bytes) -> Attr | None:
        """See Vfs."""
        if self._state is not None:
            if parent == self._state.inode:
                return self._state.lookup(name)
            if parent == self.root and name == _HIDDEN and self._tree.lookup(self._tree.root, name) is None:
                return self._state.getattr(self._state.inode)
        node = self._tree.lookup(self._directory(parent), name)
        return None if node is None else self._found(node)

    def getattr(self, inode: int) -> Attr:
        """See Vfs."""
        if self._state is not None and self._state.owns(inode):
            return self._state.getattr(inode)
        return self._attr(self._node(inode))

    def readdir(self, inode: int, start: int) -> Iterator[Entry]:
        """See Vfs."""
        if self._state is not None and inode == self._state.inode:
            yield from self._state.readdir(start)
            return
        for entry in self._tree.readdir(self._directory(inode), start):
            yield Entry(entry.name, self._found(entry.node), entry.next)

    def readlink(self, inode: int) -> bytes:
        """See Vfs."""
        return self._tree.readlink(self._node(inode))

    def xattrs(self, inode: int) -> Mapping[bytes, bytes]:
        """See Vfs."""
        if self._state is not None and self._state.owns(inode):
            return {}
        return dict(self._tree.xattrs(self._node(inode)))

    def open(self, inode: int) -> Handle:
        """See Vfs."""
        if self._state is not None and self._state.owns(inode):
            return self._state.open(inode)
        node = self._node(inode)
        return ExtentHandle(self._reader, self._views[node.layer], *self._tree.extent(node))

    def _number(self, node: UnionNode) -> int:
        if not self._base and (node.layer, node.nid) == (self._tree.root.layer, self._tree.root.nid):
            return ROOT
        if node.nid > _NID_MASK:
            raise CorruptError(f"map is too large: nid {node.nid}")
        return self._base | node.layer << _NID_BITS | node.nid

    def _found(self, node: UnionNode) -> Attr:
        """Attributes of what the tree gave; a directory is kept, since it is likely to be opened next."""
        if node.kind is Kind.DIRECTORY:
            self._keep(self._number(node), node)
        return self._attr(node)

    def _attr(self, node: UnionNode) -> Attr:
        inode = self._tree.inode(node)
        return Attr(
            inode=self._number(node),
            mode=FILE_TYPES[inode.kind] | inode.mode,
            size=inode.size,
            links=inode.links,
            uid=inode.uid,
            gid=inode.gid,
            device=inode.device,
            mtime_ns=inode.mtime_ns,
        )

    def _node(self, inode: int) -> UnionNode:
        """The file of that number; what merges into a directory from below is left out."""
        if inode == self.root:
            return self._tree.root
        layer, nid = (inode ^ self._base) >> _NID_BITS, inode & _NID_MASK
        if layer >= len(self._tree.images):
            raise NotFoundError(f"no such inode: {inode}")
        return UnionNode(layer, nid, self._tree.images[layer].kind(nid))

    def _directory(self, inode: int) -> UnionNode:
        """The directory of that number with all that merges into it."""
        if inode == self.root:
            return self._tree.root
        node = self._directories.get(inode)
        if node is None:
            node = self._find_again(self._node(inode))
            self._keep(inode, node)
        return node

    def _keep(self, number: int, node: UnionNode) -> None:
        if number not in self._directories and len(self._directories) >= _KEPT_DIRECTORIES:
            del self._directories[next(iter(self._directories))]
        self._directories[number] = node

    def _find_again(self, node: UnionNode) -> UnionNode:
        """The merged directory whose top is `node`, by its path in its layer, which is its path in the tree."""
        found: UnionNode | None = self._tree.root
        for name in self._path(node):
            found = found and self._tree.lookup(found, name)
        if found is None or (found.layer, found.nid) != (node.layer, node.nid):
            raise CorruptError(f"no directory of this tree: layer {node.layer}, nid {node.nid}")
        return found

    def _path(self, node: UnionNode) -> list[bytes]:
        """Names from the layer's root to directory `node`."""
        image, nid, names = self._tree.images[node.layer], node.nid, list[bytes]()
        while nid != image.root and len(names) < _MAX_DEPTH:
            parent = image.lookup(nid, b"..")
            name = None if parent is None else _name_of(image, parent, nid)
            if parent is None or name is None:
                raise CorruptError(f"directory without a place: layer {node.layer}, nid {nid}")
            names.append(name)
            nid = parent
        return names[::-1]


def _name_of(image: ErofsImage, directory: int, nid: int) -> bytes | None:
    return next((entry.name for entry in image.readdir(directory) if entry.nid == nid), None)


_FOLDERS: Final = {b"disks": 2, b"maps": 3, b"trees": 4, b"layers": 5, _HIDDEN: 6}
_DISKS, _MAPS, _TREES, _LAYERS, _STATE = _FOLDERS.values()


def _layer_bits(view: str) -> int:
    """What tells the files of one view's layer from those of others: never 0, which is the folders'."""
    return _hash_bits(view) & _LAYER_MASK or 1


class DomainFs:
    """The inside of a domain, for root. Maps and trees are shown from `add_*` to `remove_*`.

    A successor must have added all that its predecessor showed before it takes requests.
    """

    def __init__(self, reader: Reader, state: Mapping[str, Callable[[], bytes]]) -> None:
        self._reader = reader
        self._state = StateFiles(state, _STATE)
        self._maps: dict[int, tuple[str, Content]] = {}
        self._layers: dict[int, TreeFs] = {}
        """Of maps of whose layers somebody asked."""
        self._views: dict[int, str] = {}
        """Of all maps, by the number of their layer."""
        self._trees: dict[int, tuple[str, TreeFs]] = {}

    def add_map(self, view: str, image: Content) -> None:
        """Show `maps/<view>`, whose bytes are `image`, `disks/<view>` and `layers/<view>`; nothing if it is there.

        Raises ExistsError if another view has its number (one chance in two thousand million for each).
        """
        known = self._views.setdefault(_layer_bits(view), view)
        if known != view:
            raise ExistsError(f"two views have one number: {view}, {known}")
        self._maps.setdefault(_hash_bits(view) & _NAME_MASK, (view, image))

    def remove_map(self, view: str) -> None:
        """Take it away; what is open goes on failing with ENOENT."""
        self._maps.pop(_hash_bits(view) & _NAME_MASK, None)
        if self._views.get(_layer_bits(view)) == view:
            del self._views[_layer_bits(view)]
            self._layers.pop(_layer_bits(view), None)

    def add_tree(
        self,
        tree_id: str,
        tree: UnionTree,
        views: Sequence[str],
        state: Mapping[str, Callable[[], bytes]] | None = None,
    ) -> None:
        """Show `trees/<tree_id>`, read as `views` (top first), with `state` in it. Nothing happens if it is there.

        Raises ExistsError if another tree has its number (one chance in eight million for each): take another id.
        """
        bits = _hash_bits(tree_id) & _TREE_MASK
        if bits in self._trees:
            if self._trees[bits][0] != tree_id:
                raise ExistsError(f"two trees have one number: {tree_id}, {self._trees[bits][0]}")
            return
        base = _KIND_TREE << _KIND_SHIFT | bits << _TREE_SHIFT
        self._trees[bits] = tree_id, TreeFs(tree, views, self._reader, base=base, state=state)

    def remove_tree(self, tree_id: str) -> None:
        """Take it away."""
        self._trees.pop(_hash_bits(tree_id) & _TREE_MASK, None)

    def lookup(self, parent: int, name: bytes) -> Attr | None:
        """See Vfs."""
        if parent == ROOT:
            return self.getattr(_FOLDERS[name]) if name in _FOLDERS else None
        if parent == _STATE:
            return self._state.lookup(name)
        tree = self._tree_of(parent)
        return tree.lookup(parent, name) if tree else self.getattr(self._number(parent, name))

    def _number(self, folder: int, name: bytes) -> int:
        """The inode of a name in disks/, maps/, layers/ or trees/."""
        text = name.decode("utf-8", "surrogateescape")
        bits = _hash_bits(text)
        if folder == _TREES:
            known, tree = self._trees.get(bits & _TREE_MASK, (None, None))
            if tree is not None and known == text:
                return tree.root
        elif folder == _LAYERS and self._views.get(_layer_bits(text)) == text:
            return self._layer(_layer_bits(text)).root
        elif folder in (_DISKS, _MAPS) and self._maps.get(bits & _NAME_MASK, (None,))[0] == text:
            kind = _KIND_DISK if folder == _DISKS else _KIND_MAP
            return kind << _KIND_SHIFT | bits & _NAME_MASK
        raise NotFoundError(f"no such file: {text[:300]!r}")

    def getattr(self, inode: int) -> Attr:
        """See Vfs."""
        tree = self._tree_of(inode)
        if tree is not None:
            return tree.getattr(inode)
        match inode >> _KIND_SHIFT:
            case 2:
                return Attr(inode=inode, mode=_FILE, size=len(self._map(inode)[1]))
            case 1:
                self._map(inode)
                return Attr(inode=inode, mode=_FILE, size=DISK_SIZE)
        if self._state.owns(inode):
            return self._state.getattr(inode)
        if inode not in (ROOT, _DISKS, _MAPS, _TREES, _LAYERS):
            raise NotFoundError(f"no such inode: {inode}")
        return Attr(inode=inode, mode=_DIRECTORY, links=2)

    def readdir(self, inode: int, start: int) -> Iterator[Entry]:
        """See Vfs. `.nsfs` is not listed."""
        tree = self._tree_of(inode)
        if tree is not None:
            return tree.readdir(inode, start)
        if inode == _STATE:
            return self._state.readdir(start)
        return self._list(inode, start)

    def _list(self, folder: int, start: int) -> Iterator[Entry]:
        # Positions follow from names, so that a listing goes on where it was while maps come and go.
        names = sorted(
            (_hash_bits(name) >> 2 | 1, name.encode("utf-8", "surrogateescape")) for name in self._names(folder)
        )
        for position, name in names:
            attr = self.lookup(folder, name) if position > start else None
            if attr is not None:
                yield Entry(name, attr, position)

    def _names(self, folder: int) -> Iterable[str]:
        match folder:
            case 1:
                return [name.decode() for name in _FOLDERS if name != _HIDDEN]
            case 4:
                return [name for name, _ in self._trees.values()]
        return [name for name, _ in self._maps.values()]

    def readlink(self, inode: int) -> bytes:
        """See Vfs."""
        tree = self._tree_of(inode)
        if tree is None:
            raise NotFoundError(f"no such symlink: {inode}")
        return tree.readlink(inode)

    def xattrs(self, inode: int) -> Mapping[bytes, bytes]:
        """See Vfs."""
        tree = self._tree_of(inode)
        return tree.xattrs(inode) if tree else {}

    def open(self, inode: int) -> Handle:
        """See Vfs."""
        tree = self._tree_of(inode)
        if tree is not None:
            return tree.open(inode)
        match inode >> _KIND_SHIFT:
            case 2:
                return BytesHandle(self._map(inode)[1], direct=False)
            case 1:
                return ExtentHandle(self._reader, self._map(inode)[0], 0, DISK_SIZE)
        if not self._state.owns(inode):
            raise NotFoundError(f"no such inode: {inode}")
        return self._state.open(inode)

    def _map(self, inode: int) -> tuple[str, Content]:
        try:
            return self._maps[inode & _NAME_MASK]
        except KeyError:
            raise NotFoundError(f"no such inode: {inode}") from None

    def _tree_of(self, inode: int) -> TreeFs | None:
        """The tree or the layer that an inode is in; None for what is in neither."""
        kind, bits = inode >> _KIND_SHIFT, inode >> _NID_BITS & _LAYER_MASK
        if kind == _KIND_LAYER and bits:
            return self._layer(bits)
        if kind != _KIND_TREE:
            return None
        try:
            return self._trees[inode >> _TREE_SHIFT & _TREE_MASK][1]
        except KeyError:
            raise NotFoundError(f"no such inode: {inode}") from None

    def _layer(self, bits: int) -> TreeFs:
        if bits not in self._layers:
            view = self._views.get(bits)
            if view is None:
                raise NotFoundError(f"no such layer: {bits}")
            tree = LayerTree(ErofsImage(memoryview(self._map(_hash_bits(view))[1][:])))
            self._layers[bits] = TreeFs(tree, [view], self._reader, base=bits << _NID_BITS)
        return self._layers[bits]
