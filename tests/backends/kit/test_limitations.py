"""An adapter learns nothing from a caller's refused request, and from its own probe a limitation of one model, for a while."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import orjson
import pytest

from schemas.jobs import Capability
from schemas.presence import ServiceRecord
from tests.backends.contract import body_of, chat, check_stream, collect, completion, events
from tests.backends.doubles.media import MODELS, MediaDouble
from tests.backends.doubles.openai import ReceivedRequest, send_answer
from tests.backends.doubles.service import whole_chat
from tests.backends.test_openai_media import UPLOAD, file, work
from workers.adapter_kit import limitations as module
from workers.adapter_kit.limitations import (
    INCONCLUSIVE_TTL_S,
    MAX_PROBES,
    PROBE_WINDOW_S,
    RESULT_TTL_S,
    ModelLimitations,
)
from workers.adapter_kit.openai import feature_probes as module_of
from workers.backends.base import Backend, BackendConfig, BackendError, BackendRefused, make_backend

TEXT = "Hello there, world!"
Answer = tuple[int, Any] | None


class Quirky(MediaDouble):
    """`double.quirk(path, body)` answers instead, where it returns a status and a body."""

    def __init__(self) -> None:
        super().__init__()
        chats = tuple({"id": name, "object": "model", "created": 7, "owned_by": "tests"} for name in ("one", "two"))
        self.behave(models=(*chats, *MODELS))
        self.quirk: Callable[[str, dict[str, Any]], Answer] = lambda path, body: None

    async def _get(self, path: str, writer: asyncio.StreamWriter) -> bool:
        if path == "/v1/metadata":
            endpoints = ["/v1/chat/completions", "/v1/completions", "/v1/audio/transcriptions"]
            return await send_answer(writer, 200, {"name": "svc", "endpoints": endpoints, "models": ["one", "two"]})
        return await super()._get(path, writer)

    async def _post(self, seen: ReceivedRequest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        body = {} if seen.headers["content-type"].startswith("multipart/") else seen.json
        answer = self.quirk(seen.path, body)
        if answer is None and body.get("stream") is False:
            answer = 200, whole_chat("in one piece")
        return await (send_answer(writer, *answer) if answer is not None else super()._post(seen, reader, writer))

    @property
    def posts(self) -> list[dict[str, Any]]:
        return [seen.json for seen in self.seen if seen.method == "POST" and seen.path.endswith("completions")]


def refused(message: str, param: str | None = None) -> Answer:
    return 400, {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": None}}


@pytest.fixture
async def server() -> AsyncIterator[Quirky]:
    async with Quirky() as double:
        yield double


@pytest.fixture(params=["openai", "service"])
async def backend(server: Quirky, request: pytest.FixtureRequest) -> AsyncIterator[Backend]:
    service = request.param == "service"
    made = make_backend(request.param, BackendConfig(url="" if service else server.url))
    if service:
        made.services_changed({"svc": ServiceRecord(name="svc", base_url=server.url)})
        await made.discover()
    yield made
    await made.close()


async def streamed(backend: Backend, model: str = "one", **fields: Any) -> tuple[str, int, bool]:
    """Return the text, the number of its pieces, and whether usage came with it."""
    options = {"include_usage": True}
    chunks, _ = await collect(backend, chat(model, stream=True, public_model="a", stream_options=options, **fields))
    found = events(chunks)
    usage = any(event.get("usage") for event in found)
    return check_stream(found, "a", is_chat=True, include_usage=usage), len(found), usage


GOOD = (TEXT, 8, True)


# Text


async def test_an_error_that_repeats_the_request_teaches_nothing(server: Quirky, backend: Backend) -> None:
    """vLLM's validation errors hold the whole body, with the fields that Nexus added."""

    def quirk(path: str, body: dict[str, Any]) -> Answer:
        if body.get("tool_choice"):
            return refused(f"When using `tool_choice`, `tools` must be set. 'input': {body}")
        return None

    server.quirk = quirk
    for stream in (False, True):
        with pytest.raises(BackendRefused, match="must be set"):
            await collect(backend, chat("one", stream=stream, tool_choice="auto"))
    assert await streamed(backend) == GOOD
    assert (await body_of(backend, chat("one")))[0]["usage"]
    assert backend.limitations() == ()


async def test_a_field_that_does_not_go_with_streams_teaches_nothing(server: Quirky, backend: Backend) -> None:
    """A caller who does not stream gets the answer; one who does gets the server's error."""

    def quirk(path: str, body: dict[str, Any]) -> Answer:
        if body.get("stream") and body.get("prompt_logprobs"):
            return refused("`prompt_logprobs` are not available when `stream=True`.", "prompt_logprobs")
        return None

    server.quirk = quirk
    body, _ = await body_of(backend, chat("one", prompt_logprobs=1))
    assert body["choices"][0]["message"]["content"] == "in one piece"
    with pytest.raises(BackendRefused, match="not available when"):
        await collect(backend, chat("one", stream=True, prompt_logprobs=1))
    assert await streamed(backend) == GOOD


async def test_texts_of_callers_teach_nothing(server: Quirky, backend: Backend) -> None:
    """No text of a caller that an error repeats counts, however often."""

    def quirk(path: str, body: dict[str, Any]) -> Answer:
        said = str(body["messages"][0]["content"])
        return refused(f"flagged: {said}", "stream_options") if "flag" in said else None

    server.quirk = quirk
    words = "flag stream stream_options stream with tools: unknown field stream_options is not supported"
    for _ in range(5):
        with pytest.raises(BackendRefused, match="flagged"):
            await collect(backend, chat("one", stream=True, messages=[{"role": "user", "content": words}]))
    assert await streamed(backend) == GOOD
    probes = [body for body in server.posts if body.get("max_tokens") == 1]
    assert 1 <= len(probes) <= 2, "one probe a feature, whatever callers send"
    assert all(words not in str(body) for body in probes)


async def test_one_model_says_nothing_about_its_neighbors(server: Quirky, backend: Backend) -> None:
    def quirk(path: str, body: dict[str, Any]) -> Answer:
        return refused("unknown field: stream_options") if body["model"] == "one" and "stream_options" in body else None

    server.quirk = quirk
    assert await streamed(backend, "one") == (TEXT, 7, False)
    assert await streamed(backend, "two") == GOOD
    assert [(known.model, known.feature) for known in backend.limitations()] == [("one", "stream_options")]


@pytest.mark.parametrize("status", [400, 500])
async def test_a_model_that_cannot_stream_is_asked_without(server: Quirky, backend: Backend, status: int) -> None:
    """Callers who stream get its answer as events; it is probed once, and other models stream."""

    def quirk(path: str, body: dict[str, Any]) -> Answer:
        if body["model"] == "one" and body.get("stream"):
            return status, {"error": {"message": "stream is not supported", "type": "server_error"}}
        return None

    server.quirk = quirk
    for _ in range(2):
        assert (await streamed(backend, "one"))[0] == "in one piece"
    assert (await body_of(backend, chat("one")))[0]["choices"][0]["message"]["content"] == "in one piece"
    assert await streamed(backend, "two") == GOOD
    asked = [body["stream"] for body in server.posts if body["model"] == "one" and body.get("max_tokens") != 1]
    assert asked == [True, False, False, False]
    [known] = backend.limitations()
    assert (known.model, known.feature, known.until - known.since) == ("one", "stream", int(RESULT_TTL_S))


async def test_a_model_that_cannot_stream_with_tools_streams_without(server: Quirky, backend: Backend) -> None:
    """llama.cpp before May 2025."""
    tools = [{"type": "function", "function": {"name": "f"}}]

    def quirk(path: str, body: dict[str, Any]) -> Answer:
        if body.get("stream") and body.get("tools"):
            return 500, {"error": {"code": 500, "message": "Cannot use tools with stream", "type": "server_error"}}
        return None

    server.quirk = quirk
    for _ in range(2):
        assert (await streamed(backend, tools=tools))[0] == "in one piece"
    assert await streamed(backend) == GOOD
    assert [known.feature for known in backend.limitations()] == ["stream with tools"]


async def test_a_server_that_answers_in_one_piece_is_understood(server: Quirky, backend: Backend) -> None:
    server.quirk = lambda path, body: (200, whole_chat("in one piece"))
    assert (await streamed(backend))[0] == "in one piece"
    assert (await body_of(backend, chat("one")))[0]["usage"]["completion_tokens"] == 2
    assert len(server.posts) == 2


async def test_completions_and_chat_are_apart(server: Quirky) -> None:
    backend = make_backend("openai", BackendConfig(url=server.url))

    def quirk(path: str, body: dict[str, Any]) -> Answer:
        return refused("unknown stream_options") if "prompt" in body and "stream_options" in body else None

    server.quirk = quirk
    await collect(backend, completion("one", stream=True))
    assert await streamed(backend) == GOOD
    assert [known.feature for known in backend.limitations()] == ["stream_options of completions"]
    await backend.close()


async def test_options_that_a_caller_got_wrong_are_refused(server: Quirky, backend: Backend) -> None:
    def quirk(path: str, body: dict[str, Any]) -> Answer:
        return refused("stream_options: unknown nonsense") if body["stream_options"].get("nonsense") else None

    server.quirk = quirk
    with pytest.raises(BackendRefused, match="nonsense"):
        await collect(backend, chat("one", stream=True, stream_options={"nonsense": 1}))
    assert await streamed(backend) == GOOD


async def test_a_probe_that_fails_proves_nothing(server: Quirky, backend: Backend) -> None:
    """A server that is overloaded, or dies, while it is probed."""
    busy = False

    def quirk(path: str, body: dict[str, Any]) -> Answer:
        if busy and body.get("max_tokens") == 1:
            return 503, {"error": {"message": "busy"}}
        return refused("stream_options: no") if body.get("user") == "bad" and "stream_options" in body else None

    server.quirk, busy = quirk, True
    body, _ = await body_of(backend, chat("one", user="bad"))
    assert body["choices"][0]["message"]["content"] == TEXT
    busy = False
    assert await streamed(backend) == GOOD
    assert backend.limitations() == ()


# Media


OPENAIS_WORDS = (
    "Invalid file format. Supported formats: ['flac', 'm4a', 'mp3', 'wav', 'webm'] text json verbose_json stream"
)


async def test_a_garbage_upload_ends_nobodys_transcription(server: Quirky, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = make_backend("openai", BackendConfig(url=server.url))
    usual = server._transcription

    def transcription(seen: ReceivedRequest, body: dict[str, Any]) -> Any:
        if b"garbage" in seen.body:
            from tests.backends.doubles.media import Refused

            raise Refused(OPENAIS_WORDS, "file")
        return usual(seen, body)

    monkeypatch.setattr(server, "_transcription", transcription)
    for stream in (False, True):
        task = work(Capability.TRANSCRIPTIONS, stream=stream)
        garbage = type(task)(
            **{name: getattr(task, name) for name in task.__slots__} | {"files": (file("file", b"garbage"),)}
        )
        for _ in range(3):
            with pytest.raises(BackendRefused, match="Invalid file format"):
                await collect(backend, garbage)
    for form in ("json", "text", "srt", "vtt", "verbose_json"):
        await collect(backend, work(Capability.TRANSCRIPTIONS, response_format=form))
    assert backend.limitations() == ()
    uploads = [len(seen.body) for seen in server.seen if seen.method == "POST" and len(seen.body) < len(UPLOAD)]
    assert len(uploads) == 6 + 2, "each garbage once, and a probe for each of format and stream"
    await backend.close()


async def test_a_voice_that_is_refused_by_the_name_of_a_format_ends_nobodys_speech(server: Quirky) -> None:
    backend = make_backend("openai", BackendConfig(url=server.url))

    def quirk(path: str, body: dict[str, Any]) -> Answer:
        return refused("format of voice unknown: mp3 wav flac") if body.get("voice") == "bad" else None

    server.quirk = quirk
    for codec in ("mp3", "flac", "wav"):
        with pytest.raises(BackendRefused, match="format of voice"):
            await collect(backend, work(Capability.SPEECH, voice="bad", response_format=codec))
    server.seen.clear()
    for codec in ("mp3", "flac", "wav"):
        await collect(backend, work(Capability.SPEECH, response_format=codec))
    assert [seen.json["response_format"] for seen in server.seen if seen.method == "POST"] == ["mp3", "flac", "wav"]
    await backend.close()


async def test_an_input_that_is_refused_by_the_name_of_a_field_ends_nobodys_embeddings(server: Quirky) -> None:
    backend = make_backend("openai", BackendConfig(url=server.url))

    def quirk(path: str, body: dict[str, Any]) -> Answer:
        return (
            refused("input 'encoding_format base64' is flagged") if body["input"] == "encoding_format base64" else None
        )

    server.quirk = quirk
    with pytest.raises(BackendRefused, match="flagged"):
        await collect(backend, work(Capability.EMBEDDINGS, input="encoding_format base64", encoding_format="base64"))
    await collect(backend, work(Capability.EMBEDDINGS, input="a", encoding_format="base64"))
    assert server.last.json["encoding_format"] == "base64"
    await backend.close()


async def test_a_prompt_that_is_refused_by_the_name_of_a_field_changes_no_pictures(server: Quirky) -> None:
    backend = make_backend("openai", BackendConfig(url=server.url))

    def quirk(path: str, body: dict[str, Any]) -> Answer:
        return refused(f"flagged: {body['prompt']}") if "flag" in body["prompt"] else None

    server.quirk = quirk
    with pytest.raises(BackendRefused, match="flagged"):
        await collect(backend, work(Capability.IMAGES, prompt="flag response_format stream", stream=True))
    await collect(backend, work(Capability.IMAGES, stream=True, partial_images=1))
    sent = server.last.json
    assert (sent["response_format"], sent["stream"], sent["partial_images"]) == ("b64_json", True, 1)
    await backend.close()


async def test_a_ranking_that_is_refused_changes_no_others_way(server: Quirky) -> None:
    """That holds even where the server would accept the other route's fields."""
    backend = make_backend("openai", BackendConfig(url=server.url))
    server.media.rerank = "/rerank"
    usual: Callable[[str, dict[str, Any]], Answer] = lambda path, body: (  # noqa: E731
        (200, [{"index": 0, "score": 1.0}])
        if path == "/rerank" and "texts" in body
        else refused("no query")
        if path == "/rerank" and body["query"] == "bad"
        else None
    )
    server.quirk = usual
    with pytest.raises(BackendRefused, match="no query"):
        await collect(backend, work(Capability.RERANK, query="bad"))
    await collect(backend, work(Capability.RERANK))
    assert "documents" in server.last.json
    await backend.close()


@pytest.mark.parametrize("capability", [Capability.RERANK, Capability.EMBEDDINGS])
async def test_an_input_that_is_too_long_reaches_the_server_once(server: Quirky, capability: Capability) -> None:
    """No other route, no omitted field and no probe makes the input smaller."""
    backend = make_backend("openai", BackendConfig(url=server.url))
    server.media.rerank = "/rerank"
    # It names a field, and has the words of the path that TEI shares with others.
    server.quirk = lambda path, _body: (
        (413, {"error": "`inputs` must have less than 512 tokens. Given: 700, base64", "type": "Validation"})
        if path in ("/rerank", "/v1/embeddings")
        else None
    )
    task = work(capability)
    body = {**orjson.loads(task.body), "encoding_format": "base64"}
    task = replace(task, body=orjson.dumps(body))
    with pytest.raises(BackendRefused) as caught:
        await collect(backend, task)
    assert (caught.value.info.status, caught.value.info.code) == (400, "context_length_exceeded")
    posts = [seen for seen in server.seen if seen.method == "POST" and seen.path != "/v1/rerank"]
    assert len(posts) == 1
    await backend.close()


# Usage

COUNTED = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def counting(server: Quirky, shape: str) -> None:
    """Let the server send usage where `shape` says."""

    def quirk(path: str, body: dict[str, Any]) -> Answer:
        if not path.endswith("completions"):
            return None
        is_chat = path.endswith("chat/completions")
        base = {
            "id": "x-1",
            "object": "chat.completion.chunk" if is_chat else "text_completion",
            "created": 1,
            "model": "m",
        }
        if not body.get("stream"):
            content: dict[str, Any] = (
                {"message": {"role": "assistant", "content": "one two"}} if is_chat else {"text": "one two"}
            )
            return 200, base | {"choices": [{"index": 0, "finish_reason": "stop", **content}], "usage": COUNTED}
        pieces: list[dict[str, Any]] = [{"content": "one "}, {"content": "two"}, {}]
        events: list[dict[str, Any]] = []
        for at, delta in enumerate(pieces):
            content = {"delta": delta} if is_chat else {"text": delta.get("content", "")}
            last = at == len(pieces) - 1
            choice = {"index": 0, **content, "finish_reason": "stop" if last else None}
            counted = shape == "every chunk" or (last and shape == "last chunk")
            events.append(base | {"choices": [choice]} | ({"usage": COUNTED} if counted else {}))
        if shape == "no choices":
            events.append(base | {"choices": [], "usage": COUNTED})
        elif shape == "choices left out":
            events.append(base | {"usage": COUNTED})
        elif shape == "choices null":
            events.append(base | {"choices": None, "usage": COUNTED})
        server.behave(
            models=server.behavior.models,
            raw=b"".join(b"data: %b\n\n" % orjson.dumps(event) for event in events) + b"data: [DONE]\n\n",
        )
        return None

    server.quirk = quirk


SHAPES = ("last chunk", "no choices", "choices left out", "choices null", "every chunk")


@pytest.mark.parametrize("make", [chat, completion], ids=["chat", "completion"])
@pytest.mark.parametrize("shape", SHAPES)
async def test_usage_is_kept_wherever_a_stream_has_it(server: Quirky, backend: Backend, make: Any, shape: str) -> None:
    counting(server, shape)
    body, finish = await body_of(backend, make("one"))
    assert body["usage"] == COUNTED
    assert finish.usage is not None
    chunks, _ = await collect(backend, make("one", stream=True, stream_options={"include_usage": True}))
    found = events(chunks)
    assert found[-1]["usage"] == COUNTED
    assert (found[-1]["choices"], [event["usage"] for event in found[:-1]]) == ([], [None] * (len(found) - 1))
    chunks, _ = await collect(backend, make("one", stream=True))
    assert not any(event.get("usage") for event in events(chunks))


async def test_a_completion_has_usage_also_where_streams_have_none(server: Quirky, backend: Backend) -> None:
    """Even the first answer has it: a probe runs before."""
    counting(server, "nowhere")
    for probes in (3, 0):
        server.seen.clear()
        body, finish = await body_of(backend, completion("one"))
        assert (body["usage"], body["choices"][0]["text"]) == (COUNTED, "one two")
        assert finish.usage is not None
        assert [sent["stream"] for sent in server.posts] == [True, False, False][3 - probes :] + [False] * (not probes)
    chunks, _ = await collect(backend, completion("one", stream=True))
    assert len(events(chunks)) > 2, "a caller who streams gets a stream"


async def test_a_chat_has_usage_once_that_is_known(server: Quirky, backend: Backend) -> None:
    """An answer without usage starts a probe, which delays no caller."""
    counting(server, "nowhere")
    await body_of(backend, chat("one"))
    async with asyncio.timeout(5):
        while not any(one.feature == module_of.STREAM_USAGE for one in backend.limitations()):
            await asyncio.sleep(0.005)
    assert (await body_of(backend, chat("one")))[0]["usage"] == COUNTED
    chunks, _ = await collect(backend, chat("one", stream=True))
    assert len(events(chunks)) > 2


# The mechanism


class Probe:
    """A probe that the test ends."""

    def __init__(self, result: bool | Exception | None) -> None:
        self.result = result
        self.calls = 0
        self.go = asyncio.Event()

    async def __call__(self) -> bool | None:
        self.calls += 1
        await self.go.wait()
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


async def test_one_probe_serves_all_who_suspect_the_same() -> None:
    """One caller is cancelled, and the others still get the result."""
    known, probe = ModelLimitations(), Probe(result=True)
    waiting = [asyncio.create_task(known.confirm("m", "f", probe)) for _ in range(50)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await asyncio.sleep(0)
    probe.go.set()
    assert await asyncio.gather(*waiting[1:]) == [True] * 49
    assert (probe.calls, known.lacks("m", "f"), known.lacks("m", "g"), known.lacks("n", "f")) == (1, True, False, False)


@pytest.mark.parametrize(
    ("result", "lasts_s"),
    [(True, RESULT_TTL_S), (False, RESULT_TTL_S), (None, INCONCLUSIVE_TTL_S), (BackendError("x"), INCONCLUSIVE_TTL_S)],
)
async def test_results_expire(result: Any, lasts_s: float) -> None:
    now = 100.0
    known, probe = ModelLimitations(lambda: now), Probe(result)
    probe.go.set()
    for _ in range(3):
        assert await known.confirm("m", "f", probe) is (result is True)
    assert probe.calls == 1
    assert bool(known.confirmed_limitations()) is (result is True)
    now += lasts_s
    assert not known.lacks("m", "f")
    assert known.confirmed_limitations() == ()
    await known.confirm("m", "f", probe)
    assert probe.calls == 2


async def test_probes_are_bounded_in_rate() -> None:
    now = 100.0
    known, probe = ModelLimitations(lambda: now), Probe(result=True)
    probe.go.set()
    results = [await known.confirm(f"m{number}", "f", probe) for number in range(2 * MAX_PROBES)]
    assert results == [True] * MAX_PROBES + [False] * MAX_PROBES
    now += PROBE_WINDOW_S
    assert await known.confirm("another", "f", probe)


async def test_a_probe_that_hangs_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROBE_TIMEOUT_S", 0.01)
    known, probe = ModelLimitations(), Probe(result=True)
    assert await known.confirm("m", "f", probe) is False
    await known.close()


async def test_closing_ends_probes() -> None:
    known, probe = ModelLimitations(), Probe(result=True)
    waiting = asyncio.create_task(known.confirm("m", "f", probe))
    await asyncio.sleep(0)
    await known.close()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_what_a_server_says_of_itself_counts_until_it_says_otherwise() -> None:
    known = ModelLimitations()
    known.declare({("m", "stream")})
    assert known.lacks("m", "stream")
    assert await known.confirm("m", "stream", Probe(result=False))
    known.declare(())
    assert not known.lacks("m", "stream")
