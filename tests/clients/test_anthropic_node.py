"""The official Anthropic SDK for Node: `node/anthropic.mjs` uses it, the tests look at what it saw."""

from __future__ import annotations

from typing import Any

import pytest
import pytest_asyncio

from tests.clients.test_openai_node import MODELS, run_client
from tests.cluster import Cluster

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(180)]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def seen(cluster: Cluster) -> dict[str, Any]:
    """What each of the client's tests saw."""
    return await run_client("anthropic.mjs", cluster)


async def test_answers(seen: dict[str, Any]) -> None:
    """A message comes whole, as events, and accumulated by the SDK's helper."""
    for name in ("answer", "helper"):
        message = seen[name]
        assert [block["text"] for block in message["content"]] == ["one two three"]
        assert (message["stop_reason"], message["usage"]["input_tokens"]) == ("end_turn", 3)
    assert seen["stream"][0] == "message_start"
    assert seen["stream"][-2:] == ["message_delta", "message_stop"]


async def test_models(seen: dict[str, Any]) -> None:
    """The SDK reads all pages."""
    assert set(MODELS) <= set(seen["models"])


async def test_a_batch(seen: dict[str, Any]) -> None:
    """A batch ends, and its results are messages."""
    assert seen["batch"]["counts"]["succeeded"] == 2
    results = {one["custom_id"]: one["result"] for one in seen["batch"]["results"]}
    assert {name: one["message"]["content"][0]["text"] for name, one in results.items()} == dict.fromkeys(
        "ab", "one two three"
    )


@pytest.mark.parametrize(
    ("case", "name", "status", "kind"),
    [
        ("unknownModel", "NotFoundError", 404, "not_found_error"),
        ("wrongKey", "AuthenticationError", 401, "authentication_error"),
        ("wrongField", "BadRequestError", 400, "invalid_request_error"),
        ("tooLarge", "ContentTooLargeError", 413, "request_too_large"),
    ],
)
async def test_errors(seen: dict[str, Any], case: str, name: str, status: int, kind: str) -> None:
    """Errors are the SDK's classes, with type and request id, and without the key."""
    error = seen[case]
    assert (error["name"], error["status"], error["type"]) == (name, status, kind)
    assert error["requestID"].startswith("req_")
    assert "sk-secret" not in error["message"]


async def test_a_broken_stream(seen: dict[str, Any]) -> None:
    """A stream that fails after it began is an error."""
    assert seen["brokenStream"]["type"] == "api_error"
