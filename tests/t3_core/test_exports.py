"""What of an image goes beside it in its registry: nothing of a start that was recorded by somebody's word."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from core_sources import digest_of
from nsfs.core.exports import Exports
from nsfs.core.fetchplan import stream_pieces
from nsfs.format.artifact import PACK_TYPE, TABLE_TYPE
from nsfs.format.pack import open_piece, parse_table
from nsfs.model.pool import LayerKey
from nsfs.model.profile import Profile, ProfiledLayer, Run
from nsfs.model.report import Data, Note, Part
from trio_tests import run

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

BLOB = digest_of(b"layer")
KEY = LayerKey(BLOB, "plain")
STREAM = bytes(range(256)) * 40
"""One file, between 512 bytes that are none."""


class FakeTable:
    def segments_in_stream(self, start: int, end: int) -> list[tuple[int, int, int]]:
        return [(1 << 30, len(STREAM) - 1024, 512)]


class FakeStreams:
    def locate(self, parts: Iterable[tuple[LayerKey, range]]) -> Iterator[tuple[int, int]]:
        table: Any = FakeTable()
        for _, part in parts:
            yield from stream_pieces(table, part)

    async def read_stream(self, key: LayerKey, owner: str, start: int, size: int) -> bytes:
        assert (key, owner) == (KEY, "owner")
        return STREAM[start : start + size]


class FakeProfiles:
    def __init__(self, runs: list[Run], flaw: str) -> None:
        self._profile = Profile(layers=[ProfiledLayer(str(BLOB))], runs=runs, flaw=flaw)

    def get(self, image: object, owner: str) -> Profile:
        return self._profile


class FakeImage:
    digest = BLOB

    class access:  # noqa: N801  an attribute
        owner = "owner"


def sent(runs: list[Run], flaw: str = "") -> list[Any]:
    """What is reported for an image whose start read these runs."""
    events: list[Any] = []
    nothing: Any = None
    streams: Any = FakeStreams()
    image: Any = FakeImage()

    async def report(event: Any) -> None:
        events.append(event)

    async def body() -> None:
        exports = Exports(nothing, nothing, nothing, FakeProfiles(runs, flaw), streams)
        await exports._send_pack(image, {BLOB: KEY}, report)

    run(body)
    return events


def test_a_pack_has_what_a_start_read() -> None:
    runs = [Run(0, 4096, 4096), Run(0, 512, 1000)]
    pack, table = sent(runs)[1::2]
    assert [event.media_type for event in sent(runs)[::2]] == [PACK_TYPE, TABLE_TYPE]
    assert isinstance(pack, Data)
    (piece,) = parse_table(table.data, len(pack.data)).pieces
    assert open_piece(piece, pack.data) == [(run, STREAM[run.start : run.start + run.length]) for run in runs]


@pytest.mark.parametrize(
    ("wrong", "flaw", "why"),
    [
        (Run(0, 511, 2), "", "is not of these layers: a part of the stream is in no file"),
        (Run(0, len(STREAM) - 513, 2), "", "is not of these layers: a part of the stream is in no file"),
        (Run(0, 512, 2), "some pages were in memory", "may lack something: some pages were in memory"),
    ],
)
def test_there_is_none_of_a_start_that_may_not_have_been_so(wrong: Run, flaw: str, why: str) -> None:
    events = sent([Run(0, 4096, 4096), wrong], flaw)
    assert not any(isinstance(event, Part | Data) for event in events)
    (note,) = events
    assert isinstance(note, Note)
    assert why in note.text
