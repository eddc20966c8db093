"""The merged tree against a model of unpacking (a dict), and against real overlayfs over the mounted maps."""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import Phase, event, given, settings
from hypothesis import strategies as st

import strategies
from kernel import DISK_BLOCKS, make_disk, mounted_erofs, mounted_overlay
from nsfs.core.union import DeeperError, LowerTree, UnionNode, UnionTree, decide
from nsfs.errors import CorruptError, NotFoundError
from nsfs.format.erofs import FILE_TYPES, render_erofs
from nsfs.format.erofs_image import ErofsImage
from nsfs.model.layer import Entry, Kind
from nsfs.model.tree import PlannedTree, plan_tree, plan_xattrs
from strategies import directory, hardlink, place_entries, regular, symlink

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

IMAGES = strategies.images()
PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)
"""Not Phase.explain, which takes a minute."""


@dataclass
class Image:
    """Planned and rendered layers, top first."""

    maps: list[ErofsImage] = field(default_factory=list)
    trees: list[PlannedTree] = field(default_factory=list)
    blobs: list[bytes] = field(default_factory=list)

    def add(self, entries: list[Entry]) -> None:
        addresses = place_entries(entries, (1 << 30) * (1 + len(self.maps)))
        tree = plan_tree(entries, addresses, None)
        if tree.needs_lower:
            tree = plan_tree(entries, addresses, LowerTree(self.maps))
        blob = bytes(render_erofs(tree.root, disk_blocks=DISK_BLOCKS, uuid=bytes(16), volume=tree.volume))
        self.blobs.insert(0, blob)
        self.maps.insert(0, ErofsImage(blob))
        self.trees.insert(0, tree)


def build(*layers: list[Entry]) -> Image:
    """Of layers, lowest first."""
    image = Image()
    for entries in layers:
        image.add(entries)
    return image


def tree_of(*layers: list[Entry]) -> UnionTree:
    return UnionTree(build(*layers).maps)


def names(tree: UnionTree, path: bytes = b"") -> list[bytes]:
    return [entry.name for entry in tree.readdir(tree.resolve(path))]


class InvalidError(Exception):
    """The model refuses the layer."""


@dataclass(eq=False)
class File:
    """An inode of the model."""

    entry: Entry
    layer: int
    address: int = 0
    children: dict[bytes, File] = field(default_factory=dict)
    links: int = 0

    @property
    def is_directory(self) -> bool:
        return self.entry.kind is Kind.DIRECTORY


class Model:
    """Layers unpacked one over the other into one tree, as the OCI image specification says."""

    def __init__(self) -> None:
        self.layer = -1
        self.root = File(directory(b""), 0)
        self.declared: set[bytes] = set()
        self.hidden: set[bytes] = set()

    def apply(self, entries: list[Entry]) -> None:
        self.layer += 1
        self.declared = {entry.path for entry in entries if entry.kind is Kind.DIRECTORY}
        marks = [entry.path for entry in entries if b".wh." in entry.path]
        self.hidden = {path.replace(b".wh.", b"") for path in marks if b".wh..wh." not in path}
        for path in marks:
            self._hide(*self._split(path))
        addresses = place_entries(entries, (1 << 30) * (1 + self.layer))
        for entry, address in zip(entries, addresses, strict=True):
            if b".wh." not in entry.path:
                self._add(entry, address)
        for path in sorted(marks):
            self._make_parent(path)
        self._count_links()

    def _split(self, path: bytes) -> tuple[bytes, bytes]:
        parent, _, name = path.rpartition(b"/")
        return parent, name

    def _hide(self, path: bytes, name: bytes) -> None:
        parent = self.root
        for component in path.split(b"/") if path else []:
            if component not in parent.children:
                return
            parent = parent.children[component]
        if name == b".wh..wh..opq":
            parent.children.clear()
        elif not name.startswith(b".wh..wh."):
            parent.children.pop(name.removeprefix(b".wh."), None)

    def _make_parent(self, mark: bytes) -> None:
        """A whiteout's parent exists, unless the layer has put something else there, or hides it."""
        parent, name = self._split(mark)
        if name.startswith(b".wh..wh.") and name != b".wh..wh..opq":
            return
        components = parent.split(b"/") if parent else []
        for depth in range(1, len(components) + 1):
            place = b"/".join(components[:depth])
            if place in self.hidden and place not in dict(self.walk()):
                return
        with contextlib.suppress(InvalidError):
            self._walk(parent)

    def _add(self, entry: Entry, address: int) -> None:
        if not entry.path:
            self.root.entry = entry
            return
        path, name = self._split(entry.path)
        parent = self._walk(path)
        old = parent.children.get(name)
        if entry.kind is Kind.DIRECTORY and old is not None and old.is_directory:
            old.entry, old.layer = entry, self.layer
            return
        parent.children.pop(name, None)
        if entry.kind is Kind.HARDLINK:
            parent.children[name] = self._link_target(entry)
        else:
            parent.children[name] = File(entry, self.layer, address)

    def _link_target(self, entry: Entry) -> File:
        path, name = self._split(entry.link)
        parent = self._walk(path)
        target = parent.children.get(name)
        if target is None or target.is_directory:
            raise InvalidError
        if target.layer != self.layer:
            target = parent.children[name] = replace(target, layer=self.layer)
        return target

    def _walk(self, path: bytes) -> File:
        reached: list[tuple[bytes, File]] = [(b"", self.root)]
        todo = path.split(b"/")[::-1]
        hops = 0
        while todo:
            component = todo.pop()
            if component == b"..":
                del reached[max(1, len(reached) - 1) :]
            elif component not in (b"", b"."):
                place = b"/".join([*[name for name, _ in reached[1:]], component])
                child = self._step(reached[-1][1], component, place)
                if child.is_directory:
                    reached.append((component, child))
                elif child.entry.kind is Kind.SYMLINK and hops < 255:
                    hops += 1
                    del reached[1 if child.entry.link.startswith(b"/") else len(reached) :]
                    todo += child.entry.link.split(b"/")[::-1]
                else:
                    raise InvalidError
        return reached[-1][1]

    def _step(self, parent: File, name: bytes, place: bytes) -> File:
        child = parent.children.get(name)
        if child is None or child.layer != self.layer:
            if child is not None and child.is_directory:
                child.layer = self.layer
            elif child is None or place in self.declared or child.entry.kind is not Kind.SYMLINK:
                child = parent.children[name] = File(directory(place), self.layer)
        return child

    def _count_links(self) -> None:
        mine = [file for _, file in self.walk() if file.layer == self.layer]
        for file in mine:
            file.links = 0
        for file in mine:
            file.links += 1

    def walk(self) -> Iterator[tuple[bytes, File]]:
        pending = [(b"", self.root)]
        while pending:
            path, file = pending.pop()
            yield path, file
            pending += [(path + b"/" + name if path else name, child) for name, child in file.children.items()]


def modelled(model: Model) -> dict[bytes, object]:
    numbers: dict[File, int] = {}
    shown: dict[bytes, object] = {}
    for path, file in sorted(model.walk(), key=lambda item: item[0]):
        entry = file.entry
        is_file, is_link = entry.kind is Kind.REGULAR, entry.kind is Kind.SYMLINK
        shown[path] = (
            *(entry.kind, 0o777 if is_link else entry.mode, entry.uid, entry.gid, entry.mtime_ns),
            *(entry.device, entry.link if is_link else b"", plan_xattrs(entry)),
            *(entry.size if is_file else 0, file.address if is_file and entry.size else 0),
            None if file.is_directory else (file.links, numbers.setdefault(file, len(numbers))),
        )
    return shown


def merged(tree: UnionTree) -> dict[bytes, object]:
    numbers: dict[tuple[int, int], int] = {}
    shown: dict[bytes, object] = {}
    for path, node in sorted(tree.walk(), key=lambda item: item[0]):
        inode = tree.inode(node)
        address, size = tree.extent(node) if inode.kind is Kind.REGULAR else (0, 0)
        shown[path] = (
            *(inode.kind, inode.mode, inode.uid, inode.gid, inode.mtime_ns),
            *(inode.device, tree.readlink(node) if inode.kind is Kind.SYMLINK else b"", tuple(tree.xattrs(node))),
            *(size, address),
            None
            if inode.kind is Kind.DIRECTORY
            else (inode.links, numbers.setdefault((node.layer, node.nid), len(numbers))),
        )
    return shown


@given(IMAGES)
@settings(max_examples=400, phases=PHASES)
def test_merged_maps_equal_unpacking_in_order(layers: list[list[Entry]]) -> None:
    image, model = Image(), Model()
    for entries in layers:
        try:
            model.apply(entries)
        except InvalidError:
            event("refused")
            with pytest.raises(CorruptError):
                image.add(entries)
            return
        image.add(entries)
    assert merged(UnionTree(image.maps)) == modelled(model)


def overlay_shows(mount: bytes) -> dict[bytes, object]:
    shown: dict[bytes, object] = {}
    numbers: dict[tuple[int, int], int] = {}
    for place, directories, files in os.walk(mount):
        for name in [b"", *directories, *files] if place == mount else directories + files:
            path = os.path.join(place, name)
            found = os.lstat(path)
            key = path[len(mount) :].strip(b"/")
            shown[key] = (stat.S_IFMT(found.st_mode), *_lstat(path, found))
    for key in sorted(shown):
        found = os.lstat(os.path.join(mount, key))
        if not stat.S_ISDIR(found.st_mode):
            shown[key] = (shown[key], found.st_nlink, numbers.setdefault((found.st_dev, found.st_ino), len(numbers)))
    return shown


def _lstat(path: bytes, found: os.stat_result) -> tuple[object, ...]:
    listed = os.listxattr(path, follow_symlinks=False)
    xattrs = {name: os.getxattr(path, name, follow_symlinks=False) for name in listed}
    target = os.readlink(path) if stat.S_ISLNK(found.st_mode) else b""
    size = found.st_size if stat.S_ISREG(found.st_mode) else 0
    owner = (found.st_uid, found.st_gid)
    return stat.S_IMODE(found.st_mode), *owner, found.st_mtime_ns, xattrs, target, size, found.st_rdev


def union_shows(tree: UnionTree) -> dict[bytes, object]:
    shown: dict[bytes, object] = {}
    numbers: dict[tuple[int, int], int] = {}
    for path, node in sorted(tree.walk(), key=lambda item: item[0]):
        inode = tree.inode(node)
        xattrs = {os.fsdecode(name): value for name, value in tree.xattrs(node)}
        target = tree.readlink(node) if inode.kind is Kind.SYMLINK else b""
        size = inode.size if inode.kind is Kind.REGULAR else 0
        attributes = (inode.mode, inode.uid, inode.gid, inode.mtime_ns, xattrs, target, size, os.makedev(*inode.device))
        shown[path] = (FILE_TYPES[inode.kind], *attributes)
        if inode.kind is not Kind.DIRECTORY:
            shown[path] = (shown[path], inode.links, numbers.setdefault((node.layer, node.nid), len(numbers)))
    return shown


def assert_overlay_agrees(image: Image, scratch: Path) -> None:
    disk = make_disk(scratch / "disk")
    shown = next((depth for depth, tree in enumerate(image.trees, 1) if tree.opaque), len(image.trees))
    with contextlib.ExitStack() as stack:
        empty = scratch / "empty"
        empty.mkdir(exist_ok=True)
        lowers = []
        for number, blob in enumerate(image.blobs[:shown]):
            path = scratch / f"map{number}"
            path.write_bytes(blob)
            lowers.append(stack.enter_context(mounted_erofs(path, disk, scratch / f"l{number}")))
        target = stack.enter_context(mounted_overlay([*lowers, empty], scratch / "merged"))
        kernel, ours = overlay_shows(bytes(target)), union_shows(UnionTree(image.maps))
    if not image.trees[0].named:  # overlay takes the top's attributes, whether its layer names them or not
        del kernel[b""], ours[b""]
    assert kernel == ours


@given(IMAGES)
@settings(max_examples=25)
def test_merged_maps_equal_overlayfs(tmp_path: Path, layers: list[list[Entry]]) -> None:
    image = Image()
    for entries in layers:
        try:
            image.add(entries)
        except CorruptError:
            break
    if image.maps:
        assert_overlay_agrees(image, tmp_path)


RICH = (
    [
        directory(b"", 0o755, mtime_ns=5),
        *[directory(path, 0o711, mtime_ns=7) for path in (b"usr", b"usr/lib", b"etc", b"old", b"opt", b"opt/x")],
        *[regular(path, 10) for path in (b"usr/lib/a", b"usr/lib/b", b"etc/one", b"etc/two", b"old/f", b"opt/x/deep")],
        symlink(b"lib", b"usr/lib"),
    ],
    [
        regular(b"lib/c", 5000),
        regular(b"etc/.wh.one", 0),
        directory(b"opt"),
        regular(b"opt/.wh..wh..opq", 0),
        regular(b"opt/new"),
        hardlink(b"etc/linked", b"usr/lib/a"),
        regular(b"usr/lib/.wh.nothing", 0),
        directory(b"fresh"),
        regular(b"fresh/.wh.nothing", 0),
    ],
    [regular(b".wh.old", 0), directory(b"old/again"), regular(b"etc/two", 99), regular(b"usr/.wh.gone", 0)],
)


def test_a_rich_image_equals_overlayfs(tmp_path: Path) -> None:
    assert_overlay_agrees(build(*RICH), tmp_path)


def test_a_rich_image_is_as_expected() -> None:
    tree = tree_of(*RICH)
    assert names(tree) == [b"etc", b"fresh", b"lib", b"old", b"opt", b"usr"]
    assert names(tree, b"etc") == [b"linked", b"two"]
    assert names(tree, b"usr/lib") == names(tree, b"lib/") == [b"a", b"b", b"c"]
    assert (names(tree, b"opt"), names(tree, b"old"), names(tree, b"fresh")) == ([b"new"], [b"again"], [])
    assert tree.inode(tree.resolve(b"")).mtime_ns == 5
    assert tree.inode(tree.resolve(b"usr")).mode == 0o711
    linked, original = tree.resolve(b"etc/linked"), tree.resolve(b"usr/lib/a")
    assert (linked, tree.inode(linked).links) == (original, 2)
    assert tree.extent(linked)[0] < 2 << 30


def test_lower_layers_that_lend_addresses_are_told() -> None:
    assert [tree.borrowed for tree in build(*RICH).trees] == [frozenset(), frozenset({0}), frozenset()]


def test_an_opaque_root_hides_all_below() -> None:
    tree = tree_of([regular(b"a")], [regular(b".wh..wh..opq", 0), regular(b"b")], [regular(b"c")])
    assert names(tree) == [b"b", b"c"]
    assert tree.lookup(tree.root, b"a") is None


def test_overlays_marks_are_not_shown() -> None:
    tree = tree_of([directory(b"d", xattrs=((b"user.a", b"1"),)), regular(b"d/.wh..wh..opq", 0)])
    assert tree.xattrs(tree.resolve(b"d")) == [(b"user.a", b"1")]


LINKS = [
    *[directory(b"d"), directory(b"d/e"), regular(b"d/e/f"), regular(b"file")],
    *[symlink(b"abs", b"/d/e"), symlink(b"up", b"../../d"), symlink(b"d/e/back", b"../../file")],
    *[symlink(b"hop%d" % number, b"hop%d" % (number + 1)) for number in range(40)],
    *[symlink(b"dangling", b"nothing"), symlink(b"loop", b"loop"), regular(b"hop40")],
]


@pytest.mark.parametrize(
    ("path", "same"),
    [
        (b"/abs/f", b"d/e/f"),
        (b"up/e//./f", b"d/e/f"),
        (b"abs/back", b"file"),
        (b"d/../../file", b"file"),
        (b"abs/..", b"d"),
        (b"", b"/."),
        (b"hop0", b"hop40"),
    ],
)
def test_resolve_follows_symlinks_inside_the_root(path: bytes, same: bytes) -> None:
    tree = tree_of(LINKS)
    assert tree.resolve(path) == tree.resolve(same, follow_last=False)


@pytest.mark.parametrize(
    "path", [b"nothing", b"file/x", b"file/", b"file/..", b"loop", b"dangling", b"d/x/f", b"hop/0"]
)
def test_what_is_not_there_is_not_found(path: bytes) -> None:
    with pytest.raises(NotFoundError):
        tree_of(LINKS).resolve(path)


def test_resolve_stops_after_as_many_symlinks_as_linux() -> None:
    tree = tree_of([*LINKS, symlink(b"one more", b"hop0")])
    with pytest.raises(NotFoundError, match="too many symlinks"):
        tree.resolve(b"one more")


@pytest.mark.parametrize("path", [b"dangling", b"loop", b"abs"])
def test_the_last_symlink_is_only_followed_if_asked(path: bytes) -> None:
    assert tree_of(LINKS).resolve(path, follow_last=False).kind is Kind.SYMLINK


def test_walk_begins_where_it_is_told() -> None:
    tree = tree_of(LINKS)
    assert [path for path, _ in tree.walk(b"/d/")] == [b"d", b"d/e", b"d/e/back", b"d/e/f"]
    assert [path for path, _ in tree.walk(b"abs")] == [b"abs", b"abs/back", b"abs/f"]
    assert [path for path, _ in tree.walk(b"file")] == [b"file"]


@given(st.lists(st.sets(st.integers(0, 999), max_size=400), min_size=1, max_size=4), st.data())
@settings(max_examples=30)
def test_listing_goes_on_from_any_entry(layers: list[set[int]], data: st.DataObject) -> None:
    tree = tree_of(*[[directory(b"d"), *[regular(b"d/%d" % number, 0) for number in layer]] for layer in layers])
    whole = list(tree.readdir(tree.resolve(b"d")))
    assert [entry.name for entry in whole] == sorted(b"%d" % number for number in set().union(*layers))
    for number in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=5)) if whole else []:
        again = list(tree.readdir(tree.resolve(b"d"), whole[number].next))
        assert [(entry.name, entry.node) for entry in again] == [
            (entry.name, entry.node) for entry in whole[number + 1 :]
        ]


@given(st.integers(0, 1 << 64))
def test_a_wrong_position_gives_a_clear_error_or_an_answer(position: int) -> None:
    tree = tree_of(*RICH)
    with contextlib.suppress(CorruptError):
        list(tree.readdir(tree.resolve(b"etc"), position))


@given(IMAGES)
@settings(max_examples=60)
def test_a_listing_agrees_with_looking_up(layers: list[list[Entry]]) -> None:
    try:
        tree = tree_of(*layers)
    except CorruptError:
        return
    for path, node in tree.walk():
        parent, _, name = path.rpartition(b"/")
        if path:
            assert tree.lookup(_directory_at(tree, parent), name) == node


def _directory_at(tree: UnionTree, path: bytes) -> UnionNode:
    node: UnionNode | None = tree.root
    for name in path.split(b"/") if path else []:
        assert node is not None
        node = tree.lookup(node, name)
    assert node is not None
    return node


@given(IMAGES, strategies.paths(), st.booleans(), st.booleans())
@settings(max_examples=150)
def test_what_the_top_layers_decide_no_lower_layer_changes(
    layers: list[list[Entry]], path: bytes, follow: bool, listing: bool
) -> None:
    try:
        image = build(*layers)
    except CorruptError:
        return
    answers = [_answer(UnionTree(image.maps[:depth]), path, follow, listing) for depth in range(1, len(layers) + 1)]
    for depth, answer in enumerate(answers, 1):
        if decide(image.maps[:depth], path, follow_last=follow, listing=listing):
            event("decided")
            assert all(later == answer for later in answers[depth:])


def _answer(tree: UnionTree, path: bytes, follow: bool, listing: bool) -> object:
    try:
        node = tree.resolve(path, follow_last=follow)
    except NotFoundError:
        return None
    found = (node.layer, node.nid)
    if not listing or node.kind is not Kind.DIRECTORY:
        return found
    return found, [(entry.name, entry.node.layer, entry.node.nid) for entry in tree.readdir(node)]


@pytest.mark.parametrize(
    ("path", "listing", "depth"),
    [
        (b"etc/two", False, 1),
        (b"etc/one", False, 2),
        (b"etc/missing", False, 4),
        (b"etc", False, 1),
        (b"etc", True, 4),
        (b"opt/new", False, 2),
        (b"opt/missing", False, 2),
        (b"opt", True, 2),
        (b"old/f", False, 1),
        (b"old", True, 1),
        (b"lib/c", False, 3),
        (b"", False, 3),
        (b"", True, 4),
    ],
)
def test_how_many_layers_decide(path: bytes, listing: bool, depth: int) -> None:
    maps = build([], *RICH).maps
    assert [decide(maps[:known], path, listing=listing) for known in range(4)] == [known >= depth for known in range(4)]


def test_a_partial_tree_does_not_guess() -> None:
    tree = UnionTree(build(*RICH).maps[:1], partial=True)
    with pytest.raises(DeeperError):
        tree.lookup(tree.root, b"missing")
    with pytest.raises(DeeperError):
        list(tree.readdir(tree.root))


def test_below_nothing_is_nothing() -> None:
    assert LowerTree([]).find(b"a/b") is None
    assert not decide([], b"a")
