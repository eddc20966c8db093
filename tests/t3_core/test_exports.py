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
"""Two files, before, between and behind which are 512 bytes that are none."""
FILES = [range(512, 5632), range(6144, len(STREAM) - 512)]


class FakeTable:
    def segments_in_stream(self, start: int, end: int) -> list[tuple[int, int, int]]:
        return [(1 << 30 + number, len(file), file.start) for number, file in enumerate(FILES)]


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
        exports = Exports(nothing, nothing, nothing, nothing, FakeProfiles(runs, flaw), streams)
        await exports._send_pack(image, {BLOB: KEY}, report)

    run(body)
    return events


def test_a_pack_has_what_a_start_read_by_offset_and_small_gaps_in_files() -> None:
    assert packed([Run(0, 512, 1000)]) == [Run(0, 512, 1000)]
    assert packed([Run(0, 4608, 1024), Run(0, 512, 1000)]) == [Run(0, 512, 5120)]
    between_files = [Run(0, 7000, 100), Run(0, 5000, 632)]
    assert packed(between_files) == between_files[::-1]


def packed(runs: list[Run]) -> list[Run]:
    """The runs of the pack of a start that read these."""
    pack, table = sent(runs)[1::2]
    assert [event.media_type for event in sent(runs)[::2]] == [PACK_TYPE, TABLE_TYPE]
    assert isinstance(pack, Data)
    (piece,) = parse_table(table.data, len(pack.data)).pieces
    found = open_piece(piece, pack.data)
    assert all(data == STREAM[run.start : run.start + run.length] for run, data in found)
    return [run for run, _ in found]


@pytest.mark.parametrize(
    ("wrong", "flaw", "why"),
    [
        (Run(0, 511, 2), "", "is not of these layers: a part of the stream is in no file"),
        (Run(0, len(STREAM) - 513, 2), "", "is not of these layers: a part of the stream is in no file"),
        (Run(0, 512, 2), "some pages were in memory", "may lack something: some pages were in memory"),
    ],
)
def test_there_is_none_of_a_start_that_may_not_have_been_so(wrong: Run, flaw: str, why: str) -> None:
    events = sent([Run(0, 1024, 512), wrong], flaw)
    assert not any(isinstance(event, Part | Data) for event in events)
    (note,) = events
    assert isinstance(note, Note)
    assert why in note.text
