"""Lists in pages, as OpenAI's cursor pages have them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from backbone.store.documents import DocumentStore

T = TypeVar("T")

STEP = 500
"""Documents fetched at once."""


class ListItem(Protocol):
    """What a page consists of."""

    @property
    def id(self) -> str:
        """What the next page begins behind."""

    def to_openai(self) -> dict[str, Any]:
        """As its owner sees it."""


async def read_page(
    documents: DocumentStore,
    kind: str,
    owner: str,
    parse: Callable[[bytes], T],
    *,
    after: str,
    limit: int,
    newest_first: bool = True,
    wanted: Callable[[T], bool] | None = None,
) -> tuple[list[T], bool]:
    """Up to `limit` wanted documents behind the id `after`, and whether there are more. Raises Unavailable."""
    found: list[T] = []
    # Of those that are wanted there may be few: look at many.
    step = STEP if wanted is not None else min(STEP, limit + 1)
    while len(found) <= limit:
        page = await documents.page(kind, owner, after=after, limit=step, newest_first=newest_first)
        values = [parse(data) for _, data in page]
        found += values if wanted is None else filter(wanted, values)
        if len(page) < step:
            break
        after = page[-1][0]
    return found[:limit], len(found) > limit


def list_object(items: Sequence[ListItem], more: bool) -> dict[str, Any]:
    """OpenAI's list object."""
    return {
        "object": "list",
        "data": [item.to_openai() for item in items],
        "first_id": items[0].id if items else None,
        "last_id": items[-1].id if items else None,
        "has_more": more,
    }
