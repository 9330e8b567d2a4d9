"""Define the inspection of a team: for a limited time, its requests and answers are kept for administrators."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

MAX_INSPECTION_S = 86_400
MAX_REQUESTS = 200
MAX_PATTERNS = 20
RedactPattern = Annotated[str, StringConstraints(pattern=r"^[!-~]{3,100}$")]
"""Text that is hidden; `*` stands for any characters without a blank or a quote, at most two times."""


class Inspection(BaseModel):
    """What is kept of a team's requests, and for how long."""

    model_config = ConfigDict(frozen=True)

    until: int
    """Unix seconds: later requests are not kept."""
    max_requests: int = Field(ge=1, le=MAX_REQUESTS)
    """The newest requests are kept, and no more."""
    keep_s: int = Field(ge=1, le=MAX_INSPECTION_S)
    """Seconds after which a kept request is deleted."""
    redact: tuple[RedactPattern, ...] = Field(default=(), max_length=MAX_PATTERNS)
    """Patterns that are hidden, beside those that always are."""


class InspectedSummary(BaseModel):
    """One kept request in a list."""

    model_config = ConfigDict(frozen=True)

    id: str
    """The id of its job."""
    request_id: str
    endpoint: str
    model: str
    created_at: float
    """Unix seconds."""
    durable: bool
    """The request became a durable job, which may end after its answer."""
    key: str = ""
    """The id of the API key; empty for a session."""


class InspectedRequest(InspectedSummary):
    """One kept request, after redaction."""

    request: str
    """The body, or its beginning."""
    request_bytes: int
    status: int | None = None
    """The HTTP status of the answer; null: it has not ended, or the caller has disconnected."""
    error: str | None = None
    answer: str | None = None
    """The answer, or its beginning; a stream's pieces are joined."""
    answer_bytes: int = 0
    worker: str = ""
    attempts: int = 0
    queue_s: float | None = None
    """Seconds from the request to the start of its first attempt."""
    first_token_s: float | None = None
    """Seconds from the request to the first piece of its answer."""
    seconds: float | None = None
    """Seconds from the request to its end."""
