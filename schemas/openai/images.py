"""Define the requests of `POST /v1/images/generations` and `/v1/images/edits`: the fields that Nexus reads. All others reach the backend unchanged."""

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
    """The fields that both requests share."""

    model: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """None: the default model for images. OpenAI's SDKs allow to omit it."""
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
    """A field of Nexus, like `negative_prompt`, `steps` and `guidance`. -1: a random seed."""
    service_tier: ServiceTier | None = None


class ImageGenerationRequest(ImageRequestBase):
    """A request for pictures from a text."""

    model_config = ConfigDict(extra="allow", strict=True)


class ImageEditRequest(FormRequest, ImageRequestBase):
    """A request for pictures from a picture: the fields of a form, in which numbers and booleans are text. The files travel separately."""
