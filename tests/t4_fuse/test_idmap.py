"""Owners as they are seen through idmapped mounts of real views and directories."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from mounting import arena, below, make_directory
from nsfs.errors import UnsupportedError
from nsfs.format.erofs import render_erofs
from nsfs.model.layer import Kind, Node
from nsfs.serve import idmap, mounts

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["arena"]
NOBODY = 65534


def owners(top: Path) -> list[tuple[int, int]]:
    return [(found.st_uid, found.st_gid) for found in (os.stat(top / name) for name in ("root", "user", "other"))]


@pytest.fixture(params=["erofs", "erofs-loop", "directory"])
def layer(request: pytest.FixtureRequest, arena: Path) -> Iterator[Path]:
    """Files of uid and gid 0, of 1000 and 1001, and of somebody who has no counterpart."""
    files = {"root": (0, 0), "user": (1000, 1001), "other": (70000, 70000)}
    top = make_directory(arena / "layer")
    if request.param == "directory":
        for name, owner in files.items():
            (top / name).write_bytes(b"x")
            os.chown(top / name, *owner)
        yield top
        return
    root = Node(Kind.DIRECTORY, 0o755)
    root.children = {name.encode(): Node(Kind.REGULAR, 0o644, *owner) for name, owner in files.items()}
    (arena / "map").write_bytes(render_erofs(root, disk_blocks=(1 << 32) - 1, uuid=bytes(16)))
    with (arena / "disk").open("wb") as disk:
        disk.truncate((16 << 40) - 4096)
    mounts.do_step(
        mounts.Erofs(
            target=str(top),
            image=str(arena / "map"),
            device=str(arena / "disk"),
            loop=request.param == "erofs-loop",
        )
    )
    yield top


def test_owners_are_shifted_and_the_layers_own_stay(arena: Path, layer: Path) -> None:
    into = make_directory(arena / "l")
    make_directory(into / "a")
    uids, gids = "0 100000 65536\n", "0 5 1\n1 200000 2000\n"
    mounts.do_step(mounts.Clones(target=str(into), clones=((str(layer), "a"),), uids=uids, gids=gids))
    assert owners(into / "a") == [(100000, 5), (101000, 201000), (NOBODY, NOBODY)]
    assert owners(layer) == [(0, 0), (1000, 1001), (70000, 70000)]
    assert {"ro", "idmapped"} <= set(mounts.find_mount(str(into / "a")).options.split(","))
    with pytest.raises(OSError, match="Read-only"):
        (into / "a" / "new").touch()
    upper, work, root = (make_directory(arena / name) for name in ("upper", "work", "rootfs"))
    step = mounts.Overlay(target=str(root), base=str(into), lowers=("a",), upper=str(upper), work=str(work))
    mounts.do_step(step)
    mounts.unmount(str(into / "a"))
    assert owners(root) == [(100000, 5), (101000, 201000), (NOBODY, NOBODY)]
    os.chmod(root / "user", 0o600)
    assert ((upper / "user").stat().st_uid, (upper / "user").stat().st_gid) == (101000, 201000)
    with pytest.raises(OSError, match=os.strerror(errno.EOVERFLOW)):
        os.chmod(root / "other", 0o600)


def test_a_filesystem_that_cannot_says_so(arena: Path) -> None:
    make_directory(arena / "l" / "a")
    step = mounts.Clones(target=str(arena / "l"), clones=(("/proc", "a"),), uids="0 1 1\n", gids="0 1 1\n")
    with pytest.raises(UnsupportedError, match="cannot shift owners") as caught:
        mounts.do_step(step)
    assert "nsfs doctor" in (caught.value.hint or "")
    assert below(arena) == []


def test_a_host_without_user_namespaces_says_why(arena: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = make_directory(arena / "bin") / "unshare"
    program.write_text("#!/bin/sh\necho unshare failed: no space >&2\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(arena / "bin"))
    with pytest.raises(OSError, match="no user namespace can be made: unshare failed: no space"):
        idmap.user_namespace("0 1 1\n", "0 1 1\n").__enter__()
