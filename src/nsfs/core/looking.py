"""Looking into an image without mounting it: `nsfs ls`, `cat`, `tree` and `stat`.

Owns how much of an image is read for that: layers are indexed one by one from the top, until those known decide what is
at the path; contents are read like a mount's. Says what a download will cost before it begins.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from nsfs.core.tasks import run_all
from nsfs.core.union import UnionTree, decide
from nsfs.errors import UsageError
from nsfs.model.layer import Kind
from nsfs.model.report import Data, EntryReport, Item, Note, render_size

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from msgspec import Struct

    from nsfs.core.images import Image, Layer
    from nsfs.core.layers import Layers
    from nsfs.core.maps import Maps
    from nsfs.core.union import UnionNode
    from nsfs.format.erofs_image import ErofsImage
    from nsfs.model.pool import MapRecord

    Report = Callable[[Struct], Awaitable[None]]

_PIECE: Final = 1 << 20
KINDS: Final = {
    Kind.REGULAR: "file",
    Kind.DIRECTORY: "directory",
    Kind.SYMLINK: "symlink",
    Kind.CHARACTER: "character",
    Kind.BLOCK: "block",
    Kind.FIFO: "fifo",
    Kind.SOCKET: "socket",
}
"""Kinds as reports call them."""


@dataclass(frozen=True, slots=True)
class Stack:
    """As many layers of an image as were needed."""

    tree: UnionTree
    maps: Sequence[MapRecord]
    """One for each of the tree's images, top first."""


class Looking:
    """The service."""

    def __init__(self, layers: Layers, maps: Maps, reader: Callable[[str, str, int, int], Awaitable[bytes]]) -> None:
        self._layers = layers
        self._maps = maps
        self._reader = reader

    async def stat(self, image: Image, path: bytes, report: Report) -> EntryReport:
        """What is at `path`; a symlink itself."""
        async with self._stack(image, path, report, follow=False) as stack:
            return _entry(stack, _normal(path), stack.tree.resolve(path, follow_last=False))

    async def list_names(self, image: Image, path: bytes, report: Report) -> None:
        """Report the names in a directory, or the one file."""
        async with self._stack(image, path, report, listing=True) as stack:
            node = stack.tree.resolve(path)
            if node.kind is not Kind.DIRECTORY:
                await report(Item(_entry(stack, _normal(path), node)))
                return
            for entry in stack.tree.readdir(node):
                await report(Item(_entry(stack, _normal(path + b"/" + entry.name), entry.node)))

    async def tree(self, image: Image, path: bytes, report: Report) -> None:
        """Report a directory and everything below it; this needs every layer."""
        async with self._stack(image, path, report, whole=True) as stack:
            for found, node in stack.tree.walk(path):
                await report(Item(_entry(stack, b"/" + found, node)))

    async def read(self, image: Image, path: bytes, offset: int, length: int | None, report: Report) -> None:
        """Report a file's bytes in pieces; raises UsageError for bytes that no file can have."""
        if offset < 0 or (length is not None and length < 0):
            raise UsageError(f"not a part of a file: {length} bytes at {offset}")
        async with self._stack(image, path, report) as stack:
            node = stack.tree.resolve(path)
            if node.kind is not Kind.REGULAR:
                raise UsageError(f"not a regular file but a {KINDS[node.kind]}: {os.fsdecode(path)}")
            address, size = stack.tree.extent(node)
            map_id = stack.maps[node.layer].id
            end = size if length is None else min(size, offset + length)
            while offset < end:
                piece = min(_PIECE, end - offset)
                await report(Data(await self._reader(map_id, image.access.owner, address + offset, piece)))
                offset += piece

    @asynccontextmanager
    async def _stack(
        self,
        image: Image,
        path: bytes,
        report: Report,
        *,
        follow: bool = True,
        listing: bool = False,
        whole: bool = False,
    ) -> AsyncIterator[Stack]:
        """The layers that decide what is at `path`, from the top."""
        maps: list[MapRecord] = []
        with ExitStack() as files:
            images: list[ErofsImage] = []
            for depth in range(1, len(image.layers) + 1):
                record = None if whole else await self._top_map(image, depth, report)
                if record is None or record.needs_lower:
                    maps = (await self.all_maps(image, report))[::-1]
                    images = [files.enter_context(self._maps.opened(each.path)) for each in maps]
                    break
                maps.append(record)
                images.append(files.enter_context(self._maps.opened(record.path)))
                if decide(images, path, follow_last=follow, listing=listing):
                    break
            partial = len(images) < len(image.layers)
            yield Stack(UnionTree(images, partial=partial), maps)

    async def _top_map(self, image: Image, depth: int, report: Report) -> MapRecord:
        layer = image.layers[-depth]
        await self.announce(image, [layer], report)
        await self._layers.index(image, layer)
        return await self._layers.map_alone(layer)

    async def all_maps(self, image: Image, report: Report) -> list[MapRecord]:
        """Every layer's map, lowest first; layers that are not indexed are, all at once."""
        for layer in image.layers:
            self._layers.check(layer)
        await self.announce(image, image.layers, report)
        unique = {layer.digest: layer for layer in image.layers}.values()
        layers = sorted(unique, key=lambda layer: layer.descriptor.size, reverse=True)
        await run_all(partial(self._layers.index, image, layer) for layer in layers)
        return await self._layers.maps(image.layers)

    async def announce(self, image: Image, layers: Sequence[Layer], report: Report) -> None:
        """Say what indexing `layers` will download."""
        costs = await self._layers.left_to_download(image, layers)
        plain = [digest for digest, cost in costs.items() if cost]
        if plain:
            what = f"plain layer {plain[0].short}" if len(plain) == 1 else f"{len(plain)} plain layers"
            size = render_size(sum(costs.values()))
            await report(Note(text=f"{what} must be read once, whole, to be indexed: {size} to download"))


def _normal(path: bytes) -> bytes:
    return b"/" + b"/".join(part for part in path.split(b"/") if part not in {b"", b"."})


def _entry(stack: Stack, path: bytes, node: UnionNode) -> EntryReport:
    inode = stack.tree.inode(node)
    return EntryReport(
        path=path,
        kind=KINDS[inode.kind],
        mode=inode.mode,
        uid=inode.uid,
        gid=inode.gid,
        size=inode.size,
        mtime_ns=inode.mtime_ns,
        links=inode.links,
        target=stack.tree.readlink(node) if inode.kind is Kind.SYMLINK else b"",
        device=inode.device,
        xattrs=dict(stack.tree.xattrs(node)),
        layer=str(stack.maps[node.layer].blob) if stack.maps else "",
    )
