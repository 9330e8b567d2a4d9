"""Resolves `item_reference` items: items of stored responses that a request names by id."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any

from backbone.bus.blobs import BlobNotFound
from gateway.responses.repository import ResponseNotFound, ResponseRepository, StoredResponse
from schemas.errors import NotFound
from schemas.openai.responses import InputItem, ResponsesRequest

JSON = dict[str, Any]

REFERENCE = "item_reference"
ITEM_ID = re.compile(r"[a-z]{1,16}_([0-9a-f]{32})_i?[0-9]{1,9}")
"""An item id contains the id of its response. The number of an input item follows an `i`."""


class ItemReferences:
    """Looks up items in the input and output of stored responses."""

    def __init__(self, repository: ResponseRepository, state: Callable[[StoredResponse], Awaitable[JSON]]) -> None:
        """Create a resolver. `state` returns the current object of a stored response."""
        self._repository = repository
        self._state = state

    async def resolve(self, owner: str, request: ResponsesRequest) -> ResponsesRequest:
        """Return the request with each reference replaced by its item. Raises NotFound, Unavailable."""
        if isinstance(request.input, str) or all(item.type != REFERENCE for item in request.input):
            return request
        known: dict[str, dict[str, JSON]] = {}
        items = []
        for number, item in enumerate(request.input):
            items.append(item if item.type != REFERENCE else await self._item(owner, item.id or "", number, known))
        return request.model_copy(update={"input": items})

    async def _item(self, owner: str, item_id: str, number: int, known: dict[str, dict[str, JSON]]) -> InputItem:
        match = ITEM_ID.fullmatch(item_id)
        if match is not None:
            response = f"resp_{match[1]}"
            if response not in known:
                known[response] = await self._items_of(owner, response)
            if item_id in known[response]:
                return InputItem.model_validate(known[response][item_id])
        raise NotFound(
            f"Item with id '{item_id[:100]}' not found. Only items of stored responses can be referenced. Send the item itself.",
            code="item_not_found",
            param=f"input.{number}.id",
        )

    async def _items_of(self, owner: str, response: str) -> dict[str, JSON]:
        try:
            stored = await self._repository.get(owner, response)
            talk = await self._repository.talk(stored)
            output = (await self._state(stored))["output"]
        except (ResponseNotFound, BlobNotFound):
            return {}
        return {str(item["id"]): item for item in (*talk["input"], *output)}
