"""`POST /v1/jobs`: any request, to be answered later."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Metadata = dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]]
"""As OpenAI has it: at most 16 pairs."""


PUBLIC_URL = r"^https?://([A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,20}(:[1-9][0-9]{1,3})?(/[!-~]*)?$"
"""The usual form of such a URL, for the documentation alone: others are taken too, such as one with an address."""


class WebhookRequest(BaseModel):
    """Whom to tell of the job's end."""

    model_config = ConfigDict(extra="forbid", strict=True, title="WebhookWish")

    url: Annotated[str, Field(min_length=1, max_length=2048, json_schema_extra={"pattern": PUBLIC_URL})]


class SubmitRequest(BaseModel):
    """A job."""

    model_config = ConfigDict(extra="forbid", strict=True)

    endpoint: Annotated[str, Field(min_length=1, max_length=200)]
    """An inference endpoint's path: `/v1/chat/completions`."""
    body: dict[str, Any]
    """What would be sent there. Where that takes a form, its files are ids of uploaded files."""
    metadata: Annotated[Metadata, Field(max_length=16)] = Field(default_factory=dict)
    webhook: WebhookRequest | None = None
    service_tier: Literal["priority", "default", "flex"] | None = None
    """None: as the body says."""
    timeout: Annotated[float, Field(gt=0, le=30 * 86_400)] | None = None
    """Seconds from now after which the job ends as `expired`, whatever it is doing."""
