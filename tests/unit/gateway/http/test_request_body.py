"""Request bodies: read within bounds, parsed strictly, and what is wrong with them is named."""

from __future__ import annotations

import asyncio
import json
from collections.abc import MutableMapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.http.request_body import MAX_DEPTH, CallerDisconnected, parse_body, parse_normalized, read_body
from schemas.errors import InvalidRequest, RequestTimeout, RequestTooLarge
from schemas.openai.chat import ChatRequest
from schemas.openai.completions import CompletionRequest

LIMIT = 100


class Body:
    """What a server hands on: pieces of a body, and then nothing any more, unless the caller hangs up."""

    def __init__(self, *pieces: bytes, gone: bool = False, ends: bool = True) -> None:
        self.messages: list[MutableMapping[str, Any]] = [
            {"type": "http.request", "body": piece, "more_body": not ends or at < len(pieces) - 1}
            for at, piece in enumerate(pieces)
        ]
        if gone:
            self.messages.append({"type": "http.disconnect"})
        self.taken = 0

    async def receive(self) -> MutableMapping[str, Any]:
        if self.taken == len(self.messages):
            await asyncio.get_running_loop().create_future()
        self.taken += 1
        return self.messages[self.taken - 1]


async def read(body: Body, length: bytes | None = None, timeout_s: float = 5.0) -> bytes:
    headers = [(b"host", b"nexus")] + ([(b"content-length", length)] if length is not None else [])
    return await read_body(headers, body.receive, LIMIT, timeout_s)


class TestReading:
    async def test_a_body_in_pieces(self) -> None:
        """A body comes in any number of pieces, up to the limit and no less."""
        assert await read(Body(b"a", b"", b"bc")) == b"abc"
        assert await read(Body(b"")) == b""
        assert await read(Body(b"x" * LIMIT), b"%d" % LIMIT) == b"x" * LIMIT

    @pytest.mark.parametrize("length", [b"101", b"9" * 30, b"9" * 10_000, b"-1", b"five", b""])
    async def test_a_length_that_says_too_much(self, length: bytes) -> None:
        """A Content-Length over the limit, or none at all, is refused before a byte is read."""
        body = Body(b"x")
        with pytest.raises(RequestTooLarge, match="100"):
            await read(body, length)
        assert body.taken == 0

    async def test_a_body_that_grows_too_large(self) -> None:
        """Without a Content-Length, reading stops where the limit is passed."""
        body = Body(*[b"x" * 30] * 10)
        with pytest.raises(RequestTooLarge):
            await read(body)
        assert body.taken == 4

    async def test_a_body_that_does_not_come(self) -> None:
        """The whole body has one deadline, however many pieces of it come."""
        with pytest.raises(RequestTimeout) as caught:
            await read(Body(b"x", ends=False), timeout_s=0.01)
        assert caught.value.info.should_retry is False

    async def test_a_caller_that_disconnects(self) -> None:
        """A caller who leaves in the middle is no error of anybody's."""
        with pytest.raises(CallerDisconnected):
            await read(Body(b"x", ends=False, gone=True))


def problem(body: Any, schema: Any = ChatRequest) -> tuple[str | None, str]:
    with pytest.raises(InvalidRequest) as caught:
        parse_body(body if isinstance(body, bytes) else json.dumps(body).encode(), schema)
    assert caught.value.info.status == 400
    return caught.value.info.param, caught.value.info.message


def request(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}


def nested(levels: int) -> bytes:
    return json.dumps(request()).encode()[:-1] + b',"x":' + b"[" * levels + b"]" * levels + b"}"


class TestParsing:
    def test_unknown_fields_are_kept(self) -> None:
        """Fields that Nexus does not know do not disturb it."""
        parsed = parse_body(json.dumps(request(top_k=5, stream=True)).encode(), ChatRequest)
        assert (parsed.model, parsed.stream) == ("m", True)

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b" ",
            b"{",
            b"[]",
            b"1",
            b'"x"',
            b"null",
            b'{"a": NaN}',
            b'{"a": "\\ud800"}',
            b'{"a": "\xff"}',
            b"\xef\xbb\xbf{}",
            b"{}{}",
        ],
    )
    def test_a_body_that_is_no_object(self, body: bytes) -> None:
        """What is not one strict JSON object is refused, without a `param`."""
        param, message = problem(body)
        assert param is None
        assert "body" in message

    def test_depth(self) -> None:
        """A body may be as deep as the limit, and no deeper; brackets in text do not count."""
        parse_body(nested(MAX_DEPTH - 1), ChatRequest)
        assert "deeper" in problem(nested(MAX_DEPTH))[1]
        parse_body(json.dumps(request(user="[" * 1000)).encode(), ChatRequest)
        parse_body(json.dumps(request(x=[[]] * 1000)).encode(), ChatRequest)

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"model": 5}, "model"),
            ({"temperature": "warm"}, "temperature"),
            ({"stop": 5}, "stop"),
            ({"stop": {"str": 5}}, "stop"),
            ({"stop": ["a", 5]}, "stop.1"),
            ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
            ({"messages": []}, "messages"),
            ({"messages": [{"content": "x"}]}, "messages.0.role"),
            ({"messages": [{"role": "user"}, {"role": "user", "content": [5]}]}, "messages.1.content.0"),
            ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
            ({"tool_choice": 5}, "tool_choice"),
            ({"service_tier": "gold"}, "service_tier"),
        ],
    )
    def test_the_wrong_field_is_named(self, fields: dict[str, Any], param: str) -> None:
        """`param` is a place in the request; the branches of a union are no part of it."""
        said, message = problem(request(**fields))
        assert said == param
        assert message.endswith(f"'{param}'")
        assert "Field required" in message or "hould" in message

    def test_the_error_names_all_types_of_a_union(self) -> None:
        """Where several types would do, the message names them all."""
        assert problem(request(stop=5))[1] == "Input should be a valid string or a valid list: 'stop'"

    @pytest.mark.parametrize(
        ("prompt", "param"), [(5, "prompt"), ([1, "a"], "prompt.0"), ([[1], ["a"]], "prompt.1.0"), ({"a": 1}, "prompt")]
    )
    def test_a_wrong_prompt(self, prompt: Any, param: str) -> None:
        """So for prompts, which have four forms."""
        assert problem({"model": "m", "prompt": prompt}, CompletionRequest)[0] == param

    @pytest.mark.parametrize("field", ["model", "messages"])
    def test_a_missing_field_is_named(self, field: str) -> None:
        """What is missing is named too."""
        assert problem({k: v for k, v in request().items() if k != field}) == (field, f"Field required: '{field}'")

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(), x, max_size=3),
        ),
        st.sampled_from(sorted(ChatRequest.model_fields)),
    )
    def test_any_value_anywhere(self, value: Any, field: str) -> None:
        """Whatever a field holds, the request is taken, or refused with a `param` in that field or none at all."""
        try:
            parse_body(json.dumps(request(**{field: value})).encode(), ChatRequest)
        except InvalidRequest as error:
            param = error.info.param
            assert param is None or param.split(".")[0] == field


class TestWholeNumbers:
    def test_an_integer_with_a_point(self) -> None:
        """86.0 is an integer, as in JSON Schema, and travels as 86; 86.5, "86" and true are none."""
        sent = {"model": "m", "prompt": [[1.0, 2]], "n": 3.0, "temperature": 1.0, "mine": 5.0}
        request, body = parse_normalized(json.dumps(sent).encode(), CompletionRequest)
        assert (request.n, request.prompt) == (3, [[1, 2]])
        assert body == b'{"model":"m","prompt":[[1,2]],"n":3,"temperature":1.0,"mine":5.0}'
        for wrong in (86.5, "86", True, 1e300, 0.0):
            with pytest.raises(InvalidRequest) as caught:
                parse_normalized(json.dumps(sent | {"n": wrong}).encode(), CompletionRequest)
            assert caught.value.info.param == "n"

    def test_a_body_without_travels_as_it_came(self) -> None:
        """Nothing is written again that need not be."""
        sent = b'{ "model": "m", "prompt": "x", "n": 3 }'
        assert parse_normalized(sent, CompletionRequest)[1] is sent
