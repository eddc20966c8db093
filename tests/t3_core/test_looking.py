"""Looking into images: only the layers that decide are indexed, and contents come from the layer that has them."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from core_sources import LAYER, digest_of
from kernel import DISK_BLOCKS
from nsfs.core.images import Image, Layer
from nsfs.core.looking import Looking
from nsfs.core.maps import Maps
from nsfs.core.union import LowerTree
from nsfs.errors import CorruptError, NotFoundError, UnsupportedError, UsageError
from nsfs.format.erofs import render_erofs
from nsfs.model.digest import DiffId, Digest
from nsfs.model.layer import Entry
from nsfs.model.oci import Descriptor, ImageConfig, Platform, Runtime, layer_format
from nsfs.model.pool import MapRecord
from nsfs.model.report import Data, EntryReport, Item, Note
from nsfs.model.tree import PlannedTree, plan_tree
from nsfs.store.sealed import load_content
from strategies import directory, hardlink, place_entries, regular, symlink
from trio_tests import run

MAPS = Maps(partial(load_content, key=None))


class FakeLayers:
    """Layers by number, lowest first, whose maps lie in a directory; counts what is indexed."""

    def __init__(self, path: Path, layers: Sequence[list[Entry]]) -> None:
        self.path = path
        self.entries = list(layers)
        self.indexed: list[int] = []
        self.refused: set[int] = set()

    def number(self, layer: Layer) -> int:
        return layer.descriptor.size - 1_000_000

    def check(self, layer: Layer) -> None:
        if self.number(layer) in self.refused:
            raise UnsupportedError("encrypted")

    async def left_to_download(self, _image: Image, layers: Sequence[Layer]) -> dict[Digest, int]:
        return {each.digest: 0 if self.number(each) in self.indexed else each.descriptor.size for each in layers}

    async def index(self, _image: Image, layer: Layer) -> None:
        self.check(layer)
        if self.number(layer) not in self.indexed:
            self.indexed.append(self.number(layer))

    async def map_alone(self, layer: Layer) -> MapRecord:
        assert self.number(layer) in self.indexed
        return self._write(self.number(layer), None)

    async def maps(self, layers: Sequence[Layer]) -> list[MapRecord]:
        made: list[MapRecord] = []
        for layer in layers:
            assert self.number(layer) in self.indexed
            record = self._write(self.number(layer), None)
            made.append(self._write(self.number(layer), made) if record.needs_lower else record)
        return made

    def _write(self, number: int, lowers: list[MapRecord] | None) -> MapRecord:
        entries = self.entries[number]
        below = None if lowers is None else LowerTree([MAPS.open(record.path) for record in lowers[::-1]])
        planned = plan_tree(entries, place_entries(entries, (1 << 30) * (1 + number)), below)
        needs_lower = planned.needs_lower and lowers is None
        path = self.path / f"{number}-{lowers is None}"
        if not needs_lower:
            path.write_bytes(render(planned))
        return MapRecord(
            id=f"{number:032x}",
            blob=digest_of(b"%d" % number),
            index="plain",
            path=str(path),
            needs_lower=needs_lower,
            marks=planned.marks,
            opaque=planned.opaque,
        )


def render(planned: PlannedTree) -> bytes:
    return bytes(render_erofs(planned.root, disk_blocks=DISK_BLOCKS, uuid=bytes(16), volume=planned.volume))


class Site:
    def __init__(self, path: Path, *layers: list[Entry]) -> None:
        fake: Any = FakeLayers(path, layers)
        self.layers = fake
        self.told: list[Any] = []
        self.asked: list[tuple[str, int, int]] = []
        self.looking = Looking(fake, MAPS, self.read)
        descriptors = [
            Descriptor(media_type=LAYER, digest=digest_of(b"%d" % n), size=1_000_000 + n) for n in range(len(layers))
        ]
        self.image = Image(
            reference="r:latest",
            repository="r",
            tag="latest",
            digest=digest_of(b"manifest"),
            config=ImageConfig(Platform("amd64", "linux"), (), Runtime(), {}),
            layers=tuple(Layer(each, DiffId(each.digest), layer_format(LAYER)) for each in descriptors),
        )

    async def read(self, map_id: str, _owner: str, address: int, size: int) -> bytes:
        self.asked.append((map_id, address, size))
        return bytes(address // 4096 % 251 for _ in range(size))

    async def tell(self, body: object) -> None:
        self.told.append(body)

    async def stat(self, path: bytes) -> EntryReport:
        return await self.looking.stat(self.image, path, self.tell)

    async def names(self, path: bytes) -> list[bytes]:
        self.told.clear()
        await self.looking.list_names(self.image, path, self.tell)
        return [item.entry.path for item in self.told if isinstance(item, Item)]

    async def content(self, path: bytes, offset: int = 0, length: int | None = None) -> int:
        self.told.clear()
        await self.looking.read(self.image, path, offset, length, self.tell)
        return sum(len(piece.data) for piece in self.told if isinstance(piece, Data))


BASE = [
    directory(b"etc"),
    regular(b"etc/hosts", 100),
    regular(b"etc/issue", 200),
    symlink(b"lib", b"usr/lib"),
    directory(b"usr/lib"),
]
MIDDLE = [directory(b"usr", mode=0o711), directory(b"usr/lib"), regular(b"usr/lib/big", 5_000_000)]
TOP = [directory(b"etc"), regular(b"etc/hosts", 7), regular(b"etc/.wh.issue", 0), regular(b"run", 3)]


def test_what_the_top_layer_decides_needs_no_other(tmp_path: Path) -> None:
    async def body() -> None:
        site = Site(tmp_path, BASE, MIDDLE, TOP)
        entry = await site.stat(b"/etc//hosts")
        assert (entry.path, entry.kind, entry.size, entry.layer) == (b"/etc/hosts", "file", 7, digest_of(b"2"))
        with pytest.raises(NotFoundError):
            await site.stat(b"/etc/issue")
        assert site.layers.indexed == [2]

    run(body)


def test_layers_are_asked_from_the_top_until_the_path_is_decided(tmp_path: Path) -> None:
    async def body() -> None:
        site = Site(tmp_path, BASE, MIDDLE, TOP)
        assert await site.content(b"/usr/lib/big", 10, 20) == 20
        assert site.layers.indexed == [2, 1]
        assert site.asked == [(f"{1:032x}", (2 << 30) + 10, 20)]
        assert await site.content(b"lib/big", 4_999_999) == 1
        assert site.layers.indexed == [2, 1, 0]

    run(body)


def test_a_name_that_no_layer_has_needs_all(tmp_path: Path) -> None:
    async def body() -> None:
        site = Site(tmp_path, BASE, MIDDLE, TOP)
        with pytest.raises(NotFoundError):
            await site.stat(b"/nowhere")
        assert site.layers.indexed == [2, 1, 0]

    run(body)


def test_a_listing_is_of_all_that_merge(tmp_path: Path) -> None:
    async def body() -> None:
        site = Site(tmp_path, BASE, MIDDLE, TOP)
        assert await site.names(b"/etc") == [b"/etc/hosts"]
        assert await site.names(b"/") == [b"/etc", b"/lib", b"/run", b"/usr"]
        assert await site.names(b"/run") == [b"/run"]

    run(body)


def test_an_opaque_directory_ends_the_search(tmp_path: Path) -> None:
    async def body() -> None:
        site = Site(tmp_path, BASE, [directory(b"etc"), regular(b"etc/.wh..wh..opq", 0), regular(b"etc/new", 1)])
        assert await site.names(b"/etc") == [b"/etc/new"]
        with pytest.raises(NotFoundError):
            await site.stat(b"/etc/hosts")
        assert site.layers.indexed == [1]

    run(body)


def test_a_layer_that_cannot_be_read_alone_needs_those_below(tmp_path: Path) -> None:
    async def body() -> None:
        site = Site(tmp_path, BASE, [hardlink(b"etc/other", b"etc/hosts")], [regular(b"run", 1)])
        assert (await site.stat(b"/run")).size == 1
        assert site.layers.indexed == [2]
        entry = await site.stat(b"/etc/other")
        assert (entry.size, entry.links) == (100, 2)
        assert sorted(site.layers.indexed) == [0, 1, 2]
        await site.content(b"/etc/other")
        assert site.asked == [(f"{1:032x}", 1 << 30, 100)], "the upper map asks, though the address is the lower's"

    run(body)


def test_a_tree_is_everything_below(tmp_path: Path) -> None:
    async def body() -> None:
        site = Site(tmp_path, BASE, MIDDLE, TOP)
        await site.looking.tree(site.image, b"/usr", site.tell)
        entries = [item.entry for item in site.told if isinstance(item, Item)]
        assert [(entry.path, entry.mode) for entry in entries] == [
            (b"/usr", 0o711),
            (b"/usr/lib", 0o755),
            (b"/usr/lib/big", 0o644),
        ]

    run(body)


def test_what_it_costs_is_said_before_it_is_paid(tmp_path: Path) -> None:
    async def body() -> None:
        site = Site(tmp_path, BASE, MIDDLE, TOP)
        await site.stat(b"/run")
        await site.looking.tree(site.image, b"/run", site.tell)
        await site.looking.tree(site.image, b"/run", site.tell)
        notes = [note.text for note in site.told if isinstance(note, Note)]
        assert len(notes) == 2
        assert notes[0].startswith("plain layer")
        assert notes[1].startswith("2 plain layers")

    run(body)


def test_a_layer_that_cannot_be_shown_is_no_matter_where_it_is_not_needed(tmp_path: Path) -> None:
    async def body() -> None:
        site = Site(tmp_path, BASE, MIDDLE, TOP)
        site.layers.refused = {0}
        assert (await site.stat(b"/run")).size == 3
        with pytest.raises(UnsupportedError):
            await site.stat(b"/lib")
        with pytest.raises(UnsupportedError):
            await site.looking.tree(site.image, b"/run", site.tell)

    run(body)


def test_files_are_read_in_pieces_and_no_further(tmp_path: Path) -> None:
    async def body() -> None:
        site = Site(tmp_path, MIDDLE)
        assert await site.content(b"/usr/lib/big") == 5_000_000
        assert max(size for _, _, size in site.asked) == 1 << 20
        for offset, length, expected in [(4_999_990, 100, 10), (5_000_000, 1, 0), (9_000_000, None, 0), (3, 0, 0)]:
            assert await site.content(b"/usr/lib/big", offset, length) == expected

    run(body)


@pytest.mark.parametrize(("offset", "length"), [(-1, None), (-4096, 10), (0, -1)])
def test_no_byte_outside_of_a_file_is_read(offset: int, length: int | None, tmp_path: Path) -> None:
    async def body() -> None:
        site = Site(tmp_path, MIDDLE)
        with pytest.raises(UsageError, match="not a part"):
            await site.content(b"/usr/lib/big", offset, length)
        assert site.asked == []

    run(body)


@pytest.mark.parametrize("path", [b"/usr", b"/"])
def test_only_files_have_contents(path: bytes, tmp_path: Path) -> None:
    async def body() -> None:
        with pytest.raises(UsageError, match="a directory"):
            await Site(tmp_path, MIDDLE).content(path)

    run(body)


def test_no_map_stays_open(tmp_path: Path) -> None:
    async def body() -> None:
        site = Site(tmp_path, BASE, MIDDLE, TOP)
        await site.names(b"/")
        with pytest.raises(NotFoundError):
            await site.stat(b"/nowhere")

    run(body)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_a_map_that_is_gone_or_damaged_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such file"):
        MAPS.open(str(tmp_path / "none"))
    for content in (b"", b"x" * 100, bytes(8192)):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(CorruptError):
            MAPS.open(str(tmp_path / "bad"))
