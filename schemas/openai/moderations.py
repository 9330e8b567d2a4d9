"""Define the request of `POST /v1/moderations`, and the fields that an answer must hold. All other fields pass unchanged."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from schemas.openai.chat import NeverStreamed, ServiceTier


class ImageAddress(BaseModel):
    """The address of a picture: a data URL, or a URL that the gateway fetches."""

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
    """A request to classify content: a text, several texts, or the parts of one content."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """None: the default model for moderations. OpenAI's SDKs allow to omit it."""
    input: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[InputPart], Field(min_length=1, max_length=100)]
    )
    service_tier: ServiceTier | None = None
    stream: NeverStreamed | None = None
    """Only false: this endpoint has no streams."""


class ModerationResult(BaseModel):
    """The classification of one text, or of all parts together."""

    model_config = ConfigDict(extra="allow")

    flagged: bool
    """Whether a category is flagged."""
    categories: dict[str, bool | None]
    """Whether each category is flagged."""
    category_scores: dict[str, float | None]
    """The score of each category, from 0 to 1."""
    category_applied_input_types: dict[str, Any] | None = None
    """The kinds of input, `text` and `image`, that each score applies to."""


class Moderation(BaseModel):
    """The classifications, in the order of the inputs."""

    model_config = ConfigDict(extra="allow")

    id: str | None = None
    model: str
    results: list[ModerationResult]
