"""Define the request of `POST /v1/audio/speech`: the fields that Nexus reads. All others reach the backend unchanged."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from schemas.openai.chat import ServiceTier

SoundCodec = Literal["mp3", "opus", "aac", "flac", "wav", "pcm"]

SPEECH_CONTENT_TYPES: dict[str, str] = {
    "mp3": "audio/mpeg",
    # Opus comes in Ogg, whose type this is (RFC 7845); audio/opus means bare packets in RTP, and players do not know it.
    "opus": "audio/ogg",
    "aac": "audio/aac",
    "flac": "audio/flac",
    "wav": "audio/wav",
    "pcm": "audio/pcm",
}
"""The content type of an answer in each format."""

MAX_INPUT = 32_768
"""Maximum characters. OpenAI accepts 4,096; this is about half an hour of speech."""

MIN_SPEED, MAX_SPEED = 0.25, 4.0


class VoiceId(BaseModel):
    """A custom voice."""

    model_config = ConfigDict(extra="allow", strict=True)

    id: Annotated[str, Field(min_length=1)]


class SpeechRequest(BaseModel):
    """A request to speak a text."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: Annotated[str, Field(min_length=1, max_length=256)]
    input: Annotated[str, Field(min_length=1, max_length=MAX_INPUT)]
    voice: str | VoiceId | None = None
    """None: the model's default voice."""
    response_format: SoundCodec | None = None
    """None: mp3."""
    speed: Annotated[float, Field(ge=MIN_SPEED, le=MAX_SPEED)] | None = None
    stream_format: Literal["audio", "sse"] | None = None
    """None: audio."""
    instructions: str | None = None
    service_tier: ServiceTier | None = None
