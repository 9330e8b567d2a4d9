"""The response bodies of image, transcription and model-management routes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Image(BaseModel):
    """One image, in `b64_json` or `url` as `response_format` requests."""

    b64_json: str | None = None
    """The image's bytes in Base64."""
    url: str | None = None
    """A signed URL of the image. It needs no API key and is valid for an hour unless the operator configures another time."""
    seed: int | None = None
    """The seed that reproduces this image."""
    revised_prompt: str | None = None


class ImageList(BaseModel):
    """The generated images."""

    created: int
    """Unix seconds."""
    data: list[Image]
    output_format: str | None = None
    """`png`, `jpeg` or `webp`."""
    size: str | None = None
    """Width and height in pixels: `1024x1024`."""
    usage: dict[str, Any] | None = None


class TranscriptSegment(BaseModel):
    """A phrase with its start and end time."""

    id: int | str | None = None
    start: float
    """Seconds from the beginning of the recording."""
    end: float
    text: str


class TranscriptWord(BaseModel):
    """A word with its start and end time."""

    word: str
    start: float
    """Seconds from the beginning of the recording."""
    end: float


class TranscriptObject(BaseModel):
    """The text of a recording. `verbose_json` adds language, duration, segments and words."""

    model_config = ConfigDict(title="Transcript")

    text: str
    task: str | None = None
    language: str | None = None
    duration: float | None = None
    """Seconds."""
    segments: list[TranscriptSegment] | None = None
    words: list[TranscriptWord] | None = None
    """Present with `timestamp_granularities[]=word`."""
    usage: dict[str, Any] | None = None


class ModelJobDone(BaseModel):
    """Confirmation that a model was pulled, loaded or unloaded."""

    object: Literal["model.pull", "model.load", "model.unload"]
    model: str
    status: str
    """`success`."""
