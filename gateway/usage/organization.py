"""Answer OpenAI's routes of usage and costs: pages of buckets. A project is a team, a user a person.

Requests that did not complete are not counted, as OpenAI's are not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from backbone.ledger.usage_query import Bucket, UsageQuery, UsageSum
from gateway.usage.query import (
    Parameters,
    read_choice,
    read_names,
    read_number,
    read_one,
    read_time,
    read_values,
    require_known,
    require_order,
    restrict_to_team,
)
from gateway.usage.report import NANO, UsageReports
from schemas.errors import InvalidRequest

WIDTHS: Mapping[str, tuple[Bucket, int, int, int]] = {
    "1m": ("minute", 60, 60, 1440),
    "1h": ("hour", 3600, 24, 168),
    "1d": ("day", 86_400, 7, 31),
}
"""By OpenAI's name: ours, seconds, buckets in a page by default and at most."""
COST_WIDTHS: Mapping[str, tuple[Bucket, int, int, int]] = {"1d": ("day", 86_400, 7, 180)}
MAX_RESULTS = 50_000
"""Results in all buckets of a page."""
COMMON = {"project_id": "team", "user_id": "person", "api_key_id": "key", "model": "model"}
"""OpenAI's names of what results are grouped by, and ours."""
TEXT = COMMON | {"batch": "batch", "service_tier": "lane"}
FILTERS = {"project_ids": "team", "user_ids": "person", "api_key_ids": "key", "models": "model"}

Sums = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class UsageKind:
    """One of OpenAI's routes of usage."""

    capabilities: tuple[str, ...]
    dimensions: Mapping[str, str]
    measures: Callable[[Sums], dict[str, int]]
    other_fields: tuple[str, ...] = ()
    """Fields of OpenAI's results that Nexus does not know: they are null."""


def _text(sums: Sums) -> dict[str, int]:
    return {
        "input_tokens": sums["input_tokens"],
        "output_tokens": sums["output_tokens"],
        "input_cached_tokens": sums["cached_tokens"],
        "input_audio_tokens": 0,
        "output_audio_tokens": 0,
    }


KINDS: Mapping[str, UsageKind] = {
    "completions": UsageKind(("chat", "completions"), TEXT, _text),
    "embeddings": UsageKind(("embeddings",), COMMON, lambda sums: {"input_tokens": sums["input_tokens"]}),
    "moderations": UsageKind(("moderations",), COMMON, lambda sums: {"input_tokens": sums["input_tokens"]}),
    "images": UsageKind(
        ("images",), COMMON | {"size": "image_size"}, lambda sums: {"images": sums["images"]}, ("source",)
    ),
    "audio_speeches": UsageKind(("speech",), COMMON, lambda sums: {"characters": sums["characters"]}),
    "audio_transcriptions": UsageKind(
        ("transcriptions",), COMMON, lambda sums: {"seconds": round(sums["audio_ms"] / 1000)}
    ),
}


async def usage_page(
    reports: UsageReports, name: str, parameters: Parameters, *, own_team: str | None, now: float
) -> dict[str, Any]:
    """Return a page of `GET /v1/organization/usage/{name}`. Raises InvalidRequest, PermissionDenied, NoLedger, Unavailable."""
    reports.require_ledger()
    kind = KINDS[name]
    special = {"batch"} if "batch" in kind.dimensions else {"sizes"} if "size" in kind.dimensions else set()
    page = _Page.read(parameters, WIDTHS, {*FILTERS, *special}, now)
    group_by = read_names(parameters, "group_by", tuple(kind.dimensions))
    filters = _filters(parameters, own_team) | {"capability": kind.capabilities, "status": ("completed",)}
    if "sizes" in parameters:
        filters["image_size"] = read_values(parameters, "sizes")
    if "batch" in parameters:
        filters["batch"] = (read_choice(parameters, "batch", ("true", "false"), "") == "true",)
    names = [kind.dimensions[one] for one in group_by]

    def result(row: UsageSum) -> dict[str, Any]:
        values = {
            theirs: row.group.get(ours) if theirs in group_by else None for theirs, ours in kind.dimensions.items()
        }
        return {
            "object": f"organization.usage.{name}.result",
            **kind.measures(row.sums),
            "num_model_requests": row.sums["requests"],
            **values,
            **dict.fromkeys(kind.other_fields),
        }

    return await page.answer(reports, names, filters, result)


async def costs_page(
    reports: UsageReports, parameters: Parameters, *, own_team: str | None, now: float
) -> dict[str, Any]:
    """Return a page of `GET /v1/organization/costs`; a line item is a model. Raises as `usage_page`."""
    reports.require_ledger()
    dimensions = {"project_id": "team", "line_item": "model", "api_key_id": "key"}
    page = _Page.read(parameters, COST_WIDTHS, {"project_ids", "api_key_ids"}, now)
    group_by = read_names(parameters, "group_by", tuple(dimensions))

    def result(row: UsageSum) -> dict[str, Any]:
        return {
            "object": "organization.costs.result",
            "amount": {"value": row.cost_nanos / NANO, "currency": row.currency or "usd"},
            **{theirs: row.group.get(ours) if theirs in group_by else None for theirs, ours in dimensions.items()},
        }

    return await page.answer(reports, [dimensions[one] for one in group_by], _filters(parameters, own_team), result)


def _filters(parameters: Parameters, own_team: str | None) -> dict[str, tuple[Any, ...]]:
    filters: dict[str, tuple[Any, ...]] = {
        ours: read_values(parameters, theirs) for theirs, ours in FILTERS.items() if theirs in parameters
    }
    return restrict_to_team(filters, own_team, "project_ids")


@dataclass(frozen=True, slots=True)
class _Page:
    """The buckets of a page."""

    first: int
    end: int
    """Unix seconds at which the page ends."""
    last: int
    """Unix seconds at which all pages end."""
    bucket: Bucket
    width_s: int

    @classmethod
    def read(
        cls,
        parameters: Parameters,
        widths: Mapping[str, tuple[Bucket, int, int, int]],
        filters: set[str],
        now: float,
    ) -> _Page:
        """Read what all routes have in common. Raises InvalidRequest."""
        known = {"start_time", "end_time", "bucket_width", "group_by", "limit", "page"}
        require_known(parameters, known | filters)
        if read_one(parameters, "start_time") is None:
            raise InvalidRequest("'start_time' is required: Unix seconds.", param="start_time")
        width = read_choice(parameters, "bucket_width", tuple(widths), "1d")
        bucket, seconds, default, most = widths[width]
        start = read_time(parameters, "start_time", 0)
        last = read_time(parameters, "end_time", int(now) + 1)
        require_order(start, last, "start_time", "end_time")
        first = read_number(parameters, "page", start // seconds * seconds, 0, last)
        limit = read_number(parameters, "limit", default, 1, most)
        first = first // seconds * seconds
        return cls(first, min(last, first + limit * seconds), last, bucket, seconds)

    async def answer(
        self,
        reports: UsageReports,
        group_by: list[str],
        filters: dict[str, tuple[Any, ...]],
        result: Callable[[UsageSum], dict[str, Any]],
    ) -> dict[str, Any]:
        """Return the page."""
        if self.first >= self.end:
            return {"object": "page", "data": [], "has_more": False, "next_page": None}
        query = UsageQuery(self.first, self.end, self.bucket, tuple(group_by), filters, limit=MAX_RESULTS + 1)
        rows = await reports.add_up(query)
        if len(rows) > MAX_RESULTS:
            raise InvalidRequest("These are too many results for a page. Use a smaller 'limit'.", param="limit")
        by_start: dict[int | None, list[dict[str, Any]]] = {}
        for row in rows:
            by_start.setdefault(row.start, []).append(result(row))
        buckets = [
            {
                "object": "bucket",
                "start_time": start,
                "end_time": min(start + self.width_s, self.last),
                "results": by_start.get(start, []),
            }
            for start in range(self.first, self.end, self.width_s)
        ]
        has_more = self.end < self.last
        return {
            "object": "page",
            "data": buckets,
            "has_more": has_more,
            "next_page": str(self.end) if has_more else None,
        }
