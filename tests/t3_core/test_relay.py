"""Relays: what one worker gets of another is exactly what was asked for, or an error."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from core_sources import FakeBlob, FakeMemory, FakeSource, FakeSources, digest_of
from nsfs.core import relay
from nsfs.core.blobs import Blobs
from nsfs.errors import CorruptError, NotFoundError, UnreachableError
from nsfs.model.oci import Descriptor
from nsfs.model.report import Data
from nsfs.model.route import Route
from nsfs.serve.wire import open_peer
from trio_tests import run

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from nsfs.serve.wire import Methods, Peer

DATA = bytes(range(256)) * 12_000


def descriptor(data: bytes = DATA, size: int | None = None) -> Descriptor:
    return Descriptor(media_type="x", digest=digest_of(data), size=len(data) if size is None else size)


@asynccontextmanager
async def relayed(methods: Methods) -> AsyncIterator[relay.RelaySource]:
    """A source over a line to a worker that answers by `methods`."""
    near, far = trio.testing.memory_stream_pair()

    async def serve() -> None:
        async with open_peer(far, methods, name="own") as peer:
            await peer.wait_closed()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        async with open_peer(near, {}, name="shared") as peer:

            async def connect() -> Peer:
                return peer

            yield relay.RelaySource(connect, "r")


class MeasuredBlob(FakeBlob):
    """As of a registry."""

    def route(self) -> Route:
        return Route("registry", 0.03, 1e6)


class MeasuredSource(FakeSource):
    """As a registry's."""

    def blob(self, descriptor: Descriptor) -> MeasuredBlob:
        return MeasuredBlob(self, descriptor)


def test_the_route_of_the_other_worker_is_told_with_the_bytes() -> None:
    source = MeasuredSource("r")
    source.add_image("latest", [DATA])

    async def body() -> None:
        methods = relay.relay_methods(Blobs(FakeSources(source), FakeMemory()))
        async with relayed(methods) as relayed_source:
            blob = relayed_source.blob(descriptor())
            assert blob.route() == Route()
            await blob.fetch(5, 7)
            assert blob.route() == Route("registry", 0.03, 1e6)

    run(body)


def own_worker() -> Methods:
    source = FakeSource("r")
    source.add_image("latest", [DATA])
    return relay.relay_methods(Blobs(FakeSources(source), FakeMemory()))


def lying(*pieces: bytes, **document: str) -> Methods:
    """A worker that was taken over."""

    async def give(_asked: relay.Range, report: Any) -> relay.Sent:
        for piece in pieces:
            await report(Data(piece))
        return relay.Sent()

    async def manifest(_asked: relay.ManifestName, _report: Any) -> relay.Manifest:
        return relay.Manifest(data=b"{}", media_type="x", digest=document.get("digest", ""))

    return {
        "Fetch": (relay.Range, give),
        "Stream": (relay.Range, give),
        "Manifest": (relay.ManifestName, manifest),
    }


async def read_all(blob: relay.RelayBlob, offset: int = 0) -> bytes:
    async with blob.stream(offset) as pieces:
        return b"".join([piece async for piece in pieces])


def test_bytes_and_documents_are_those_of_the_repository() -> None:
    async def body() -> None:
        async with relayed(own_worker()) as source:
            document = await source.manifest("latest")
            assert await source.manifest(document.digest) == document
            blob = source.blob(descriptor())
            assert await blob.fetch(1, 2_500_000) == DATA[1:2_500_001]
            assert await blob.fetch(5, 0) == b""
            assert await read_all(blob, 7) == DATA[7:]
            assert await source.read_blob(descriptor(), 1 << 30) == DATA
            with pytest.raises(NotFoundError):
                await source.manifest("other")

    run(body)


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        ((DATA, b"x"), CorruptError),
        ((DATA[:-1],), UnreachableError),
        ((), UnreachableError),
        ((bytes(len(DATA)) * 2,), CorruptError),
    ],
)
def test_a_worker_that_was_taken_over_gives_no_other_length(pieces: tuple[bytes, ...], error: type[Exception]) -> None:
    async def body() -> None:
        async with relayed(lying(*pieces)) as source:
            blob = source.blob(descriptor())
            with pytest.raises(error):
                await blob.fetch(0, len(DATA))
            with pytest.raises(error):
                await read_all(blob)

    run(body)


@pytest.mark.parametrize("digest", ["", "sha256:00", str(digest_of(b"other"))])
def test_nor_documents_and_small_blobs_that_are_something_else(digest: str) -> None:
    async def body() -> None:
        async with relayed(lying(bytes(len(DATA)), digest=digest)) as source:
            with pytest.raises(CorruptError):
                await source.manifest("latest")
            with pytest.raises(CorruptError):
                await source.manifest(digest_of(b"other"))
            with pytest.raises(CorruptError, match="does not match"):
                await source.read_blob(descriptor(), 1 << 30)
            with pytest.raises(CorruptError, match="too large"):
                await source.read_blob(descriptor(), 10)

    run(body)


def test_a_reader_who_leaves_cancels_the_request() -> None:
    left = trio.Event()

    async def stall(_asked: relay.Range, report: Any) -> relay.Sent:
        await report(Data(DATA[:10]))
        try:
            await trio.sleep_forever()
        finally:
            left.set()

    async def body() -> None:
        async with relayed({"Stream": (relay.Range, stall)}) as source:
            async with source.blob(descriptor()).stream() as pieces:
                assert await anext(aiter(pieces)) == DATA[:10]
            await left.wait()

    run(body)
