"""What the echo adapter answers where no chat is asked for."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import math
import struct
import wave
from collections.abc import AsyncIterator
from dataclasses import replace
from io import BytesIO
from typing import Any

import pytest
from PIL import Image

from schemas.jobs import Capability
from tests.backends.adapter_contract import AdapterContract, AdapterRig, outputs_of
from workers.backends.base import (
    Backend,
    BackendConfig,
    BackendError,
    BackendRefused,
    Chunk,
    Finish,
    Task,
    UploadedFile,
)
from workers.backends.echo.adapter import EchoBackend

PATHS = {
    Capability.EMBEDDINGS: "/v1/embeddings",
    Capability.IMAGES: "/v1/images/generations",
    Capability.SPEECH: "/v1/audio/speech",
    Capability.TRANSCRIPTIONS: "/v1/audio/transcriptions",
    Capability.RERANK: "/v1/rerank",
}
BODIES: dict[Capability, dict[str, Any]] = {
    Capability.EMBEDDINGS: {"input": ["one", "two", "three words here"]},
    Capability.IMAGES: {"prompt": "a cat", "n": 2},
    Capability.SPEECH: {"input": "Hello there, world.", "response_format": "wav"},
    Capability.TRANSCRIPTIONS: {},
    Capability.RERANK: {"query": "a red cat", "documents": ["a blue dog", "the red cat", "cat"]},
}
BAD: dict[Capability, dict[str, Any]] = {
    Capability.EMBEDDINGS: {"input": []},
    Capability.IMAGES: {"prompt": " "},
    Capability.SPEECH: {"input": ""},
    Capability.TRANSCRIPTIONS: {"response_format": "docx"},
    Capability.RERANK: {"query": "x", "documents": []},
}
SOUND = bytes(range(256)) * 40


async def sound() -> AsyncIterator[bytes]:
    for at in range(0, len(SOUND), 1000):
        yield SOUND[at : at + 1000]


def work(capability: Capability, stream: bool = False, **fields: Any) -> Task:
    body = json.dumps({"model": "echo", **BODIES[capability], **fields}).encode()
    files = (
        (UploadedFile("file", "a.wav", "audio/wav", len(SOUND), sound),)
        if capability is Capability.TRANSCRIPTIONS
        else ()
    )
    return Task("job_1", "req_1", capability, PATHS[capability], "echo", "alias", stream, body, files)


def echo(**options: str) -> EchoBackend:
    return EchoBackend(BackendConfig(options=options))


async def body_of(task: Task) -> bytes:
    chunks, _, _ = await outputs_of(echo(), task)
    return b"".join(chunk.data for chunk in chunks)


async def json_of(task: Task) -> Any:
    return json.loads(await body_of(task))


@pytest.mark.parametrize("capability", PATHS, ids=str)
class TestEchoMedia(AdapterContract):
    @pytest.fixture
    async def rig(self, capability: Capability, monkeypatch: pytest.MonkeyPatch) -> AdapterRig:
        backend, running = echo(), 0
        run = backend.run

        async def counted(task: Task) -> AsyncIterator[Any]:
            nonlocal running
            running += 1
            output = run(task)
            try:
                async for piece in output:
                    yield piece
            finally:
                await output.aclose()  # type: ignore[attr-defined]
                running -= 1

        async def idle() -> bool:
            return running == 0

        def check(chunks: list[Chunk], finish: Finish) -> None:
            assert any(chunk.data for chunk in chunks)
            assert finish.content_type == ("audio/wav" if capability is Capability.SPEECH else "application/json")

        monkeypatch.setattr(backend, "run", counted)
        slow = {"delay_ms": 200}
        long = work(capability, echo=json.dumps(slow) if capability is Capability.TRANSCRIPTIONS else slow)
        bad = work(capability, **BAD[capability])
        progress = capability is Capability.IMAGES
        short = work(capability)
        return AdapterRig(backend, capability, short, check, long, bad, idle, None, None, progress)


async def test_vectors_are_of_length_one_and_say_the_same_each_time() -> None:
    answer = await json_of(work(Capability.EMBEDDINGS, dimensions=7))
    vectors = [item["embedding"] for item in answer["data"]]
    assert [len(vector) for vector in vectors] == [7, 7, 7]
    assert all(abs(math.hypot(*vector) - 1) < 1e-5 for vector in vectors)
    assert len({tuple(vector) for vector in vectors}) == 3
    assert answer["model"] == "alias"
    assert answer["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    again = await json_of(work(Capability.EMBEDDINGS, input="two", dimensions=7, encoding_format="base64"))
    packed = base64.b64decode(again["data"][0]["embedding"])
    assert list(struct.unpack("<7f", packed)) == vectors[1]


@pytest.mark.parametrize("value", ["text", ["a", "b"], [1, 2], [[1], [2, 3]]])
async def test_every_form_of_input_is_taken(value: Any) -> None:
    answer = await json_of(work(Capability.EMBEDDINGS, input=value))
    assert len(answer["data"]) == (2 if isinstance(value[0], list) or value[0] == "a" else 1)


async def test_pictures_have_the_size_asked_for() -> None:
    answer = await json_of(work(Capability.IMAGES, size="1000x30", seed=4))
    pictures = [Image.open(BytesIO(base64.b64decode(item["b64_json"]))) for item in answer["data"]]
    assert [picture.size for picture in pictures] == [(1000, 30)] * 2
    assert [item["seed"] for item in answer["data"]] == [4, 5]
    colors = {picture.convert("RGB").getpixel((999, 29)) for picture in pictures}
    assert len(colors) == 2


async def test_a_picture_can_be_as_large_as_a_benchmark_wants() -> None:
    answer = await json_of(work(Capability.IMAGES, n=1, echo={"size": 1_000_000}))
    data = base64.b64decode(answer["data"][0]["b64_json"])
    assert len(data) == 1_000_000
    Image.open(BytesIO(data)).load()


async def test_pictures_show_how_they_come_about() -> None:
    task = work(Capability.IMAGES, stream=True, n=1, partial_images=2, echo={"tokens": 6})
    chunks, progress, finish = await outputs_of(echo(), task)
    assert [one.fraction for one in progress] == [step / 6 for step in range(1, 7)]
    kinds = [line[7:] for line in b"".join(chunk.data for chunk in chunks).split(b"\n") if line.startswith(b"event: ")]
    assert kinds == [b"image_generation.partial_image"] * 2 + [b"image_generation.completed"]
    assert finish.content_type == "text/event-stream"


async def test_pictures_by_url_are_kept() -> None:
    kept: list[tuple[bytes, str]] = []

    async def store_file(data: bytes, content_type: str) -> str:
        kept.append((data, content_type))
        return f"kept-{len(kept)}"

    answer = await json_of(replace(work(Capability.IMAGES, response_format="url"), store_file=store_file))
    assert [item["url"] for item in answer["data"]] == ["kept-1", "kept-2"]
    assert {content_type for _, content_type in kept} == {"image/png"}


async def test_speech_is_a_tone_as_long_as_the_text() -> None:
    with wave.open(BytesIO(await body_of(work(Capability.SPEECH)))) as sound:
        assert (sound.getframerate(), sound.getnchannels(), sound.getsampwidth()) == (24_000, 1, 2)
        assert sound.getnframes() == int(19 * 0.05 * 24_000)
        samples = struct.unpack("<600h", sound.readframes(600))
    assert samples[:60] == samples[540:]
    assert max(samples) > 7000


async def test_speech_streams_as_it_is_made() -> None:
    task = work(Capability.SPEECH, stream=True, response_format="pcm", echo={"size": 30_001})
    chunks, _, finish = await outputs_of(echo(), task)
    assert finish.content_type == "audio/pcm"
    sizes = [len(chunk.data) for chunk in chunks if chunk.data]
    assert sum(sizes) == 30_000
    assert len(sizes) == 3


@pytest.mark.parametrize("response_format", ["json", "text", "srt", "vtt", "verbose_json"])
async def test_a_transcript_says_what_arrived(response_format: str) -> None:
    said = (await body_of(work(Capability.TRANSCRIPTIONS, response_format=response_format))).decode()
    assert f"{len(SOUND)} bytes" in said
    assert hashlib.sha256(SOUND).hexdigest() in said


async def test_a_transcript_streams_word_by_word() -> None:
    chunks, _, finish = await outputs_of(echo(), work(Capability.TRANSCRIPTIONS, stream=True))
    events = [json.loads(chunk.data[6:]) for chunk in chunks]
    assert "".join(event["delta"] for event in events[:-1]) == events[-1]["text"]
    assert len(events) == 9
    assert finish.content_type == "text/event-stream"


async def test_rerank_orders_by_common_words() -> None:
    answer = await json_of(work(Capability.RERANK, top_n=2, return_documents=True))
    assert [(one["index"], one["document"]["text"]) for one in answer["results"]] == [(1, "the red cat"), (2, "cat")]
    assert answer["results"][0]["relevance_score"] == 0.5
    whole = await json_of(work(Capability.RERANK))
    assert [one["index"] for one in whole["results"]] == [1, 2, 0]
    assert "document" not in whole["results"][0]


@pytest.mark.parametrize("capability", PATHS, ids=str)
@pytest.mark.parametrize("fail", ["before", "mid", "refuse", "error", "drop"])
async def test_it_fails_as_it_is_told(capability: Capability, fail: str) -> None:
    """Never with a Finish."""
    task, seen = work(capability), []
    try:
        async for output in echo(fail=fail).run(task):
            seen.append(output)  # noqa: PERF401 - what came before the error counts
    except BackendRefused:
        assert fail == "refuse"
    except BackendError as error:
        assert fail in ("before", "mid", "error")
        assert error.transient == (fail != "error")
    else:
        assert fail == "drop"
    assert not any(isinstance(output, Finish) for output in seen)
    if fail not in ("mid", "drop"):
        assert not seen


async def test_a_hanging_answer_ends_when_it_is_closed() -> None:
    running: Backend = echo(fail="hang_mid")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(outputs_of(running, work(Capability.IMAGES)), 0.05)
