"""`POST /v1/rerank`, in the shape of Jina and Cohere: the fields that Nexus reads."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from schemas.openai.chat import Tier


class RerankRequest(BaseModel):
    """Documents to be ordered by what they have to do with a query."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: Annotated[str, Field(min_length=1, max_length=256)]
    query: Annotated[str, Field(min_length=1)]
    documents: Annotated[list[str | dict[str, Any]], Field(min_length=1)]
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool | None = None
    service_tier: Tier | None = None
