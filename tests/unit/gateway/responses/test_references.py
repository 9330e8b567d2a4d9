"""Items that a request names in place of sending them."""

from __future__ import annotations

from typing import Any

import pytest

from backbone.testing.blobs import MemoryBlobStore
from backbone.testing.documents import MemoryDocumentStore
from gateway.http.request_body import validate_body
from gateway.responses.input_items import input_item_objects, to_messages
from gateway.responses.references import ItemReferences
from gateway.responses.repository import ResponseRepository, StoredResponse
from gateway.responses.resource import initial_response
from schemas.errors import NotFound
from schemas.openai.responses import ResponsesRequest

pytestmark = pytest.mark.asyncio

HEX = "a" * 32
ANSWER: Any = {
    "type": "message",
    "id": f"msg_{HEX}_0",
    "role": "assistant",
    "content": [{"type": "output_text", "text": "My name is Ada."}],
}


def request(*items: Any) -> ResponsesRequest:
    return validate_body({"model": "m", "input": list(items)}, ResponsesRequest)


def reference(name: str) -> Any:
    return {"type": "item_reference", "id": name}


@pytest.fixture
async def references() -> ItemReferences:
    """Of one stored response, which has answered."""
    repository = ResponseRepository(MemoryDocumentStore(lambda: 0.0), MemoryBlobStore(), 100.0)
    asked = request({"role": "user", "content": "Who are you?"})
    head = initial_response(asked, f"job_{HEX}", 1)
    await repository.add(
        "me", f"job_{HEX}", head, {"messages": [], "input": input_item_objects(asked.input, str(head["id"]))}
    )

    async def state(stored: StoredResponse) -> Any:
        return stored.initial | {"output": [ANSWER]}

    return ItemReferences(repository, state)


async def test_items_of_a_stored_response(references: ItemReferences) -> None:
    """Input and output, in their places between items that are sent."""
    asked = request(reference(f"msg_{HEX}_i0"), reference(ANSWER["id"]), {"role": "user", "content": "Again?"})
    resolved = await references.resolve("me", asked)
    told = [message["content"] for message in to_messages(resolved.input)]
    assert told == ["Who are you?", "My name is Ada.", "Again?"]


@pytest.mark.parametrize(
    "name", [f"msg_{HEX}_7", f"msg_{'b' * 32}_0", "msg_1", "", "x" * 5000, f"msg_{HEX}_0\n", "../a", f"MSG_{HEX}_0"]
)
async def test_unknown_items(references: ItemReferences, name: str) -> None:
    """404, with the place; what is no id never gets to the store."""
    with pytest.raises(NotFound) as caught:
        await references.resolve("me", request({"role": "user", "content": "x"}, reference(name)))
    assert (caught.value.info.code, caught.value.info.param) == ("item_not_found", "input.1.id")


async def test_items_of_another_owner(references: ItemReferences) -> None:
    """They are as unknown as those that never were."""
    with pytest.raises(NotFound):
        await references.resolve("you", request(reference(ANSWER["id"])))


async def test_requests_without_references_stay_as_they_are(references: ItemReferences) -> None:
    asked = request({"role": "user", "content": "x"})
    assert await references.resolve("me", asked) is asked
