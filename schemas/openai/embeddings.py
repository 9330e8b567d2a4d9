"""Define the request of `POST /v1/embeddings`: the fields that Nexus reads. All others reach the backend unchanged."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from schemas.openai.chat import NeverStreamed, ServiceTier, TokenId

Text = Annotated[str, Field(min_length=1)]
Tokens = Annotated[list[TokenId], Field(min_length=1)]


class EmbeddingsRequest(BaseModel):
    """A request for the vectors of one text, several texts, or the same as token ids."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: Annotated[str, Field(min_length=1, max_length=256)]
    input: Text | Annotated[list[Text], Field(min_length=1)] | Tokens | Annotated[list[Tokens], Field(min_length=1)]
    encoding_format: Literal["float", "base64"] | None = None
    """None: float."""
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None
    service_tier: ServiceTier | None = None
    stream: NeverStreamed | None = None
    """Only false: this endpoint has no streams."""
