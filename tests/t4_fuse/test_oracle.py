"""The oracle itself: it says what umoci does, and its comparison sees a difference."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

import oracle
import rich_images
from images import write_oci_layout

if TYPE_CHECKING:
    from pathlib import Path

BY_UMOCI = {
    "everything": (b".",),
    "changes": (b"back", b"cache"),
    "stack-10": (),
    "repeated": (),
}
"""Image by name, with directories whose mtime umoci lets a later entry of the same layer change."""


@pytest.mark.parametrize("name", BY_UMOCI)
def test_says_what_umoci_unpacks(tmp_path: Path, name: str) -> None:
    layout = write_oci_layout(tmp_path / "layout", rich_images.IMAGES[name]())
    (tmp_path / "scratch").mkdir()
    expected = oracle.expected_tree(oracle.find_layers(str(layout)), str(tmp_path / "scratch"))
    command = ["umoci", "unpack", "--image", f"{layout}:latest", str(tmp_path / "bundle")]
    subprocess.run(command, check=True, capture_output=True)
    actual = oracle.snapshot(str(tmp_path / "bundle" / "rootfs"))

    assert oracle.difference(_comparable(expected, BY_UMOCI[name]), actual) == ""


def _comparable(tree: oracle.Tree, changed: tuple[bytes, ...]) -> oracle.Tree:
    """Without links, which umoci joins and overlayfs cannot, empty xattrs, which Go's tar reader drops, some mtimes."""
    return {
        name: replace(
            file,
            links=None,
            group=None,
            xattrs=tuple(xattr for xattr in file.xattrs if xattr[1]),
            mtime_ns=None if name in changed else file.mtime_ns,
        )
        for name, file in tree.items()
    }


def test_links_into_a_lower_layer_are_one_inode_of_the_upper_one(tmp_path: Path) -> None:
    """As copy-up makes them: what has other names below is parted from these."""
    layout = write_oci_layout(tmp_path / "layout", rich_images.changes())
    (tmp_path / "scratch").mkdir()
    tree = oracle.expected_tree(oracle.find_layers(str(layout)), str(tmp_path / "scratch"))

    assert tree[b"target"].group == tree[b"merged/linked-up-too"].group
    assert tree[b"linked-up"].group == tree[b"etc/again"].group != tree[b"target"].group
    assert [tree[name].links for name in (b"target", b"linked-up", b"trio/one", b"trio/two")] == [3, 2, 2, 2]
    assert tree[b"pair/one"].links == 2  # the name that a whiteout hides still counts, as in any overlayfs


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"mode": 0o600}, "mode is 384"),
        ({"mtime_ns": 1}, "mtime_ns is 1"),
        ({"digest": "0"}, "digest is '0'"),
        ({"xattrs": (("user.x", b""),)}, "xattrs is"),
        ({"links": 2}, "links is 2"),
        ({"group": b"other"}, "group is b'other'"),
    ],
)
def test_sees_each_difference(tmp_path: Path, change: dict[str, object], complaint: str) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "file").chmod(0o644)
    tree = oracle.snapshot(str(tmp_path))
    damaged = tree | {b"file": replace(tree[b"file"], **change)}  # type: ignore[arg-type]

    assert oracle.difference(tree, tree) == ""
    assert complaint in oracle.difference(tree, damaged)
    assert "missing" in oracle.difference(tree, {b".": tree[b"."]})
    assert "not in the image" in oracle.difference({b".": tree[b"."]}, tree)
