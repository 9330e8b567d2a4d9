"""Splitting server-sent events."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.adapter_kit.sse import EventTooLarge, SseSplitter, payloads

pieces = st.sampled_from(
    [
        b"\n",
        b"\r",
        b"\r\n",
        b"\n\n",
        b"data:",
        b"data: ",
        b": ping",
        b"event: x",
        b"id",
        b"error: {}",
        b"{}",
        b"a",
        b" ",
    ]
)
streams = st.lists(pieces, max_size=40).map(b"".join)


def split(stream: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    return [stream[start:end] for start, end in pairwise(edges)]


def read(parts: list[bytes]) -> list[bytes]:
    splitter = SseSplitter()
    return [payload for part in parts for payload in payloads(splitter.feed(part))]


def by_the_book(stream: bytes) -> list[bytes]:
    """Read a stream line by line, as the specification says; return its events."""
    found: list[bytes] = []
    data: list[bytes] = []
    lines = stream.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")[:-1]
    for line in lines:
        if not line:
            if b"\n".join(data):
                found.append(b"\n".join(data))
            data = []
        elif line.startswith((b"data:", b"error:")):
            value = line.partition(b":")[2]
            data.append(value[1:] if value.startswith(b" ") else value)
    return found


@given(streams, st.lists(st.integers(0, 1000), max_size=20))
def test_how_the_bytes_arrive_makes_no_difference(stream: bytes, cuts: list[int]) -> None:
    assert read(split(stream, cuts)) == read([stream])


@given(streams)
def test_byte_by_byte_is_as_the_specification_says(stream: bytes) -> None:
    assert read([stream[at : at + 1] for at in range(len(stream))]) == by_the_book(stream)


@given(streams, st.lists(st.integers(0, 1000), max_size=20))
def test_blocks_are_whole_events_with_line_feeds_only(stream: bytes, cuts: list[int]) -> None:
    splitter = SseSplitter()
    for part in split(stream, cuts):
        block = splitter.feed(part)
        assert not block or block.endswith(b"\n\n")
        assert b"\r" not in block


def test_comments_and_other_fields_say_nothing() -> None:
    stream = b": ping\n\nevent: message\nid: 4\nretry: 9\ndata: a\ndata:b\n\n:\n\nevent: empty\n\n"
    assert read([stream]) == [b"a\nb"]


def test_what_is_not_complete_is_no_event() -> None:
    assert read([b"data: a\n\ndata: b\n"]) == [b"a"]


def test_an_event_has_a_largest_size() -> None:
    splitter = SseSplitter(limit=100)
    splitter.feed(b"data: " + b"x" * 90)
    with pytest.raises(EventTooLarge):
        splitter.feed(b"x" * 10)
