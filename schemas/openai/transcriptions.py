"""`POST /v1/audio/transcriptions` and `/v1/audio/translations`: the fields of their forms, without the file.

A form's values are strings: numbers and booleans are read from them, and an empty one counts as not given. Fields
that are not named here reach the backend untouched.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from schemas.openai.chat import Tier

AudioFormat = Literal["json", "text", "srt", "verbose_json", "vtt", "diarized_json"]


class TranslationRequest(BaseModel):
    """Speech in any language to English text."""

    model_config = ConfigDict(extra="allow")

    model: Annotated[str, Field(min_length=1, max_length=256)]
    prompt: str | None = None
    response_format: AudioFormat | None = None
    """`diarized_json` is refused by the backends that cannot tell speakers apart."""
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    service_tier: Tier | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value != "" or name == "model"}


class TranscriptionRequest(TranslationRequest):
    """Speech to text in its own language."""

    language: Annotated[str, Field(max_length=64)] | None = None
    stream: bool | None = None
    timestamp_granularities: list[Literal["word", "segment"]] | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_is_a_list(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and isinstance(fields.get("timestamp_granularities"), str):
            return fields | {"timestamp_granularities": [fields["timestamp_granularities"]]}
        return fields
