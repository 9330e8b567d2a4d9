"""Define the requests of `POST /v1/audio/transcriptions` and `/v1/audio/translations`: the fields of their forms, without the file.

Other fields reach the backend unchanged.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from schemas.openai.chat import ServiceTier
from schemas.openai.form import FormRequest

AudioFormat = Literal["json", "text", "srt", "verbose_json", "vtt", "diarized_json"]


class TranslationRequest(FormRequest):
    """A request for the English text of speech in any language."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    prompt: str | None = None
    response_format: AudioFormat | None = None
    """Backends that cannot tell speakers apart refuse `diarized_json`."""
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    service_tier: ServiceTier | None = None


class TranscriptionRequest(TranslationRequest):
    """A request for the text of speech, in the language of the speech."""

    language: Annotated[str, Field(max_length=64)] | None = None
    stream: bool | None = None
    timestamp_granularities: list[Literal["word", "segment"]] | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_is_a_list(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and isinstance(fields.get("timestamp_granularities"), str):
            return fields | {"timestamp_granularities": [fields["timestamp_granularities"]]}
        return fields
