"""Build the parameters of speech, transcriptions and translations."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterable, Mapping, Sequence

from schemas.descriptors import JSON, EndpointDescriptor
from schemas.openai.speech import MAX_INPUT, MAX_SPEED, MIN_SPEED
from schemas.parameters.fields import advanced, body, choice, file, flag, prompt, slider, text

FORMATS = ("mp3", "opus", "aac", "flac", "wav", "pcm")
TRANSCRIPT_FORMATS = ("json", "text", "srt", "verbose_json", "vtt")
MAX_VOICES = 500


def speech(
    voices: Sequence[str] = (),
    *,
    formats: Iterable[str] = FORMATS,
    speed: bool = True,
    instructions: bool = True,
    strict_voices: bool = False,
    enforced: bool = False,
    extra: Mapping[str, JSON] | None = None,
) -> EndpointDescriptor:
    """Return the parameters of `/v1/audio/speech`.

    `voices`: the default one first. `strict_voices`: any other name is refused. `extra`: parameters that only this server has.
    """
    known = list(voices[:MAX_VOICES])
    voice = text("Voice", **{"x-nexus-widget": "voice"})
    if known:
        voice |= ({"enum": known} if strict_voices and len(voices) <= MAX_VOICES else {"examples": known}) | {
            "default": known[0]
        }
    fields: dict[str, JSON] = {"input": prompt("Text", "The text to speak.", max_length=MAX_INPUT), "voice": voice}
    fields["response_format"] = choice("Format", formats, default="mp3")
    if speed:
        fields["speed"] = slider("Speed", least=MIN_SPEED, most=MAX_SPEED, step=0.05, default=1.0)
    if instructions:
        fields["instructions"] = advanced(prompt("Instructions", "How to speak, for models that read it."))
    fields["stream_format"] = advanced(choice("Stream format", ("audio", "sse"), default="audio"))
    fields |= extra or {}
    schema = body(fields, ("input",), enforced=enforced)
    return EndpointDescriptor(parameters=schema, example={"input": "Hello from Nexus.", "response_format": "wav"})


def transcriptions(
    *,
    formats: Iterable[str] = TRANSCRIPT_FORMATS,
    words: bool = True,
    stream: bool = True,
    language: bool = True,
    extra: Mapping[str, JSON] | None = None,
) -> EndpointDescriptor:
    """Return the parameters of `/v1/audio/transcriptions`.

    `words`: the server gives the times of words. `language`: the model knows several.
    """
    fields = _recognition(formats)
    if language:
        fields["language"] = text(
            "Language", "The code of the speech's language, such as `en`; detected, where it is missing.", maxLength=64
        )
    if words:
        items: JSON = {"type": "string", "enum": ["segment", "word"]}
        fields["timestamp_granularities"] = advanced(
            {
                "type": "array",
                "title": "Times",
                "items": items,
                "description": "Times of segments or words, in `verbose_json`.",
            }
        )
    if stream:
        fields["stream"] = advanced(flag("Stream", "Send the text while it is recognized."))
    fields |= extra or {}
    return EndpointDescriptor(
        parameters=body(fields, ("file",)), example={"file": SAMPLE_SOUND, "response_format": "json"}
    )


def translations(*, formats: Iterable[str] = TRANSCRIPT_FORMATS) -> EndpointDescriptor:
    """Return the parameters of `/v1/audio/translations`, which answers in English."""
    return EndpointDescriptor(
        parameters=body(_recognition(formats), ("file",)), example={"file": SAMPLE_SOUND, "response_format": "json"}
    )


def _recognition(formats: Iterable[str]) -> dict[str, JSON]:
    return {
        "file": file("Audio", "audio/*", "audio", "A recording in any usual format."),
        "response_format": choice("Format", formats, default="json"),
        "prompt": advanced(prompt("Prompt", "Words that the recording may hold, such as names.")),
        "temperature": advanced(slider("Temperature", least=0.0, most=1.0, step=0.05)),
    }


def _sample_sound() -> str:
    """Return a tenth of a second of silence as a WAV, in base64."""
    rate, samples = 8000, bytes(800 * 2)
    head = (
        b"WAVEfmt "
        + struct.pack("<IHHIIHH", 16, 1, 1, rate, rate * 2, 2, 16)
        + b"data"
        + struct.pack("<I", len(samples))
    )
    return base64.b64encode(b"RIFF" + struct.pack("<I", len(head) + len(samples)) + head + samples).decode()


SAMPLE_SOUND = _sample_sound()
