"""`/v1/audio/speech`, `/transcriptions` and `/translations` of an OpenAI-style server.

Where a probe of the worker's own shows that a model lacks a format, the format is made from another one. Without that proof the
caller gets the server's own error.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from functools import partial
from typing import Any, TypeVar

import orjson

from schemas.usage import MediaUsage
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
FALLBACK_AUDIO_FORMATS = ("wav", "flac", "mp3")
"""Formats to request instead of one that the server lacks: every server has one of them."""
FALLBACK_TRANSCRIPT_FORMATS: tuple[TranscriptFormat, ...] = ("verbose_json", "json", "text")
MAGIC_NUMBERS = ((b"RIFF", "wav"), (b"OggS", "opus"), (b"fLaC", "flac"), (b"ID3", "mp3"))
MAGIC_SIZE = 4
MAX_VOICE_LENGTH = 100
Name = TypeVar("Name", bound=str)
SAMPLE_RATE = re.compile(r"rate\s*=\s*(\d+)")


# Speech


async def synthesize_speech(api: OpenAIClient, task: Task) -> AsyncGenerator[Output]:
    """Yield the server's audio as it is, or converted where the server lacks the requested format."""
    request = SynthesisRequest.from_task(task)
    response, requested = await _request_speech(api, task, request)
    try:
        first = b""
        while len(first) < MAGIC_SIZE and (data := await response.read()):
            first += data
        if not first:
            raise BackendError(NO_AUDIO_MESSAGE)
        source = _detect_format(first, requested, response.headers.get("content-type", ""))
        async with aclosing(respond_with_speech(task, request, _read_audio(response, first), source)) as outputs:
            async for output in outputs:
                yield output
    finally:
        response.close()


async def _request_speech(api: OpenAIClient, task: Task, request: SynthesisRequest) -> tuple[BackendResponse, str]:
    fields = forwarded_fields(request.fields, task.model)
    fields.pop("stream_format", None)  # events are made here
    voice = api.voices.get(task.model) or str(fields.get("voice") or "alloy")[:MAX_VOICE_LENGTH]
    refused: BackendRefused | None = None
    for codec in _candidate_formats(api, task.model, request.response_format, FALLBACK_AUDIO_FORMATS):
        try:
            return await api.post("/audio/speech", fields | {"response_format": codec}), codec
        except BackendRefused as error:
            probe = partial(lacks_sound, api, task.model, voice, codec, FALLBACK_AUDIO_FORMATS)
            if not (
                rejects_parameter(error, "format", codec) and await api.limitations.confirm(task.model, codec, probe)
            ):
                raise
            refused = refused or error
    raise refused or BackendRefused(
        f"the backend supports neither the requested format nor any of {', '.join(FALLBACK_AUDIO_FORMATS)}",
        param="response_format",
    )


def _candidate_formats(api: OpenAIClient, model: str, wanted: Name, others: tuple[Name, ...]) -> Iterator[Name]:
    for name in dict.fromkeys((wanted, *others)):
        if not api.limitations.lacks(model, name):
            yield name


async def _read_audio(response: BackendResponse, first: bytes) -> AsyncGenerator[bytes]:
    yield first
    while data := await response.read():
        yield data


def _detect_format(first: bytes, requested: str, content_type: str) -> AudioFormat:
    """Return the format of the audio: some servers ignore the requested one."""
    if content_type.partition(";")[0].strip().lower().endswith("json"):
        raise BackendError("the backend answered with JSON instead of audio")
    codec = _detect_codec(first, requested)
    rate = SAMPLE_RATE.search(content_type)
    return AudioFormat(codec, int(rate[1]) if rate and codec == "pcm" else PCM_RATE_HZ)


def _detect_codec(first: bytes, requested: str) -> str:
    for magic, codec in MAGIC_NUMBERS:
        if first.startswith(magic):
            return codec
    # Raw samples may look like the header of an MP3 or AAC frame.
    if requested != "pcm" and len(first) > 1 and first[0] == 0xFF and first[1] & 0xE0 == 0xE0:
        return "mp3" if first[1] & 0x06 else "aac"
    return requested


def parse_voice_list(answer: Any) -> tuple[str, ...]:
    """Return the names in an answer to `GET /v1/audio/voices`: `{"voices": […]}` or a list, of names or of objects."""
    if isinstance(answer, dict):
        answer = answer.get("voices") or answer.get("data")
    if not isinstance(answer, list):
        return ()
    names = (one if isinstance(one, str) else _voice_name(one) for one in answer)
    return tuple(dict.fromkeys(name for name in names if name))


def _voice_name(voice: Any) -> str:
    if not isinstance(voice, dict):
        return ""
    return next((str(voice[key]) for key in ("id", "voice_id", "name") if voice.get(key)), "")


# Transcriptions


async def transcribe(api: OpenAIClient, task: Task) -> AsyncGenerator[Output]:
    """Yield the transcript in the requested format, converted where the server lacks it."""
    request = RecognitionRequest.from_task(task)
    response, answer_format = await _request_transcript(api, task, request)
    try:
        if task.stream:
            async with aclosing(
                _relay_events(response) if is_event_stream(response) else _simulate_events(response, answer_format)
            ) as outputs:
                seconds = 0.0
                async for output in outputs:
                    if isinstance(output, Chunk) and b"transcript.text.done" in output.data:
                        seconds = _heard_seconds(output.data.removeprefix(b"data: "))
                    yield output
            yield Finish(content_type="text/event-stream", media=MediaUsage(audio_s=seconds))
            return
        body, content_type = _convert_transcript(
            request, answer_format, response, await response.read_all(TRANSCRIPT_LIMIT)
        )
        yield Chunk(body)
        yield Finish(content_type=content_type, media=MediaUsage(audio_s=_heard_seconds(body)))
    finally:
        response.close()


def _heard_seconds(answer: bytes) -> float:
    """Return the length of the sound where the answer tells it: `duration`, or `usage.seconds`; else 0."""
    try:
        body = orjson.loads(answer)
        usage = body.get("usage") or {}
        seconds = body.get("duration") or usage.get("seconds") or 0
        return float(seconds)
    except (ValueError, TypeError, AttributeError):
        return 0.0


async def _request_transcript(
    api: OpenAIClient, task: Task, request: RecognitionRequest
) -> tuple[BackendResponse, TranscriptFormat]:
    path = "/audio/translations" if request.mode == "translate" else "/audio/transcriptions"
    limitations, model = api.limitations, task.model
    stream = task.stream and not limitations.lacks(model, STREAM)
    refused: BackendRefused | None = None
    wanted: TranscriptFormat = "json" if task.stream else request.response_format
    for answer_format in _candidate_formats(api, model, wanted, FALLBACK_TRANSCRIPT_FORMATS):
        fields = form_fields(_form_fields(task, request, answer_format) | ({"stream": True} if stream else {}))
        try:
            return await api.post(path, encode_multipart(fields, [FilePart.from_file(request.file)])), answer_format
        except BackendRefused as error:
            stream_probe = partial(lacks_transcript_stream, api, path, model)
            if stream and rejects_parameter(error, STREAM) and await limitations.confirm(model, STREAM, stream_probe):
                return await _request_transcript(api, task, request)
            format_probe = partial(
                lacks_transcript, api, path, {"model": model}, answer_format, FALLBACK_TRANSCRIPT_FORMATS
            )
            if not (
                rejects_parameter(error, "format", answer_format)
                and await limitations.confirm(model, answer_format, format_probe)
            ):
                raise
            refused = refused or error
    raise refused or BackendRefused(
        f"the backend supports neither the requested format nor any of {', '.join(FALLBACK_TRANSCRIPT_FORMATS)}",
        param="response_format",
    )


def _form_fields(task: Task, request: RecognitionRequest, answer_format: str) -> JSON:
    times = {"timestamp_granularities": sorted(request.granularities)} if answer_format == "verbose_json" else {}
    return {
        **request.extra,
        "model": task.model,
        "language": request.language,
        "prompt": request.prompt,
        "temperature": request.temperature,
        "response_format": answer_format,
        **times,
    }


def _convert_transcript(
    request: RecognitionRequest, answer_format: TranscriptFormat, response: BackendResponse, data: bytes
) -> tuple[bytes, str]:
    """Return the answer in the requested format, unchanged where it has that format already."""
    parsed = _parse_json_answer(response, answer_format, data)
    wanted = request.response_format
    if answer_format == wanted and parsed is None:
        return data, TEXT_CONTENT_TYPE
    if answer_format == wanted == "json" and isinstance(parsed, dict) and isinstance(parsed.get("text"), str):
        return data, "application/json"
    return render_transcript(
        _read_transcript(parsed, answer_format, data), wanted, task=request.mode, granularities=request.granularities
    )


def _parse_json_answer(response: BackendResponse, answer_format: TranscriptFormat, data: bytes) -> JSON | str | None:
    """Return the value of a JSON answer, even where another format was requested; None for an answer that is not JSON."""
    if answer_format in ("json", "verbose_json") or is_json_response(response):
        parsed = parse_json_response(response, data)
        if isinstance(parsed, dict) and parsed.get("error"):
            raise error_from_payload(parsed)
        return parsed if isinstance(parsed, dict | str) else {}
    return None


def _read_transcript(parsed: JSON | str | None, answer_format: TranscriptFormat, data: bytes) -> SpeechTranscript:
    if isinstance(parsed, dict):
        return parse_transcript_json(parsed)
    return SpeechTranscript(parsed.strip()) if isinstance(parsed, str) else parse_transcript(data, answer_format)


async def _simulate_events(response: BackendResponse, answer_format: TranscriptFormat) -> AsyncGenerator[Output]:
    """Yield events made from an answer in one piece."""
    data = await response.read_all(TRANSCRIPT_LIMIT)
    transcript = _read_transcript(_parse_json_answer(response, answer_format, data), answer_format, data)
    for text in text_deltas(transcript):
        yield Chunk(delta_frame(text))
    yield Chunk(done_frame(transcript), 0)


async def _relay_events(response: BackendResponse) -> AsyncGenerator[Output]:
    """Yield OpenAI's events unchanged; a server's own, `{"text": …}` for each segment, are converted into OpenAI's."""
    texts: list[str] = []
    typed = done = False
    async for block in read_events(response, EVENT_LIMIT):
        for payload in payloads(block):
            if payload == b"[DONE]":
                continue
            event = _parse_event(payload)
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
        raise BackendError("the backend's stream ended before it was complete", transient=True)
    if not typed:
        yield Chunk(done_frame(SpeechTranscript("".join(texts).strip())), 0)


def _parse_event(payload: bytes) -> JSON:
    try:
        event = orjson.loads(payload)
    except orjson.JSONDecodeError:
        return {"text": payload.decode("utf-8", "replace")}
    return event if isinstance(event, dict) else {"text": str(event)}
