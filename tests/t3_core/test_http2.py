"""What of a connection's bytes the door lets through, in whatever pieces they come."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsfs.serve.http2 import GREETING, PREFACE, Conversation, Kind, render_frame

ACK = render_frame(Kind.SETTINGS, flags=1)
CALLS = [
    render_frame(Kind.HEADERS, b"one", stream=1),
    render_frame(Kind.DATA, bytes(70_000), flags=1, stream=1),
    render_frame(Kind.HEADERS, b"three", stream=3),
]


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    bounds = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[begin:end] for begin, end in pairwise(bounds)]


def inwards(conversation: Conversation, *frames: bytes) -> bytes:
    return conversation.inwards(b"".join(frames))


@given(st.lists(st.integers(0, 100_000), max_size=20))
def test_all_passes_in_both_directions_in_whatever_pieces(cuts: list[int]) -> None:
    said, answer = b"".join([PREFACE, GREETING, ACK, *CALLS]), b"".join([GREETING, ACK, *CALLS])
    conversation = Conversation()
    assert b"".join(conversation.inwards(piece) for piece in pieces(said, cuts)) == said
    assert conversation.open == 2
    assert b"".join(conversation.outwards(piece) for piece in pieces(answer, cuts)) == answer
    assert conversation.open == 1


def test_only_whole_frames_are_given_out() -> None:
    conversation = Conversation()
    assert conversation.outwards(CALLS[1][:-1]) == b""
    assert conversation.outwards(CALLS[1][-1:]) == CALLS[1]


def test_what_a_greeted_client_acknowledges_first_is_not_for_its_server() -> None:
    conversation = Conversation(is_greeted=True)
    assert inwards(conversation, PREFACE, GREETING, CALLS[0], ACK, ACK) == PREFACE + GREETING + CALLS[0] + ACK


def test_after_a_farewell_what_is_under_way_goes_on_and_nothing_else_begins() -> None:
    conversation = Conversation()
    inwards(conversation, PREFACE, CALLS[0])
    assert conversation.say_farewell() == render_frame(Kind.GOAWAY, bytes([0, 0, 0, 1, 0, 0, 0, 0]))
    assert inwards(conversation, CALLS[2], CALLS[1], ACK) == CALLS[1] + ACK
    assert conversation.open == 1
    assert conversation.outwards(render_frame(Kind.GOAWAY, bytes(8))) == b"", "one is enough"
    conversation.outwards(render_frame(Kind.HEADERS, flags=1, stream=1))
    assert conversation.open == 0


@pytest.mark.parametrize("is_client", [True, False])
def test_a_call_that_is_reset_has_ended(is_client: bool) -> None:
    conversation, reset = Conversation(), render_frame(Kind.RST_STREAM, bytes(4), stream=1)
    inwards(conversation, PREFACE, CALLS[0])
    assert (conversation.inwards(reset) if is_client else conversation.outwards(reset)) == reset
    assert conversation.open == 0


def test_who_does_not_speak_http2_is_not_understood() -> None:
    conversation = Conversation()
    assert conversation.inwards(b"GET / HTTP/1.1\r\n") == b""
    with pytest.raises(ValueError, match="does not speak HTTP/2"):
        conversation.inwards(b"Host: localhost\r\n\r\n")
