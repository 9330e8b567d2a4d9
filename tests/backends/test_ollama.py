"""The adapter for Ollama on a double: text and embeddings, what is asked of the server and what comes back."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from schemas.frames import Progress
from schemas.jobs import Capability
from tests.backends.adapter_contract import AdapterContract, AdapterRig, outputs_of
from tests.backends.contract import Contract, Rig, body_of, chat, check_stream, collect, completion, events, task
from tests.backends.doubles.ollama import BUSY, CHAT, EMBED, VISION, OllamaDouble, StoredModel, vector
from workers.backends.base import (
    Backend,
    BackendConfig,
    BackendError,
    BackendRefused,
    BackendUnavailable,
    Chunk,
    Finish,
    ModelNotServed,
    Task,
    make_backend,
)
from workers.backends.ollama.client import LineSplitter

TEXT = "Hello there, world!"
EMBEDDINGS = "/v1/embeddings"
MANY = ("word ",) * 2000
PICTURE = base64.b64encode(b"\x89PNG a picture").decode()
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture
async def ollama() -> AsyncIterator[OllamaDouble]:
    async with OllamaDouble() as server:
        server.loaded = {name: {} for name in server.models}
        yield server


@pytest.fixture
async def backend(ollama: OllamaDouble) -> AsyncIterator[Backend]:
    made = make_backend("ollama", BackendConfig(url=ollama.url))
    await made.start()
    yield made
    await made.close()


def stream(**fields: Any) -> Task:
    return chat(CHAT, stream=True, public_model="alias", **fields)


def embedding(given: Any, **fields: Any) -> Task:
    body = json.dumps({"model": EMBED, "input": given} | fields).encode()
    return Task("job_1", "req_1", Capability.EMBEDDINGS, EMBEDDINGS, EMBED, "alias", False, body)


async def embedded(backend: Backend, work: Task) -> dict[str, Any]:
    chunks, _, finish = await outputs_of(backend, work)
    body = json.loads(b"".join(chunk.data for chunk in chunks))
    assert finish.usage is not None
    assert body["usage"]["prompt_tokens"] == finish.usage.prompt_tokens
    return dict(body)


async def sent(backend: Backend, ollama: OllamaDouble, **fields: Any) -> dict[str, Any]:
    """What the server is asked for a chat with these fields."""
    await collect(backend, chat(CHAT, **fields))
    return ollama.bodies("/api/chat")[-1]


async def refused(backend: Backend, work: Task) -> BackendRefused:
    with pytest.raises(BackendRefused) as caught:
        await outputs_of(backend, work)
    assert not caught.value.transient
    assert caught.value.info.status == 400
    return caught.value


class TestText(Contract):
    @pytest.fixture
    async def rig(self, ollama: OllamaDouble, backend: Backend, request: pytest.FixtureRequest) -> Rig:
        if "stops_the_server" in request.node.name:
            ollama.behave(words=MANY, delay_s=0.02)

        async def idle() -> bool:
            return ollama.running == 0

        return Rig(backend, CHAT, idle, {"max_tokens": 2000}, context_length=4096)


class OllamaAdapter(AdapterContract):
    """A server that dies forgets what it has loaded: the second start loads again."""

    def rig_of(self, ollama: OllamaDouble, backend: Backend, short: Task, long: Task, bad: Task) -> AdapterRig:
        async def idle() -> bool:
            return ollama.running == 0

        return AdapterRig(backend, short.capability, short, self.check, long, bad, idle, ollama.kill, ollama.start)

    @staticmethod
    def check(chunks: list[Chunk], finish: Finish) -> None:
        raise NotImplementedError


class TestChat(OllamaAdapter):
    @pytest.fixture
    def rig(self, ollama: OllamaDouble, backend: Backend, request: pytest.FixtureRequest) -> AdapterRig:
        if "closing" in request.node.name or "midway" in request.node.name:
            ollama.behave(words=MANY, delay_s=0.02)
        return self.rig_of(ollama, backend, stream(), stream(), stream(messages="none"))

    @staticmethod
    def check(chunks: list[Chunk], finish: Finish) -> None:
        assert check_stream(events(chunks), "alias", is_chat=True) == TEXT
        assert finish.usage is not None
        assert finish.usage.total_tokens == 12


class TestEmbeddings(OllamaAdapter):
    @pytest.fixture
    def rig(self, ollama: OllamaDouble, backend: Backend, request: pytest.FixtureRequest) -> AdapterRig:
        if "closing" in request.node.name or "midway" in request.node.name:
            ollama.behave(delay_s=1.0)
        long = embedding([f"text {number}" for number in range(20)])
        return self.rig_of(ollama, backend, embedding("a text"), long, embedding([1, 2, 3]))

    @staticmethod
    def check(chunks: list[Chunk], finish: Finish) -> None:
        body = json.loads(b"".join(chunk.data for chunk in chunks))
        assert (body["object"], body["model"]) == ("list", "alias")
        assert [item["index"] for item in body["data"]] == [0]
        assert body["data"][0]["embedding"] == pytest.approx(vector("a text", 64))
        assert finish.usage is not None
        assert finish.usage.total_tokens == 2


# What the server has


async def test_says_what_each_model_can_do(ollama: OllamaDouble, backend: Backend) -> None:
    ollama.models["tiny:latest"] = StoredModel(("completion",), remote_host="https://ollama.com:443")
    ollama.loaded = {EMBED: {}}
    offers = {offer.name: offer for offer in (await backend.discover()).models}
    assert offers[CHAT].capabilities == (Capability.CHAT, Capability.COMPLETIONS)
    assert (offers[CHAT].loaded, offers[CHAT].context_length, offers[CHAT].embedding_length) == (False, 8192, None)
    assert offers[CHAT].created == 1746889608
    assert offers[EMBED].capabilities == (Capability.EMBEDDINGS,)
    assert (offers[EMBED].loaded, offers[EMBED].embedding_length) == (True, 64)
    assert offers["tiny:latest"].loaded is None


async def test_the_context_is_the_one_that_the_model_is_loaded_with(ollama: OllamaDouble, backend: Backend) -> None:
    """Not the one that it was trained for: a Modelfile says another one, or the server when it has loaded the model."""
    ollama.models["small:latest"] = StoredModel(num_ctx=512)
    ollama.loaded = {}

    async def contexts() -> dict[str, int | None]:
        return {offer.name: offer.context_length for offer in (await backend.discover()).models}

    assert await contexts() == {CHAT: 8192, EMBED: 2048, VISION: 8192, "small:latest": 512}
    await outputs_of(backend, chat(CHAT))
    await outputs_of(backend, chat("small", options={"num_ctx": 256}))
    assert await contexts() == {CHAT: 4096, EMBED: 2048, VISION: 8192, "small:latest": 256}
    ollama.loaded = {}
    assert (await contexts())[CHAT] == 4096, "the server will load it so again"


async def test_asks_about_a_model_once(ollama: OllamaDouble, backend: Backend) -> None:
    for _ in range(3):
        await backend.discover()
    assert ollama.counts["/api/show"] == len(ollama.models)


async def test_an_old_server_tells_no_capabilities(ollama: OllamaDouble, backend: Backend) -> None:
    ollama.behave(old=True)
    offers = {offer.name: offer.capabilities for offer in (await backend.discover()).models}
    assert offers[CHAT] == (Capability.CHAT, Capability.COMPLETIONS)
    assert offers[EMBED] == (Capability.EMBEDDINGS,)


async def test_serves_only_the_configured_models_that_are_there(ollama: OllamaDouble) -> None:
    """A tag may be left out, and is offered all the same; what is not there can still be pulled."""
    backend = make_backend("ollama", BackendConfig(url=ollama.url, models=("llava", "not-yet-pulled")))
    assert [offer.name for offer in (await backend.discover()).models] == ["llava:latest"]
    body, _ = await body_of(backend, chat("llava"))
    assert body["choices"][0]["message"]["content"] == TEXT
    with pytest.raises(ModelNotServed):
        await collect(backend, chat(CHAT))
    await backend.close()


async def test_a_model_is_asked_only_for_what_it_can_do(backend: Backend) -> None:
    error = await refused(backend, chat(EMBED))
    assert error.info.param == "model"


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(ValueError, match="no option speed"):
        make_backend("ollama", BackendConfig(url="http://127.0.0.1:1", options={"speed": "1"}))


# What is asked of it


async def test_openai_parameters_become_options(ollama: OllamaDouble, backend: Backend) -> None:
    fields = {"top_p": 0.5, "seed": 7, "stop": "END", "max_completion_tokens": 3, "presence_penalty": 0.1}
    own = {"options": {"num_ctx": 2048, "temperature": 0.9}, "keep_alive": "10m", "think": True}
    body = await sent(backend, ollama, user="me", **fields, **own)
    assert body["options"] == {
        "temperature": 0.9, "top_p": 0.5, "seed": 7, "stop": ["END"], "num_predict": 3, "presence_penalty": 0.1,
        "num_ctx": 2048,
    }  # fmt: skip
    assert (body["keep_alive"], body["think"], body["stream"]) == ("10m", True, True)
    assert "user" not in body


async def test_the_configured_keep_alive_is_for_requests_without_one(ollama: OllamaDouble) -> None:
    backend = make_backend("ollama", BackendConfig(url=ollama.url, options={"keep_alive": "-1"}))
    assert (await sent(backend, ollama))["keep_alive"] == -1
    assert (await sent(backend, ollama, keep_alive="1m"))["keep_alive"] == "1m"
    await backend.close()


@pytest.mark.parametrize(
    ("wanted", "sent_format"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, "json"),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}, {"type": "object"}),
    ],
    ids=["text", "object", "schema"],
)
async def test_response_format(ollama: OllamaDouble, backend: Backend, wanted: Any, sent_format: Any) -> None:
    assert (await sent(backend, ollama, response_format=wanted)).get("format") == sent_format


async def test_reasoning_effort_is_how_much_to_think(ollama: OllamaDouble, backend: Backend) -> None:
    assert (await sent(backend, ollama, reasoning_effort="none"))["think"] is False
    assert (await sent(backend, ollama, reasoning_effort="high"))["think"] == "high"


async def test_messages_with_parts_images_and_tool_calls(ollama: OllamaDouble, backend: Backend) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Paris"}'}}
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PICTURE}"}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What"}, image, {"type": "text", "text": "is it?"}]},
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    await collect(backend, chat(VISION, messages=messages))
    assert ollama.bodies("/api/chat")[-1]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What\nis it?", "images": [PICTURE]},
        {
            "role": "assistant", "content": "", "thinking": "hm",
            "tool_calls": [{"id": "call_1", "function": {"name": "weather", "arguments": {"city": "Paris"}}}],
        },
        {"role": "tool", "content": "sunny", "tool_call_id": "call_1", "tool_name": "weather"},
    ]  # fmt: skip


def with_image(url: str, model: str = VISION) -> Task:
    parts = [{"type": "image_url", "image_url": {"url": url}}]
    return chat(model, messages=[{"role": "user", "content": parts}])


@pytest.mark.parametrize("url", ["https://example.org/cat.png", "data:image/png,%89PNG", "data:text/html;base64,aaaa"])
async def test_images_that_are_no_base64_data_urls_are_refused(backend: Backend, url: str) -> None:
    error = await refused(backend, with_image(url))
    assert error.info.param == "messages.0.content.0.image_url"
    assert "data:image/png;base64," in error.info.message


async def test_a_model_without_eyes_refuses_images(backend: Backend) -> None:
    """Some versions of Ollama would answer as if there were no image."""
    error = await refused(backend, with_image(f"data:image/png;base64,{PICTURE}", CHAT))
    assert error.info.param == "messages.0.content"


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("n", {"n": 17}),
        ("tool_choice", {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "other"}}}),
        ("functions", {"functions": [{"name": "f"}]}),
        ("modalities", {"modalities": ["text", "audio"]}),
        ("max_tokens", {"max_tokens": 0}),
        ("options", {"options": [1]}),
        ("response_format", {"response_format": {"type": "json_schema"}}),
        ("response_format", {"response_format": {"type": "xml"}}),
        ("reasoning_effort", {"reasoning_effort": "enormous"}),
        ("tools", {"tools": [{"type": "code_interpreter"}]}),
        ("messages", {"messages": []}),
        ("messages.0.content.0", {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}),
        (
            "messages.0.tool_calls",
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        ),
    ],
    ids=str,
)
async def test_what_ollama_cannot_do_is_refused(
    ollama: OllamaDouble, backend: Backend, param: str, fields: dict[str, Any]
) -> None:
    """Before anything is asked of the server."""
    assert (await refused(backend, chat(CHAT, **fields))).info.param == param
    assert ollama.counts["/api/chat"] == 0


async def test_the_harmless_forms_of_those_are_passed_over(ollama: OllamaDouble, backend: Backend) -> None:
    body = await sent(
        backend, ollama, n=1, logit_bias={}, parallel_tool_calls=True, tools=[WEATHER], tool_choice="none", store=False
    )
    assert set(body) == {"model", "messages", "stream", "options", "truncate"}


LONG = [{"role": "user", "content": "word " * 5000}]


@pytest.mark.parametrize("streamed", [True, False], ids=["stream", "whole"])
async def test_a_prompt_that_is_too_long_is_refused(backend: Backend, streamed: bool) -> None:
    """Ollama would cut it, and answer 200."""
    for work in (
        chat(CHAT, stream=streamed, messages=LONG),
        completion(CHAT, stream=streamed, prompt="word " * 5000),
        embedding("word " * 5000),
    ):
        error = await refused(backend, work)
        assert error.info.code == "context_length_exceeded"


async def test_a_caller_may_have_a_prompt_cut(ollama: OllamaDouble, backend: Backend) -> None:
    await collect(backend, chat(CHAT, messages=LONG, truncate=True))
    assert ollama.bodies("/api/chat")[-1]["truncate"] is True


# What comes back


async def test_thinking_is_reasoning(ollama: OllamaDouble, backend: Backend) -> None:
    ollama.behave(thoughts=("Let me", " see."))
    body, _ = await body_of(backend, chat(CHAT))
    message = body["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Let me see.", TEXT)
    chunks, _ = await collect(backend, stream())
    deltas = [event["choices"][0]["delta"] for event in events(chunks)]
    assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == "Let me see."


async def test_thinking_before_a_completion_is_a_sign_of_life(ollama: OllamaDouble, backend: Backend) -> None:
    ollama.behave(thoughts=("hm",) * 4, delay_s=0.005)
    chunks, _ = await collect(backend, completion(CHAT, stream=True, max_tokens=100))
    assert not chunks[0].data
    assert check_stream(events([chunk for chunk in chunks if chunk.data]), CHAT, is_chat=False) == TEXT


CALLS = (
    {"id": "call_a", "function": {"index": 0, "name": "weather", "arguments": {"city": "Paris"}}},
    {"function": {"name": "weather", "arguments": {}}},  # before 0.9: neither id nor index
)


async def test_tool_calls_streamed(ollama: OllamaDouble, backend: Backend) -> None:
    ollama.behave(words=(), calls=CALLS)
    chunks, _ = await collect(backend, stream(tools=[WEATHER]))
    found = events(chunks)
    check_stream(found, "alias", is_chat=True)
    calls = [call for event in found for call in event["choices"][0]["delta"].get("tool_calls", ())]
    assert [call["index"] for call in calls] == [0, 1]
    assert [json.loads(call["function"]["arguments"]) for call in calls] == [{"city": "Paris"}, {}]
    assert calls[0]["id"] == "call_a"
    assert calls[1]["id"].startswith("call_")
    assert found[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_tool_calls_in_one_piece(ollama: OllamaDouble, backend: Backend) -> None:
    ollama.behave(words=(), calls=CALLS)
    body, _ = await body_of(backend, chat(CHAT, tools=[WEATHER]))
    [choice] = body["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert [call["type"] for call in choice["message"]["tool_calls"]] == ["function", "function"]
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city":"Paris"}'


@pytest.mark.parametrize(("said", "reason"), [("stop", "stop"), ("length", "length"), ("load", "stop"), ("", "stop")])
async def test_why_it_ended(ollama: OllamaDouble, backend: Backend, said: str, reason: str) -> None:
    ollama.behave(done_reason=said)
    body, _ = await body_of(backend, chat(CHAT))
    assert body["choices"][0]["finish_reason"] == reason


async def test_a_limit_of_tokens_is_kept(backend: Backend) -> None:
    body, finish = await body_of(backend, chat(CHAT, max_tokens=2))
    assert (body["choices"][0]["message"]["content"], body["choices"][0]["finish_reason"]) == ("Hello there", "length")
    assert finish.usage is not None
    assert (finish.usage.prompt_tokens, finish.usage.completion_tokens) == (7, 2)


async def test_logprobs(ollama: OllamaDouble, backend: Backend) -> None:
    body, _ = await body_of(backend, chat(CHAT, logprobs=True, top_logprobs=1))
    tokens = body["choices"][0]["logprobs"]["content"]
    assert [token["token"] for token in tokens] == list(ollama.behavior.words)
    assert tokens[0]["top_logprobs"] == [{"token": "Hello", "logprob": -0.5, "bytes": [1]}]


async def test_logprobs_of_an_old_server_are_refused(ollama: OllamaDouble, backend: Backend) -> None:
    ollama.behave(version="0.12.3")
    error = await refused(backend, chat(CHAT, logprobs=True))
    assert (error.info.param, "0.12.11" in error.info.message) == ("logprobs", True)


@pytest.mark.parametrize("prompt", ["", ["a", "b"], [1, 2, 3], [[1, 2]], None], ids=str)
async def test_prompts_that_are_not_one_text_are_refused(backend: Backend, prompt: Any) -> None:
    assert (await refused(backend, completion(CHAT, prompt=prompt))).info.param == "prompt"


# Embeddings


async def test_embeddings_keep_their_order_over_batches(
    ollama: OllamaDouble, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.backends.ollama.adapter.EMBED_BATCH", 3)
    texts = [f"text {number}" for number in range(8)]
    body = await embedded(backend, embedding(texts))
    assert [item["index"] for item in body["data"]] == list(range(8))
    assert [item["embedding"] for item in body["data"]] == [pytest.approx(vector(text, 64)) for text in texts]
    assert body["usage"] == {"prompt_tokens": 16, "total_tokens": 16}
    assert ollama.counts["/api/embed"] == 3


async def test_embeddings_in_base64(backend: Backend) -> None:
    body = await embedded(backend, embedding(["one", "two"], encoding_format="base64"))
    numbers = struct.unpack("<64f", base64.b64decode(body["data"][1]["embedding"]))
    assert numbers == pytest.approx(vector("two", 64), abs=1e-6)


async def test_embeddings_with_fewer_dimensions(backend: Backend) -> None:
    body = await embedded(backend, embedding("one", dimensions=16))
    assert len(body["data"][0]["embedding"]) == 16


@pytest.mark.parametrize("old", [True, False], ids=["old", "too-large"])
async def test_dimensions_that_the_server_passes_over_are_refused(
    ollama: OllamaDouble, backend: Backend, old: bool
) -> None:
    ollama.behave(old=old)
    error = await refused(backend, embedding("one", dimensions=16 if old else 4096))
    assert error.info.param == "dimensions"


@pytest.mark.parametrize("given", ["", [], [""], [1, 2], [[1]], 5, None], ids=str)
async def test_inputs_that_are_no_texts_are_refused(backend: Backend, given: Any) -> None:
    assert (await refused(backend, embedding(given))).info.param == "input"


async def test_other_encodings_are_refused(backend: Backend) -> None:
    assert (await refused(backend, embedding("a", encoding_format="int8"))).info.param == "encoding_format"


# Failures


@pytest.mark.parametrize("streamed", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("no_done", "ended before it was complete"),
        ("error_line", "CUDA error"),
        ("die", "closed the connection"),
        ("nonsense", "not JSON"),
    ],
)
async def test_a_stream_that_breaks_off_is_a_transient_failure(
    ollama: OllamaDouble, backend: Backend, fault: str, words: str, streamed: bool
) -> None:
    ollama.behave(fault=fault)
    with pytest.raises(BackendError, match=words) as caught:
        await collect(backend, chat(CHAT, stream=streamed))
    assert caught.value.transient


async def test_an_error_line_about_the_request_is_a_refusal(ollama: OllamaDouble, backend: Backend) -> None:
    ollama.behave(fault="error_line", error="input length exceeds maximum context length")
    assert (await refused(backend, stream())).info.code == "context_length_exceeded"


async def test_a_last_line_without_its_end_is_read(ollama: OllamaDouble, backend: Backend) -> None:
    ollama.behave(fault="no_newline")
    body, _ = await body_of(backend, chat(CHAT))
    assert body["choices"][0]["message"]["content"] == TEXT


async def test_a_busy_server_is_unavailable(ollama: OllamaDouble, backend: Backend) -> None:
    ollama.behave(refuse=(503, BUSY))
    for work in (stream(), embedding("a")):
        with pytest.raises(BackendUnavailable, match="server busy"):
            await outputs_of(backend, work)


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (400, '"llama3.2:1b" does not support thinking'),
        (400, "invalid message content"),
        (500, 'option "seed" must be of type integer'),
        (500, "failed to parse grammar"),
        (500, "this model is missing data required for image input"),
    ],
    ids=str,
)
async def test_bad_input_is_refused_whatever_the_status(
    ollama: OllamaDouble, backend: Backend, status: int, text: str
) -> None:
    ollama.behave(refuse=(status, text))
    assert text in (await refused(backend, stream())).info.message


@pytest.mark.parametrize(("status", "text"), [(500, "llama runner process has terminated"), (499, "request canceled")])
async def test_other_failures_are_transient(ollama: OllamaDouble, backend: Backend, status: int, text: str) -> None:
    ollama.behave(refuse=(status, text))
    with pytest.raises(BackendError, match=text) as caught:
        await collect(backend, stream())
    assert caught.value.transient


async def test_a_model_deleted_meanwhile_is_not_found(ollama: OllamaDouble, backend: Backend) -> None:
    await backend.discover()
    del ollama.models[CHAT], ollama.loaded[CHAT]
    with pytest.raises(ModelNotServed):
        await outputs_of(backend, stream())


async def test_endpoints_that_it_lacks_are_refused(backend: Backend) -> None:
    await refused(backend, replace(stream(), capability=Capability.RERANK, endpoint="/v1/rerank"))
    await refused(backend, task("/v1/chat", CHAT, False, {}))


# Loading


async def test_a_loaded_model_is_not_loaded_again(ollama: OllamaDouble, backend: Backend) -> None:
    _, progress, _ = await outputs_of(backend, stream())
    assert progress == []
    assert ollama.counts["/api/generate"] == 0


@pytest.mark.parametrize(
    "work", [stream(options={"num_ctx": 512}), embedding("a text", keep_alive="1m")], ids=["chat", "embed"]
)
async def test_loading_is_a_phase_of_its_own(ollama: OllamaDouble, backend: Backend, work: Task) -> None:
    """And the request does not make the server load once more."""
    ollama.loaded.clear()
    heard: list[None] = []
    backend.notify_changed = lambda: heard.append(None)
    _, progress, _ = await outputs_of(backend, work)
    assert [one.phase for one in progress] == ["load", "run"]
    assert ollama.counts["load"] == 1
    assert len(ollama.seen) - ollama.counts["/api/show"] == 1, (
        "a load in a call of its own may be evicted before the next"
    )
    assert len(heard) == 2, "it is being loaded, and it is loaded"


async def test_says_what_is_being_loaded(ollama: OllamaDouble, backend: Backend) -> None:
    ollama.loaded.clear()
    gate = asyncio.Event()
    ollama.behave(loads=gate)

    async def state() -> tuple[bool | None, bool]:
        offers = {offer.name: offer for offer in (await backend.discover()).models}
        return offers[CHAT].loaded, offers[CHAT].loading

    assert await state() == (False, False)
    running = asyncio.create_task(outputs_of(backend, stream()))
    await begun(ollama)
    assert await state() == (False, True)
    gate.set()
    await running
    assert await state() == (True, False)


async def test_keep_alive_zero_unloads_after_the_answer(ollama: OllamaDouble, backend: Backend) -> None:
    ollama.loaded.clear()
    await outputs_of(backend, stream(keep_alive=0))
    assert ollama.bodies("/api/chat")[0]["keep_alive"] == 0
    assert await backend.resident_models() == frozenset()


async def test_a_model_that_runs_elsewhere_is_never_loaded(ollama: OllamaDouble, backend: Backend) -> None:
    ollama.models["big:cloud"] = StoredModel(remote_host="https://ollama.com:443")
    _, progress, _ = await outputs_of(backend, chat("big:cloud"))
    assert progress == []


async def begun(ollama: OllamaDouble) -> None:
    async with asyncio.timeout(10):
        while not ollama.counts["load"]:
            await asyncio.sleep(0.005)


async def test_a_cancelled_load_ends_at_the_server(ollama: OllamaDouble, backend: Backend) -> None:
    """And the next request loads as if nothing had been."""
    ollama.loaded.clear()
    ollama.behave(loads=asyncio.Event())
    running = asyncio.create_task(outputs_of(backend, stream()))
    await begun(ollama)
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running
    async with asyncio.timeout(10):
        while ollama.running:
            await asyncio.sleep(0.005)
    assert ollama.counts["given up"] == 1
    ollama.behave()
    _, progress, _ = await outputs_of(backend, stream())
    assert [one.phase for one in progress] == ["load", "run"]


async def test_who_comes_while_a_model_loads_waits_in_that_phase(ollama: OllamaDouble, backend: Backend) -> None:
    """The server lists a model as soon as its loading begins; the limit for the first token must not run yet."""
    ollama.loaded.clear()
    gate = asyncio.Event()
    ollama.behave(loads=gate)
    first = asyncio.create_task(outputs_of(backend, stream()))
    await begun(ollama)
    second = backend.run(stream())
    assert await anext(second) == Progress(phase="load")
    gate.set()
    rest = [output async for output in second]
    assert rest[0] == Progress(phase="run")
    await first
    assert ollama.counts["load"] == 1


async def test_a_load_that_fails_says_why(ollama: OllamaDouble, backend: Backend) -> None:
    ollama.loaded.clear()
    words = "model requires more system memory (5.6 GiB) than is available (3.2 GiB)"
    ollama.behave(refuse=(500, words))
    with pytest.raises(BackendError, match="more system memory") as caught:
        await outputs_of(backend, stream())
    assert caught.value.transient


def test_half_a_character_in_a_call_is_replaced_in_it() -> None:
    """Calls come whole: the next line's call has the same place, and another text."""

    def line(name: str, text: str) -> bytes:
        call = b'{"function":{"name":"%b","arguments":{"q":"%b"}}}' % (name.encode(), text.encode())
        return b'{"message":{"content":"","tool_calls":[%b]},"done":false}\n' % call

    found = LineSplitter().feed(line("find", r"a\ud83d") + line("look", "b"))
    calls = [one["message"]["tool_calls"][0]["function"] for one in found]
    assert [call["arguments"] for call in calls] == [{"q": "a\ufffd"}, {"q": "b"}]
