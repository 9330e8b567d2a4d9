"""Define the request of `POST /v1/rerank`, as in the APIs of Jina and Cohere: the fields that Nexus reads. All others reach the backend unchanged."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from schemas.openai.chat import NeverStreamed, ServiceTier


class RerankDocument(BaseModel):
    """A document as an object. Fields other than `text` are returned with it."""

    model_config = ConfigDict(extra="allow", strict=True, title="Document")

    text: str


class RerankRequest(BaseModel):
    """A request to order documents by their relevance to a query."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: Annotated[str, Field(min_length=1, max_length=256)]
    query: Annotated[str, Field(min_length=1)]
    documents: Annotated[list[str | RerankDocument], Field(min_length=1)]
    top_n: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    """None: all documents."""
    return_documents: bool | None = None
    """None: false, only their indexes are returned."""
    service_tier: ServiceTier | None = None
    stream: NeverStreamed | None = None
    """Only false: this endpoint has no streams."""
