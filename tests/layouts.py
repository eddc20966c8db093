"""Layers made by arithmetic: a stream, files on a disk, spans of a blob; and a blob that fails by script."""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import trio
from hypothesis import strategies as st

from nsfs.errors import DeniedError, UnreachableError
from nsfs.model.digest import Digest
from nsfs.model.layer import Codec, Covers, LayerIndex, Span, Spans
from nsfs.store.layers import LayerTable, open_table, render_layer, store_layer, store_spans

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractAsyncContextManager

    from nsfs.store.crypt import DomainKey

BASE = 1 << 30


@dataclass
class Layout:
    """What a layer's tables say, and what must come out."""

    stream: bytes
    rows: list[tuple[int, int, int]]
    extents: list[tuple[int, int]]
    spans: Spans
    blob: bytes
    disk: bytearray
    """From BASE on."""

    def table(self, directory: str, key: DomainKey | None = None, *, with_spans: bool = True) -> LayerTable:
        store_layer(directory, render_layer(LayerIndex([], len(self.stream)), [], self.rows, self.extents), key)
        if with_spans:
            store_spans(directory, self.spans, key)
        return open_table(directory, key)


@dataclass
class ScriptedBlob:
    """Fulfils the Blob protocol by script, a letter for each request, and is right afterwards.

    E unreachable, D denied, C corrupt, S short; T stalls until `go_on` is set; any other is right.
    """

    data: bytes
    script: str = ""
    retry_after: float | None = None
    delay: float = 0.0
    asked: list[tuple[int, int]] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    go_on: trio.Event = field(default_factory=trio.Event)

    @cached_property
    def digest(self) -> Digest:
        return Digest.of(self.data)

    @property
    def size(self) -> int:
        return len(self.data)

    def stream(self, offset: int = 0) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        raise NotImplementedError

    async def fetch(self, offset: int, length: int) -> bytes:
        letter = self.script[len(self.asked) : len(self.asked) + 1]
        self.asked.append((offset, length))
        self.at_once += 1
        self.most_at_once = max(self.at_once, self.most_at_once)
        try:
            await trio.sleep(self.delay)
            return await self._answer(letter, self.data[offset : offset + length])
        finally:
            self.at_once -= 1

    async def _answer(self, letter: str, right: bytes) -> bytes:
        match letter:
            case "E":
                raise UnreachableError("down", retry_after=self.retry_after)
            case "D":
                raise DeniedError("no")
            case "C":
                return bytes([right[0] ^ 1]) + right[1:]
            case "S":
                return right[:-1]
            case "T":
                await self.go_on.wait()
        return right


def lay_out(
    files: list[list[tuple[int, int, int]]], cuts: list[int], *, codec: Codec = Codec.NONE, per_group: int = 1
) -> Layout:
    """Files as lists of (hole before, length, stream gap before), and the lengths of spans, repeated to the end.

    Each file begins in a block of its own.
    """
    rows, extents, address, stream = [], [], BASE, 0
    for parts in files:
        at = address
        for hole, length, gap in parts:
            at += hole
            stream += gap
            rows.append((at, length, stream))
            at += length
            stream += length
        if at > address:
            extents.append((address, at - address))
        address = -(-(at + 1) // 4096) * 4096
    data = hashlib.shake_128(b"stream").digest(stream)
    disk = bytearray(address - BASE)
    for start, length, offset in rows:
        disk[start - BASE : start - BASE + length] = data[offset : offset + length]
    spans, blob = _spans_of(data, cuts, codec, per_group)
    return Layout(data, rows, extents, spans, blob, disk)


def _spans_of(data: bytes, cuts: list[int], codec: Codec, per_group: int) -> tuple[Spans, bytes]:
    spans: list[Span] = []
    blob = b""
    start = number = 0
    while start < len(data):
        sizes = [cuts[(number + k) % len(cuts)] for k in range(per_group)]
        number += per_group
        whole = data[start : start + sum(sizes)]
        packed = whole if codec is Codec.NONE else gzip.compress(whole, 1)
        skip = 0
        for size in sizes:
            part = whole[skip : skip + size]
            if part:
                spans.append(Span(len(blob), len(packed), start + skip, len(part), skip, hashlib.sha256(part).digest()))
            skip += size
        blob += packed
        start += len(whole)
    return Spans(codec, Covers.STREAM, spans), blob


_parts = st.tuples(
    st.sampled_from([0, 0, 0, 100, 4096, 9000]),
    st.integers(1, 9000) | st.just(4096),
    st.sampled_from([0, 0, 512, 3000]),
)


def layouts() -> st.SearchStrategy[Layout]:
    """Several segments per block, holes, gaps, spans that end anywhere."""
    return st.builds(
        lay_out,
        st.lists(st.lists(_parts, min_size=1, max_size=4), min_size=1, max_size=6),
        st.lists(st.integers(500, 9000), min_size=1, max_size=4),
        codec=st.sampled_from([Codec.NONE, Codec.GZIP_MEMBER]),
        per_group=st.integers(1, 3),
    )
