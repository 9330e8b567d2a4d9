"""Define the request of `POST /v1/messages/batches`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from schemas.batches import MAX_REQUESTS


class BatchedMessage(BaseModel):
    """One request of a batch."""

    model_config = ConfigDict(extra="allow", strict=True)

    custom_id: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    """Names the request in the results. Each request of a batch has its own."""
    params: dict[str, Any]
    """The body of a request to `/v1/messages`, without `stream`."""


class MessageBatchRequest(BaseModel):
    """A batch of messages to run."""

    model_config = ConfigDict(extra="allow", strict=True)

    requests: Annotated[list[BatchedMessage], Field(min_length=1, max_length=MAX_REQUESTS)]
