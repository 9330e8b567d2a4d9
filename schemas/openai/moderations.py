"""`POST /v1/moderations`: the fields that Nexus reads, and what an answer must hold. All other fields pass untouched."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from schemas.openai.chat import NeverStreamed, ServiceTier


class ImageAddress(BaseModel):
    """Where a picture is: a data URL, or a URL that the gateway fetches."""

    model_config = ConfigDict(extra="allow", strict=True)

    url: Annotated[str, Field(min_length=1)]


class TextPart(BaseModel):
    """A text to classify."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["text"]
    text: str


class ImagePart(BaseModel):
    """A picture to classify."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["image_url"]
    image_url: ImageAddress


InputPart = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class ModerationRequest(BaseModel):
    """Content to classify: a text, several texts, or the parts of one content."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """None: the default for moderations; OpenAI's SDKs let it be left out."""
    input: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[InputPart], Field(min_length=1, max_length=100)]
    )
    service_tier: ServiceTier | None = None
    stream: NeverStreamed | None = None
    """There is nothing to stream."""


class ModerationResult(BaseModel):
    """The classification of one text, or of all parts together."""

    model_config = ConfigDict(extra="allow")

    flagged: bool
    """Whether a category is flagged."""
    categories: dict[str, bool | None]
    """The categories, and whether each is flagged."""
    category_scores: dict[str, float | None]
    """The categories' scores, from 0 to 1."""
    category_applied_input_types: dict[str, Any] | None = None
    """The kinds of input, `text` and `image`, that each score applies to."""


class Moderation(BaseModel):
    """The classifications, in the order of the inputs."""

    model_config = ConfigDict(extra="allow")

    id: str | None = None
    model: str
    results: list[ModerationResult]
