"""The adapter for speech-to-text servers: on a real Whisper, and on doubles of servers that do not run here."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest
from aiohttp import web
from openai.types.audio import TranscriptionVerbose

from cli.embedded.whisper_server import MODEL_NAME
from schemas.jobs import Capability
from tests.backends.adapter_contract import AdapterContract, AdapterRig, eventually, outputs_of
from tests.backends.whisper_server import PARAGRAPH, SENTENCE, WhisperServer, repeated, spoken
from workers.adapter_kit.http_client import HttpClient
from workers.adapter_kit.openai.client import OpenAIClient
from workers.adapter_kit.openai.feature_probes import lacks_transcript
from workers.backends.base import (
    BackendConfig,
    BackendError,
    BackendRefused,
    BackendUnavailable,
    Chunk,
    Finish,
    ModelNotServed,
    Output,
    Task,
    UploadedFile,
)
from workers.backends.whisper import WhisperBackend

LONG = 14
"""Times the paragraph: many windows of Whisper, and many seconds of work."""
STOP_S = 20.0
"""Whisper ends its window first, on a machine that may be busy."""


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return spoken(SENTENCE, tmp_path_factory.mktemp("sound"))


@pytest.fixture(scope="session")
def paragraph(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return spoken(PARAGRAPH, tmp_path_factory.mktemp("paragraph"))


@pytest.fixture(scope="module")
def one_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WhisperServer]:
    server = WhisperServer(tmp_path_factory.mktemp("whisper"))
    yield server
    server.process.kill()


@pytest.fixture
async def server(one_server: WhisperServer) -> WhisperServer:
    """Up, and idle, whatever the test before did to it."""
    await one_server.process.start()
    await one_server.process.wait_ready()
    await eventually(one_server.idle, STOP_S)
    return one_server


def said(
    sound: bytes, model: str = MODEL_NAME, *, stream: bool = False, what: str = "transcriptions", **fields: Any
) -> Task:
    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(sound), 65536):
            yield sound[at : at + 65536]

    body = json.dumps({"model": model} | fields).encode()
    files = (UploadedFile("file", "a.wav", "audio/wav", len(sound), pieces),)
    endpoint = f"/v1/audio/{what}"
    return Task("job_1", "req_1", Capability.TRANSCRIPTIONS, endpoint, model, model, stream, body, files)


def heard(text: str) -> bool:
    return "quick brown fox jumps over the lazy dog" in text.lower()


def check(chunks: list[Chunk], finish: Finish) -> None:
    assert finish.content_type == "application/json"
    assert heard(json.loads(b"".join(chunk.data for chunk in chunks))["text"])


def events(chunks: list[Chunk]) -> list[dict[str, Any]]:
    frames = b"".join(chunk.data for chunk in chunks).decode().split("\n\n")
    assert frames.pop() == ""
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


class TestWhisperContract(AdapterContract):
    @pytest.fixture
    async def rig(self, server: WhisperServer, sound: bytes, paragraph: bytes) -> AsyncIterator[AdapterRig]:
        backend = WhisperBackend(BackendConfig(url=server.url, options={"stream": "yes"}))
        yield AdapterRig(
            backend=backend,
            capability=Capability.TRANSCRIPTIONS,
            short=said(sound),
            check=check,
            long=said(repeated(paragraph, LONG)),
            bad=said(b"this is no sound at all"),
            idle=server.idle,
            kill=server.kill,
            start=server.spawn,
            progress=True,
            stop_s=STOP_S,
        )
        await backend.close()


@asynccontextmanager
async def adapter(url: str, *models: str, **options: str) -> AsyncIterator[WhisperBackend]:
    backend = WhisperBackend(BackendConfig(url=url, models=models, options=options))
    try:
        yield backend
    finally:
        await backend.close()


async def test_a_real_whisper_in_every_format(server: WhisperServer, sound: bytes) -> None:
    """With words timed, streamed, and refused: one server for all of it."""
    for options in ({}, {"stream": "yes"}):
        async with adapter(server.url, **options) as backend:
            for name in ("text", "srt", "vtt"):
                chunks, _, finish = await outputs_of(backend, said(sound, response_format=name))
                assert finish.content_type == "text/plain; charset=utf-8"
                assert heard(chunks[-1].data.decode())
            task = said(sound, response_format="verbose_json", timestamp_granularities=["word"])
            chunks, _, _ = await outputs_of(backend, task)
            verbose = TranscriptionVerbose.model_validate_json(chunks[-1].data)
            assert verbose.words is not None
            assert [word.word.lower() for word in verbose.words][:2] == ["the", "quick"]
            assert all(word.start <= word.end <= verbose.duration for word in verbose.words)
            chunks, _, finish = await outputs_of(backend, said(sound, stream=True))
            *deltas, done = events(chunks)
            assert finish.content_type == "text/event-stream"
            assert "".join(event["delta"] for event in deltas) == done["text"]
            assert heard(done["text"])
            for refused, param in (
                (said(sound, language="de"), "language"),
                (said(sound, what="translations"), "model"),
                (said(sound, stream=True, language="tlhingan"), "language"),
            ):
                with pytest.raises(BackendRefused) as caught:
                    await outputs_of(backend, refused)
                assert caught.value.info.param == param


async def test_a_stream_comes_as_it_is_heard(server: WhisperServer, paragraph: bytes) -> None:
    """The first words are with the caller while the server still listens."""
    async with adapter(server.url, stream="yes") as backend:
        output = cast("AsyncGenerator[Output, None]", backend.run(said(repeated(paragraph, LONG), stream=True)))
        first = await anext(output)
        assert isinstance(first, Chunk)
        assert "small boat" in events([first])[0]["delta"]
        assert await is_busy(server)
        await output.aclose()
        await eventually(server.idle, STOP_S)


async def test_a_server_that_cannot_be_stopped_keeps_its_slot(server: WhisperServer, paragraph: bytes) -> None:
    """Cancelled, the adapter returns when the server is done; cancelled again, at once."""
    async with adapter(server.url) as backend:
        work = asyncio.create_task(outputs_of(backend, said(repeated(paragraph, 2))))
        await eventually(lambda: is_busy(server), 30)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        assert await server.idle()
        work = asyncio.create_task(outputs_of(backend, said(repeated(paragraph, LONG))))
        await eventually(lambda: is_busy(server), 30)
        work.cancel()
        await asyncio.sleep(0)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        await eventually(server.idle, STOP_S)


async def is_busy(server: WhisperServer) -> bool:
    return not await server.idle()


# Servers that do not run here

Answer = Callable[["Double", dict[str, Any]], web.StreamResponse]
VERBOSE = {"task": "transcribe", "language": "en", "duration": 2.0, "text": " Hello there.",
           "segments": [{"id": 0, "start": 0.0, "end": 2.0, "text": " Hello there."}]}  # fmt: skip


@dataclass
class Double:
    """A speech-to-text server: what it was asked, and what it answers."""

    models: list[dict[str, Any]] | None = None
    page: str = ""
    path: str = "/v1/audio/transcriptions"
    answer: Answer = lambda *_: web.json_response(VERBOSE)
    forms: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""

    async def take(self, request: web.Request) -> web.StreamResponse:
        form = await request.post()
        fields: dict[str, Any] = {name: form.getall(name) for name in form}
        upload = fields.pop("file")[0]
        fields = {name: values if len(values) > 1 else values[0] for name, values in fields.items()}
        self.forms.append(fields | {"sound": upload.file.read(), "filename": upload.filename})
        return self.answer(self, fields)

    async def list(self, _: web.Request) -> web.StreamResponse:
        if self.models is None:
            return web.Response(status=404)
        return web.json_response({"object": "list", "data": self.models})

    async def front(self, _: web.Request) -> web.StreamResponse:
        return web.Response(text=self.page, content_type="text/html")


@asynccontextmanager
async def running(double: Double) -> AsyncIterator[Double]:
    app = web.Application()
    app.router.add_post(double.path, double.take)
    app.router.add_get("/v1/models", double.list)
    app.router.add_get("/", double.front)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    double.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield double
    finally:
        await runner.cleanup()


def whisper_cpp(**fields: Any) -> Double:
    return Double(page="<html><h1>Whisper.cpp Server</h1></html>", path="/inference", **fields)


WAV = b"RIFF....WAVEfmt and so on"


async def test_whisper_cpp_is_known_by_its_page() -> None:
    """It names no model, and takes its own fields; the caller notices nothing."""
    words = [{"word": " Hello", "start": 0.0, "end": 0.5}, {"word": " there.", "start": 0.5, "end": 1.0}]
    answer = VERBOSE | {"segments": [VERBOSE["segments"][0] | {"words": words}]}  # type: ignore[index]
    async with (
        running(whisper_cpp(answer=lambda *_: web.json_response(answer))) as double,
        adapter(double.url) as backend,
    ):
        await backend.health()
        assert [model.name for model in (await backend.discover()).models] == ["whisper"]
        task = said(WAV, "whisper", what="translations", response_format="verbose_json", prompt="Hm.",
                    temperature=0.5, beam_size=2)  # fmt: skip
        chunks, _, _ = await outputs_of(backend, task)
        assert json.loads(chunks[0].data)["language"] == "english"
        form = double.forms[0]
        assert form.pop("sound") == WAV
        assert form == {
            "filename": "a.wav", "prompt": "Hm.", "temperature": "0.5", "language": "auto", "translate": "true",
            "beam_size": "2", "response_format": "verbose_json",
        }  # fmt: skip
        task = said(WAV, "whisper", response_format="verbose_json", timestamp_granularities=["word"])
        chunks, _, _ = await outputs_of(backend, task)
        assert [word["word"] for word in json.loads(chunks[0].data)["words"]] == ["Hello", "there."]
    async with running(whisper_cpp()) as double, adapter(double.url, "large-v3", api="whispercpp") as backend:
        assert [model.name for model in (await backend.discover()).models] == ["large-v3"]


async def test_only_models_that_hear_are_offered() -> None:
    """A server for speech in both directions lists its voices too."""
    models = [{"id": "a", "task": "automatic-speech-recognition"}, {"id": "b", "task": "text-to-speech"}, {"id": "c"}]
    async with running(Double(models=models)) as double, adapter(double.url) as backend:
        assert [model.name for model in (await backend.discover()).models] == ["a", "c"]
        with pytest.raises(ModelNotServed):
            await outputs_of(backend, said(WAV, "b"))


async def test_a_server_without_a_list_needs_names() -> None:
    async with running(Double()) as double:
        async with adapter(double.url) as backend:
            with pytest.raises(BackendError, match="--model"):
                await backend.discover()
        async with adapter(double.url, "tiny", model_field="model_name") as backend:
            await outputs_of(backend, said(WAV, "tiny", language="en", timestamp_granularities=["segment"]))
    assert double.forms[0] == {
        "model_name": "tiny", "language": "en", "response_format": "verbose_json", "sound": WAV, "filename": "a.wav"
    }  # fmt: skip


async def test_a_format_that_the_server_lacks_is_converted_or_refused() -> None:
    """Asked once, remembered; the refusal says what is possible."""

    def only(double: Double, form: dict[str, Any]) -> web.StreamResponse:
        if form["response_format"] == "json":
            return web.json_response({"text": "Hello there."})
        if form["response_format"] == "srt":
            return web.Response(text="1\n00:00:00,000 --> 00:00:02,000\nHello there.\n\n")
        return web.json_response({"error": {"message": "response_format 'verbose_json' is not compatible"}}, status=400)

    async with running(Double(models=[{"id": "tiny"}], answer=only)) as double, adapter(double.url) as backend:
        chunks, _, _ = await outputs_of(backend, said(WAV, "tiny", response_format="text"))
        assert chunks[0].data == b"Hello there.\n"
        chunks, _, _ = await outputs_of(backend, said(WAV, "tiny", response_format="srt"))
        assert b"00:00:02,000\nHello there." in chunks[0].data
        asked = [form["response_format"] for form in double.forms]
        assert asked == ["verbose_json", "verbose_json", "json", "json", "srt"]
        assert [form["filename"] for form in double.forms][1:3] == ["tone.wav", "tone.wav"], "the probe is our own"
        with pytest.raises(BackendRefused, match="json or text"):
            await outputs_of(backend, said(WAV, "tiny", response_format="verbose_json"))


async def test_a_file_that_is_refused_by_the_name_of_a_format_changes_nothing() -> None:
    """The server's words about one caller's file hold `response_format`; a probe shows that it has the format."""

    def no_noise(double: Double, form: dict[str, Any]) -> web.StreamResponse:
        if double.forms[-1]["sound"] == b"noise":
            told = "no audio (response_format=verbose_json)"
            return web.json_response({"error": {"message": told, "type": "invalid_request_error"}}, status=400)
        return web.json_response({"text": "Hello.", "segments": [{"start": 0, "end": 1, "text": "Hello."}]})

    async with running(Double(models=[{"id": "tiny"}], answer=no_noise)) as double, adapter(double.url) as backend:
        for _ in range(2):
            with pytest.raises(BackendRefused, match="no audio"):
                await outputs_of(backend, said(b"noise", "tiny"))
        chunks, _, _ = await outputs_of(backend, said(WAV, "tiny", response_format="srt"))
        assert b"-->" in chunks[0].data
        assert len(double.forms) == 4
        assert backend.limitations() == ()


@pytest.mark.parametrize(
    ("sound", "status", "text", "kind"),
    [
        (WAV, 400, '{"error": "failed to read audio data"}', BackendRefused),
        (WAV, 500, '{"detail": "Invalid data found when processing input"}', BackendRefused),
        (b"%PDF-1.7", 500, "Internal Server Error", BackendRefused),
        (WAV, 500, "Internal Server Error", BackendError),
        (WAV, 503, '{"error": "busy"}', BackendUnavailable),
        (WAV, 404, '{"detail": "Model \'tiny\' is not installed locally."}', ModelNotServed),
        (WAV, 200, "<html>", BackendError),
    ],
)
async def test_what_goes_wrong_is_said_rightly(sound: bytes, status: int, text: str, kind: type[BackendError]) -> None:
    """Bad sound is the caller's fault, whatever status the server gives it."""
    double = Double(models=[{"id": "tiny"}], answer=lambda *_: web.Response(status=status, text=text))
    async with running(double), adapter(double.url) as backend:
        with pytest.raises(kind) as caught:
            await outputs_of(backend, said(sound, "tiny"))
        assert type(caught.value) is kind


async def test_a_stream_without_its_end_is_a_failure() -> None:
    def half(*_: Any) -> web.StreamResponse:
        return web.Response(
            text='data: {"type": "transcript.text.delta", "delta": "Hel"}\n\n', content_type="text/event-stream"
        )

    async with running(Double(models=[{"id": "tiny"}], answer=half)) as double:
        async with adapter(double.url, stream="yes") as backend:
            with pytest.raises(BackendError, match="broke off") as caught:
                await outputs_of(backend, said(WAV, "tiny", stream=True))
        assert caught.value.transient


async def test_a_server_that_does_not_stream_after_all_is_understood() -> None:
    async with running(Double(models=[{"id": "tiny"}])) as double, adapter(double.url, stream="yes") as backend:
        chunks, _, _ = await outputs_of(backend, said(WAV, "tiny", stream=True))
        assert [event["type"] for event in events(chunks)] == ["transcript.text.delta", "transcript.text.done"]


@pytest.mark.parametrize("name", ["include", "known_speaker_names", "languages"])
async def test_what_these_servers_lack_is_refused(name: str) -> None:
    fields: dict[str, Any] = {name: ["x"]}
    async with running(Double(models=[{"id": "tiny"}])) as double, adapter(double.url) as backend:
        with pytest.raises(BackendRefused) as caught:
            await outputs_of(backend, said(WAV, "tiny", **fields))
        assert caught.value.info.param == name
        await outputs_of(backend, replace(said(WAV, "tiny", service_tier="flex", chunking_strategy="auto")))
    assert double.forms[0]["chunking_strategy"] == "auto"
    assert "service_tier" not in double.forms[0]


@pytest.mark.parametrize("options", [{"api": "soap"}, {"stream": "maybe"}, {"nonsense": "1"}], ids=str)
def test_options_that_make_no_sense_are_refused(options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="whisper adapter"):
        WhisperBackend(BackendConfig(url="http://127.0.0.1:1", options=options))


async def test_probes_find_what_a_real_server_has(server: WhisperServer) -> None:
    """The tone is sound enough for it, in every format."""
    client = HttpClient(server.url)
    try:
        for form in ("verbose_json", "json", "text"):
            lacks = await lacks_transcript(
                OpenAIClient(client, "/v1"), "/audio/transcriptions", {"model": MODEL_NAME}, form, ("json", "text")
            )
            assert lacks is False
    finally:
        await client.close()
