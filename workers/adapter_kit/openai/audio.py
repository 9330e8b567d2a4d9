"""`/v1/audio/speech`, `/transcriptions` and `/translations` of an OpenAI-style server.

A format that a model lacks, as a probe of our own shows, is made of another one that it has. Without that proof, the caller gets
the server's own refusal.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from functools import partial
from typing import Any, TypeVar

import orjson

from workers.adapter_kit.audio.codecs import PCM_RATE, SoundFormat
from workers.adapter_kit.audio.speech import NO_SOUND, SpeechRequest, speak
from workers.adapter_kit.audio.transcripts import (
    PLAIN,
    Format,
    Transcript,
    TranscriptionRequest,
    delta_frame,
    deltas,
    done_frame,
    from_json,
    parse,
    render,
)
from workers.adapter_kit.error_mapping import stream_error
from workers.adapter_kit.http_client import Response
from workers.adapter_kit.multipart import FilePart, encode
from workers.adapter_kit.openai.client import (
    JSON,
    Api,
    events_of,
    fields_of,
    form_fields,
    is_about,
    is_events,
    is_json,
    json_of,
)
from workers.adapter_kit.openai.feature_probes import STREAM, lacks_sound, lacks_transcript, lacks_transcript_stream
from workers.adapter_kit.sse import payloads
from workers.backends.base import BackendError, BackendRefused, Chunk, Finish, Output, Task

TRANSCRIPT_LIMIT = 64 * 1024 * 1024
EVENT_LIMIT = 4 * 1024 * 1024
SOUNDS = ("wav", "flac", "mp3")
"""What to ask for instead of a format that the server lacks: every server has one of them."""
TRANSCRIPTS: tuple[Format, ...] = ("verbose_json", "json", "text")
MAGIC = ((b"RIFF", "wav"), (b"OggS", "opus"), (b"fLaC", "flac"), (b"ID3", "mp3"))
MAGIC_SIZE = 4
VOICE_LENGTH = 100
Name = TypeVar("Name", bound=str)
RATE = re.compile(r"rate\s*=\s*(\d+)")


# Speech


async def speech(api: Api, task: Task) -> AsyncGenerator[Output]:
    """The sound as it comes where the server has the format, else made of one that it has."""
    request = SpeechRequest.of(task)
    response, asked = await _spoken(api, task, request)
    try:
        first = b""
        while len(first) < MAGIC_SIZE and (data := await response.read()):
            first += data
        if not first:
            raise BackendError(NO_SOUND)
        source = _source(first, asked, response.headers.get("content-type", ""))
        async with aclosing(speak(task, request, _sound(response, first), source)) as outputs:
            async for output in outputs:
                yield output
    finally:
        response.close()


async def _spoken(api: Api, task: Task, request: SpeechRequest) -> tuple[Response, str]:
    fields = fields_of(request.fields, task.model)
    fields.pop("stream_format", None)  # events are made here
    voice = api.voices.get(task.model) or str(fields.get("voice") or "alloy")[:VOICE_LENGTH]
    refused: BackendRefused | None = None
    for codec in _untried(api, task.model, request.response_format, SOUNDS):
        try:
            return await api.post("/audio/speech", fields | {"response_format": codec}), codec
        except BackendRefused as error:
            probe = partial(lacks_sound, api, task.model, voice, codec, SOUNDS)
            if not (is_about(error, "format", codec) and await api.limitations.confirm(task.model, codec, probe)):
                raise
            refused = refused or error
    raise refused or BackendRefused(f"the backend has none of the formats {', '.join(SOUNDS)}", param="response_format")


def _untried(api: Api, model: str, wanted: Name, others: tuple[Name, ...]) -> Iterator[Name]:
    for name in dict.fromkeys((wanted, *others)):
        if not api.limitations.lacks(model, name):
            yield name


async def _sound(response: Response, first: bytes) -> AsyncGenerator[bytes]:
    yield first
    while data := await response.read():
        yield data


def _source(first: bytes, asked: str, content_type: str) -> SoundFormat:
    """What the sound is: some servers give what they have, whatever they are asked for."""
    if content_type.partition(";")[0].strip().lower().endswith("json"):
        raise BackendError("the backend answered with JSON instead of sound")
    codec = _codec(first, asked)
    rate = RATE.search(content_type)
    return SoundFormat(codec, int(rate[1]) if rate and codec == "pcm" else PCM_RATE)


def _codec(first: bytes, asked: str) -> str:
    for magic, codec in MAGIC:
        if first.startswith(magic):
            return codec
    # Samples may look like the beginning of a frame of MP3 or AAC.
    if asked != "pcm" and len(first) > 1 and first[0] == 0xFF and first[1] & 0xE0 == 0xE0:
        return "mp3" if first[1] & 0x06 else "aac"
    return asked


def voices_of(answer: Any) -> tuple[str, ...]:
    """Names in what `GET /v1/audio/voices` answers: `{"voices": […]}` or a list, of names or of objects."""
    if isinstance(answer, dict):
        answer = answer.get("voices") or answer.get("data")
    if not isinstance(answer, list):
        return ()
    names = (one if isinstance(one, str) else _named(one) for one in answer)
    return tuple(dict.fromkeys(name for name in names if name))


def _named(voice: Any) -> str:
    if not isinstance(voice, dict):
        return ""
    return next((str(voice[key]) for key in ("id", "voice_id", "name") if voice.get(key)), "")


# Transcriptions


async def transcribe(api: Api, task: Task) -> AsyncGenerator[Output]:
    """What was said, in the caller's format, made of another one where the server lacks it."""
    request = TranscriptionRequest.of(task)
    response, form = await _heard(api, task, request)
    try:
        if task.stream:
            async with aclosing(_events(response) if is_events(response) else _pretended(response, form)) as outputs:
                async for output in outputs:
                    yield output
            yield Finish(content_type="text/event-stream")
            return
        body, content_type = _in_form(request, form, response, await response.read_all(TRANSCRIPT_LIMIT))
        yield Chunk(body)
        yield Finish(content_type=content_type)
    finally:
        response.close()


async def _heard(api: Api, task: Task, request: TranscriptionRequest) -> tuple[Response, Format]:
    path = "/audio/translations" if request.what == "translate" else "/audio/transcriptions"
    limitations, model = api.limitations, task.model
    stream = task.stream and not limitations.lacks(model, STREAM)
    refused: BackendRefused | None = None
    wanted: Format = "json" if task.stream else request.response_format
    for form in _untried(api, model, wanted, TRANSCRIPTS):
        fields = form_fields(_fields(task, request, form) | ({"stream": True} if stream else {}))
        try:
            return await api.post(path, encode(fields, [FilePart.of(request.file)])), form
        except BackendRefused as error:
            streamless = partial(lacks_transcript_stream, api, path, model)
            if stream and is_about(error, STREAM) and await limitations.confirm(model, STREAM, streamless):
                return await _heard(api, task, request)
            formless = partial(lacks_transcript, api, path, {"model": model}, form, TRANSCRIPTS)
            if not (is_about(error, "format", form) and await limitations.confirm(model, form, formless)):
                raise
            refused = refused or error
    raise refused or BackendRefused("the backend has none of the formats that are known", param="response_format")


def _fields(task: Task, request: TranscriptionRequest, form: str) -> JSON:
    times = {"timestamp_granularities": sorted(request.granularities)} if form == "verbose_json" else {}
    return {
        **request.extra,
        "model": task.model,
        "language": request.language,
        "prompt": request.prompt,
        "temperature": request.temperature,
        "response_format": form,
        **times,
    }


def _in_form(request: TranscriptionRequest, form: Format, response: Response, data: bytes) -> tuple[bytes, str]:
    """As it came where that is what is wanted."""
    said = _said(response, form, data)
    wanted = request.response_format
    if form == wanted and said is None:
        return data, PLAIN
    if form == wanted == "json" and isinstance(said, dict) and isinstance(said.get("text"), str):
        return data, "application/json"
    return render(_transcript(said, form, data), wanted, task=request.what, granularities=request.granularities)


def _said(response: Response, form: Format, data: bytes) -> JSON | str | None:
    """What JSON says, also where another format was asked for; None where it is none."""
    if form in ("json", "verbose_json") or is_json(response):
        said = json_of(response, data)
        if isinstance(said, dict) and said.get("error"):
            raise stream_error(said)
        return said if isinstance(said, dict | str) else {}
    return None


def _transcript(said: JSON | str | None, form: Format, data: bytes) -> Transcript:
    if isinstance(said, dict):
        return from_json(said)
    return Transcript(said.strip()) if isinstance(said, str) else parse(data, form)


async def _pretended(response: Response, form: Format) -> AsyncGenerator[Output]:
    """Events of an answer that came in one piece."""
    data = await response.read_all(TRANSCRIPT_LIMIT)
    transcript = _transcript(_said(response, form, data), form, data)
    for text in deltas(transcript):
        yield Chunk(delta_frame(text))
    yield Chunk(done_frame(transcript), 0)


async def _events(response: Response) -> AsyncGenerator[Output]:
    """OpenAI's events as they came; a server's own, `{"text": …}` for each segment, as OpenAI's."""
    texts: list[str] = []
    typed = done = False
    async for block in events_of(response, EVENT_LIMIT):
        for payload in payloads(block):
            if payload == b"[DONE]":
                continue
            event = _event(payload)
            kind = str(event.get("type") or "")
            if event.get("error") or kind == "error":
                raise stream_error(event)
            typed = typed or kind.startswith("transcript.text.")
            done = done or kind == "transcript.text.done"
            if kind:
                yield Chunk(b"data: %b\n\n" % payload)
            elif text := str(event.get("text") or ""):
                texts.append(text if not texts or text.startswith(" ") else f" {text}")
                yield Chunk(delta_frame(texts[-1]))
    if typed and not done:
        raise BackendError("the backend's stream ended before its end was said", transient=True)
    if not typed:
        yield Chunk(done_frame(Transcript("".join(texts).strip())), 0)


def _event(payload: bytes) -> JSON:
    try:
        event = orjson.loads(payload)
    except orjson.JSONDecodeError:
        return {"text": payload.decode("utf-8", "replace")}
    return event if isinstance(event, dict) else {"text": str(event)}
