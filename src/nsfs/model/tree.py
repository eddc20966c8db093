"""From a layer's entries to the tree that overlay wants to see.

Owns the rules of unpacking: what a repeated name, a missing or symlinked parent, a hard link, a whiteout or an opaque
mark does (OCI image specification, layer.md, and what containerd's archive.Apply makes of it), which extended
attributes a layer may set, and what is refused. Pure; one call, no state left behind.

Whiteouts hide lower layers only, wherever they stand in the layer. The result is a function of the entries and their
addresses alone, except where unpacking looks below: for a parent that the layer does not name, and for a hard link to
what it does not contain. Only then `Lower` is asked, and `PlannedTree.needs_lower` says so.

Hostile layers get a CorruptError that names the entry; work and depth are bounded.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from nsfs.errors import CorruptError
from nsfs.model.layer import Entry, Kind, Node

if TYPE_CHECKING:
    from collections.abc import Sequence

OPAQUE: Final = (b"trusted.overlay.opaque", b"y")
"""Overlay's mark of a directory that hides what lies below it."""
ORIGIN: Final = (b"trusted.overlay.origin", b"")
"""Makes overlay look for whiteouts in a directory that merges with nothing (fs/overlayfs/inode.c, ovl_get_inode)."""
UNNAMED_ROOT: Final = b"unnamed root"
"""Volume name of the map of a layer that does not say what its root's attributes are."""

_DROPPED_XATTRS: Final = (b"trusted.", b"user.overlay.", b"security.selinux", b"security.ima", b"security.evm")
_ACL, _DEFAULT_ACL = b"system.posix_acl_access", b"system.posix_acl_default"
_MAX_XATTR_NAME: Final = 255
_MAX_XATTR_VALUE: Final = 0xFFFF
_MAX_XATTRS: Final = 128 << 10
"""Bytes of all names and values of one file; Linux lists at most 64 KiB of names."""
_MAX_TARGET: Final = 4095
_MAX_PATH: Final = 4096
_MAX_SYMLINKS: Final = 255
"""Followed on the way to one entry; containerd's limit."""
_MAX_STEPS: Final = 10_000_000
"""Path components looked at beyond one per entry, in the whole layer: some seconds."""
_MAX_FILE: Final = 16 << 40
_MAX_TIME_NS: Final = (1 << 63) * 1_000_000_000
_WHITEOUT: Final = b".wh."
_META_WHITEOUT: Final = b".wh..wh."
_OPAQUE_NAME: Final = b".wh..wh..opq"
_WHITEOUT_NAME: Final = re.compile(rb"(?:\A|/)\.wh\.")
_DEFAULT_MODE: Final = 0o755
_REGULAR, _DIRECTORY, _SYMLINK, _HARDLINK = Kind.REGULAR, Kind.DIRECTORY, Kind.SYMLINK, Kind.HARDLINK
_CHARACTER: Final = Kind.CHARACTER
_DEVICES: Final = (_CHARACTER, Kind.BLOCK)


@dataclass(frozen=True, slots=True)
class Found:
    """What lower layers have at a path."""

    node: Node
    """A fresh one: attributes without overlay's marks, one link, no children."""
    layer: int
    """Which of the lower layers it is from, as `Lower` counts them."""


class Lower(Protocol):
    """The layers below, merged."""

    def find(self, path: bytes) -> Found | None:
        """What is at `path`, no symlink followed; None if nothing is, or if a parent is no directory."""


@dataclass(frozen=True, slots=True)
class PlannedTree:
    """A layer's tree, and what there is to know about it."""

    root: Node
    needs_lower: bool
    """The tree depends on the layers below. If they were not given, it is empty: plan again with them."""
    files: int = 0
    """Names of anything but directories and whiteouts."""
    marks: bool = False
    """Has whiteouts or opaque directories: alone it must not be shown without overlay."""
    opaque: bool = False
    """The root is opaque. Overlay does not obey that on a layer's root: leave out the layers below."""
    named: bool = False
    """The layer says what its root's attributes are; else they are 0755, root, 1970."""
    borrowed: frozenset[int] = frozenset()
    """Lower layers (`Found.layer`) whose addresses the tree uses."""

    @property
    def volume(self) -> bytes:
        """The volume name that its map must get, so that the merged tree takes the root from the right layer."""
        return b"" if self.named else UNNAMED_ROOT


def plan_tree(entries: Sequence[Entry], addresses: Sequence[int], lower: Lower | None) -> PlannedTree:
    """The tree of a layer; `addresses` has one disk address per entry, meaningful for regular files that are not empty.

    `lower` is None while the layers below are not known; the lowest layer has an empty `Lower`. Raises CorruptError.
    """
    marks = _sort_marks(entries)
    plan = _Plan(entries, lower, marks)
    try:
        for entry, address in zip(entries, addresses, strict=True):
            if entry.path not in marks.paths:
                plan.add(entry, address)
        plan.apply_marks()
    except _LowerNeededError:
        return PlannedTree(Node(Kind.DIRECTORY, _DEFAULT_MODE), needs_lower=True)
    return plan.finish()


class _LowerNeededError(Exception):
    """The layers below were not given."""


class _NotDirectoryError(CorruptError):
    """A parent of an entry is something else."""


@dataclass(frozen=True, slots=True)
class _Marks:
    """A layer's whiteouts by the paths that they hide (for opaque ones: the directory)."""

    hidden: dict[bytes, None] = field(default_factory=dict)
    emptied: dict[bytes, None] = field(default_factory=dict)
    paths: set[bytes] = field(default_factory=set)
    """Of all entries that are no files, among them those that mean nothing to us."""


def _sort_marks(entries: Sequence[Entry]) -> _Marks:
    marks = _Marks()
    for entry in entries:
        path = entry.path
        if _WHITEOUT not in path or (match := _WHITEOUT_NAME.search(path)) is None:
            continue
        marks.paths.add(path)
        directory, _, name = path.rpartition(b"/")
        if path.startswith(_META_WHITEOUT, match.end() - len(_WHITEOUT)):
            if name == _OPAQUE_NAME and _WHITEOUT_NAME.search(directory) is None:
                marks.emptied[directory] = None
        elif b"/" in path[match.end() :]:
            raise CorruptError(f"an entry lies inside a whiteout: {_show(path)}")
        elif name[len(_WHITEOUT) :] in (b"", b".", b".."):
            raise CorruptError(f"a whiteout hides no name: {_show(path)}")
        else:
            marks.hidden[_join(directory, name[len(_WHITEOUT) :])] = None
    return marks


class _Plan:
    """The tree while it grows.

    A directory's *place* is its path without symlinks. `_shut` directories hide whatever lies below them: opaque ones,
    those under a shut one, and those of which it is known that nothing lies below.
    """

    def __init__(self, entries: Sequence[Entry], lower: Lower | None, marks: _Marks) -> None:
        self._entries = entries
        self._lower = lower
        self._marks = marks
        self._root = Node(Kind.DIRECTORY, _DEFAULT_MODE)
        self._places = {self._root: b""}
        self._directories = {b"": self._root}
        self._shut: set[Node] = {self._root} if b"" in marks.emptied else set()
        self._opaque: set[Node] = set()
        self._whiteouts: set[Node] = set()
        """Directories that hold some."""
        self._declared: frozenset[bytes] | None = None
        self._lower_symlinks: dict[bytes, Node] = {}
        self._xattrs: dict[tuple[tuple[tuple[bytes, bytes], ...], Kind], tuple[tuple[bytes, bytes], ...]] = {}
        self._marking = False
        """All entries are in; what is missing now is not there."""
        self._steps = 0
        self._needs_lower = False
        self._named = False
        self._borrowed: set[int] = set()

    def add(self, entry: Entry, address: int) -> None:
        directory, _, name = entry.path.rpartition(b"/")
        if not name:
            self._add_root(entry)
            return
        parent = self._directories.get(directory) or self._walk(directory, entry.path)
        if entry.kind is _DIRECTORY:
            self._add_directory(parent, name, entry)
        elif entry.kind is _HARDLINK:
            self._add_link(parent, name, entry)
        else:
            node = self._node(entry, address)
            children = _children(parent)
            if name in children:
                self._remove(parent, name)
            children[name] = node

    def apply_marks(self) -> None:
        """Marks in what the layer has put something else for, or hides itself, mean nothing."""
        self._marking = True
        for place in self._marks.emptied:
            with contextlib.suppress(_NotDirectoryError):
                self._empty(place)
        for place in self._marks.hidden:
            with contextlib.suppress(_NotDirectoryError):
                self._hide(place)

    def finish(self) -> PlannedTree:
        for node in self._opaque:
            node.xattrs = (*node.xattrs, OPAQUE)
        for node in self._whiteouts - {self._root}:
            node.xattrs = (*node.xattrs, ORIGIN)
        return PlannedTree(
            root=self._root,
            needs_lower=self._needs_lower,
            files=self._count_files(),
            marks=bool(self._opaque or self._whiteouts),
            opaque=self._root in self._opaque,
            named=self._named,
            borrowed=frozenset(self._borrowed),
        )

    def _add_root(self, entry: Entry) -> None:
        if entry.kind is not _DIRECTORY:
            raise CorruptError("the root of a layer is no directory")
        self._set_attributes(self._root, entry)
        self._named = True

    def _add_directory(self, parent: Node, name: bytes, entry: Entry) -> None:
        node = _children(parent).get(name)
        if node is None or node.children is None:
            replaced = node is not None
            self._remove(parent, name)
            node = Node(_DIRECTORY, _DEFAULT_MODE)
            self._attach(parent, name, node)
            if replaced:
                self._opaque.add(node)
                self._shut.add(node)
        self._set_attributes(node, entry)

    def _add_link(self, parent: Node, name: bytes, entry: Entry) -> None:
        self._remove(parent, name)
        node = self._link_target(entry, _join(self._places[parent], name))
        if node.children is not None:
            raise CorruptError(f"a hard link to a directory: {_show(entry.path)} to {_show(entry.link)}")
        node.links += 1
        _children(parent)[name] = node

    def _link_target(self, entry: Entry, place: bytes) -> Node:
        """What a hard link that will be at `place` links to; from a lower layer it is put into this one first."""
        directory, _, name = entry.link.rpartition(b"/")
        if not name or name.startswith(_WHITEOUT):
            raise CorruptError(f"a hard link to no file: {_show(entry.path)} to {_show(entry.link)}")
        parent = self._directory(directory, entry.path)
        node = _children(parent).get(name)
        if node is None:
            found = None if _is_inside(_join(self._places[parent], name), place) else self._find_below(parent, name)
            if found is None:
                raise CorruptError(f"a hard link to nothing: {_show(entry.path)} to {_show(entry.link)}")
            node = found.node
            if node.children is None:
                _children(parent)[name] = node
                if node.size:
                    self._borrowed.add(found.layer)
        return node

    def _node(self, entry: Entry, address: int) -> Node:
        _check_time(entry)
        node = Node(entry.kind, entry.mode, entry.uid, entry.gid, entry.mtime_ns)
        if entry.xattrs:
            node.xattrs = self._plan_xattrs(entry)
        if entry.kind is _REGULAR:
            if not 0 <= entry.size <= _MAX_FILE:
                raise CorruptError(f"a file of {entry.size} bytes: {_show(entry.path)}")
            node.size = entry.size
            node.address = address
        elif entry.kind is _SYMLINK:
            if not 0 < len(entry.link) <= _MAX_TARGET or b"\0" in entry.link:
                raise CorruptError(f"a symlink with a target of {len(entry.link)} bytes: {_show(entry.path)}")
            node.mode = 0o777
            node.link = entry.link
        elif entry.kind in _DEVICES:
            _check_device(entry)
            node.device = entry.device
        return node

    def _set_attributes(self, node: Node, entry: Entry) -> None:
        _check_time(entry)
        node.mode = entry.mode
        node.uid = entry.uid
        node.gid = entry.gid
        node.mtime_ns = entry.mtime_ns
        node.xattrs = self._plan_xattrs(entry) if entry.xattrs else ()

    def _plan_xattrs(self, entry: Entry) -> tuple[tuple[bytes, bytes], ...]:
        key = (entry.xattrs, entry.kind)
        if key not in self._xattrs:
            self._xattrs[key] = plan_xattrs(entry)
        return self._xattrs[key]

    def _directory(self, path: bytes, entry: bytes) -> Node:
        """The directory at `path`, in which `entry` is: symlinks are followed, what is missing is made."""
        return self._directories.get(path) or self._walk(path, entry)

    def _walk(self, path: bytes, entry: bytes) -> Node:
        reached = [self._root]
        todo = path.split(b"/")[::-1]
        symlinks = 0
        while todo:
            name = todo.pop()
            self._count_step(entry)
            if name == b"..":
                reached = reached[:-1] or reached
            elif name not in (b"", b"."):
                node = self._descend(reached[-1], name)
                if node.children is not None:
                    reached.append(node)
                    continue
                symlinks += 1
                if node.kind is not _SYMLINK:
                    raise _NotDirectoryError(f"a parent is no directory: {_show(entry)}")
                if symlinks > _MAX_SYMLINKS:
                    raise CorruptError(f"too many symlinks on the way to an entry: {_show(entry)}")
                reached = reached[:1] if node.link.startswith(b"/") else reached
                todo += node.link.split(b"/")[::-1]
        return reached[-1]

    def _count_step(self, entry: bytes) -> None:
        self._steps += 1
        if self._steps > _MAX_STEPS + len(self._entries):
            raise CorruptError(f"too many symlinks in the layer, by the time of: {_show(entry)}")

    def _descend(self, parent: Node, name: bytes) -> Node:
        """What has `name` in `parent`; made if it is missing, by what lower layers have there."""
        node = _children(parent).get(name)
        if node is not None:
            return node
        place = _join(self._places[parent], name)
        if self._marking and place in self._marks.hidden:
            raise _NotDirectoryError(f"a parent is hidden: {_show(place)}")
        if self._declares(place):
            node = Node(_DIRECTORY, _DEFAULT_MODE)
            self._attach(parent, name, node)
            return node
        found = self._lower_symlinks.get(place) or self._lower_parent(parent, name)
        if found is not None and found.kind is _SYMLINK:
            self._lower_symlinks[place] = found
            return found
        node = found or Node(_DIRECTORY, _DEFAULT_MODE)
        self._attach(parent, name, node)
        if found is None:
            self._shut.add(node)
        return node

    def _lower_parent(self, parent: Node, name: bytes) -> Node | None:
        found = self._find_below(parent, name)
        return found.node if found is not None and found.node.kind in (_DIRECTORY, _SYMLINK) else None

    def _find_below(self, parent: Node, name: bytes) -> Found | None:
        """What lower layers show through `parent` as `name`."""
        place = _join(self._places[parent], name)
        if parent in self._shut or place in self._marks.hidden:
            return None
        self._needs_lower = True
        if self._lower is None:
            raise _LowerNeededError
        return self._lower.find(place)

    def _declares(self, place: bytes) -> bool:
        """Whether the layer has a directory of that name somewhere; then its parents do not matter to it."""
        if self._declared is None:
            self._declared = frozenset([entry.path for entry in self._entries if entry.kind is _DIRECTORY])
        return place in self._declared

    def _attach(self, parent: Node, name: bytes, node: Node) -> None:
        place = _join(self._places[parent], name)
        if len(place) > _MAX_PATH:
            raise CorruptError(f"a path of {len(place)} bytes: {_show(place)}")
        _children(parent)[name] = node
        self._places[node] = place
        self._directories[place] = node
        if parent in self._shut or place in self._marks.hidden or place in self._marks.emptied:
            self._shut.add(node)

    def _remove(self, parent: Node, name: bytes) -> None:
        """Take `name` away from `parent`, with all that is in it."""
        gone = _children(parent).pop(name, None)
        if gone is None:
            return
        pending = [gone]
        while pending:
            node = pending.pop()
            if node.children is None:
                node.links -= 1
            else:
                pending.extend(node.children.values())
                del self._directories[self._places.pop(node)]
                self._shut.discard(node)
                self._opaque.discard(node)

    def _empty(self, place: bytes) -> None:
        node = self._directory(place, place)
        self._opaque.add(node)
        self._shut.add(node)

    def _hide(self, place: bytes) -> None:
        directory, _, name = place.rpartition(b"/")
        parent = self._directory(directory, place)
        node = _children(parent).get(name)
        if node is not None and node.children is not None:
            self._opaque.add(node)
        elif node is None and parent not in self._shut:
            _children(parent)[name] = Node(Kind.CHARACTER, 0)
            self._whiteouts.add(parent)

    def _count_files(self) -> int:
        nodes = [node for directory in self._places for node in _children(directory).values()]
        whiteouts = sum([is_whiteout(node) for node in nodes if node.kind is _CHARACTER])
        return sum([node.children is None for node in nodes]) - whiteouts


def is_whiteout(node: Node) -> bool:
    """Whether it is overlay's mark of a deleted name."""
    return node.kind is Kind.CHARACTER and node.device == (0, 0)


def plan_xattrs(entry: Entry) -> tuple[tuple[bytes, bytes], ...]:
    """The extended attributes that an entry gets; raises CorruptError.

    Dropped is what a layer may not set (overlay's own, labels and signatures of the host's policy), and what Linux has
    no place for (xattr(7)): unknown namespaces, `user.` on all but regular files and directories, ACLs of symlinks.
    """
    kept = {name: value for name, value in entry.xattrs if _is_settable(name, entry.kind)}
    for name, value in kept.items():
        if len(name) > _MAX_XATTR_NAME or len(value) > _MAX_XATTR_VALUE or b"\0" in name or name.endswith(b"."):
            raise CorruptError(f"an extended attribute that Linux can't hold: {_show(name)} of {_show(entry.path)}")
    if sum([len(name) + len(value) + 8 for name, value in kept.items()]) > _MAX_XATTRS:
        raise CorruptError(f"more than {_MAX_XATTRS} bytes of extended attributes: {_show(entry.path)}")
    return tuple(kept.items())


def _is_settable(name: bytes, kind: Kind) -> bool:
    if name.startswith(_DROPPED_XATTRS):
        return False
    if name.startswith(b"user."):
        return kind in (_REGULAR, _DIRECTORY)
    if name in (_ACL, _DEFAULT_ACL):
        return kind is _DIRECTORY or (name == _ACL and kind is not _SYMLINK)
    return name.startswith(b"security.")


def _check_time(entry: Entry) -> None:
    if not -_MAX_TIME_NS <= entry.mtime_ns < _MAX_TIME_NS:
        raise CorruptError(f"a time that Linux can't hold: {_show(entry.path)}")


def _check_device(entry: Entry) -> None:
    major, minor = entry.device
    if not (0 <= major < 1 << 12 and 0 <= minor < 1 << 20):
        raise CorruptError(f"a device that Linux can't have, {major}:{minor}: {_show(entry.path)}")
    if entry.kind is Kind.CHARACTER and entry.device == (0, 0):
        raise CorruptError(f"a character device 0:0, which overlay takes for a whiteout: {_show(entry.path)}")


def _children(node: Node) -> dict[bytes, Node]:
    assert node.children is not None
    return node.children


def _join(directory: bytes, name: bytes) -> bytes:
    return directory + b"/" + name if directory else name


def _is_inside(path: bytes, directory: bytes) -> bool:
    return path == directory or path.startswith(directory + b"/")


def _show(path: bytes) -> str:
    return repr(path[:200])[1:]
