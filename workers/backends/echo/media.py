"""The answers of the echo adapter to all requests that are not text. The same request always has the same answer.

| endpoint | answer | a token is |
|---|---|---|
| embeddings | a vector of length 1 made of the text's hash; 64 numbers, or `dimensions` | a text |
| images | a PNG of one color in the requested size; the option `size` sets the bytes of the file | a step, with its progress and a preview |
| speech | a tone of 50 ms for each character; the option `size` sets its bytes of samples | a word |
| transcriptions | a sentence with the size and the SHA-256 of the uploaded file | a word |
| rerank | the share of words that document and query have in common | a document |
| score | how many words the texts of a pair have in common | a pair |
| moderations | flags the categories whose names the text holds (`self-harm`, `hate threatening`) | a text |
"""

from __future__ import annotations

import hashlib
import math
import random
import re
import struct
import zlib
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from functools import lru_cache
from typing import Any, Protocol, cast

import orjson

from schemas.endpoints import BY_PATH
from schemas.frames import Progress
from schemas.jobs import Usage
from schemas.openai.score import ScoreRequest
from schemas.usage import MediaUsage
from workers.adapter_kit.audio.codecs import AudioFormat
from workers.adapter_kit.audio.speech import SynthesisRequest, respond_with_speech
from workers.adapter_kit.audio.transcripts import (
    RecognitionRequest,
    SpeechSegment,
    SpeechTranscript,
    SpeechWord,
    delta_frame,
    done_frame,
    render_transcript,
)
from workers.adapter_kit.embeddings import embeddings_body
from workers.adapter_kit.images.responses import GeneratedImage, ImageRequest
from workers.adapter_kit.images.responses import respond_with_images as images_answer
from workers.adapter_kit.request_fields import parse_json_object
from workers.adapter_kit.rerank import RankingRequest, rerank_body
from workers.backends.base import BackendRefused, Chunk, Finish, Output, Task

JSON = dict[str, Any]

EMBEDDING_LENGTH = 64
MAX_DIMENSIONS = 8192
STEPS = 4
SIDE = 64
RATE = 24_000
CHARACTER_S = 0.05
WORD_S = 0.5
PERIOD = b"".join(struct.pack("<h", int(8000 * math.sin(2 * math.pi * at / 60))) for at in range(60))
"""One wave of a tone of 400 Hz at `RATE`."""
MODERATION_CATEGORIES = (
    *("harassment", "harassment/threatening", "hate", "hate/threatening", "illicit", "illicit/violent", "self-harm"),
    *("self-harm/intent", "self-harm/instructions", "sexual", "sexual/minors", "violence", "violence/graphic"),
)
"""Those of omni-moderation."""
PICTURED_CATEGORIES = frozenset(
    ("self-harm", "self-harm/intent", "self-harm/instructions", "sexual", "violence", "violence/graphic")
)
"""Those that omni-moderation scores of pictures, too."""
IMAGE_FIELDS = (
    "size",
    "seed",
    "steps",
    "guidance",
    "negative_prompt",
    "strength",
    "edit",
    "images",
    "mask",
    "echo",
)


class Pacer(Protocol):
    """The requested pace of an answer."""

    tokens: int | None
    size: int | None

    async def step(self, total: int) -> None:
        """Wait before the next of `total` tokens, or end the answer by an exception."""


async def answer(task: Task, pace: Pacer) -> AsyncGenerator[Output]:
    """Answer a task that is not text."""
    make = _ANSWERS.get(task.endpoint)
    if make is None:
        raise BackendRefused(f"this backend does not serve {task.endpoint}")
    async with aclosing(cast("AsyncGenerator[Output]", make(task, pace))) as outputs:
        async for output in outputs:
            yield output


async def _embeddings(task: Task, pace: Pacer) -> AsyncGenerator[Output]:
    body = parse_json_object(task.body)
    texts = _inputs(body.get("input"))
    length = EMBEDDING_LENGTH if body.get("dimensions") is None else body["dimensions"]
    if not isinstance(length, int) or not 1 <= length <= MAX_DIMENSIONS:
        raise BackendRefused(f"dimensions must be a number from 1 to {MAX_DIMENSIONS}", param="dimensions")
    for _ in texts:
        await pace.step(len(texts))
        yield Chunk(b"")
    tokens = sum(len(text.split()) for text in texts)
    form = str(body.get("encoding_format") or "float")
    vectors = [_vector(text, length) for text in texts]
    yield Chunk(
        embeddings_body(vectors, model=task.public_model, encoding_format=form, prompt_tokens=tokens),
        0,
    )
    yield Finish(Usage(prompt_tokens=tokens, total_tokens=tokens))


def _inputs(value: Any) -> list[str]:
    if isinstance(value, str) and value:
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(one, int) for one in value):
            return [" ".join(map(str, value))]
        if all(isinstance(one, str) for one in value):
            return value
        if all(isinstance(one, list) and one for one in value):
            return [_inputs(one)[0] for one in value]
    raise BackendRefused("input must be a text, texts, token ids, or lists of token ids", param="input")


def _vector(text: str, length: int) -> array[float]:
    numbers = array("h", hashlib.shake_128(text.encode()).digest(2 * length))
    norm = math.hypot(*numbers)
    return array("f", [number / (norm or 1.0) for number in numbers])


def _images(task: Task, pace: Pacer) -> AsyncIterator[Output]:
    request = ImageRequest.from_task(task)
    request.require_supported(*IMAGE_FIELDS)
    return images_answer(task, request, _pictures(request, pace), keep_metadata=True)


async def _pictures(request: ImageRequest, pace: Pacer) -> AsyncIterator[Progress | GeneratedImage]:
    steps = pace.tokens or STEPS
    total = steps * request.n
    width, height = request.width or SIDE, request.height or SIDE
    for index in range(request.n):
        seed = request.seed_for(index) or 0
        for step in range(1, steps + 1):
            await pace.step(total)
            done = index * steps + step
            yield Progress(fraction=done / total, step=step, steps=steps, message=f"picture {index + 1}")
            if request.partial_images and step < steps:
                yield GeneratedImage(_png(width, height, f"{request.prompt}{seed}{step}"), final=False, index=index)
        yield GeneratedImage(
            _png(width, height, f"{request.prompt}{seed}", pace.size), seed=request.seed_for(index), index=index
        )


@lru_cache(maxsize=8)
def _png(width: int, height: int, say: str, size: int | None = None) -> bytes:
    """Return a PNG in a color that `say` selects; of `size` bytes, if it is not larger anyway."""
    color = hashlib.sha256(say.encode()).digest()[:3]
    rows = zlib.compress(bytes(height * (1 + (width + 7) // 8)))
    parts = [
        _part(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 3, 0, 0, 0)),
        _part(b"PLTE", color),
        _part(b"IDAT", rows),
        _part(b"IEND", b""),
    ]
    missing = (size or 0) - 8 - sum(map(len, parts)) - 12
    if missing >= 0:
        parts.insert(-1, _part(b"noIs", random.Random(say).randbytes(missing)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _part(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _speech(task: Task, pace: Pacer) -> AsyncIterator[Output]:
    request = SynthesisRequest.from_task(task)
    return respond_with_speech(task, request, _tone(request, pace), AudioFormat("pcm", RATE, 1))


async def _tone(request: SynthesisRequest, pace: Pacer) -> AsyncGenerator[bytes]:
    samples = int(len(request.input) * CHARACTER_S * RATE / request.speed)
    size = pace.size or samples * 2
    pieces = pace.tokens or len(request.input.split())
    at = 0
    for number in range(1, pieces + 1):
        await pace.step(pieces)
        end = size * number // pieces // 2 * 2
        phase = at % len(PERIOD)
        yield (PERIOD * ((end - at) // len(PERIOD) + 2))[phase : phase + end - at]
        at = end


async def _transcriptions(task: Task, pace: Pacer) -> AsyncGenerator[Output]:
    request = RecognitionRequest.from_task(task)
    size, digest = 0, hashlib.sha256()
    async for piece in request.file.pieces():
        size += len(piece)
        digest.update(piece)
    transcript = _transcript(f"Echo heard {size} bytes with the SHA-256 {digest.hexdigest()}.")
    body, content_type = render_transcript(
        transcript, request.response_format, task=request.mode, granularities=request.granularities
    )
    words = transcript.text.split(" ")
    for number, word in enumerate(words):
        await pace.step(len(words))
        yield Chunk(delta_frame(f" {word}" if number else word) if task.stream else b"")
    if task.stream:
        yield Chunk(done_frame(transcript), 0)
    else:
        yield Chunk(body, 0)
    media = MediaUsage(audio_s=transcript.seconds or 0.0)
    yield Finish(content_type="text/event-stream" if task.stream else content_type, media=media)


def _transcript(text: str) -> SpeechTranscript:
    words = tuple(SpeechWord(word, at * WORD_S, (at + 1) * WORD_S) for at, word in enumerate(text.split()))
    end = words[-1].end
    return SpeechTranscript(text, "english", end, (SpeechSegment(text, 0.0, end),), words)


async def _rerank(task: Task, pace: Pacer) -> AsyncGenerator[Output]:
    request = RankingRequest.from_task(task)
    for _ in request.texts:
        await pace.step(len(request.texts))
        yield Chunk(b"")
    query = set(request.query.lower().split())
    scores = [(at, _overlap(query, set(text.lower().split()))) for at, text in enumerate(request.texts)]
    tokens = sum(len(text.split()) for text in (request.query, *request.texts))
    yield Chunk(rerank_body(request, scores, model=task.public_model, tokens=tokens), 0)
    yield Finish(Usage(prompt_tokens=tokens, total_tokens=tokens))


async def _score(task: Task, pace: Pacer) -> AsyncGenerator[Output]:
    request = ScoreRequest.model_validate({**parse_json_object(task.body), "model": task.model})
    left, right = request.left, request.right
    pairs = list(zip(left if len(left) == len(right) else left * len(right), right, strict=True))
    for _ in pairs:
        await pace.step(len(pairs))
        yield Chunk(b"")
    data = [
        {"index": at, "object": "score", "score": _overlap(set(one.lower().split()), set(other.lower().split()))}
        for at, (one, other) in enumerate(pairs)
    ]
    tokens = sum(len(text.split()) for pair in pairs for text in pair)
    usage = Usage(prompt_tokens=tokens, total_tokens=tokens)
    answer = {"id": f"score-{task.job}", "object": "list", "model": task.public_model, "data": data}
    yield Chunk(orjson.dumps(answer | {"usage": usage.model_dump()}), 0)
    yield Finish(usage)


async def _moderations(task: Task, pace: Pacer) -> AsyncGenerator[Output]:
    given = parse_json_object(task.body).get("input")
    parts: list[Any] = given if isinstance(given, list) else [given]
    if isinstance(parts[0], dict):  # the parts of one content
        kinds = sorted({"text" if part["type"] == "text" else "image" for part in parts}, reverse=True)
        texts = [" ".join(part["text"] for part in parts if part["type"] == "text")]
    else:
        kinds, texts = ["text"], [str(part) for part in parts]
    for _ in texts:
        await pace.step(len(texts))
        yield Chunk(b"")
    answer = {
        "id": f"modr-{task.job}",
        "model": task.public_model,
        "results": [_moderated(one, kinds) for one in texts],
    }
    yield Chunk(orjson.dumps(answer), 0)
    yield Finish()


def _moderated(text: str, kinds: list[str]) -> JSON:
    """Score each category: near 1 where the text holds its name, else less than 0.01, by a hash of both."""
    words = " ".join(re.findall(r"[a-z]+", text.lower()))
    scores = {}
    for category in MODERATION_CATEGORIES:
        share = hashlib.sha256(f"{category} {text}".encode()).digest()[0] / 25_600
        named = re.search(rf"\b{re.sub('[^a-z]', ' ', category)}\b", words)
        scores[category] = 1 - share if named else share
    flags = {category: score > 0.5 for category, score in scores.items()}
    return {
        "flagged": any(flags.values()),
        "categories": flags,
        "category_scores": scores,
        "category_applied_input_types": {
            category: [kind for kind in kinds if kind == "text" or category in PICTURED_CATEGORIES]
            for category in MODERATION_CATEGORIES
        },
    }


def _overlap(one: set[str], other: set[str]) -> float:
    return len(one & other) / len(one | other or {""})


_ANSWERS: dict[str, Callable[[Task, Pacer], AsyncIterator[Output]]] = {
    "/v1/embeddings": _embeddings,
    "/v1/images/generations": _images,
    "/v1/images/edits": _images,
    "/v1/audio/speech": _speech,
    "/v1/audio/transcriptions": _transcriptions,
    "/v1/audio/translations": _transcriptions,
    "/v1/rerank": _rerank,
    "/v1/score": _score,
    "/v1/moderations": _moderations,
}
MEDIA = tuple(dict.fromkeys(BY_PATH[path].capability for path in _ANSWERS))
"""What a model is capable of beside text."""
