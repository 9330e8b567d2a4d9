"""What is stored in the usage ledger, what is asked of it, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from schemas.usage import UsageEvent

Bucket = Literal["", "minute", "hour", "day", "month"]


class PricedEvent(NamedTuple):
    """A usage event and its cost by the price list."""

    event: UsageEvent
    cost_nanos: int
    """Billionths of the currency's unit."""
    currency: str


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """What to add up."""

    start: int
    """Unix seconds, inclusive."""
    end: int
    """Unix seconds, exclusive."""
    bucket: Bucket = ""
    """The length of the intervals, in UTC; empty: one sum over all time."""
    group_by: tuple[str, ...] = ()
    """Names of `schemas.usage.DIMENSIONS`."""
    filters: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """By dimension: the values to count."""
    limit: int = 1000
    offset: int = 0


class UsageSum(NamedTuple):
    """One group of runs, added up."""

    start: int | None
    """Unix seconds of the interval's beginning; None: the query has no intervals."""
    group: dict[str, Any]
    sums: dict[str, int]
    """`requests`, and the fields of `schemas.usage.SUMS`."""
    cost_nanos: int
    currency: str
