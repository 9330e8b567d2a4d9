"""`POST /v1/images/generations` and `/v1/images/edits`: the fields that Nexus reads. All others reach the backend untouched."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from schemas.openai.chat import ServiceTier
from schemas.openai.form import FormRequest

SIZE = re.compile(r"auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4}")


def _size(value: str) -> str:
    if not SIZE.fullmatch(value):
        raise PydanticCustomError("image_size", "Size must be auto, or WIDTHxHEIGHT such as 1024x1024")
    return value


class ImageRequestBase(BaseModel):
    """What both have in common."""

    model: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """None: the default for images; OpenAI's SDKs let it be left out."""
    prompt: Annotated[str, Field(min_length=1, max_length=32_000)]
    n: Annotated[int, Field(ge=1, le=10)] | None = None
    size: Annotated[str, AfterValidator(_size), Field(json_schema_extra={"pattern": f"^({SIZE.pattern})$"})] | None = (
        None
    )
    """`auto` or `WIDTHxHEIGHT`."""
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    seed: Annotated[int, Field(ge=-1, le=2**64 - 1)] | None = None
    """Ours, as are `negative_prompt`, `steps` and `guidance`. -1: any."""
    service_tier: ServiceTier | None = None


class ImageGenerationRequest(ImageRequestBase):
    """Pictures from a text."""

    model_config = ConfigDict(extra="allow", strict=True)


class ImageEditRequest(FormRequest, ImageRequestBase):
    """Pictures from a picture: the fields of a form, where numbers and booleans are text. Its files travel beside it."""
