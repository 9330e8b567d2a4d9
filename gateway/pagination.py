"""Read documents page by page, and render OpenAI's list object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from backbone.store.documents import DocumentStore

T = TypeVar("T")

MAX_BATCH = 500
"""Most documents that are read at once."""


class ListItem(Protocol):
    """An item of a list object."""

    @property
    def id(self) -> str:
        """The id that serves as the cursor of the next page."""

    def to_openai(self) -> dict[str, Any]:
        """Return the item's JSON, as its owner sees it."""


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
    """Return up to `limit` wanted documents after the id `after`, and whether there are more. Raises Unavailable."""
    found: list[T] = []
    # Few of the documents may be wanted: read many at once.
    batch = MAX_BATCH if wanted is not None else min(MAX_BATCH, limit + 1)
    while len(found) <= limit:
        page = await documents.page(kind, owner, after=after, limit=batch, newest_first=newest_first)
        values = [parse(data) for _, data in page]
        found += values if wanted is None else filter(wanted, values)
        if len(page) < batch:
            break
        after = page[-1][0]
    return found[:limit], len(found) > limit


def list_object(items: Sequence[ListItem], more: bool) -> dict[str, Any]:
    """Return OpenAI's list object."""
    return {
        "object": "list",
        "data": [item.to_openai() for item in items],
        "first_id": items[0].id if items else None,
        "last_id": items[-1].id if items else None,
        "has_more": more,
    }
