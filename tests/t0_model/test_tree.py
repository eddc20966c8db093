"""The rules of unpacking, one by one; together they are checked against a model in t3_core/test_union.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given

import strategies
from nsfs.errors import CorruptError
from nsfs.model.layer import Entry, Kind, Node
from nsfs.model.tree import OPAQUE, ORIGIN, UNNAMED_ROOT, Found, PlannedTree, is_whiteout, plan_tree
from strategies import device, directory, hardlink, place_entries, regular, symlink

if TYPE_CHECKING:
    from collections.abc import Mapping


class Below:
    """Lower layers as a dict."""

    def __init__(self, files: Mapping[bytes, Node]) -> None:
        self.files = files
        self.asked: list[bytes] = []

    def find(self, path: bytes) -> Found | None:
        self.asked.append(path)
        node = self.files.get(path)
        return None if node is None else Found(node, 3)


NOTHING = Below({})


def lower_directory(mode: int = 0o750) -> Node:
    node = Node(Kind.DIRECTORY, mode, uid=7, gid=8, mtime_ns=9)
    node.xattrs = ((b"user.a", b"1"),)
    return node


def lower_symlink(target: bytes) -> Node:
    node = Node(Kind.SYMLINK, 0o777)
    node.link = target
    return node


def lower_file(size: int = 10) -> Node:
    node = Node(Kind.REGULAR, 0o640, uid=1)
    node.size, node.address = size, 1 << 20
    return node


def plan(*entries: Entry, lower: Any = NOTHING) -> PlannedTree:
    return plan_tree(entries, place_entries(entries), lower)


def at(tree: PlannedTree, path: bytes) -> Node:
    node = tree.root
    for name in path.split(b"/"):
        assert node.children is not None
        node = node.children[name]
    return node


def names(tree: PlannedTree, path: bytes = b"") -> set[bytes]:
    children = (at(tree, path) if path else tree.root).children
    assert children is not None
    return set(children)


def test_an_empty_layer_is_an_empty_directory() -> None:
    tree = plan(lower=None)
    assert (tree.root.mode, tree.root.uid, tree.root.mtime_ns, tree.root.children) == (0o755, 0, 0, {})
    assert tree == PlannedTree(tree.root, needs_lower=False)
    assert tree.volume == UNNAMED_ROOT


def test_the_root_entry_sets_the_roots_attributes() -> None:
    tree = plan(directory(b"", 0o555, uid=4), lower=None)
    assert (tree.root.mode, tree.root.uid, tree.named, tree.volume) == (0o555, 4, True, b"")


def test_attributes_are_taken_over() -> None:
    file = at(
        plan(regular(b"f", 5000, 0o4711, uid=1, gid=2, mtime_ns=-3, xattrs=((b"user.x", b"y"),)), lower=None), b"f"
    )
    assert (file.mode, file.uid, file.gid, file.mtime_ns, file.xattrs) == (0o4711, 1, 2, -3, ((b"user.x", b"y"),))
    assert (file.size, file.address, file.links) == (5000, strategies.FIRST_ADDRESS, 1)


def test_symlinks_have_the_mode_that_linux_gives_them() -> None:
    assert at(plan(Entry(b"s", Kind.SYMLINK, 0o600, 0, 0, 0, link=b"t"), lower=None), b"s").mode == 0o777


def test_a_later_file_wins() -> None:
    tree = plan(regular(b"f", 1), regular(b"f", 2), lower=None)
    assert (at(tree, b"f").size, tree.files) == (2, 1)


def test_a_later_directory_replaces_attributes_and_keeps_children() -> None:
    tree = plan(directory(b"d", 0o700), regular(b"d/f"), directory(b"d", 0o711), lower=None)
    assert at(tree, b"d").mode == 0o711
    assert names(tree, b"d") == {b"f"}
    assert at(tree, b"d").xattrs == ()


def test_a_file_over_a_directory_takes_its_children_away() -> None:
    tree = plan(directory(b"d"), directory(b"d/e"), regular(b"d/e/f"), regular(b"d"), lower=None)
    assert at(tree, b"d").kind is Kind.REGULAR
    assert tree.files == 1


def test_a_directory_over_a_file_of_the_same_layer_is_opaque() -> None:
    tree = plan(regular(b"d"), directory(b"d"), regular(b"d/x/f"), lower=None)
    assert at(tree, b"d").xattrs == (OPAQUE,)
    assert not tree.needs_lower


def test_hard_links_are_one_node() -> None:
    tree = plan(regular(b"a"), hardlink(b"b", b"a"), directory(b"d"), hardlink(b"d/c", b"b"), lower=None)
    assert at(tree, b"a") is at(tree, b"b") is at(tree, b"d/c")
    assert (at(tree, b"a").links, tree.files) == (3, 3)


def test_a_replaced_name_is_no_link_any_more() -> None:
    tree = plan(regular(b"a"), directory(b"d"), hardlink(b"d/b", b"a"), hardlink(b"c", b"a"), regular(b"d"), lower=None)
    assert at(tree, b"a").links == 2


@pytest.mark.parametrize(
    "entries",
    [
        [hardlink(b"a", b"a")],
        [regular(b"a"), hardlink(b"a", b"a")],
        [hardlink(b"b", b"a"), regular(b"a")],
        [hardlink(b"b", b"a"), hardlink(b"a", b"b")],
        [directory(b"d"), hardlink(b"b", b"d")],
        [hardlink(b"b", b"")],
        [regular(b".wh.a"), hardlink(b"b", b".wh.a")],
        [directory(b"d"), regular(b"d/f"), hardlink(b"d", b"d/f")],
    ],
)
def test_hard_links_to_no_file_are_refused(entries: list[Entry]) -> None:
    with pytest.raises(CorruptError, match="hard link"):
        plan(*entries)


def test_a_hard_link_to_a_lower_file_repeats_it() -> None:
    lower = Below({b"lib": lower_directory(), b"lib/f": lower_file()})
    tree = plan(hardlink(b"g", b"lib/f"), lower=lower)
    node = at(tree, b"g")
    assert node is at(tree, b"lib/f")
    assert (node.links, node.size, node.address, node.uid) == (2, 10, 1 << 20, 1)
    assert (tree.needs_lower, tree.borrowed, tree.files) == (True, frozenset({3}), 2)
    assert at(tree, b"lib").mode == 0o750


@pytest.mark.parametrize("mark", [b".wh.f", b".wh..wh..opq"])
def test_a_hard_link_to_a_hidden_lower_file_is_refused(mark: bytes) -> None:
    with pytest.raises(CorruptError, match="hard link to nothing"):
        plan(hardlink(b"g", b"f"), regular(mark, 0), lower=Below({b"f": lower_file()}))


def test_a_hard_link_over_its_own_lower_target_is_refused() -> None:
    with pytest.raises(CorruptError, match="hard link to nothing"):
        plan(hardlink(b"f", b"f"), lower=Below({b"f": lower_file()}))


@pytest.mark.parametrize(
    "entries",
    [[regular(b"d/f")], [hardlink(b"b", b"a")], [regular(b"d/.wh.f", 0)], [regular(b"d/.wh..wh..opq", 0)]],
    ids=["parent", "link", "whiteout", "opaque"],
)
def test_what_depends_on_lower_layers_says_so(entries: list[Entry]) -> None:
    assert plan(*entries, lower=None).needs_lower


@pytest.mark.parametrize(
    "entries",
    [
        [directory(b"d"), regular(b"d/f"), regular(b"d/.wh.g", 0)],
        [regular(b"d/f"), directory(b"d", 0o700)],
        [regular(b".wh.d", 0), regular(b"d/e/f")],
        [regular(b".wh..wh..opq", 0), regular(b"d/e/f")],
        [directory(b"d"), symlink(b"s", b"d"), regular(b"s/f"), hardlink(b"g", b"s/f")],
    ],
)
def test_what_does_not_depend_on_lower_layers_does_not_ask_them(entries: list[Entry]) -> None:
    lower = Below({b"d": lower_file()})
    assert not plan(*entries, lower=lower).needs_lower
    assert lower.asked == []
    assert not plan(*entries, lower=None).needs_lower


def test_a_missing_parent_takes_the_attributes_of_the_lower_one() -> None:
    tree = plan(regular(b"d/f"), lower=Below({b"d": lower_directory()}))
    parent = at(tree, b"d")
    assert (parent.mode, parent.uid, parent.gid, parent.mtime_ns) == (0o750, 7, 8, 9)
    assert parent.xattrs == ((b"user.a", b"1"),)


@pytest.mark.parametrize("lower", [{}, {b"d": lower_file()}], ids=["nothing", "a file"])
def test_a_parent_that_is_missing_everywhere_gets_defaults(lower: dict[bytes, Node]) -> None:
    parent = at(plan(regular(b"d/f"), lower=Below(lower)), b"d")
    assert (parent.mode, parent.uid, parent.gid, parent.mtime_ns, parent.xattrs) == (0o755, 0, 0, 0, ())


@pytest.mark.parametrize(
    ("target", "place"),
    [
        (b"usr/lib", b"usr/lib/f"),
        (b"/usr/lib", b"usr/lib/f"),
        (b"../../usr/./lib/", b"usr/lib/f"),
        (b".", b"f"),
        (b"usr/../opt", b"opt/f"),
    ],
)
@pytest.mark.parametrize("below", [True, False])
def test_a_symlinked_parent_is_followed_inside_the_root(target: bytes, place: bytes, *, below: bool) -> None:
    if below:
        tree = plan(regular(b"lib/f"), lower=Below({b"lib": lower_symlink(target)}))
        assert b"lib" not in names(tree)
    else:
        tree = plan(symlink(b"lib", target), regular(b"lib/f"))
        assert at(tree, b"lib").kind is Kind.SYMLINK
    assert at(tree, place).size == 1


def test_what_was_reached_by_a_lower_symlink_stays_when_the_layer_replaces_the_symlink() -> None:
    lower = Below({b"lib": lower_symlink(b"usr")})
    tree = plan(regular(b"lib/f"), regular(b"lib/g"), symlink(b"lib", b"opt"), regular(b"lib/h"), lower=lower)
    assert (names(tree, b"usr"), names(tree, b"opt")) == ({b"f", b"g"}, {b"h"})


@pytest.mark.parametrize("entries", [[symlink(b"s", b"s")], [symlink(b"s", b"t"), symlink(b"t", b"/s/x")]])
def test_symlink_cycles_end(entries: list[Entry]) -> None:
    with pytest.raises(CorruptError, match="too many symlinks"):
        plan(*entries, regular(b"s/f"))


def test_work_on_hostile_symlinks_is_bounded() -> None:
    hops = [symlink(b"s%d" % number, b"s%d/" % (number + 1) + b"./" * 2000) for number in range(200)]
    with pytest.raises(CorruptError, match="too many symlinks in the layer"):
        plan(*hops, symlink(b"s200", b"."), *[regular(b"s0/f%d" % number, 0) for number in range(100_000)])


def test_depth_is_bounded() -> None:
    deep = b"/".join([b"d"] * 1500)
    with pytest.raises(CorruptError, match="a path of"):
        plan(symlink(b"s", deep), symlink(deep + b"/t", deep), regular(b"s/t/f"))


def test_a_file_as_parent_is_refused() -> None:
    with pytest.raises(CorruptError, match="a parent is no directory: 'f/g'"):
        plan(regular(b"f"), regular(b"f/g"))


def test_a_whiteout_is_a_device_zero() -> None:
    tree = plan(directory(b"d"), regular(b"d/.wh.f", 0), regular(b".wh.g", 0), lower=None)
    for path in (b"d/f", b"g"):
        node = at(tree, path)
        assert (node.kind, node.device, node.mode) == (Kind.CHARACTER, (0, 0), 0)
        assert is_whiteout(node)
    assert (tree.marks, tree.opaque, tree.files) == (True, False, 0)
    assert at(tree, b"d").xattrs == (ORIGIN,)
    assert tree.root.xattrs == ()


@pytest.mark.parametrize("swap", [False, True])
def test_a_whiteout_beside_a_file_is_dropped(*, swap: bool) -> None:
    entries = [regular(b".wh.f", 0), regular(b"f", 3)]
    tree = plan(*(entries[::-1] if swap else entries), lower=None)
    assert (at(tree, b"f").size, tree.marks) == (3, False)


@pytest.mark.parametrize("swap", [False, True])
def test_a_whiteout_beside_a_directory_makes_it_opaque(*, swap: bool) -> None:
    entries = [regular(b".wh.d", 0), directory(b"d")]
    tree = plan(*(entries[::-1] if swap else entries), lower=None)
    assert at(tree, b"d").xattrs == (OPAQUE,)
    assert tree.marks


@pytest.mark.parametrize("swap", [False, True])
def test_an_opaque_mark_is_an_attribute_of_its_directory(*, swap: bool) -> None:
    entries = [directory(b"d", xattrs=((b"user.a", b"1"),)), regular(b"d/.wh..wh..opq", 0)]
    tree = plan(*(entries[::-1] if swap else entries), lower=None)
    assert at(tree, b"d").xattrs == ((b"user.a", b"1"), OPAQUE)
    assert names(tree, b"d") == set()


def test_whiteouts_in_an_opaque_directory_are_left_out() -> None:
    tree = plan(directory(b"d"), regular(b"d/.wh..wh..opq", 0), regular(b"d/.wh.f", 0), directory(b"d/e"), lower=None)
    assert names(tree, b"d") == {b"e"}


@pytest.mark.parametrize("inner", [b"d/.wh.f", b"d/.wh..wh..opq", b"d/e/.wh.f"])
@pytest.mark.parametrize("swap", [False, True])
def test_a_mark_inside_of_what_is_hidden_means_nothing(inner: bytes, *, swap: bool) -> None:
    entries = [regular(b".wh.d", 0), regular(inner, 0)]
    tree = plan(*(entries[::-1] if swap else entries), lower=Below({b"d": lower_directory()}))
    assert is_whiteout(at(tree, b"d"))
    assert not tree.needs_lower


def test_an_opaque_root_is_told() -> None:
    tree = plan(regular(b".wh..wh..opq", 0), regular(b"f"), lower=None)
    assert (tree.opaque, tree.marks) == (True, True)


def test_other_aufs_files_are_ignored() -> None:
    ignored = [
        directory(b".wh..wh.plnk"),
        regular(b".wh..wh.plnk/1.2"),
        regular(b"d/.wh..wh.aufs"),
        regular(b".wh..wh."),
    ]
    tree = plan(*ignored, regular(b"x.wh.y"), lower=None)
    assert names(tree) == {b"x.wh.y"}


@pytest.mark.parametrize("below", [True, False])
def test_whiteouts_follow_symlinked_parents(*, below: bool) -> None:
    mark = regular(b"lib/.wh.f", 0)
    if below:
        tree = plan(mark, lower=Below({b"lib": lower_symlink(b"usr"), b"usr": lower_directory()}))
    else:
        tree = plan(directory(b"usr"), mark, symlink(b"lib", b"usr"))
    assert is_whiteout(at(tree, b"usr/f"))


def test_a_whiteout_under_what_is_a_file_now_hides_nothing() -> None:
    tree = plan(regular(b"d/.wh.f", 0), regular(b"d"))
    assert at(tree, b"d").kind is Kind.REGULAR


@pytest.mark.parametrize("path", [b".wh.", b"d/.wh..", b".wh...", b".wh.d/f"])
def test_nonsense_whiteouts_are_refused(path: bytes) -> None:
    with pytest.raises(CorruptError, match="whiteout"):
        plan(regular(path, 0))


def test_hostile_xattrs_are_dropped() -> None:
    hostile = (b"trusted.overlay.opaque", b"trusted.x", b"user.overlay.whiteout", b"security.selinux", b"security.ima")
    more = (b"security.evm", b"system.nfs4_acl", b"nonsense", b"btrfs.compression")
    kept = (b"user.a", b"security.capability", b"system.posix_acl_access")
    xattrs = tuple((name, b"y") for name in hostile + more + kept)
    assert [name for name, _ in at(plan(regular(b"f", xattrs=xattrs)), b"f").xattrs] == list(kept)
    assert at(plan(symlink(b"s", b"t", xattrs=xattrs)), b"s").xattrs == ((b"security.capability", b"y"),)


def test_of_repeated_xattrs_the_last_counts() -> None:
    tree = plan(regular(b"f", xattrs=((b"user.a", b"1"), (b"user.b", b"2"), (b"user.a", b"3"))))
    assert dict(at(tree, b"f").xattrs) == {b"user.a": b"3", b"user.b": b"2"}


@pytest.mark.parametrize(
    "entry",
    [
        device(b"f", Kind.CHARACTER, (0, 0)),
        device(b"f", Kind.CHARACTER, (4096, 0)),
        device(b"f", Kind.BLOCK, (1, 1 << 20)),
        symlink(b"f", b""),
        symlink(b"f", b"a\0b"),
        symlink(b"f", b"x" * 4096),
        regular(b"f", -1),
        regular(b"f", 8 << 60),
        regular(b"f", mtime_ns=1 << 95),
        regular(b"f", xattrs=((b"user.", b""),)),
        regular(b"f", xattrs=((b"user.a\0", b""),)),
        regular(b"f", xattrs=((b"user." + b"x" * 251, b""),)),
        regular(b"f", xattrs=((b"user.a", bytes(65536)),)),
        regular(b"f", xattrs=tuple((b"user.%d" % number, bytes(60_000)) for number in range(3))),
    ],
)
def test_what_linux_cannot_hold_is_refused(entry: Entry) -> None:
    with pytest.raises(CorruptError, match="'f'"):
        plan(entry)


def test_a_root_that_is_no_directory_is_refused() -> None:
    with pytest.raises(CorruptError, match="root"):
        plan(regular(b""))


@given(strategies.layers())
def test_any_layer_gives_a_tree_or_a_clear_error(entries: list[Entry]) -> None:
    try:
        tree = plan(*entries)
    except CorruptError:
        return
    assert all(not name.startswith(b".wh.") for name in _all_names(tree.root))


@given(strategies.layers())
def test_a_tree_that_needs_nothing_below_is_the_same_with_anything_below(entries: list[Entry]) -> None:
    class Hostile:
        def find(self, path: bytes) -> Found | None:
            raise AssertionError(path)

    try:
        needs_lower = plan(*entries, lower=None).needs_lower
    except CorruptError:
        return
    if not needs_lower:
        plan(*entries, lower=Hostile())


def _all_names(node: Node) -> set[bytes]:
    found: set[bytes] = set()
    for name, child in (node.children or {}).items():
        found |= {name} | _all_names(child)
    return found
