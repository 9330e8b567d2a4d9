"""`POST /v1/rerank`, as Jina and Cohere have it: the fields that Nexus reads. All others reach the backend untouched."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from schemas.openai.chat import NeverStreamed, ServiceTier


class RerankDocument(BaseModel):
    """A text; what else it holds comes back with it."""

    model_config = ConfigDict(extra="allow", strict=True, title="Document")

    text: str


class RerankRequest(BaseModel):
    """Documents to be ordered by how well they answer a query."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: Annotated[str, Field(min_length=1, max_length=256)]
    query: Annotated[str, Field(min_length=1)]
    documents: Annotated[list[str | RerankDocument], Field(min_length=1)]
    top_n: Annotated[int, Field(ge=1)] | None = None
    """None: all of them."""
    return_documents: bool | None = None
    """None: no, only their indexes."""
    service_tier: ServiceTier | None = None
    stream: NeverStreamed | None = None
    """There is nothing to stream."""
