"""`/v1/audio/speech` for every adapter: the parsed request, and the answer from the audio that a server makes.

    async with aclosing(speak(task, request, sound, source)) as outputs:
        async for output in outputs:
            yield output

`sound` yields bytes in the format `source`, which are converted piece by piece into the requested format. Without PyAV, the
formats that need it are refused, and the error names the possible ones.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field

import orjson
from pydantic import ValidationError

from schemas.openai.speech import SPEECH_CONTENT_TYPES, VoiceId
from schemas.openai.speech import SpeechRequest as Fields
from schemas.usage import MediaUsage
from workers.adapter_kit.audio.codecs import (
    PCM_RATE_HZ,
    AudioEncoder,
    AudioFormat,
    WavReader,
    decode_audio,
    finish_before_cancel,
    require_codec,
)
from workers.adapter_kit.request_fields import JSON, parse_json_object
from workers.backends.base import BackendError, BackendRefused, Chunk, Finish, Output, Task

ENDPOINT = "/v1/audio/speech"
ENCODED_PIECE_BYTES = 64 * 1024
"""Bytes of samples that are encoded at a time: about 5 ms of CPU."""
MAX_INLINE_BYTES = 8 * 1024
"""Up to so many bytes are encoded on the event loop: a thread costs more."""
MAX_ENCODED_BYTES = 64 * 1024 * 1024
"""Bytes of encoded audio that are accepted from a server for conversion."""
ZERO_USAGE = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
"""Clients expect usage; speech servers count no tokens."""
OPENAI_VOICES = frozenset(
    {"alloy", "ash", "ballad", "coral", "echo", "fable", "onyx", "nova", "sage", "shimmer", "verse", "marin", "cedar"}
)
"""Names that clients send by default."""
NO_AUDIO_MESSAGE = "the backend made no audio of this input"


@dataclass(frozen=True, slots=True)
class SynthesisRequest:
    """A caller's request for speech, checked."""

    input: str
    voice: str = ""
    """Empty: the model's default."""
    response_format: str = "mp3"
    speed: float = 1.0
    sse: bool = False
    """A streamed answer comes as server-sent events."""
    instructions: str = ""
    fields: JSON = field(default_factory=dict)
    """The whole body."""

    @classmethod
    def from_task(cls, task: Task) -> SynthesisRequest:
        """Parse a task. Raises BackendRefused for another endpoint, or where a field is wrong."""
        if task.endpoint != ENDPOINT:
            raise BackendRefused(f"this backend does not serve {task.endpoint}")
        body = parse_json_object(task.body)
        try:
            fields = Fields.model_validate({"model": task.model} | body)
        except ValidationError as error:
            raise _validation_error(error) from error
        if not fields.input.strip():
            raise BackendRefused("input contains no text to speak", param="input")
        voice = fields.voice.id if isinstance(fields.voice, VoiceId) else fields.voice
        return cls(
            input=fields.input,
            voice=voice or "",
            response_format=fields.response_format or "mp3",
            speed=fields.speed or 1.0,
            sse=fields.stream_format == "sse",
            instructions=fields.instructions or "",
            fields=body,
        )


def _validation_error(error: ValidationError) -> BackendRefused:
    first = error.errors(include_url=False, include_context=False)[0]
    name = str(first["loc"][0]) if first["loc"] else None
    return BackendRefused(f"{name}: {first['msg']}", param=name)


def parse_voices_option(option: str) -> dict[str, str]:
    """Parse the option `voices`: `joe;alloy:joe` names a voice, and another name for it. Raises ValueError for another form."""
    named: dict[str, str] = {}
    for entry in option.split(";"):
        name, colon, voice = (part.strip() for part in entry.partition(":"))
        if name and (voice or not colon):
            named[name] = voice or name
        elif entry.strip():
            raise ValueError(f"the option voices must look like joe;alloy:joe; {entry.strip()!r} does not")
    return named


def choose_voice(wanted: str, named: Mapping[str, str], default: str, *, strict: bool = False) -> str:
    """Return the voice for a name. An empty name, and unless `strict` OpenAI's own names, stand for the default one.

    Raises BackendRefused, with the available voices, for any other name that is not in `named`.
    """
    if wanted in named:
        return named[wanted]
    if not wanted or (wanted in OPENAI_VOICES and not strict):
        return default
    raise BackendRefused(
        f"the voice {wanted!r} does not exist; choose one of {', '.join(named)}"
        if named
        else "this backend has only one voice; leave voice out",
        param="voice",
    )


async def respond_with_speech(
    task: Task, request: SynthesisRequest, sound: AsyncGenerator[bytes], source: AudioFormat, *, speed: float = 1.0
) -> AsyncGenerator[Output]:
    """Yield the answer as it is made. Closing the generator closes `sound`.

    `speed`: the part of `request.speed` that the server has not applied. A caller who streams gets the audio itself, or
    events; any other caller the complete audio, whose header gives its length. Raises BackendRefused before the first byte
    of `sound` is read, when the requested format cannot be made of `source`.
    """
    events = task.stream and request.sse
    made = _convert(request.response_format, sound, source, whole=not task.stream, speed=speed)
    async with aclosing(sound), aclosing(made):
        async for data in made:
            yield Chunk(_delta_event(data) if events else data)
        if events:
            yield Chunk(_event({"type": "speech.audio.done", "usage": ZERO_USAGE}), 0)
    content_type = "text/event-stream" if events else SPEECH_CONTENT_TYPES[request.response_format]
    yield Finish(content_type=content_type, media=MediaUsage(characters=len(request.input)))


def _delta_event(data: bytes) -> bytes:
    return _event({"type": "speech.audio.delta", "audio": base64.b64encode(data).decode()}) if data else b""


def _event(event: JSON) -> bytes:
    return b"data: %b\n\n" % orjson.dumps(event)


async def _convert(
    codec: str, sound: AsyncGenerator[bytes], source: AudioFormat, *, whole: bool, speed: float
) -> AsyncGenerator[bytes]:
    """Yield `sound` in another format; empty pieces are signs of life."""
    if codec == source.codec and codec not in ("wav", "pcm") and speed == 1:
        has_audio = False
        async for data in sound:
            has_audio = has_audio or bool(data)
            yield data
        if not has_audio:
            raise BackendError(NO_AUDIO_MESSAGE)
        return
    require_codec(codec, source, speed)
    encoder: AudioEncoder | None = None
    try:
        async for samples, audio_format in _read_samples(sound, source):
            encoder = encoder or AudioEncoder(codec, audio_format, whole=whole, speed=speed)
            for start in range(0, len(samples), ENCODED_PIECE_BYTES):
                yield await _encode(encoder, samples[start : start + ENCODED_PIECE_BYTES])
        if encoder is None or not encoder.samples:
            raise BackendError(NO_AUDIO_MESSAGE)
        for data in encoder.finish():
            yield data
    finally:
        if encoder is not None:
            encoder.close()


async def _encode(encoder: AudioEncoder, samples: bytes) -> bytes:
    if encoder.is_passthrough or len(samples) <= MAX_INLINE_BYTES:
        return encoder.encode(samples)
    return await finish_before_cancel(asyncio.to_thread(encoder.encode, samples))


async def _read_samples(sound: AsyncGenerator[bytes], source: AudioFormat) -> AsyncIterator[tuple[bytes, AudioFormat]]:
    """Yield samples and their format. Encoded audio is read completely first: it is rarely more than a few megabytes."""
    if source.codec == "pcm":
        async for data in sound:
            yield data, source
    elif source.codec == "wav":
        reader = WavReader()
        async for data in sound:
            samples = reader.feed(data)
            if reader.format is not None:
                yield samples, reader.format
    else:
        yield await _read_decoded(sound), AudioFormat("pcm", PCM_RATE_HZ, 1)


async def _read_decoded(sound: AsyncGenerator[bytes]) -> bytes:
    coded = bytearray()
    async for data in sound:
        coded += data
        if len(coded) > MAX_ENCODED_BYTES:
            raise BackendError(
                f"the backend's audio is larger than the {MAX_ENCODED_BYTES} bytes that can be converted"
            )
    try:
        return (await decode_audio(bytes(coded), rate=PCM_RATE_HZ)).samples
    except BackendRefused as error:
        raise BackendError(f"the backend's audio cannot be read: {error}") from error
