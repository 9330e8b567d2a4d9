"""The adapter for OpenAI-compatible servers, on a double that can be made to misbehave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, cast

import pytest

from schemas.jobs import Capability
from tests.backends.contract import (
    Contract,
    Rig,
    body_of,
    chat,
    check_stream,
    collect,
    completion,
    events,
    task,
)
from tests.backends.doubles.openai import OpenAIDouble
from workers.backends.base import (
    Backend,
    BackendConfig,
    BackendError,
    BackendRefused,
    BackendUnavailable,
    Chunk,
    ModelNotServed,
    Output,
    make_backend,
)
from workers.backends.openai import OpenAIBackend

TEXT = "Hello there, world!"


@pytest.fixture
async def backend(double: OpenAIDouble) -> AsyncIterator[Backend]:
    made = make_backend("openai", BackendConfig(url=double.url))
    await made.start()
    yield made
    await made.close()


def stream(**fields: Any) -> Any:
    return chat("double", stream=True, public_model="alias", **fields)


async def text_of(backend: Backend) -> str:
    chunks, _ = await collect(backend, stream())
    return check_stream(events(chunks), "alias", is_chat=True)


async def whole_text_of(backend: Backend) -> str:
    body, _ = await body_of(backend, chat("double"))
    return str(body["choices"][0]["message"]["content"])


class TestOpenAI(Contract):
    @pytest.fixture
    async def rig(self, double: OpenAIDouble, backend: Backend, request: pytest.FixtureRequest) -> Rig:
        if "stops_the_server" in request.node.name:
            double.behave(words=("word ",) * 2000, token_delay_s=0.02)

        async def idle() -> bool:
            return double.streaming == 0

        return Rig(backend, "double", idle, {"max_tokens": 2000})


# What servers get wrong


@pytest.mark.parametrize(
    "behavior",
    [
        {"role": False},
        {"newline": "\r\n"},
        {"newline": "\r"},
        {"dribble": True},
        {"dribble": True, "newline": "\r\n"},
        {"pings": True},
        {"model": "something/else"},
        {"usage": "last"},
        {"spaces": True},
        {"spaces": True, "model": "x", "usage": "last", "pings": True},
        {"chunked": False},
        {"ticking": True},
        {"token_delay_s": 0.005},
        {"usage": "no"},
    ],
    ids=str,
)
async def test_what_servers_get_wrong_is_made_right(
    double: OpenAIDouble, backend: Backend, behavior: dict[str, Any]
) -> None:
    double.behave(**behavior)
    assert await text_of(backend) == TEXT
    assert await whole_text_of(backend) == TEXT
    chunks, _ = await collect(backend, completion("double", stream=True))
    assert check_stream(events(chunks), "double", is_chat=False) == TEXT
    if behavior.get("usage") != "no":
        chunks, finish = await collect(backend, stream(stream_options={"include_usage": True}))
        assert check_stream(events(chunks), "alias", is_chat=True, include_usage=True) == TEXT
        assert finish.usage is not None


async def test_text_that_looks_like_structure_is_text(double: OpenAIDouble, backend: Backend) -> None:
    words = (
        '"finish_reason":"stop"',
        "\n\ndata: [DONE]\n\n",
        '"tool_calls":[{',
        '\\"',
        "é😀",
        '"usage":{}',
        "\r\n",
        "\\",
    )
    double.behave(words=words * 3)
    assert await text_of(backend) == "".join(words * 3)
    assert await whole_text_of(backend) == "".join(words * 3)


async def test_backlogged_tokens_come_in_one_chunk(double: OpenAIDouble, backend: Backend) -> None:
    frame = 'data: {"id":"a","created":1,"model":"double","choices":[{"index":0,"delta":{"content":"w"},"finish_reason":%s}]}\n\n'
    double.behave(raw=(frame % "null" * 50 + frame % '"stop"' + "data: [DONE]\n\n").encode())
    chunks, _ = await collect(backend, stream())
    assert [chunk.tokens for chunk in chunks] == [51]


async def test_nothing_is_shown_before_the_first_token(double: OpenAIDouble, backend: Backend) -> None:
    double.behave(token_delay_s=0.02)
    chunks, _ = await collect(backend, stream())
    assert [event["choices"][0]["delta"].get("content") for event in events(chunks[:1])] == ["", "Hello"]


async def test_a_server_without_stream_options_is_remembered(double: OpenAIDouble, backend: Backend) -> None:
    double.behave(no_stream_options=True)
    assert await text_of(backend) == TEXT
    assert await text_of(backend) == TEXT
    posts = [seen for seen in double.seen if seen.method == "POST"]
    probes = [seen.json.get("max_tokens") == 1 for seen in posts]
    assert probes == [False, True, True, False, False]
    assert ["stream_options" in seen.json for seen in posts] == [True, True, False, False, False]
    [known] = backend.limitations()
    assert (known.model, known.feature) == ("double", "stream_options")


# What passes through


async def test_the_request_reaches_the_server_untouched(double: OpenAIDouble, backend: Backend) -> None:
    fields = {
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "min_p": 0.1,
        "unheard_of": {"a": [1, None, "é"]},
        "stream_options": {"include_usage": False, "other": 1},
        "max_tokens": 5,
    }
    await collect(backend, chat("double", stream=True, public_model="alias", service_tier="flex", **fields))
    body = double.last.json
    assert {name: body[name] for name in fields} == fields | {"stream_options": {"include_usage": True, "other": 1}}
    assert body["model"] == "double"
    assert body["stream"] is True
    assert "service_tier" not in body


CALLS = (
    {"tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": ""}}]},
    {"tool_calls": [{"function": {"arguments": '{"a"'}}]},
    {"tool_calls": [{"function": {"arguments": ":1}"}}]},
    {"tool_calls": [{"id": "call_2", "type": "function", "function": {"name": "g", "arguments": "{}"}}]},
)


async def test_tool_calls_without_an_index_get_one(double: OpenAIDouble, backend: Backend) -> None:
    double.behave(deltas=CALLS, finish="tool_calls")
    chunks, _ = await collect(backend, stream())
    found = events(chunks)
    deltas = [event["choices"][0]["delta"] for event in found]
    indices = [call["index"] for delta in deltas for call in delta.get("tool_calls", ())]
    assert indices == [0, 0, 0, 1]
    assert found[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_tool_calls_in_one_piece(double: OpenAIDouble, backend: Backend) -> None:
    double.behave(deltas=CALLS, finish="tool_calls")
    body, _ = await body_of(backend, chat("double"))
    message = body["choices"][0]["message"]
    assert message["content"] is None
    assert message["tool_calls"] == [
        {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}},
        {"id": "call_2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ]
    assert body["choices"][0]["finish_reason"] == "tool_calls"


async def test_reasoning_and_unknown_fields_are_joined(double: OpenAIDouble, backend: Backend) -> None:
    double.behave(deltas=({"reasoning_content": "hm"}, {"reasoning_content": "m"}, {"content": "A"}, {"content": "B"}))
    body, _ = await body_of(backend, chat("double"))
    message = body["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hmm", "AB")
    assert body["system_fingerprint"] == "fp"


async def test_n_is_refused_where_the_server_ignores_it(backend: Backend) -> None:
    with pytest.raises(BackendRefused) as caught:
        await collect(backend, chat("double", n=2))
    assert caught.value.info.param == "n"


async def test_an_endpoint_of_another_kind_is_refused(backend: Backend) -> None:
    with pytest.raises(BackendRefused):
        await collect(backend, task("/v1/embeddings", "double", False, {"input": "x"}))


# Failures


@pytest.mark.parametrize("whole", [False, True], ids=["stream", "whole"])
@pytest.mark.parametrize(
    "behavior",
    [
        {"drop": "before"},
        {"drop": "mid"},
        {"done": False, "finish": None},
        {"drop": "mid", "chunked": False},
    ],
    ids=str,
)
async def test_an_answer_that_does_not_end_properly_failed(
    double: OpenAIDouble, backend: Backend, behavior: dict[str, Any], whole: bool
) -> None:
    double.behave(**behavior)
    with pytest.raises(BackendError) as caught:
        await collect(backend, chat("double", stream=not whole))
    assert caught.value.transient
    assert caught.value.info.status == 502


@pytest.mark.parametrize("whole", [False, True], ids=["stream", "whole"])
@pytest.mark.parametrize("behavior", [{"done": False}, {"finish": None}, {"done": False, "drop": "end"}], ids=str)
async def test_one_sign_of_the_end_is_enough(
    double: OpenAIDouble, backend: Backend, behavior: dict[str, Any], whole: bool
) -> None:
    """Some servers never write `[DONE]`, others no finish_reason, or close without an end: the answer is complete, and was paid for."""
    double.behave(**behavior)
    chunks, finish = await collect(backend, chat("double", stream=not whole))
    assert b'"finish_reason":"stop"' in b"".join(chunk.data for chunk in chunks)
    assert finish is not None
    assert len([seen for seen in double.seen if seen.method == "POST"]) == 1


async def test_an_error_object_in_a_stream_is_an_error(double: OpenAIDouble, backend: Backend) -> None:
    double.behave(error_in_stream={"message": "out of memory", "type": "server_error", "code": 500})
    with pytest.raises(BackendError, match="out of memory") as caught:
        await collect(backend, stream())
    assert caught.value.info.status == 502
    double.behave(error_in_stream={"message": "too long", "type": "exceed_context_size_error", "code": 400})
    with pytest.raises(BackendRefused, match="too long") as refused:
        await collect(backend, stream())
    assert (refused.value.info.status, refused.value.info.code) == (400, "context_length_exceeded")


@pytest.mark.parametrize("raw", [b"data: {oops\n\n", b"data: 5\n\n", b'data: {"id": "x"', b"", b"data: [DONE]\n\n"])
async def test_nonsense_is_an_error(double: OpenAIDouble, backend: Backend, raw: bytes) -> None:
    double.behave(raw=raw)
    for whole in (True, False):
        with pytest.raises(BackendError):
            await collect(backend, chat("double", stream=not whole))


REFUSED = {
    "error": {"message": "bad temperature", "type": "invalid_request_error", "param": "temperature", "code": "x"}
}


@pytest.mark.parametrize(
    ("status", "error", "kind", "expected"),
    [
        (400, REFUSED, BackendRefused, (400, "x", "temperature")),
        (422, {"detail": [{"loc": ["body", "messages"], "msg": "missing"}]}, BackendRefused, (400, None, "messages")),
        (413, {"error": "too much"}, BackendRefused, (413, None, None)),
        (
            404,
            {"error": {"message": "The model `x` does not exist"}},
            ModelNotServed,
            (404, "model_not_found", "model"),
        ),
        (404, {"detail": "Not Found"}, BackendRefused, (404, "unsupported_endpoint", None)),
        (500, {"error": {"message": "JSON schema: bad", "type": "server_error"}}, BackendRefused, (400, None, None)),
        (500, REFUSED, BackendRefused, (400, "x", "temperature")),
        (500, {"error": "CUDA out of memory"}, BackendError, (502, "backend_error", None)),
        (500, b"<html>oops</html>", BackendError, (502, "backend_error", None)),
        (501, {"error": {"message": "no", "type": "not_supported_error"}}, BackendRefused, (400, None, None)),
        (401, {"error": "wrong key sk-1"}, BackendError, (502, "backend_error", None)),
        (503, {"error": {"message": "Loading model"}}, BackendUnavailable, (503, "backend_unavailable", None)),
    ],
)
async def test_what_an_error_answer_means(
    double: OpenAIDouble, backend: Backend, status: int, error: Any, kind: type[BackendError], expected: Any
) -> None:
    double.behave(status=status, error=error)
    with pytest.raises(kind) as caught:
        await collect(backend, stream())
    info = caught.value.info
    assert type(caught.value) is kind
    assert (info.status, info.code, info.param) == expected
    assert info.message


@pytest.mark.parametrize("status", [429, 503])
async def test_retry_after_is_kept(double: OpenAIDouble, backend: Backend, status: int) -> None:
    double.behave(status=status, error={"error": "busy"}, headers={"retry-after": "17"})
    with pytest.raises(BackendUnavailable) as caught:
        await collect(backend, stream())
    assert caught.value.transient
    assert caught.value.info.retry_after_s == 17


async def test_the_key_is_sent_and_never_told(double: OpenAIDouble) -> None:
    backend = OpenAIBackend(BackendConfig(url=double.url, api_key="sk-secret"))
    try:
        await text_of(backend)
        assert double.last.headers["authorization"] == "Bearer sk-secret"
        for status in (400, 401, 403, 500):
            double.behave(status=status, error={"error": {"message": "key sk-secret is wrong"}})
            with pytest.raises(BackendError) as caught:
                await collect(backend, stream())
            assert "sk-secret" not in caught.value.info.model_dump_json()
    finally:
        await backend.close()


async def test_a_redirect_is_refused_and_named(double: OpenAIDouble, backend: Backend) -> None:
    double.behave(status=307, error={}, headers={"location": "http://elsewhere/v1"})
    with pytest.raises(BackendError, match="http://elsewhere/v1"):
        await collect(backend, stream())


@pytest.mark.parametrize("hang", ["before_head", "before", "mid"])
async def test_cancelling_a_hanging_server_disconnects(double: OpenAIDouble, backend: Backend, hang: str) -> None:
    double.behave(hang=hang)
    running = asyncio.create_task(collect(backend, stream()))
    async with asyncio.timeout(20):
        while not double.streaming:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        running.cancel()
        await double.disconnected.wait()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_killed_and_back(double: OpenAIDouble, backend: Backend) -> None:
    double.behave(hang="mid")
    output = cast("AsyncGenerator[Output, None]", backend.run(stream()))
    assert isinstance(await anext(output), Chunk)
    await double.kill()
    with pytest.raises(BackendError) as caught:
        async for _ in output:
            pass
    assert caught.value.transient
    for attempt in (backend.health(), backend.discover(), collect(backend, stream())):
        with pytest.raises(BackendUnavailable):
            await attempt
    double.behave()
    await double.start()
    await backend.health()
    assert await text_of(backend) == TEXT


async def test_loading_is_unavailable_until_it_is_done(double: OpenAIDouble, backend: Backend) -> None:
    double.behave(loading=True)
    with pytest.raises(BackendUnavailable, match="Loading"):
        await backend.health()
    with pytest.raises(BackendUnavailable):
        await backend.discover()
    with pytest.raises(BackendUnavailable):
        await collect(backend, stream())
    double.behave()
    await backend.health()
    assert await text_of(backend) == TEXT


# What the server has


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/", "/some/prefix", "/some/prefix/v1"])
async def test_the_url_may_end_in_v1(double: OpenAIDouble, suffix: str) -> None:
    backend = OpenAIBackend(BackendConfig(url=double.url + suffix))
    assert await text_of(backend) == TEXT
    await backend.close()
    prefix = suffix.rstrip("/").removesuffix("/v1")
    assert double.last.path == f"{prefix}/v1/chat/completions"


@pytest.mark.parametrize("url", ["", "localhost:80", "ftp://x", "http://user:pw@x"])
def test_a_url_that_makes_no_sense_is_an_error(url: str) -> None:
    with pytest.raises(ValueError, match="URL"):
        OpenAIBackend(BackendConfig(url=url))


async def test_the_api_may_lie_elsewhere(double: OpenAIDouble) -> None:
    backend = OpenAIBackend(BackendConfig(url=double.url, models=("double",), options={"api_path": "/openai/beta"}))
    double.behave(models_status=404)
    assert await text_of(backend) == TEXT
    await backend.close()
    assert double.last.path == "/openai/beta/chat/completions"


def test_an_unknown_option_is_an_error() -> None:
    with pytest.raises(ValueError, match="no option nonsense"):
        OpenAIBackend(BackendConfig(url="http://x", options={"nonsense": "1"}))


async def test_configured_models_must_be_there(double: OpenAIDouble) -> None:
    double.behave(models=({"id": "a"}, {"id": "b", "max_model_len": 4096, "aliases": ["b", "bee"]}))
    backend = OpenAIBackend(BackendConfig(url=double.url, models=("b", "bee")))
    found = await backend.discover()
    assert [(model.name, model.context_length) for model in found.models] == [("b", 4096), ("bee", 4096)]
    assert found.models[0].capabilities == (Capability.CHAT, Capability.COMPLETIONS)
    await backend.close()
    backend = OpenAIBackend(BackendConfig(url=double.url, models=("c",)))
    with pytest.raises(BackendError, match="lacks c; it has a, b"):
        await backend.discover()
    await backend.close()


async def test_a_server_without_a_list_is_believed(double: OpenAIDouble, backend: Backend) -> None:
    double.behave(models_status=404, health_status=404)
    await backend.health()
    with pytest.raises(BackendError, match="--model"):
        await backend.discover()
    trusting = OpenAIBackend(BackendConfig(url=double.url, models=("double",)))
    assert [model.name for model in (await trusting.discover()).models] == ["double"]
    assert await text_of(trusting) == TEXT
    await trusting.close()


async def test_llama_cpp_says_more(double: OpenAIDouble, backend: Backend) -> None:
    meta = {"n_ctx_train": 8192, "n_ctx": 2048}
    llama = {"owned_by": "llamacpp", "created": 5}
    double.behave(
        models=({"id": "a", "meta": meta, **llama}, {"id": "b", "status": {"value": "unloaded"}, **llama}),
        props={"total_slots": 3},
    )
    found = await backend.discover()
    assert found.slots == 3
    assert [(model.context_length, model.loaded) for model in found.models] == [(2048, None), (None, False)]


async def test_a_connection_is_used_again_only_when_its_answer_was_read(double: OpenAIDouble, backend: Backend) -> None:
    for _ in range(5):
        await text_of(backend)
        await whole_text_of(backend)
    assert double.connections == 1
    double.behave(words=("w",) * 100, token_delay_s=0.01)
    output = cast("AsyncGenerator[Output, None]", backend.run(stream()))
    await anext(output)
    await output.aclose()
    double.behave()
    await text_of(backend)
    assert double.connections == 2


async def test_a_stale_connection_is_replaced(double: OpenAIDouble, backend: Backend) -> None:
    await text_of(backend)
    await double.drop_idle()
    assert await text_of(backend) == TEXT
    assert len([seen for seen in double.seen if seen.method == "POST"]) == 2
