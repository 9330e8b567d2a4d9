"""Recorded shapes through a whole Nexus: gateway, queue and worker change nothing of what the adapters make right."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.backends.shape_corpus import MODEL, PATHS, Shape, ShapeServer, check_error, check_stream, check_whole, shapes
from tests.cluster import Cluster

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

JSON = dict[str, Any]

FINAL = frozenset({400, 404, 413})
"""Statuses of errors that are not tried again."""
SHAPES = [
    shape
    for shape in shapes()
    if shape.adapter == "openai" and shape.want.get("error", {"status": 400})["status"] in FINAL
]
ANSWERED = [
    shape
    for shape in SHAPES
    if "error" not in shape.want and shape.endpoint == "chat" and "functions" not in shape.request
]


class Info:
    """An error, as `check_error` reads one: an answer, or the last event of a stream whose text had begun."""

    def __init__(self, answer: httpx.Response, status: int) -> None:
        begun = answer.status_code == 200
        body = json.loads(answer.text.rstrip().rpartition("data: ")[2]) if begun else answer.json()
        self.status = status if begun else answer.status_code
        self.code, self.message = body["error"]["code"], body["error"]["message"]


@pytest_asyncio.fixture(scope="module", loop_scope="module", autouse=True)
async def server(cluster: Cluster) -> AsyncIterator[ShapeServer]:
    """A server behind the model `shape`: a request's `user` names the shape of its answer."""
    async with ShapeServer() as running:
        running.how = "events"
        await cluster.start_gateway()
        await cluster.start_worker("openai", WORKER_BACKEND_URL=running.url)
        yield running


def body_of(shape: Shape, **more: Any) -> JSON:
    said: JSON = {"messages": [{"role": "user", "content": "hi"}]} if shape.endpoint == "chat" else {"prompt": "hi"}
    return {"model": MODEL, "user": shape.id, **said, **shape.request, **more}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.id)
async def test_chat_and_completions(cluster: Cluster, shape: Shape) -> None:
    """In one piece, and streamed with usage."""
    path = PATHS[shape.endpoint]
    whole = await cluster.post(path, body_of(shape))
    streamed = await cluster.post(path, body_of(shape, stream=True, stream_options={"include_usage": True}))
    if "error" in shape.want:
        assert whole.status_code != 200
        for answer in (whole, streamed):
            check_error(Info(answer, shape.want["error"]["status"]), shape.want["error"])
        return
    assert (whole.status_code, streamed.status_code) == (200, 200), whole.text
    check_whole(whole.json(), shape, MODEL)
    frames = [frame.removeprefix("data: ") for frame in streamed.text.split("\n\n") if frame.startswith("data: ")]
    assert frames.pop() == "[DONE]"
    check_stream([json.loads(frame) for frame in frames], shape, MODEL)


@pytest.mark.parametrize("shape", ANSWERED, ids=lambda shape: shape.id)
async def test_responses(cluster: Cluster, shape: Shape) -> None:
    """The same in the words of the Responses API."""
    asked: JSON = {"model": MODEL, "user": shape.id, "input": "hi", "store": False}
    if "tools" in shape.request:
        asked["tools"] = [{"type": "function", **tool["function"]} for tool in shape.request["tools"]]
    answer = await cluster.post("/v1/responses", asked)
    assert answer.status_code == 200, answer.text
    made, want = answer.json(), shape.want
    cut = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(want["finish_reason"])
    assert made["status"] == ("incomplete" if cut else "completed")
    assert (made["incomplete_details"] or {}).get("reason") == cut
    items = {
        kind: [item for item in made["output"] if item["type"] == kind]
        for kind in ("message", "reasoning", "function_call")
    }
    assert "".join(part.get("text", "") for item in items["message"] for part in item["content"]) == want["content"]
    assert "".join(part["text"] for item in items["reasoning"] for part in item["content"]) == want.get("reasoning", "")
    calls = [(item["name"], json.loads(item["arguments"])) for item in items["function_call"]]
    assert calls == [(call["name"], call["arguments"]) for call in want.get("tool_calls", ())]
    assert len({item["call_id"] for item in items["function_call"]}) == len(calls)
    if "usage" in want:
        assert [made["usage"][f"{name}_tokens"] for name in ("input", "output", "total")] == want["usage"]
