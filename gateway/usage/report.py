"""Answer `GET /v1/usage`: as JSON, or as a CSV table with the same numbers."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from backbone.ledger.usage_ledger import UsageLedger
from backbone.ledger.usage_query import UsageQuery, UsageSum
from schemas.errors import NotFound

NANO = 1_000_000_000
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
"""Texts that spreadsheets would run."""
MEASURES: tuple[tuple[str, Callable[[dict[str, int]], int | float]], ...] = (
    ("requests", lambda sums: sums["requests"]),
    ("input_tokens", lambda sums: sums["input_tokens"]),
    ("output_tokens", lambda sums: sums["output_tokens"]),
    ("cached_tokens", lambda sums: sums["cached_tokens"]),
    ("reasoning_tokens", lambda sums: sums["reasoning_tokens"]),
    ("images", lambda sums: sums["images"]),
    ("audio_seconds", lambda sums: sums["audio_ms"] / 1000),
    ("characters", lambda sums: sums["characters"]),
    ("bytes_in", lambda sums: sums["bytes_in"]),
    ("bytes_out", lambda sums: sums["bytes_out"]),
    ("queue_seconds", lambda sums: sums["queue_us"] / 1_000_000),
    ("run_seconds", lambda sums: sums["run_us"] / 1_000_000),
    ("slot_seconds", lambda sums: sums["slot_us"] / 1_000_000),
)


class NoLedger(NotFound):
    """This gateway keeps no usage: its operator has not set LEDGER_URL."""

    code = "no_ledger"


class UsageReports:
    """Reads the ledger for callers."""

    def __init__(self, ledger: UsageLedger | None) -> None:
        self._ledger = ledger

    @property
    def has_ledger(self) -> bool:
        """Whether this gateway keeps usage."""
        return self._ledger is not None

    def require_ledger(self) -> UsageLedger:
        """Return the ledger. Raises NoLedger, which routes say before they look at a query."""
        if self._ledger is None:
            raise NoLedger
        return self._ledger

    async def add_up(self, query: UsageQuery) -> list[UsageSum]:
        """Return the sums. Raises NoLedger, Unavailable."""
        return await self.require_ledger().add_up(query)


async def usage_object(reports: UsageReports, query: UsageQuery) -> dict[str, Any]:
    """Return the answer as JSON. Raises as `UsageReports.add_up`."""
    rows, has_more = await _page(reports, query)
    return {
        "object": "usage",
        "start": query.start,
        "end": query.end,
        "bucket": query.bucket or None,
        "group_by": list(query.group_by),
        "data": [_row_object(row) for row in rows],
        "has_more": has_more,
        "next_page": str(query.offset + query.limit) if has_more else None,
    }


async def usage_csv(reports: UsageReports, query: UsageQuery) -> str:
    """Return the answer as CSV (RFC 4180), with a head. Raises as `UsageReports.add_up`."""
    rows, _ = await _page(reports, query)
    text = io.StringIO()
    table = csv.writer(text)
    interval = ["start"] if query.bucket else []
    table.writerow([*interval, *query.group_by, *(name for name, _ in MEASURES), "cost", "currency"])
    for row in rows:
        start = [] if row.start is None else [datetime.fromtimestamp(row.start, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")]
        group = [_cell(row.group[name]) for name in query.group_by]
        measures = (measure(row.sums) for _, measure in MEASURES)
        table.writerow([*start, *group, *measures, row.cost_nanos / NANO, row.currency])
    return text.getvalue()


async def _page(reports: UsageReports, query: UsageQuery) -> tuple[list[UsageSum], bool]:
    rows = await reports.add_up(replace(query, limit=query.limit + 1))
    return rows[: query.limit], len(rows) > query.limit


def _row_object(row: UsageSum) -> dict[str, Any]:
    interval = {} if row.start is None else {"start": row.start}
    measures = {name: measure(row.sums) for name, measure in MEASURES}
    cost = {"value": row.cost_nanos / NANO, "currency": row.currency} if row.currency else None
    return interval | row.group | measures | {"cost": cost}


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    return f"'{value}" if str(value).startswith(FORMULA_STARTS) else value
