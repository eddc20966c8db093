"""What a program's libraries are fetched for: of which starts, in which layers, once, and whatever files say."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import trio

from kernel import DISK_BLOCKS
from nsfs.core.libraries import Libraries, plan_programs
from nsfs.core.tasks import open_tasks
from nsfs.errors import CorruptError, UnreachableError
from nsfs.format.erofs import render_erofs
from nsfs.format.erofs_image import ErofsImage
from nsfs.model.digest import Digest
from nsfs.model.oci import Runtime
from nsfs.model.policy import view_name
from nsfs.model.pool import MapRecord
from nsfs.model.tree import plan_tree
from programs import SIZE, render_program
from strategies import directory, place_entries, regular, symlink
from trio_tests import run

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Sequence

    from nsfs.model.layer import Entry

LOW, HIGH = "a" * 32, "b" * 32
LINKER = b"/lib64/ld.so"
LOCALE = b"usr/lib/locale/C.utf8/LC_CTYPE"


@dataclass
class Site:
    """Two layers of programs, and what is asked of them."""

    files: dict[int, bytes] = field(default_factory=dict)
    """By address."""
    addresses: dict[bytes, int] = field(default_factory=dict)
    images: dict[str, ErofsImage] = field(default_factory=dict)
    fetched: list[tuple[str, int, int]] = field(default_factory=list)
    is_local: bool = False
    is_down: bool = False
    is_damaged: bool = False
    comes_ahead: bool = True
    looked: int = 0
    """How often somebody waited for bytes."""

    def add(self, map_id: str, first: int, contents: dict[bytes, bytes], links: dict[bytes, bytes]) -> None:
        """A layer whose files have addresses from `first` on."""
        parents = sorted({parent for path in (*contents, *links) for parent in _parents(path)})
        entries: list[Entry] = [directory(path) for path in parents]
        entries += [regular(path, len(data)) for path, data in contents.items()]
        entries += [symlink(path, target) for path, target in links.items()]
        addresses = place_entries(entries, first)
        for entry, address in zip(entries, addresses, strict=True):
            if entry.path in contents:
                self.files[address] = contents[entry.path]
                self.addresses[entry.path] = address
        tree = plan_tree(entries, addresses, None)
        blob = render_erofs(tree.root, disk_blocks=DISK_BLOCKS, uuid=bytes(16), volume=tree.volume)
        self.images[map_id] = ErofsImage(bytes(blob))

    def open(self, path: str) -> ErofsImage:
        return self.images[path]

    def are_local(self, _keys: Collection[Any]) -> bool:
        if self.is_damaged:
            raise CorruptError("the layer's tables are damaged")
        return self.is_local

    async def read(self, _view: str, address: int, size: int) -> bytes:
        return self._slice(address, size)

    async def peek(self, _map_id: str, _owner: str, address: int, size: int) -> bytes:
        if self.is_down:
            raise UnreachableError("the registry does not answer")
        await trio.sleep(0.1)
        self.looked += 1
        return self._slice(address, size)

    async def fetch_ahead(self, map_id: str, _owner: str, runs: Sequence[tuple[int, int]]) -> bool:
        self.fetched += [(map_id, address, size) for address, size in runs]
        return self.comes_ahead

    def extent_at(self, _map_id: str, _owner: str, address: int) -> int:
        return len(self.files.get(address, b""))

    def _slice(self, address: int, size: int) -> bytes:
        start = max(each for each in self.files if each <= address)
        data = self.files[start][address - start : address - start + size]
        assert len(data) == size, "a read reaches beyond its file"
        return data

    def names(self) -> list[bytes]:
        """Of the files whose fronts were fetched."""
        known = {address: path for path, address in self.addresses.items()}
        return sorted({known[address] for _, address, _ in self.fetched})


def _parents(path: bytes) -> list[bytes]:
    parts = path.split(b"/")[:-1]
    return [b"/".join(parts[: number + 1]) for number in range(len(parts))]


def record(map_id: str, digit: str) -> MapRecord:
    return MapRecord(
        id=map_id, blob=Digest("sha256:" + digit * 64), index="plain", path=map_id, needs_lower=False, marks=False
    )


MAPS = [record(HIGH, "b"), record(LOW, "a")]
"""Top first."""


def make_site() -> Site:
    """A program in the upper layer; its libraries in the lower one, one by a symlink, which need each other."""
    site = Site()
    libraries = {
        b"lib64/ld.so": render_program([]),
        b"usr/lib/libz.so.1.2": render_program([b"libc.so.6", b"libgone.so"]),
        b"usr/lib/libc.so.6": render_program([b"libz.so.1"]),
    }
    site.add(LOW, 1 << 30, libraries, {b"usr/lib/libz.so.1": b"libz.so.1.2"})
    programs = {
        b"bin/tool": render_program([b"libz.so.1"], LINKER),
        b"bin/script": b"#!/bin/env tool\nexit\n",
        b"etc/passwd": b"root:x:0:0::/root:/bin/sh\n",
        LOCALE: b"characters",
    }
    site.add(HIGH, 2 << 30, programs, {})
    return site


NOTHING = Runtime()
"""What an image runs that does not say so."""


def follow(
    site: Site, body: Callable[[Libraries], Awaitable[None]], owner: str = "", runtime: Runtime = NOTHING
) -> None:
    async def test() -> None:
        async with open_tasks() as nursery:
            maps: Any = site
            libraries = Libraries(maps, site, nursery)
            libraries.follow(MAPS, owner, runtime)
            await trio.sleep(1)
            site.fetched = [each for each in site.fetched if runtime is not NOTHING]
            await body(libraries)
            await trio.sleep(1)
            nursery.cancel_scope.cancel()

    run(test)


def test_the_libraries_of_a_program_that_is_read_are_fetched_once() -> None:
    site = make_site()

    async def body(libraries: Libraries) -> None:
        for _ in range(2):
            data = await libraries.read(view_name(HIGH, ""), site.addresses[b"bin/tool"], 4096)
            assert data == site.files[site.addresses[b"bin/tool"]][:4096]
            await trio.sleep(5)

    follow(site, body)
    assert site.names() == [b"bin/tool", b"lib64/ld.so", b"usr/lib/libc.so.6", b"usr/lib/libz.so.1.2"]
    assert {map_id for map_id, *_ in site.fetched} == {LOW, HIGH}
    assert all(size <= SIZE for _, _, size in site.fetched)
    assert len(site.fetched) == 8, "the front of each, and what is around its end"


def test_starts_at_one_time_have_their_libraries_fetched_once_and_a_later_one_again() -> None:
    site = make_site()
    tool = site.addresses[b"bin/tool"]

    async def body(libraries: Libraries) -> None:
        for _ in range(20):
            libraries.follow(MAPS, "", NOTHING)
        await trio.sleep(1)
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(libraries.read, view_name(HIGH, ""), tool, 4096)
        await trio.sleep(5)
        assert len(site.fetched) == 8
        libraries.follow(MAPS, "", NOTHING)
        await trio.sleep(1)
        await libraries.read(view_name(HIGH, ""), tool, 4096)
        await trio.sleep(5)

    follow(site, body)
    assert len(site.fetched) == 18, "and what is usual"


def test_nothing_is_fetched_of_what_is_no_start_s_program() -> None:
    """Another file, another owner's read, a start that is long over, and one that is local."""
    site = make_site()
    tool = site.addresses[b"bin/tool"]

    async def body(libraries: Libraries) -> None:
        await libraries.read(view_name(HIGH, ""), site.addresses[b"bin/script"], 10)
        await libraries.read(view_name(HIGH, "", "team"), tool, 4096)
        await libraries.read(view_name("c" * 32, ""), tool, 4096)
        await trio.sleep(120)
        await libraries.read(view_name(HIGH, ""), tool, 4096)
        site.is_local = True
        libraries.follow(MAPS, "", NOTHING)
        await trio.sleep(1)
        await libraries.read(view_name(HIGH, ""), tool, 4096)

    follow(site, body)
    assert site.fetched == []


def test_a_registry_that_does_not_answer_fails_nobody() -> None:
    site = make_site()
    site.is_down = True

    async def body(libraries: Libraries) -> None:
        await libraries.read(view_name(HIGH, ""), site.addresses[b"bin/tool"], 4096)

    follow(site, body)
    assert site.names() == [b"bin/tool"]


def test_a_program_that_lies_is_read_no_further_than_it_reaches() -> None:
    """It says that what it needs is behind its end, where another file may be."""
    site = make_site()
    site.files[site.addresses[b"bin/tool"]] = render_program([b"libz.so.1"], LINKER)[: 60 << 10]

    async def body(libraries: Libraries) -> None:
        await libraries.read(view_name(HIGH, ""), site.addresses[b"bin/tool"], 4096)

    follow(site, body)
    assert site.names() == [b"bin/tool", b"lib64/ld.so"]


def idle() -> Callable[[Libraries], Awaitable[None]]:
    async def body(_: Libraries) -> None:
        await trio.sleep(5)

    return body


TOOL = [b"bin/tool", b"lib64/ld.so", b"usr/lib/libc.so.6", b"usr/lib/libz.so.1.2"]
"""The program, and what its linker reads."""


def test_what_an_image_runs_is_fetched_before_anybody_reads_it() -> None:
    site = make_site()
    follow(site, idle(), runtime=Runtime(env=["PATH=/sbin:/bin"], entrypoint=["tool", "--fast"], cmd=["absent"]))
    assert site.names() == [*TOOL[:1], b"etc/passwd", *TOOL[1:], LOCALE]
    assert len(site.fetched) == 10


def test_so_is_what_a_script_runs_that_an_image_begins_with() -> None:
    site = make_site()
    follow(site, idle(), runtime=Runtime(env=["PATH=/bin"], cmd=["script"]))
    assert site.names() == [b"bin/script", *TOOL[:1], b"etc/passwd", *TOOL[1:], LOCALE]


def test_twenty_starts_at_one_time_are_one() -> None:
    site = make_site()

    async def body(libraries: Libraries) -> None:
        for _ in range(20):
            libraries.follow(MAPS, "", Runtime(cmd=["/bin/tool"]))
        await trio.sleep(5)

    follow(site, body, runtime=Runtime(cmd=["/bin/tool"]))
    assert len(site.fetched) == 10


def test_nothing_is_fetched_for_an_image_that_is_local() -> None:
    site = make_site()
    site.is_local = True
    follow(site, idle(), runtime=Runtime(cmd=["/bin/tool"]))
    assert site.fetched == []


def test_who_begins_a_start_hears_that_a_layer_is_damaged_and_others_start_all_the_same() -> None:
    site = make_site()

    async def body(libraries: Libraries) -> None:
        site.is_damaged = True
        with pytest.raises(CorruptError, match="damaged"):
            libraries.follow(MAPS, "another", Runtime(cmd=["/bin/tool"]))
        await trio.sleep(5)
        site.is_damaged = False
        libraries.follow(MAPS, "third", Runtime(cmd=["/bin/tool"]))
        await trio.sleep(5)

    follow(site, body)
    assert set(TOOL) < set(site.names())


def test_nobody_looks_at_programs_where_nothing_comes_ahead() -> None:
    site = make_site()
    site.comes_ahead = False
    follow(site, idle(), runtime=Runtime(cmd=["/bin/tool"]))
    assert not site.looked


def test_programs_are_sought_where_execvp_does() -> None:
    runtime = Runtime(env=["PATH=/a:/b", "EMPTY", "A=B=C"], working_dir="/srv")
    assert plan_programs(["x", "", "-c", "./y", "/bin/z", "n" * 999], runtime) == [
        [b"/a/x", b"/b/x"],
        [b"/srv/./y"],
        [b"/bin/z"],
    ]
    usual = plan_programs(["x"], Runtime())
    assert len(usual) == 1
    assert b"/usr/bin/x" in usual[0]
    assert len(plan_programs(["x"] * 99, Runtime())) == 8
