"""`POST /v1/embeddings`: the fields that Nexus reads. All others reach the backend untouched."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from schemas.openai.chat import Tier


class EmbeddingsRequest(BaseModel):
    """Texts, or token ids, to be turned into vectors."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: Annotated[str, Field(min_length=1, max_length=256)]
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    service_tier: Tier | None = None
