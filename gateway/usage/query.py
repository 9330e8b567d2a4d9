"""Read the query of `GET /v1/usage`. Every wrong parameter is InvalidRequest with its name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast

from backbone.ledger.usage_query import Bucket, UsageQuery
from schemas.errors import InvalidRequest, PermissionDenied
from schemas.usage import DIMENSIONS

BUCKETS = ("minute", "hour", "day", "month")
FORMATS = ("json", "csv")
DAY_S = 86_400
DEFAULT_DAYS = 30
DEFAULT_LIMIT, MAX_LIMIT = 1000, 10_000
MAX_OFFSET = 10_000_000
MAX_VALUES = 100
MAX_VALUE_LENGTH = 512
MIN_TIME, MAX_TIME = 0, 253_402_300_800
"""1970 to 9999."""
FLAGS = ("durable", "batch")
_PLAIN = ("start", "end", "bucket", "format", "limit", "page")

Parameters = Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class UsageRequest:
    """A checked query."""

    query: UsageQuery
    csv: bool


def group_parameters(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Return the values of each parameter. `name[]` is `name`, as OpenAI's SDKs write lists."""
    found: dict[str, list[str]] = {}
    for name, value in pairs:
        found.setdefault(name.removesuffix("[]"), []).append(value)
    return found


def parse_usage_request(parameters: Parameters, *, own_team: str | None, accepts_csv: bool, now: float) -> UsageRequest:
    """Return the query. `own_team`: the only team that the caller may see; None: all. Raises InvalidRequest, PermissionDenied."""
    require_known(parameters, {*_PLAIN, "group_by", *DIMENSIONS})
    end = read_time(parameters, "end", int(now) + 1)
    start = read_time(parameters, "start", (end - DEFAULT_DAYS * DAY_S) // DAY_S * DAY_S)
    require_order(start, end, "start", "end")
    bucket = read_choice(parameters, "bucket", BUCKETS, "")
    if bucket == "minute" and end - start > 7 * DAY_S:
        raise InvalidRequest("Minutes can be read for at most 7 days at once. Use a larger bucket.", param="bucket")
    style = read_choice(parameters, "format", FORMATS, "csv" if accepts_csv else "json")
    filters: dict[str, tuple[Any, ...]] = {}
    for name in DIMENSIONS:
        if name in parameters:
            filters[name] = _flags(parameters, name) if name in FLAGS else read_values(parameters, name)
    query = UsageQuery(
        start=start,
        end=end,
        bucket=cast("Bucket", bucket),
        group_by=read_names(parameters, "group_by", DIMENSIONS),
        filters=restrict_to_team(filters, own_team, "team"),
        limit=read_number(parameters, "limit", DEFAULT_LIMIT, 1, MAX_LIMIT),
        offset=read_number(parameters, "page", 0, 0, MAX_OFFSET),
    )
    return UsageRequest(query, csv=style == "csv")


def restrict_to_team(
    filters: dict[str, tuple[Any, ...]], own_team: str | None, parameter: str
) -> dict[str, tuple[Any, ...]]:
    """Return the filters, so that they show the caller's team alone. Raises PermissionDenied if they name another one."""
    if own_team is None:
        return filters
    if any(team != own_team for team in filters.get("team", ())):
        raise PermissionDenied(
            f"This API key sees the usage of its own team alone: '{parameter}' may name no other. A key with the scope 'admin' sees all.",
        )
    return filters | {"team": (own_team,)}


def require_known(parameters: Parameters, known: Iterable[str]) -> None:
    """Raise InvalidRequest for a parameter that does not exist."""
    for name in parameters:
        if name not in known:
            raise InvalidRequest(
                f"The parameter '{name[:100]}' does not exist. There are: {', '.join(sorted(known))}.", param=name[:100]
            )


def require_order(start: int, end: int, start_name: str, end_name: str) -> None:
    """Raise InvalidRequest unless the start is before the end."""
    if start >= end:
        raise InvalidRequest(f"'{start_name}' must be before '{end_name}'.", param=start_name)


def read_one(parameters: Parameters, name: str) -> str | None:
    """Return the value of a parameter that may occur once."""
    values = parameters.get(name)
    if not values:
        return None
    if len(values) > 1:
        raise InvalidRequest(f"'{name}' may be given once.", param=name)
    return values[0]


def read_choice(parameters: Parameters, name: str, choices: Sequence[str], default: str) -> str:
    """Return one of `choices`."""
    value = read_one(parameters, name)
    if value is None:
        return default
    if value not in choices:
        raise InvalidRequest(f"'{name}' must be one of {', '.join(choices)}.", param=name)
    return value


def read_number(parameters: Parameters, name: str, default: int, least: int, most: int) -> int:
    """Return a whole number within bounds."""
    value = read_one(parameters, name)
    if value is None:
        return default
    number = int(value) if value.isascii() and value.isdecimal() and len(value) < 20 else -1
    if not least <= number <= most:
        raise InvalidRequest(f"'{name}' must be a whole number from {least} to {most}.", param=name)
    return number


def read_time(parameters: Parameters, name: str, default: int) -> int:
    """Return a time in Unix seconds, given as such or by ISO 8601; a time without a zone is UTC."""
    value = read_one(parameters, name)
    if value is None:
        return default
    seconds = -1.0
    if value.isascii() and value.isdecimal() and len(value) < 16:
        seconds = int(value)
    else:
        try:
            moment = datetime.fromisoformat(value)
            seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        except (ValueError, OverflowError):
            seconds = -1.0
    if not MIN_TIME <= seconds <= MAX_TIME:
        raise InvalidRequest(f"'{name}' must be a time: 2026-11-30, 2026-11-30T14:00:00Z, or Unix seconds.", param=name)
    return int(seconds)


def read_names(parameters: Parameters, name: str, choices: Sequence[str]) -> tuple[str, ...]:
    """Return a list of names, which the parameter repeats or separates by commas."""
    names = [part.strip() for value in parameters.get(name, ()) for part in value.split(",") if part.strip()]
    for one in names:
        if one not in choices:
            raise InvalidRequest(
                f"'{name}' cannot be '{one[:100]}'. It is a list of: {', '.join(choices)}.", param=name
            )
    return tuple(dict.fromkeys(names))


def read_values(parameters: Parameters, name: str) -> tuple[str, ...]:
    """Return the values to count, each given by one repetition of the parameter."""
    values = tuple(dict.fromkeys(parameters.get(name, ())))
    if len(values) > MAX_VALUES:
        raise InvalidRequest(f"'{name}' may be given at most {MAX_VALUES} times.", param=name)
    if any(len(value) > MAX_VALUE_LENGTH or "\0" in value for value in values):
        raise InvalidRequest(f"'{name}' is too long, or holds a NUL.", param=name)
    return values


def _flags(parameters: Parameters, name: str) -> tuple[bool, ...]:
    values = parameters[name]
    if any(value not in ("true", "false") for value in values):
        raise InvalidRequest(f"'{name}' must be true or false.", param=name)
    return tuple({value == "true" for value in values})
