"""A batch's input: lines found, understood and validated."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backbone.ids import new_job_id
from gateway.batches.input_file import (
    InputLine,
    InvalidLine,
    LineTooLong,
    ValidationReport,
    job_id,
    parse_line,
    split_lines,
    validate,
)
from schemas.batches import MAX_ERRORS, MAX_REQUESTS, parse_window_s

CHAT = "/v1/chat/completions"
LONGEST = 10_000


def line(custom_id: Any = "a", **changes: Any) -> bytes:
    value = {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": {"model": "m"}} | changes
    return json.dumps({name: part for name, part in value.items() if part is not None}).encode()


async def pieces(data: bytes, step: int = 65_536) -> AsyncGenerator[bytes, None]:
    for at in range(0, len(data), step):
        yield data[at : at + step]


async def lines(data: bytes, step: int = 65_536, longest: int = LONGEST) -> list[InputLine]:
    return [one async for one in split_lines(pieces(data, step), longest)]


async def looked_at(*rows: bytes) -> ValidationReport:
    return await validate(split_lines(pieces(b"\n".join(rows)), LONGEST), CHAT)


class TestSplitting:
    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.sampled_from([b"", b"a", b"bb" * 40, b" ", b"c\r", b"\xef\xbb\xbfd"])), st.integers(1, 50))
    async def test_pieces_of_any_size_give_the_same_lines(self, rows: list[bytes], step: int) -> None:
        """Blank lines count and are left out; line ends of any system."""
        wanted = [InputLine(number, row.strip()) for number, row in enumerate(rows, 1) if row.strip()]
        if rows and rows[0].startswith(b"\xef"):
            wanted[0] = InputLine(1, b"d")
        assert await lines(b"\n".join(rows), step) == wanted

    async def test_the_last_line_needs_no_end(self) -> None:
        """With or without."""
        assert await lines(b"a\nb") == await lines(b"a\nb\n") == [InputLine(1, b"a"), InputLine(2, b"b")]

    @pytest.mark.parametrize("step", [7, 100_000])
    async def test_a_line_without_end_is_not_held(self, step: int) -> None:
        """It ends the reading as soon as it is too long."""
        with pytest.raises(LineTooLong) as raised:
            await lines(b"a\n" + b"x" * 1000, step, longest=100)
        assert raised.value.number == 2


class TestParsing:
    def test_a_request(self) -> None:
        """What it asks for."""
        request = parse_line(line("é", body={"model": "m", "n": 2}), CHAT)
        assert (request.custom_id, request.body) == ("é", {"model": "m", "n": 2})

    @pytest.mark.parametrize(
        ("data", "code", "param"),
        [
            (b"{", "invalid_json_line", None),
            (b"[]", "invalid_json_line", None),
            (b"null", "invalid_json_line", None),
            (b'{"custom_id": NaN}', "invalid_json_line", None),
            (b'{"custom_id": "\\ud800"}', "invalid_json_line", None),
            (b"\xff", "invalid_json_line", None),
            (line(body={"a": json.loads("[" * 200 + "]" * 200)}), "invalid_json_line", None),
            (line(None), "missing_required_parameter", "custom_id"),
            (line(method=None), "missing_required_parameter", "method"),
            (line(url=None), "missing_required_parameter", "url"),
            (line(body=None), "missing_required_parameter", "body"),
            (line(""), "invalid_custom_id", "custom_id"),
            (line(7), "invalid_custom_id", "custom_id"),
            (line("x" * 513), "invalid_custom_id", "custom_id"),
            (line(method="GET"), "invalid_method", "method"),
            (line(url="/v1/embeddings"), "invalid_url", "url"),
            (line(url=["/v1"]), "invalid_url", "url"),
            (line(body=[]), "invalid_body", "body"),
        ],
    )
    def test_what_is_wrong_is_named(self, data: bytes, code: str, param: str | None) -> None:
        """By code and field."""
        with pytest.raises(InvalidLine) as raised:
            parse_line(data, CHAT)
        assert (raised.value.code, raised.value.param) == (code, param)


class TestValidation:
    async def test_a_good_file(self) -> None:
        """How many requests, and the first one's model."""
        found = await looked_at(line("a", body={"model": "first"}), b"", line("b"), b"  ", line("c"))
        assert (found.total, found.model, found.errors) == (3, "first", [])

    async def test_every_wrong_line_is_told_with_its_number(self) -> None:
        """As it stands in the file."""
        found = await looked_at(line("a"), b"", b"{", line("a"), line("b", url="/v1/embeddings"))
        assert [(error.code, error.line, error.param) for error in found.errors] == [
            ("invalid_json_line", 3, None),
            ("duplicate_custom_id", 4, "custom_id"),
            ("invalid_url", 5, "url"),
        ]

    async def test_nothing_but_blanks(self) -> None:
        """A batch of no requests is a mistake."""
        assert [error.code for error in (await looked_at(b"", b" \r", b"")).errors] == ["empty_file"]

    async def test_many_mistakes_are_cut(self) -> None:
        """The rest is not read."""
        found = await looked_at(*[b"{"] * (MAX_ERRORS + 50))
        assert (len(found.errors), found.total) == (MAX_ERRORS, MAX_ERRORS)

    async def test_a_line_that_is_too_long(self) -> None:
        """Told, not raised."""
        found = await looked_at(line("a"), line("b", body={"x": "x" * LONGEST}))
        assert [(error.code, error.line) for error in found.errors] == [("line_too_long", 2)]

    async def test_too_many(self) -> None:
        """Fifty thousand are taken, one more is not."""
        rows = [
            b'{"custom_id":"%d","method":"POST","url":"/v1/chat/completions","body":{}}' % n
            for n in range(MAX_REQUESTS)
        ]
        assert (await looked_at(*rows)).errors == []
        assert [(e.code, e.line) for e in (await looked_at(*rows, line("x"))).errors] == [
            ("too_many_requests", MAX_REQUESTS + 1)
        ]

    async def test_fifty_thousand_large_lines_take_little_memory(self) -> None:
        """Only eight bytes of each custom_id stay in memory: 35 MB are read within 12 MB."""
        row = (
            b'{"custom_id":"%d","method":"POST","url":"/v1/chat/completions","body":{"model":"m","text":"' + b"y" * 600
        )

        async def made() -> AsyncGenerator[bytes, None]:
            for number in range(MAX_REQUESTS):
                yield row % number + b'"}}\n'

        tracemalloc.start()
        try:
            found = await validate(split_lines(made(), LONGEST), CHAT)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert (found.total, found.errors) == (MAX_REQUESTS, [])
        assert peak < 12 * 1024 * 1024


class TestIds:
    def test_a_lines_job_has_always_the_same_id(self) -> None:
        """One that looks like any other job's, of the batch's time, and in the order of lines."""
        batch = "batch_" + new_job_id().removeprefix("job_")
        ids = [job_id(batch, number) for number in range(1, 2000)]
        assert ids == [job_id(batch, number) for number in range(1, 2000)]
        assert ids == sorted(set(ids))
        assert {len(one) for one in ids} == {36}
        assert {one[4:16] for one in ids} == {batch[6:18]}
        assert {(one[16], one[20]) for one in ids} <= {("7", digit) for digit in "89ab"}

    def test_other_batches_have_others(self) -> None:
        """Also those of the same millisecond."""
        a, b = "batch_" + "0" * 31 + "1", "batch_" + "0" * 31 + "2"
        assert not {job_id(a, n) for n in range(500)} & {job_id(b, n) for n in range(500)}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("24h", 86_400), ("90m", 5400), ("2d", 172_800), ("0h", None), ("24", None), ("1w", None), ("-1h", None)],
)
def test_windows(text: str, seconds: int | None) -> None:
    """OpenAI's `24h`, and others."""
    assert parse_window_s(text) == seconds
