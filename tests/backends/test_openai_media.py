"""The adapter for OpenAI-style servers where no text is asked for, on a double that differs as real servers do."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
import wave
from collections.abc import AsyncIterator
from dataclasses import replace
from io import BytesIO
from typing import Any

import pytest

from schemas.jobs import Capability
from tests.backends.adapter_contract import AdapterContract, AdapterRig, eventually, outputs_of
from tests.backends.doubles.media import LENGTH, MediaDouble, png, sound_of, vector, wav
from workers.backends.base import (
    Backend,
    BackendConfig,
    BackendError,
    BackendRefused,
    Chunk,
    Finish,
    Task,
    UploadedFile,
    make_backend,
)

PATHS = {
    Capability.EMBEDDINGS: "/v1/embeddings",
    Capability.IMAGES: "/v1/images/generations",
    Capability.SPEECH: "/v1/audio/speech",
    Capability.TRANSCRIPTIONS: "/v1/audio/transcriptions",
    Capability.RERANK: "/v1/rerank",
}
MODELS = dict(zip(PATHS, ("e5", "sdxl", "tts-1", "whisper-1", "reranker"), strict=True))
BODIES: dict[Capability, dict[str, Any]] = {
    Capability.EMBEDDINGS: {"input": ["one", "two", "three"]},
    Capability.IMAGES: {"prompt": "a cat"},
    Capability.SPEECH: {"input": "Hello there.", "voice": "alloy", "response_format": "wav"},
    Capability.TRANSCRIPTIONS: {},
    Capability.RERANK: {"query": "x", "documents": ["", "x x", {"text": "x", "source": "y"}]},
}
CONTENT_TYPES = {Capability.SPEECH: "audio/wav"}
BAD: dict[Capability, dict[str, Any]] = {
    Capability.EMBEDDINGS: {"input": []},
    Capability.IMAGES: {"prompt": "forbidden"},
    Capability.SPEECH: {"voice": "nobody"},
    Capability.TRANSCRIPTIONS: {"response_format": "docx"},
    Capability.RERANK: {"documents": []},
}
UPLOAD = bytes(range(256)) * 4000


def file(field: str, data: bytes = UPLOAD, name: str = "a b.wav") -> UploadedFile:
    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(data), 65536):
            yield data[at : at + 65536]

    return UploadedFile(field, name, "audio/wav", len(data), pieces)


def work(capability: Capability, stream: bool = False, **fields: Any) -> Task:
    model = MODELS[capability]
    body = json.dumps({"model": "alias", **BODIES[capability], **fields}).encode()
    files = (file("file"),) if capability is Capability.TRANSCRIPTIONS else ()
    return Task("job_1", "req_1", capability, PATHS[capability], model, "alias", stream, body, files)


@pytest.fixture
async def server() -> AsyncIterator[MediaDouble]:
    async with MediaDouble() as double:
        yield double


@pytest.fixture
async def backend(server: MediaDouble) -> AsyncIterator[Backend]:
    made = make_backend("openai", BackendConfig(url=server.url))
    yield made
    await made.close()


async def body_of(backend: Backend, task: Task) -> bytes:
    chunks, _, _ = await outputs_of(backend, task)
    return b"".join(chunk.data for chunk in chunks)


async def json_of(backend: Backend, task: Task) -> Any:
    return json.loads(await body_of(backend, task))


def frames(data: bytes) -> list[Any]:
    """What the events say."""
    events = data.decode().split("\n\n")[:-1]
    return [json.loads(event.rpartition("data: ")[2]) for event in events]


@pytest.mark.parametrize("capability", PATHS, ids=str)
class TestMedia(AdapterContract):
    @pytest.fixture
    async def rig(self, server: MediaDouble, backend: Backend, capability: Capability) -> AdapterRig:
        def check(chunks: list[Chunk], finish: Finish) -> None:
            assert any(chunk.data for chunk in chunks)
            assert finish.content_type == CONTENT_TYPES.get(capability, "application/json")

        async def idle() -> bool:
            return server.streaming == 0

        long, bad = work(capability, user="slow"), work(capability, **BAD[capability])
        return AdapterRig(backend, capability, work(capability), check, long, bad, idle, server.kill, server.start)


@pytest.mark.parametrize("capability", PATHS, ids=str)
async def test_the_server_gets_its_own_name_of_the_model_and_nothing_of_nexus(
    server: MediaDouble, backend: Backend, capability: Capability
) -> None:
    await outputs_of(backend, work(capability, service_tier="flex", unheard_of="passed on"))
    form = capability is Capability.TRANSCRIPTIONS
    body = dict(server.form.fields) if form else server.last.json
    assert body["model"] == MODELS[capability]
    assert body["unheard_of"] == "passed on"
    assert "service_tier" not in body


@pytest.mark.parametrize("capability", PATHS, ids=str)
@pytest.mark.parametrize("until_close", [False, True], ids=["framed", "until-close"])
async def test_an_answer_cut_short_is_a_transient_failure(
    server: MediaDouble, backend: Backend, capability: Capability, until_close: bool
) -> None:
    """Also where only its JSON tells that it was."""
    if until_close and capability is Capability.SPEECH:
        pytest.skip("sound does not tell")
    server.media.cut, server.media.until_close = True, until_close
    with pytest.raises(BackendError) as caught:
        await outputs_of(backend, work(capability))
    assert caught.value.transient


async def test_a_second_cancellation_hangs_up(server: MediaDouble, backend: Backend) -> None:
    """The first one waits for the server's work to end: most servers do not stop for a caller who hangs up."""
    running = asyncio.create_task(outputs_of(backend, work(Capability.IMAGES, user="slow")))
    await eventually(lambda: is_working(server), 5)
    running.cancel()
    await asyncio.sleep(0)
    assert not running.done()
    assert server.streaming == 1
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await asyncio.wait_for(server.disconnected.wait(), 1)


async def is_working(server: MediaDouble) -> bool:
    return server.streaming == 1


async def test_a_server_that_lists_no_models_may_say_which_it_has(server: MediaDouble) -> None:
    """text-embeddings-inference does."""
    server.behave(models_status=404)
    server.media.info = {"model_id": "x/y", "model_type": {"reranker": {}}, "max_input_length": 512}
    backend = make_backend("openai", BackendConfig(url=server.url))
    [offer] = (await backend.discover()).models
    assert (offer.name, offer.capabilities, offer.context_length) == ("x/y", (Capability.RERANK,), 512)
    server.media.info = "nonsense"
    with pytest.raises(BackendError, match="does not list"):
        await backend.discover()
    await backend.close()


# Embeddings


def vectors_of(answer: Any) -> list[list[float]]:
    vectors = [item["embedding"] for item in answer["data"]]
    assert [item["index"] for item in answer["data"]] == list(range(len(vectors)))
    return [
        list(struct.unpack(f"<{LENGTH}f", base64.b64decode(one))) if isinstance(one, str) else one for one in vectors
    ]


@pytest.mark.parametrize("backwards", [False, True], ids=["in-order", "backwards"])
@pytest.mark.parametrize("server_has", ["yes", "ignores", "refuses"])
@pytest.mark.parametrize("form", ["float", "base64", None])
async def test_callers_get_the_form_they_want(
    server: MediaDouble, backend: Backend, form: str | None, server_has: Any, backwards: bool
) -> None:
    """Whatever the server speaks, in the order of the texts."""
    server.media.base64, server.media.backwards = server_has, backwards
    for _ in range(2):
        answer = await json_of(backend, work(Capability.EMBEDDINGS, encoding_format=form))
        assert isinstance(answer["data"][0]["embedding"], str) == (form == "base64")
        assert vectors_of(answer) == [vector(at, LENGTH, packed=False) for at in range(3)]
        assert answer["model"] == "alias"
        assert answer["usage"] == {"prompt_tokens": 9, "total_tokens": 9}
    refused = server_has == "refuses" and form == "base64"
    probed = 2
    assert sum(seen.method == "POST" for seen in server.seen) == (3 + probed if refused else 2)


async def test_dimensions_are_passed_on_and_checked(server: MediaDouble, backend: Backend) -> None:
    """A vector is never cut, nor given in a length that was not asked for."""
    answer = await json_of(backend, work(Capability.EMBEDDINGS, dimensions=2))
    assert [len(item["embedding"]) for item in answer["data"]] == [2, 2, 2]
    server.media.dimensions = False
    await outputs_of(backend, work(Capability.EMBEDDINGS, dimensions=LENGTH))
    with pytest.raises(BackendRefused, match=f"have {LENGTH} numbers") as caught:
        await outputs_of(backend, work(Capability.EMBEDDINGS, dimensions=2))
    assert caught.value.info.param == "dimensions"


@pytest.mark.parametrize("value", ["text", ["a", "b"], [1, 2, 3], [[1], [2, 3]]])
async def test_every_form_of_input_is_passed_on(server: MediaDouble, backend: Backend, value: Any) -> None:
    answer = await json_of(backend, work(Capability.EMBEDDINGS, input=value))
    assert server.last.json["input"] == value
    assert len(answer["data"]) == (2 if value[0] in ("a", [1]) else 1)


@pytest.mark.parametrize("form", ["float", "base64"])
async def test_a_missing_vector_is_an_error(server: MediaDouble, backend: Backend, form: str) -> None:
    server.media.missing = 1
    with pytest.raises(BackendError, match="2 embeddings for 3"):
        await outputs_of(backend, work(Capability.EMBEDDINGS, encoding_format=form))


# Rerank


@pytest.mark.parametrize("way", ["/v1/rerank", "/rerank", "/v2/rerank", "tei"])
async def test_every_servers_way_of_reranking_is_found_and_kept(
    server: MediaDouble, backend: Backend, way: Any
) -> None:
    server.media.rerank = way
    for documents in (False, True):
        server.seen.clear()
        answer = await json_of(backend, work(Capability.RERANK, top_n=2, return_documents=documents))
        assert [(one["index"], one["relevance_score"]) for one in answer["results"]] == [(1, 0.5), (2, 0.25)]
        assert answer["model"] == "alias"
    assert [one["document"] for one in answer["results"]] == [{"text": "x x"}, {"text": "x", "source": "y"}]
    assert sum(seen.method == "POST" for seen in server.seen) == 1


async def test_a_server_that_cannot_rerank_says_so(server: MediaDouble, backend: Backend) -> None:
    server.media.rerank = "/nowhere"  # type: ignore[assignment]
    with pytest.raises(BackendRefused) as caught:
        await outputs_of(backend, work(Capability.RERANK))
    assert caught.value.info.code == "unsupported_endpoint"


# Images


async def test_pictures_in_base64_pass_piece_by_piece(server: MediaDouble, backend: Backend) -> None:
    """In pieces, with what the server says of each."""
    server.media.picture = png() + bytes(3_000_000)
    chunks, _, _ = await outputs_of(backend, work(Capability.IMAGES, n=2))
    assert max(len(chunk.data) for chunk in chunks) < 1_000_000
    answer = json.loads(b"".join(chunk.data for chunk in chunks))
    assert [base64.b64decode(item["b64_json"]) for item in answer["data"]] == [server.media.picture] * 2
    assert answer["data"][1]["revised_prompt"] == "p1"
    assert server.last.json["response_format"] == "b64_json"


@pytest.mark.parametrize("where", ["/files/1.png?a=b", "http://{}/files/1.png?a=b", "data:image/png;base64,{}"])
async def test_a_picture_by_url_is_fetched_from_the_backend(
    server: MediaDouble, backend: Backend, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_data = where.startswith("data:")
    url = where.format(base64.b64encode(png()).decode() if is_data else server.url.removeprefix("http://"))
    monkeypatch.setattr(server, "_images", lambda _, edit: _answer({"data": [{"url": url}]}))
    answer = await json_of(backend, work(Capability.IMAGES))
    assert base64.b64decode(answer["data"][0]["b64_json"]) == png()
    if not is_data:
        assert server.seen[-1].path == "/files/1.png?a=b"


async def test_an_empty_field_gives_no_picture(
    server: MediaDouble, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some servers name both ways and fill one; one ends its answers with a line end of its own."""
    item = {"b64_json": "", "url": server.media.picture_url}
    monkeypatch.setattr(server, "_images", lambda _, edit: _answer({"data": [item]}))
    answer = await json_of(backend, work(Capability.IMAGES))
    assert base64.b64decode(answer["data"][0]["b64_json"]) == png()
    kind, pieces = _answer({"data": [{"b64_json": base64.b64encode(png()).decode()}]})
    monkeypatch.setattr(server, "_images", lambda _, edit: (kind, [*pieces, b"\n"]))
    assert (await json_of(backend, work(Capability.IMAGES)))["data"] == json.loads(pieces[0])["data"]


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/x.png", "https://example.com/x.png", "file:///etc/passwd", "//h/x"]
)
async def test_a_picture_elsewhere_is_not_fetched(
    server: MediaDouble, backend: Backend, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the backend says, nobody else is asked."""
    monkeypatch.setattr(server, "_images", lambda _, edit: _answer({"data": [{"url": url}]}))
    with pytest.raises(BackendError, match="fetches only"):
        await outputs_of(backend, work(Capability.IMAGES))


def _answer(value: Any) -> tuple[str, list[bytes]]:
    return "application/json", [json.dumps(value).encode()]


@pytest.mark.parametrize("given", ["b64_json", "url"])
async def test_a_caller_who_wants_urls_gets_kept_pictures(server: MediaDouble, backend: Backend, given: Any) -> None:
    server.media.pictures = given
    kept: list[bytes] = []

    async def store_file(data: bytes, content_type: str) -> str:
        assert content_type == "image/png"
        kept.append(data)
        return f"kept-{len(kept)}"

    answer = await json_of(backend, replace(work(Capability.IMAGES, n=2, response_format="url"), store_file=store_file))
    assert [item["url"] for item in answer["data"]] == ["kept-1", "kept-2"]
    assert kept == [png()] * 2


async def test_a_model_that_does_not_know_response_format_is_asked_without(
    server: MediaDouble, backend: Backend
) -> None:
    server.media.refuses = ("response_format",)
    for _ in range(2):
        answer = await json_of(backend, work(Capability.IMAGES))
        assert base64.b64decode(answer["data"][0]["b64_json"]) == png()
    assert [("response_format" in seen.json) for seen in server.seen if seen.method == "POST"] == [True, False] * 2
    assert backend.limitations() == ()


async def test_picture_events_are_relayed(server: MediaDouble, backend: Backend) -> None:
    """With their names."""
    chunks, _, finish = await outputs_of(backend, work(Capability.IMAGES, stream=True, partial_images=2))
    data = b"".join(chunk.data for chunk in chunks)
    assert data.count(b"event: image_generation.partial_image\n") == 2
    assert [event["type"].rpartition(".")[2] for event in frames(data)] == ["partial_image"] * 2 + ["completed"]
    assert finish.content_type == "text/event-stream"


@pytest.mark.parametrize("changes", [{"stream": "no"}, {"refuses": ("stream",)}])
async def test_a_server_without_streams_still_serves_them(
    server: MediaDouble, backend: Backend, changes: dict[str, Any]
) -> None:
    for name, value in changes.items():
        setattr(server.media, name, value)
    [event] = frames(await body_of(backend, work(Capability.IMAGES, stream=True, partial_images=2)))
    assert event["type"] == "image_generation.completed"
    assert base64.b64decode(event["b64_json"]) == png()


@pytest.mark.parametrize(
    ("raw", "error", "transient"),
    [
        (b'event: image_generation.partial_image\ndata: {"type":"image_generation.partial_image"}\n\n', "ended", True),
        (
            b'data: {"type":"error","error":{"message":"out of memory","type":"server_error"}}\n\n',
            "out of memory",
            True,
        ),
    ],
)
async def test_a_stream_of_pictures_that_goes_wrong_is_an_error(
    server: MediaDouble, backend: Backend, raw: bytes, error: str, transient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_images", lambda _, edit: ("text/event-stream", [raw]))
    with pytest.raises(BackendError, match=error) as caught:
        await outputs_of(backend, work(Capability.IMAGES, stream=True))
    assert caught.value.transient == transient


@pytest.mark.parametrize(
    "answer", [{"error": {"message": "no VRAM"}}, {"data": "x"}, {"data": [{"b64_json": None}]}, {}]
)
async def test_an_answer_without_pictures_is_an_error(
    server: MediaDouble, backend: Backend, answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_images", lambda _, edit: _answer(answer))
    with pytest.raises(BackendError):
        await outputs_of(backend, work(Capability.IMAGES))


@pytest.mark.parametrize("images", [1, 3])
async def test_edits_send_their_pictures(server: MediaDouble, backend: Backend, images: int) -> None:
    """Byte for byte, under the names that OpenAI has for one and for several."""
    files = (*(file("image", UPLOAD + bytes([n]), f"{n}.png") for n in range(images)), file("mask", b"mask", "m.png"))
    task = replace(work(Capability.IMAGES, n="1"), endpoint="/v1/images/edits", files=files)
    answer = await json_of(backend, task)
    assert base64.b64decode(answer["data"][0]["b64_json"]) == png()
    assert server.last.path == "/v1/images/edits"
    name = "image" if images == 1 else "image[]"
    expected = [(name, f"{n}.png", UPLOAD + bytes([n])) for n in range(images)]
    assert server.form.files == [*expected, ("mask", "m.png", b"mask")]
    assert server.form.field("prompt") == "a cat"


# Speech


@pytest.mark.parametrize("codec", ["mp3", "opus", "aac", "flac"])
async def test_sound_is_relayed_as_it_comes(server: MediaDouble, backend: Backend, codec: str) -> None:
    chunks, _, finish = await outputs_of(backend, work(Capability.SPEECH, stream=True, response_format=codec))
    assert b"".join(chunk.data for chunk in chunks) == sound_of(codec)
    assert len(chunks) > 1
    assert finish.content_type == ("audio/ogg" if codec == "opus" else f"audio/{'mpeg' if codec == 'mp3' else codec}")


async def test_samples_are_relayed_and_wav_has_its_true_length(server: MediaDouble, backend: Backend) -> None:
    assert await body_of(backend, work(Capability.SPEECH, response_format="pcm")) == wav()[44:]
    with wave.open(BytesIO(await body_of(backend, work(Capability.SPEECH)))) as sound:
        assert sound.readframes(1 << 20) == wav()[44:]


@pytest.mark.parametrize("changes", [{"sounds": ("wav",)}, {"always": "wav"}])
async def test_a_format_that_the_server_lacks_is_made_of_another(
    server: MediaDouble, backend: Backend, changes: dict[str, Any]
) -> None:
    """Also where it gives the other one without saying so. What was refused once is not asked for again."""
    for name, value in changes.items():
        setattr(server.media, name, value)
    for _ in range(2):
        data = await body_of(backend, work(Capability.SPEECH, response_format="flac"))
        assert data.startswith(b"fLaC")
    probed = 2
    assert sum(seen.method == "POST" for seen in server.seen) == (3 + probed if "sounds" in changes else 2)


@pytest.mark.parametrize("wanted", ["mp3", "flac"])
async def test_frames_without_a_header_are_known_for_mp3(server: MediaDouble, backend: Backend, wanted: str) -> None:
    """Relayed where that is what is wanted; otherwise read, which shows that these are none."""
    server.media.always = "bare mp3"
    task = work(Capability.SPEECH, response_format=wanted)
    if wanted == "mp3":
        assert await body_of(backend, task) == sound_of("bare mp3")
        return
    with pytest.raises(BackendError, match=r"audio cannot be read|no audio"):
        await outputs_of(backend, task)


async def test_no_sound_at_all_is_an_error(server: MediaDouble, backend: Backend) -> None:
    server.media.always = ""
    with pytest.raises(BackendError, match="no audio"):
        await outputs_of(backend, work(Capability.SPEECH, response_format="mp3"))


async def test_a_server_without_a_known_format_says_so(server: MediaDouble, backend: Backend) -> None:
    server.media.sounds = ("midi",)
    for _ in range(2):
        with pytest.raises(BackendRefused, match="format"):
            await outputs_of(backend, work(Capability.SPEECH))


async def test_speech_as_events(server: MediaDouble, backend: Backend) -> None:
    task = work(Capability.SPEECH, stream=True, response_format="mp3", stream_format="sse")
    *deltas, done = frames(await body_of(backend, task))
    assert b"".join(base64.b64decode(event["audio"]) for event in deltas) == sound_of("mp3")
    assert done["type"] == "speech.audio.done"
    assert "stream_format" not in server.last.json


async def test_closing_a_stream_of_sound_hangs_up(server: MediaDouble, backend: Backend) -> None:
    output: Any = backend.run(work(Capability.SPEECH, stream=True, response_format="mp3", user="slow"))
    await anext(output)
    await output.aclose()
    await asyncio.wait_for(server.disconnected.wait(), 2)


@pytest.mark.parametrize(
    "answer",
    [
        ["a", "b"],
        {"voices": ["a", "b"]},
        {"data": [{"id": "a"}, {"name": "b"}, {}, 7]},
        {"voices": [{"voice_id": "a"}, "b"]},
    ],
)
async def test_voices_are_offered(server: MediaDouble, backend: Backend, answer: Any) -> None:
    server.media.voices = answer
    found = await backend.discover()
    assert {model.name: model.voices for model in found.models if model.voices} == {"tts-1": ("a", "b")}


@pytest.mark.parametrize("answer", ["nonsense", {"voices": 7}, None])
async def test_a_server_without_voices_offers_none(server: MediaDouble, backend: Backend, answer: Any) -> None:
    server.media.voices = answer
    found = await backend.discover()
    assert not any(model.voices for model in found.models)


# Transcriptions


async def test_an_upload_arrives_byte_for_byte(server: MediaDouble, backend: Backend) -> None:
    fields: dict[str, Any] = {"language": "en", "temperature": 0.5, "include": ["logprobs"], "prompt": 'a"b\r\n'}
    answer = await json_of(backend, work(Capability.TRANSCRIPTIONS, **fields))
    assert answer == {"text": "Hello there. Bye.", "logprobs": [1]}
    assert server.form.files == [("file", "a b.wav", UPLOAD)]
    sent = {name: server.form.field(name) for name in ("language", "temperature", "include[]", "prompt")}
    assert sent == {"language": "en", "temperature": "0.5", "include[]": "logprobs", "prompt": 'a"b\r\n'}


@pytest.mark.parametrize("server_has", [("json", "text", "srt", "vtt", "verbose_json"), ("verbose_json",)])
@pytest.mark.parametrize("wanted", ["json", "text", "srt", "vtt", "verbose_json"])
async def test_every_format_is_had(
    server: MediaDouble, backend: Backend, wanted: str, server_has: tuple[str, ...]
) -> None:
    """From a server that has only one that tells all."""
    server.media.transcripts = server_has
    chunks, _, finish = await outputs_of(backend, work(Capability.TRANSCRIPTIONS, response_format=wanted))
    data = b"".join(chunk.data for chunk in chunks).decode()
    assert "Hello there." in data
    assert finish.content_type == ("application/json" if "json" in wanted else "text/plain; charset=utf-8")
    assert ("-->" in data) == (wanted in ("srt", "vtt"))
    assert ("segments" in data) == (wanted == "verbose_json")


async def test_times_that_the_server_does_not_tell_are_refused(server: MediaDouble, backend: Backend) -> None:
    server.media.transcripts = ("json",)
    with pytest.raises(BackendRefused, match="json or text"):
        await outputs_of(backend, work(Capability.TRANSCRIPTIONS, response_format="srt"))
    assert (await json_of(backend, work(Capability.TRANSCRIPTIONS)))["text"]


async def test_text_in_quotes_is_unwrapped(server: MediaDouble, backend: Backend) -> None:
    """Some servers give text as a JSON string."""
    server.media.text_as_json = True
    assert await body_of(backend, work(Capability.TRANSCRIPTIONS, response_format="text")) == b"Hello there. Bye.\n"


async def test_translations_go_to_their_own_endpoint(server: MediaDouble, backend: Backend) -> None:
    await outputs_of(backend, replace(work(Capability.TRANSCRIPTIONS), endpoint="/v1/audio/translations"))
    assert server.last.path == "/v1/audio/translations"


@pytest.mark.parametrize("manner", ["openai", "segments", "no", "refuses"])
async def test_a_transcript_streams_in_openais_events(server: MediaDouble, backend: Backend, manner: Any) -> None:
    """Whatever the server's own manner is."""
    server.media.stream = manner
    *deltas, done = frames(await body_of(backend, work(Capability.TRANSCRIPTIONS, stream=True)))
    assert {event["type"] for event in deltas} == {"transcript.text.delta"}
    assert "".join(event["delta"] for event in deltas).strip() == done["text"] == "Hello there. Bye."
    assert done["type"] == "transcript.text.done"


async def test_what_is_no_sound_is_refused(server: MediaDouble, backend: Backend) -> None:
    with pytest.raises(BackendRefused, match="no sound"):
        await outputs_of(backend, replace(work(Capability.TRANSCRIPTIONS), files=(file("file", b"noise"),)))
