"""The response bodies of the routes of usage."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Money(BaseModel):
    """An amount of money, by the operator's price list."""

    value: float
    currency: str


class UsageSums(BaseModel):
    """The usage of one group; it also has the fields that the query groups by."""

    model_config = ConfigDict(extra="allow", title="UsageSums")

    start: int | None = None
    """Unix seconds of the interval's beginning, if the query has a `bucket`."""
    requests: int
    input_tokens: int
    """Cached tokens included."""
    output_tokens: int
    """Reasoning tokens included."""
    cached_tokens: int
    reasoning_tokens: int
    images: int
    audio_seconds: float
    characters: int
    bytes_in: int
    bytes_out: int
    queue_seconds: float
    run_seconds: float
    slot_seconds: float
    cost: Money | None
    """Null without a price list."""


class UsageReport(BaseModel):
    """Usage, added up."""

    object: Literal["usage"]
    start: int
    end: int
    bucket: str | None
    group_by: list[str]
    data: list[UsageSums]
    has_more: bool
    next_page: str | None
    """The `page` of the next rows."""


class UsageBucket(BaseModel):
    """One interval, in OpenAI's shape."""

    object: Literal["bucket"]
    start_time: int
    end_time: int
    results: list[dict[str, Any]]
    """OpenAI's objects, such as `organization.usage.completions.result`."""


class UsagePage(BaseModel):
    """A page of intervals, in OpenAI's shape."""

    object: Literal["page"]
    data: list[UsageBucket]
    has_more: bool
    next_page: str | None
