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

from workers.adapter_kit.audio.codecs import PCM_RATE_HZ, AudioFormat
from workers.adapter_kit.audio.speech import NO_AUDIO_MESSAGE, SynthesisRequest, respond_with_speech
from workers.adapter_kit.audio.transcripts import (
    TEXT_CONTENT_TYPE,
    RecognitionRequest,
    SpeechTranscript,
    TranscriptFormat,
    delta_frame,
    done_frame,
    parse_transcript,
    parse_transcript_json,
    render_transcript,
    text_deltas,
)
from workers.adapter_kit.error_mapping import error_from_payload
from workers.adapter_kit.http_client import BackendResponse
from workers.adapter_kit.multipart import FilePart, encode_multipart
from workers.adapter_kit.openai.client import (
    JSON,
    OpenAIClient,
    form_fields,
    forwarded_fields,
    is_event_stream,
    is_json_response,
    parse_json_response,
    read_events,
    rejects_parameter,
)
from workers.adapter_kit.openai.feature_probes import STREAM, lacks_sound, lacks_transcript, lacks_transcript_stream
from workers.adapter_kit.sse import payloads
from workers.backends.base import BackendError, BackendRefused, Chunk, Finish, Output, Task

TRANSCRIPT_LIMIT = 64 * 1024 * 1024
EVENT_LIMIT = 4 * 1024 * 1024
SOUNDS = ("wav", "flac", "mp3")
"""What to ask for instead of a format that the server lacks: every server has one of them."""
TRANSCRIPTS: tuple[TranscriptFormat, ...] = ("verbose_json", "json", "text")
MAGIC = ((b"RIFF", "wav"), (b"OggS", "opus"), (b"fLaC", "flac"), (b"ID3", "mp3"))
MAGIC_SIZE = 4
VOICE_LENGTH = 100
Name = TypeVar("Name", bound=str)
RATE = re.compile(r"rate\s*=\s*(\d+)")


# Speech


async def synthesize_speech(api: OpenAIClient, task: Task) -> AsyncGenerator[Output]:
    """The sound as it comes where the server has the format, else made of one that it has."""
    request = SynthesisRequest.from_task(task)
    response, asked = await _spoken(api, task, request)
    try:
        first = b""
        while len(first) < MAGIC_SIZE and (data := await response.read()):
            first += data
        if not first:
            raise BackendError(NO_AUDIO_MESSAGE)
        source = _source(first, asked, response.headers.get("content-type", ""))
        async with aclosing(respond_with_speech(task, request, _sound(response, first), source)) as outputs:
            async for output in outputs:
                yield output
    finally:
        response.close()


async def _spoken(api: OpenAIClient, task: Task, request: SynthesisRequest) -> tuple[BackendResponse, str]:
    fields = forwarded_fields(request.fields, task.model)
    fields.pop("stream_format", None)  # events are made here
    voice = api.voices.get(task.model) or str(fields.get("voice") or "alloy")[:VOICE_LENGTH]
    refused: BackendRefused | None = None
    for codec in _untried(api, task.model, request.response_format, SOUNDS):
        try:
            return await api.post("/audio/speech", fields | {"response_format": codec}), codec
        except BackendRefused as error:
            probe = partial(lacks_sound, api, task.model, voice, codec, SOUNDS)
            if not (
                rejects_parameter(error, "format", codec) and await api.limitations.confirm(task.model, codec, probe)
            ):
                raise
            refused = refused or error
    raise refused or BackendRefused(f"the backend has none of the formats {', '.join(SOUNDS)}", param="response_format")


def _untried(api: OpenAIClient, model: str, wanted: Name, others: tuple[Name, ...]) -> Iterator[Name]:
    for name in dict.fromkeys((wanted, *others)):
        if not api.limitations.lacks(model, name):
            yield name


async def _sound(response: BackendResponse, first: bytes) -> AsyncGenerator[bytes]:
    yield first
    while data := await response.read():
        yield data


def _source(first: bytes, asked: str, content_type: str) -> AudioFormat:
    """What the sound is: some servers give what they have, whatever they are asked for."""
    if content_type.partition(";")[0].strip().lower().endswith("json"):
        raise BackendError("the backend answered with JSON instead of sound")
    codec = _codec(first, asked)
    rate = RATE.search(content_type)
    return AudioFormat(codec, int(rate[1]) if rate and codec == "pcm" else PCM_RATE_HZ)


def _codec(first: bytes, asked: str) -> str:
    for magic, codec in MAGIC:
        if first.startswith(magic):
            return codec
    # Samples may look like the beginning of a frame of MP3 or AAC.
    if asked != "pcm" and len(first) > 1 and first[0] == 0xFF and first[1] & 0xE0 == 0xE0:
        return "mp3" if first[1] & 0x06 else "aac"
    return asked


def parse_voice_list(answer: Any) -> tuple[str, ...]:
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


async def transcribe(api: OpenAIClient, task: Task) -> AsyncGenerator[Output]:
    """What was said, in the caller's format, made of another one where the server lacks it."""
    request = RecognitionRequest.from_task(task)
    response, form = await _heard(api, task, request)
    try:
        if task.stream:
            async with aclosing(
                _events(response) if is_event_stream(response) else _pretended(response, form)
            ) as outputs:
                async for output in outputs:
                    yield output
            yield Finish(content_type="text/event-stream")
            return
        body, content_type = _in_form(request, form, response, await response.read_all(TRANSCRIPT_LIMIT))
        yield Chunk(body)
        yield Finish(content_type=content_type)
    finally:
        response.close()


async def _heard(
    api: OpenAIClient, task: Task, request: RecognitionRequest
) -> tuple[BackendResponse, TranscriptFormat]:
    path = "/audio/translations" if request.mode == "translate" else "/audio/transcriptions"
    limitations, model = api.limitations, task.model
    stream = task.stream and not limitations.lacks(model, STREAM)
    refused: BackendRefused | None = None
    wanted: TranscriptFormat = "json" if task.stream else request.response_format
    for form in _untried(api, model, wanted, TRANSCRIPTS):
        fields = form_fields(_fields(task, request, form) | ({"stream": True} if stream else {}))
        try:
            return await api.post(path, encode_multipart(fields, [FilePart.from_file(request.file)])), form
        except BackendRefused as error:
            streamless = partial(lacks_transcript_stream, api, path, model)
            if stream and rejects_parameter(error, STREAM) and await limitations.confirm(model, STREAM, streamless):
                return await _heard(api, task, request)
            formless = partial(lacks_transcript, api, path, {"model": model}, form, TRANSCRIPTS)
            if not (rejects_parameter(error, "format", form) and await limitations.confirm(model, form, formless)):
                raise
            refused = refused or error
    raise refused or BackendRefused("the backend has none of the formats that are known", param="response_format")


def _fields(task: Task, request: RecognitionRequest, form: str) -> JSON:
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


def _in_form(
    request: RecognitionRequest, form: TranscriptFormat, response: BackendResponse, data: bytes
) -> tuple[bytes, str]:
    """As it came where that is what is wanted."""
    said = _said(response, form, data)
    wanted = request.response_format
    if form == wanted and said is None:
        return data, TEXT_CONTENT_TYPE
    if form == wanted == "json" and isinstance(said, dict) and isinstance(said.get("text"), str):
        return data, "application/json"
    return render_transcript(
        _transcript(said, form, data), wanted, task=request.mode, granularities=request.granularities
    )


def _said(response: BackendResponse, form: TranscriptFormat, data: bytes) -> JSON | str | None:
    """What JSON says, also where another format was asked for; None where it is none."""
    if form in ("json", "verbose_json") or is_json_response(response):
        said = parse_json_response(response, data)
        if isinstance(said, dict) and said.get("error"):
            raise error_from_payload(said)
        return said if isinstance(said, dict | str) else {}
    return None


def _transcript(said: JSON | str | None, form: TranscriptFormat, data: bytes) -> SpeechTranscript:
    if isinstance(said, dict):
        return parse_transcript_json(said)
    return SpeechTranscript(said.strip()) if isinstance(said, str) else parse_transcript(data, form)


async def _pretended(response: BackendResponse, form: TranscriptFormat) -> AsyncGenerator[Output]:
    """Events of an answer that came in one piece."""
    data = await response.read_all(TRANSCRIPT_LIMIT)
    transcript = _transcript(_said(response, form, data), form, data)
    for text in text_deltas(transcript):
        yield Chunk(delta_frame(text))
    yield Chunk(done_frame(transcript), 0)


async def _events(response: BackendResponse) -> AsyncGenerator[Output]:
    """OpenAI's events as they came; a server's own, `{"text": …}` for each segment, as OpenAI's."""
    texts: list[str] = []
    typed = done = False
    async for block in read_events(response, EVENT_LIMIT):
        for payload in payloads(block):
            if payload == b"[DONE]":
                continue
            event = _event(payload)
            kind = str(event.get("type") or "")
            if event.get("error") or kind == "error":
                raise error_from_payload(event)
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
        yield Chunk(done_frame(SpeechTranscript("".join(texts).strip())), 0)


def _event(payload: bytes) -> JSON:
    try:
        event = orjson.loads(payload)
    except orjson.JSONDecodeError:
        return {"text": payload.decode("utf-8", "replace")}
    return event if isinstance(event, dict) else {"text": str(event)}
