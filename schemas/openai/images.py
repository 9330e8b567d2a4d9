"""`POST /v1/images/generations` and `/v1/images/edits`: the fields that Nexus reads. All others reach the backend untouched."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from schemas.openai.chat import Tier


class ImageGenerationRequest(BaseModel):
    """A picture to be made from a text."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """None: the default for images."""
    prompt: Annotated[str, Field(min_length=1, max_length=32_000)]
    n: Annotated[int, Field(ge=1, le=10)] | None = None
    size: str | None = None
    response_format: Literal["b64_json", "url"] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    seed: int | None = None
    service_tier: Tier | None = None


class ImageEditRequest(ImageGenerationRequest):
    """A picture to be changed; the fields of a form, whose values are strings."""

    model_config = ConfigDict(extra="allow", strict=False)
