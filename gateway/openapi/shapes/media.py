"""Describe answers that are pictures, transcripts, or the models of a worker."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class Image(BaseModel):
    """One picture: `b64_json` or `url`, as `response_format` asked."""

    b64_json: str | None = None
    """The picture's bytes in Base64."""
    url: str | None = None
    """Where the picture can be fetched without a key, for an hour unless the operator says otherwise."""
    seed: int | None = None
    """The seed that makes the same picture again."""
    revised_prompt: str | None = None


class ImageList(BaseModel):
    """The pictures."""

    created: int
    """Unix seconds."""
    data: list[Image]
    output_format: str | None = None
    """`png`, `jpeg` or `webp`."""
    size: str | None = None
    """Width and height in pixels: `1024x1024`."""
    usage: dict[str, Any] | None = None


class TranscriptSegment(BaseModel):
    """A phrase, and when it was said."""

    id: int | str | None = None
    start: float
    """Seconds from the beginning."""
    end: float
    text: str


class TranscriptWord(BaseModel):
    """A word, and when it was said."""

    word: str
    start: float
    """Seconds from the beginning."""
    end: float


class Transcript(BaseModel):
    """The text of a recording. `verbose_json` adds language, duration, segments and words."""

    text: str
    task: str | None = None
    language: str | None = None
    duration: float | None = None
    """Seconds."""
    segments: list[TranscriptSegment] | None = None
    words: list[TranscriptWord] | None = None
    """With `timestamp_granularities[]=word`."""
    usage: dict[str, Any] | None = None


class ModelJobDone(BaseModel):
    """A model was pulled, loaded or unloaded."""

    object: Literal["model.pull", "model.load", "model.unload"]
    model: str
    status: str
    """`success`."""
