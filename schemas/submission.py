"""Define `POST /v1/jobs`: any request, to be answered later."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Metadata = dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]]
"""OpenAI's metadata: at most 16 pairs."""


PUBLIC_URL = r"^https?://([A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,20}(:[1-9][0-9]{1,3})?(/[!-~]*)?$"
"""The usual form of such a URL, for the documentation. Requests may use others, such as a URL with an address."""


class WebhookRequest(BaseModel):
    """The webhook that receives the job's outcome."""

    model_config = ConfigDict(extra="forbid", strict=True, title="WebhookWish")

    url: Annotated[str, Field(min_length=1, max_length=2048, json_schema_extra={"pattern": PUBLIC_URL})]


class SubmitRequest(BaseModel):
    """A request for a job."""

    model_config = ConfigDict(extra="forbid", strict=True)

    endpoint: Annotated[str, Field(min_length=1, max_length=200)]
    """The path of an inference endpoint: `/v1/chat/completions`."""
    body: dict[str, Any]
    """The body of a request to that endpoint. Where the endpoint takes a form, file fields hold ids of uploaded files."""
    metadata: Annotated[Metadata, Field(max_length=16)] = Field(default_factory=dict)
    webhook: WebhookRequest | None = None
    service_tier: Literal["priority", "default", "flex"] | None = None
    """None: the tier of the body."""
    timeout: Annotated[float, Field(gt=0, le=30 * 86_400)] | None = None
    """Seconds from now after which the job ends as `expired`, in any state."""
