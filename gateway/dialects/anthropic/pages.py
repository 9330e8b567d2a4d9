"""Makes pages of lists in Anthropic's form. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from schemas.errors import InvalidRequest

JSON = dict[str, Any]

AFTER, BEFORE, LIMIT = "after_id", "before_id", "limit"
DEFAULT_LIMIT = 20
MAX_LIMIT = 1000


class PageQuery(NamedTuple):
    """Which page of a list is wanted."""

    after: str
    """The id behind which the page begins; empty: at the list's start."""
    before: str
    """The id before which the page ends; empty: with `limit`."""
    limit: int


def read_query(query: Mapping[str, str]) -> PageQuery:
    """Read which page a request's query wants. Raises InvalidRequest."""
    text = query.get(LIMIT, str(DEFAULT_LIMIT))
    if not (text.isdecimal() and len(text) <= len(str(MAX_LIMIT)) and 1 <= int(text) <= MAX_LIMIT):
        raise InvalidRequest(f"'limit' must be a number from 1 to {MAX_LIMIT}, not '{text[:20]}'.", param=LIMIT)
    return PageQuery(query.get(AFTER, ""), query.get(BEFORE, ""), int(text))


def page_of(items: Sequence[JSON], query: Mapping[str, str]) -> JSON:
    """Return the page of a whole list that a request's query wants. Raises InvalidRequest for an id that is not in the list."""
    wanted = read_query(query)
    ids = [item["id"] for item in items]
    for name, cursor in ((AFTER, wanted.after), (BEFORE, wanted.before)):
        if cursor and cursor not in ids:
            raise InvalidRequest(f"'{cursor[:100]}' is not in the list: '{name}'", param=name)
    start = ids.index(wanted.after) + 1 if wanted.after else 0
    end = ids.index(wanted.before) if wanted.before else len(items)
    rest = items[start:end]
    page = rest[-wanted.limit :] if wanted.before else rest[: wanted.limit]
    return page_object(page, more=len(rest) > len(page))


def page_object(page: Sequence[JSON], *, more: bool) -> JSON:
    """Return Anthropic's list object."""
    return {
        "data": list(page),
        "has_more": more,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
    }
