"""`/v1/audio/speech` for every adapter: what the caller asks for, and the answer from the sound that the server makes.

    async with aclosing(speak(task, request, sound, source)) as outputs:
        async for output in outputs:
            yield output

`sound` gives bytes of `source`; what the caller wants instead is made of them piece by piece. Formats that only PyAV can
make are refused, naming the possible ones, where it is not installed.
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
PIECE = 64 * 1024
"""Bytes of samples that are coded at a time: some 5 ms of a processor."""
INLINE = 8 * 1024
"""Fewer are coded on the event loop: a thread costs more."""
CODED_LIMIT = 64 * 1024 * 1024
"""Bytes of coded sound that are taken from a server to be coded anew."""
NOT_COUNTED = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
"""Clients want the numbers; speech servers do not count tokens."""
OPENAI_VOICES = frozenset(
    {"alloy", "ash", "ballad", "coral", "echo", "fable", "onyx", "nova", "sage", "shimmer", "verse", "marin", "cedar"}
)
"""Names that clients send when nobody chose one."""
NO_AUDIO_MESSAGE = "the backend made no sound of this input"


@dataclass(frozen=True, slots=True)
class SynthesisRequest:
    """What the caller asks for."""

    input: str
    voice: str = ""
    """Empty: the model's own."""
    response_format: str = "mp3"
    speed: float = 1.0
    sse: bool = False
    """The sound is to come in server-sent events, where the caller takes it in pieces."""
    instructions: str = ""
    fields: JSON = field(default_factory=dict)
    """The whole body."""

    @classmethod
    def from_task(cls, task: Task) -> SynthesisRequest:
        """Raises BackendRefused when the task is no speech request, or a field is wrong."""
        if task.endpoint != ENDPOINT:
            raise BackendRefused(f"this backend does not serve {task.endpoint}")
        body = parse_json_object(task.body)
        try:
            fields = Fields.model_validate({"model": task.model} | body)
        except ValidationError as error:
            raise _refused(error) from error
        if not fields.input.strip():
            raise BackendRefused("input: there is nothing to say", param="input")
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


def _refused(error: ValidationError) -> BackendRefused:
    first = error.errors(include_url=False, include_context=False)[0]
    name = str(first["loc"][0]) if first["loc"] else None
    return BackendRefused(f"{name}: {first['msg']}", param=name)


def parse_voices_option(option: str) -> dict[str, str]:
    """The option `voices`: `joe;alloy:joe` names a voice, and another name for it. Raises ValueError for anything else."""
    named: dict[str, str] = {}
    for entry in option.split(";"):
        name, colon, voice = (part.strip() for part in entry.partition(":"))
        if name and (voice or not colon):
            named[name] = voice or name
        elif entry.strip():
            raise ValueError(f"the option voices looks like joe;alloy:joe, which {entry.strip()!r} does not")
    return named


def choose_voice(wanted: str, named: Mapping[str, str], default: str, *, strict: bool = False) -> str:
    """The voice for a name. None, and OpenAI's own names unless `strict`, stand for the default one.

    Raises BackendRefused, with the voices that there are, for any other that is not `named`.
    """
    if wanted in named:
        return named[wanted]
    if not wanted or (wanted in OPENAI_VOICES and not strict):
        return default
    raise BackendRefused(
        f"there is no voice {wanted!r}; there are: {', '.join(named)}" if named else "this backend has one voice only",
        param="voice",
    )


async def respond_with_speech(
    task: Task, request: SynthesisRequest, sound: AsyncGenerator[bytes], source: AudioFormat, *, speed: float = 1.0
) -> AsyncGenerator[Output]:
    """The answer, as it is made. Closing it closes `sound`.

    `speed`: what is left to do of `request.speed` after the server has done its part. A caller who streams gets the sound
    itself, or events of it; any other the complete sound, whose header tells its length. Raises BackendRefused before the
    first byte of `sound` is asked for, when the format cannot be made of `source`.
    """
    events = task.stream and request.sse
    made = _converted(request.response_format, sound, source, whole=not task.stream, speed=speed)
    async with aclosing(sound), aclosing(made):
        async for data in made:
            yield Chunk(_delta(data) if events else data)
        if events:
            yield Chunk(_event({"type": "speech.audio.done", "usage": NOT_COUNTED}), 0)
    yield Finish(content_type="text/event-stream" if events else SPEECH_CONTENT_TYPES[request.response_format])


def _delta(data: bytes) -> bytes:
    return _event({"type": "speech.audio.delta", "audio": base64.b64encode(data).decode()}) if data else b""


def _event(event: JSON) -> bytes:
    return b"data: %b\n\n" % orjson.dumps(event)


async def _converted(
    codec: str, sound: AsyncGenerator[bytes], source: AudioFormat, *, whole: bool, speed: float
) -> AsyncGenerator[bytes]:
    """`sound` in another format. Empty pieces say that the work goes on."""
    if codec == source.codec and codec not in ("wav", "pcm") and speed == 1:
        came = False
        async for data in sound:
            came = came or bool(data)
            yield data
        if not came:
            raise BackendError(NO_AUDIO_MESSAGE)
        return
    require_codec(codec, source, speed)
    encoder: AudioEncoder | None = None
    try:
        async for samples, made_as in _sampled(sound, source):
            encoder = encoder or AudioEncoder(codec, made_as, whole=whole, speed=speed)
            for start in range(0, len(samples), PIECE):
                yield await _encode(encoder, samples[start : start + PIECE])
        if encoder is None or not encoder.samples:
            raise BackendError(NO_AUDIO_MESSAGE)
        for data in encoder.finish():
            yield data
    finally:
        if encoder is not None:
            encoder.close()


async def _encode(encoder: AudioEncoder, samples: bytes) -> bytes:
    if encoder.plain or len(samples) <= INLINE:
        return encoder.encode(samples)
    return await finish_before_cancel(asyncio.to_thread(encoder.encode, samples))


async def _sampled(sound: AsyncGenerator[bytes], source: AudioFormat) -> AsyncIterator[tuple[bytes, AudioFormat]]:
    """Samples, and what they are. Coded sound is read to its end first: it is seldom more than a few megabytes."""
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
        yield await _decoded(sound), AudioFormat("pcm", PCM_RATE_HZ, 1)


async def _decoded(sound: AsyncGenerator[bytes]) -> bytes:
    coded = bytearray()
    async for data in sound:
        coded += data
        if len(coded) > CODED_LIMIT:
            raise BackendError(f"the backend's sound is larger than the {CODED_LIMIT} bytes that can be converted")
    try:
        return (await decode_audio(bytes(coded), rate=PCM_RATE_HZ)).samples
    except BackendRefused as error:
        raise BackendError(f"the backend's sound cannot be read: {error}") from error
