"""The query of `GET /v1/usage`: nonsense is refused by name, and a team sees itself alone."""

from __future__ import annotations

import pytest

from gateway.usage.query import group_parameters, parse_usage_request
from schemas.errors import InvalidRequest, NexusError, PermissionDenied

NOW = 1_796_000_000.5


def parse(query: str = "", own_team: str | None = None):
    pairs = [(name, value) for name, _, value in (part.partition("=") for part in query.split("&") if part)]
    return parse_usage_request(group_parameters(pairs), own_team=own_team, accepts_csv=False, now=NOW)


def test_defaults() -> None:
    """Without parameters: one sum over the last 30 days."""
    query = parse().query
    assert (query.end, query.bucket, query.group_by, query.filters) == (1_796_000_001, "", (), {})
    assert query.start % 86_400 == 0
    assert 30 <= (query.end - query.start) / 86_400 < 31


def test_everything() -> None:
    """Lists are repeated or separated by commas, times are written in any common way."""
    request = parse(
        "start=2026-11-01&end=2026-11-02T12:00:00+02:00&bucket=day&group_by=team,model&group_by[]=worker&model=a&model=b"
        "&durable=true&limit=5&page=10&format=csv"
    )
    query = request.query
    assert request.csv
    assert (query.start, query.end) == (1_793_491_200, 1_793_613_600)
    assert query.group_by == ("team", "model", "worker")
    assert query.filters == {"model": ("a", "b"), "durable": (True,)}
    assert (query.limit, query.offset) == (5, 10)


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("start=yesterday", "start"), ("end=-5", "end"), ("end=99999999999999999", "end"), ("start=2026-13-01", "start"),
        ("start=2026-11-02&end=2026-11-01", "start"), ("bucket=week", "bucket"), ("bucket=minute", "bucket"),
        ("group_by=color", "group_by"), ("limit=0", "limit"), ("limit=1e3", "limit"), ("limit=٣", "limit"),
        ("page=x", "page"), ("format=xml", "format"), ("durable=1", "durable"), ("sort=cost", "sort"),
        ("start=1&start=2", "start"), ("model=" + "x" * 600, "model"), ("team=a\0b", "team"),
        ("&".join(f"model={n}" for n in range(101)), "model"),
    ],
)  # fmt: skip
def test_nonsense_is_refused_by_name(query: str, param: str) -> None:
    """Each wrong parameter is 400 and named."""
    with pytest.raises(InvalidRequest) as refused:
        parse(query)
    assert refused.value.info.param == param


def test_a_team_sees_itself_alone() -> None:
    """Without the scope `admin`, the query counts the caller's team, and may name no other."""
    assert parse("group_by=team", own_team="red").query.filters == {"team": ("red",)}
    assert parse("team=red", own_team="red").query.filters == {"team": ("red",)}
    with pytest.raises(PermissionDenied):
        parse("team=red&team=blue", own_team="red")
    with pytest.raises(NexusError):
        parse("team=", own_team="red")
    assert parse("team=blue").query.filters == {"team": ("blue",)}
