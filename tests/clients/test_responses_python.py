"""OpenAI's Responses API by the official SDK for Python, changed only in `base_url`."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI
from openai.types.responses import Response
from pydantic import BaseModel

from tests.backends.doubles.openai import OpenAIDouble
from tests.cluster import KEY, Cluster

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(180)]

WEATHER: Any = [
    {
        "type": "function",
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    }
]
SLOW: Any = {"echo": {"delay_ms": 150}}
HANGING: Any = {"echo": {"fail": "hang"}}
ENDS = ("response.completed", "response.incomplete", "response.failed")


def sdk(url: str, *, api_key: str = KEY, **options: Any) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=url + "/v1", api_key=api_key, **{"max_retries": 0, "timeout": 80, **options})


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def client(cluster: Cluster) -> AsyncIterator[AsyncOpenAI]:
    async with sdk(cluster.url) as client:
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def elsewhere(cluster: Cluster) -> AsyncIterator[AsyncOpenAI]:
    """The same user at another gateway."""
    await cluster.start_gateway()
    async with sdk(cluster.urls[-1]) as client:
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def stranger(cluster: Cluster) -> AsyncIterator[AsyncOpenAI]:
    """Another owner."""
    made = (await cluster.post("/v1/keys", {"name": f"stranger-{os.urandom(4).hex()}"})).json()
    async with sdk(cluster.url, api_key=made["key"]) as client:
        yield client


async def ended(client: AsyncOpenAI, response_id: str) -> Response:
    """A background response, polled as OpenAI's guide does it."""
    async with asyncio.timeout(30):
        while True:
            response = await client.responses.retrieve(response_id)
            if response.status not in ("queued", "in_progress"):
                return response
            await asyncio.sleep(0.05)


def check_events(events: list[Any], *, first: int = 0) -> Response:
    """What readers of a stream count on. Returns the final response."""
    assert [event.sequence_number for event in events] == list(range(first, first + len(events)))
    assert [event.type for event in events if event.type in ENDS] == [events[-1].type]
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    final: Response = events[-1].response
    if first == 0:
        assert events[0].type == "response.created"
        assert deltas == final.output_text
        assert deltas == "".join(event.text for event in events if event.type == "response.output_text.done")
    return final


async def collect(stream: Any) -> list[Any]:
    return [event async for event in stream]


class TestCreate:
    async def test_an_answer_in_one_piece(self, client: AsyncOpenAI) -> None:
        """`responses.create` returns the whole response, with usage and with what was asked for."""
        response = await client.responses.create(
            model="echo", input="one two three", instructions="be brief", metadata={"a": "b"}, temperature=0.5
        )
        assert response.object == "response"
        assert response.id.startswith("resp_")
        assert (response.status, response.output_text, response.model) == ("completed", "one two three", "echo")
        assert (response.error, response.incomplete_details, response.background) == (None, None, False)
        assert (response.instructions, response.metadata, response.temperature) == ("be brief", {"a": "b"}, 0.5)
        assert response.completed_at is not None
        assert response.completed_at >= response.created_at > 1_700_000_000
        message: Any = response.output[0]
        assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
        assert message.id.startswith("msg_")
        assert response.usage is not None
        assert (response.usage.input_tokens, response.usage.output_tokens, response.usage.total_tokens) == (5, 3, 8)
        assert response.usage.output_tokens_details.reasoning_tokens == 0

    async def test_what_input_may_hold(self, client: AsyncOpenAI) -> None:
        """Messages of every role, as text and in parts, function calls and their outputs; reasoning is passed over."""
        items: Any = [
            {"role": "developer", "content": "be kind"},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "old"}]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "hm", "annotations": []}]},
            {"type": "reasoning", "id": "rs_1", "summary": []},
            {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
            {
                "role": "user",
                "content": [{"type": "input_text", "text": "new "}, {"type": "input_text", "text": "words"}],
            },
        ]
        assert (await client.responses.create(model="echo", input=items)).output_text == "new words"

    async def test_a_limit_of_tokens(self, client: AsyncOpenAI) -> None:
        """An answer that was cut is `incomplete`, and says why."""
        response = await client.responses.create(model="echo", input="one two three", max_output_tokens=2)
        assert (response.status, response.output_text) == ("incomplete", "one two")
        assert response.incomplete_details is not None
        assert response.incomplete_details.reason == "max_output_tokens"
        assert response.completed_at is None
        events = await collect(
            await client.responses.create(model="echo", input="one two three", max_output_tokens=2, stream=True)
        )
        assert events[-1].type == "response.incomplete"
        assert check_events(events).output_text == "one two"

    async def test_a_stream(self, client: AsyncOpenAI) -> None:
        """Every event of a text in OpenAI's order, numbered from 0."""
        events = await collect(await client.responses.create(model="echo", input="one two", stream=True))
        assert [event.type for event in events] == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.completed",
        ]
        final = check_events(events)
        assert (final.status, final.output_text) == ("completed", "one two")
        assert len({events[0].response.id, events[1].response.id, final.id}) == 1

    async def test_the_streaming_helper(self, client: AsyncOpenAI) -> None:
        """`responses.stream` puts a response together, and finds the stream in order."""
        async with client.responses.stream(model="echo", input="one two three") as stream:
            async for event in stream:
                if event.type == "response.output_text.delta":
                    assert event.snapshot.endswith(event.delta)
            final = await stream.get_final_response()
        assert final.output_text == "one two three"

    async def test_what_goes_over_the_wire(self, cluster: Cluster) -> None:
        """Frames have event names, nothing is buffered or cached, and no `[DONE]` comes."""
        request = {"model": "echo", "input": "one two", "stream": True}
        async with cluster.http.stream("POST", cluster.url + "/v1/responses", json=request) as response:
            body = (await response.aread()).decode()
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache, no-store"
        assert response.headers["x-accel-buffering"] == "no"
        assert "content-length" not in response.headers
        assert response.headers["x-nexus-job-id"].startswith("job_")
        assert response.headers["x-request-id"].startswith("req_")
        frames = [frame.split("\n") for frame in body.strip().split("\n\n")]
        for name, data in frames:
            assert name == "event: " + json.loads(data.removeprefix("data: "))["type"]
        assert "[DONE]" not in body

    async def test_keep_alive(self, cluster: Cluster) -> None:
        """A stream that waits says that it is there."""
        await cluster.start_gateway(QUEUE_COMMENT_AFTER_S="0.2")
        body = {"model": "echo", "input": "one two", "stream": True, "echo": {"first_delay_ms": 900}}
        recorded = await cluster.record(body, url=cluster.urls[-1], path="/v1/responses").end()
        assert ": keep-alive" in recorded.comments
        assert json.loads(recorded.lines[-1])["type"] == "response.completed"

    async def test_a_real_model(self, client: AsyncOpenAI, smollm2: str) -> None:
        """A real model answers, whole and streamed, within `max_output_tokens`, and goes on from its answer."""
        ask = "What is the capital of France? Answer in one short sentence."
        first = await client.responses.create(model=smollm2, input=ask, max_output_tokens=30, temperature=0)
        assert "Paris" in first.output_text
        assert first.usage is not None
        assert first.usage.total_tokens == first.usage.input_tokens + first.usage.output_tokens > 10
        events = await collect(
            await client.responses.create(
                model=smollm2, input=ask, max_output_tokens=30, temperature=0, stream=True, store=False
            )
        )
        assert "Paris" in check_events(events).output_text
        cut = await client.responses.create(model=smollm2, input=ask, max_output_tokens=2)
        assert cut.status == "incomplete"
        second = await client.responses.create(
            model=smollm2, input="And of Germany?", previous_response_id=first.id, max_output_tokens=20
        )
        assert second.usage is not None
        assert second.usage.input_tokens > first.usage.input_tokens


class TestTools:
    async def test_a_call_and_its_output(self, client: AsyncOpenAI, double: OpenAIDouble) -> None:
        """A function is called, its output goes back, and the server is told the whole exchange as chat."""
        head = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}}
        pieces = [{"index": 0, "function": {"arguments": text}} for text in ('{"city": ', '"Bern"}')]
        double.behave(deltas=({"tool_calls": [head]}, *({"tool_calls": [p]} for p in pieces)), finish="tool_calls")
        asked: Any = {"model": "double", "tools": WEATHER}
        first = await client.responses.create(**asked, input="weather in Bern?", tool_choice="required")
        call: Any = first.output[0]
        assert (call.type, call.call_id, call.name) == ("function_call", "call_1", "weather")
        assert json.loads(call.arguments) == {"city": "Bern"}
        sent = double.last.json
        assert sent["tools"] == [{"type": "function", "function": {k: WEATHER[0][k] for k in ("name", "parameters")}}]
        assert sent["tool_choice"] == "required"
        assert sent["stream_options"] == {"include_usage": True}

        double.behave(words=("Sunny", "!"))
        output: Any = [{"type": "function_call_output", "call_id": "call_1", "output": "sunny"}]
        second = await client.responses.create(**asked, input=output, previous_response_id=first.id)
        assert second.output_text == "Sunny!"
        question, said, result = double.last.json["messages"]
        assert question == {"role": "user", "content": "weather in Bern?"}
        assert said["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Bern"}'}
        assert result == {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}

    async def test_several_calls_in_a_stream(self, client: AsyncOpenAI, double: OpenAIDouble) -> None:
        """Parallel calls are items of their own, and the SDK's helper puts them together."""
        calls = [
            {"index": n, "id": f"call_{n}", "type": "function", "function": {"name": "weather", "arguments": ""}}
            for n in (0, 1)
        ]
        pieces = [{"index": n, "function": {"arguments": text}} for n in (0, 1) for text in ('{"city":', f'"{n}"}}')]
        double.behave(deltas=tuple({"tool_calls": [call]} for call in [*calls, *pieces]), finish="tool_calls")
        async with client.responses.stream(model="double", input="weather?", tools=WEATHER) as stream:
            events = await collect(stream)
            final: Any = await stream.get_final_response()
        assert [json.loads(call.arguments) for call in final.output] == [{"city": "0"}, {"city": "1"}]
        done = [event for event in events if event.type == "response.function_call_arguments.done"]
        assert [event.arguments for event in done] == ['{"city":"0"}', '{"city":"1"}']

    async def test_an_answer_by_a_schema(self, client: AsyncOpenAI, double: OpenAIDouble) -> None:
        """`responses.parse` gives an object; the server is asked for it by `response_format`."""

        class City(BaseModel):
            name: str
            people: int

        double.behave(words=('{"name": "Bern", ', '"people": 134000}'))
        response = await client.responses.parse(model="double", input="Bern?", text_format=City)
        assert response.output_parsed == City(name="Bern", people=134000)
        wanted = double.last.json["response_format"]
        assert (wanted["type"], wanted["json_schema"]["name"], wanted["json_schema"]["strict"]) == (
            "json_schema",
            "City",
            True,
        )
        assert set(wanted["json_schema"]["schema"]["properties"]) == {"name", "people"}

    async def test_reasoning(self, client: AsyncOpenAI, double: OpenAIDouble) -> None:
        """What a model thinks before it answers is an item of its own."""
        double.behave(deltas=({"reasoning_content": "let me "}, {"reasoning_content": "see"}, {"content": "42"}))
        events = await collect(
            await client.responses.create(model="double", input="?", stream=True, reasoning={"effort": "low"})
        )
        final: Any = check_events(events)
        assert [item.type for item in final.output] == ["reasoning", "message"]
        assert final.output[0].content[0].text == "let me see"
        assert final.output_text == "42"
        assert double.last.json["reasoning_effort"] == "low"

    async def test_what_the_server_is_asked(self, client: AsyncOpenAI, double: OpenAIDouble) -> None:
        """Instructions come first, options under chat's names, and fields that OpenAI does not know as they are."""
        double.behave()
        await client.responses.create(
            model="double",
            instructions="be brief",
            input=[
                {
                    "role": "user",
                    "content": [
                        {"type": "input_text", "text": "what is this?"},
                        {"type": "input_image", "image_url": "data:image/png;base64,AAAA", "detail": "low"},
                    ],
                }
            ],
            max_output_tokens=9,
            top_p=0.5,
            user="u1",
            extra_body={"top_k": 3, "seed": 7},
        )
        sent = double.last.json
        assert sent["messages"][0] == {"role": "system", "content": "be brief"}
        assert sent["messages"][1]["content"][1] == {
            "type": "image_url",
            "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"},
        }
        told = {name: sent.get(name) for name in ("max_tokens", "top_p", "user", "top_k", "seed", "stream")}
        assert told == {"max_tokens": 9, "top_p": 0.5, "user": "u1", "top_k": 3, "seed": 7, "stream": True}


class TestCodex:
    """What Codex's CLI sends, as its source has it: the first turn, and one after its tools have run."""

    TOOLS: Any = [
        {"type": "function", "name": "shell", "description": "Runs a command", "strict": False, "parameters": {"type": "object", "properties": {"command": {"type": "array", "items": {"type": "string"}}}, "required": ["command"], "additionalProperties": False}},
        {"type": "local_shell"},
        {"type": "web_search", "external_web_access": False},
        {"type": "custom", "name": "apply_patch", "description": "Edits files", "format": {"type": "grammar", "syntax": "lark", "definition": "start: begin"}},
        {"type": "image_generation", "output_format": "png"},
        {"type": "namespace", "name": "mcp", "tools": []},
    ]  # fmt: skip
    USER: Any = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "list the files"}]}

    def request(self, *items: Any) -> dict[str, Any]:
        return {
            "model": "double",
            "instructions": "You are Codex, a coding agent.",
            "input": [{"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "<sandbox>"}]}, self.USER, *items],
            "tools": self.TOOLS,
            "tool_choice": "auto",
            "parallel_tool_calls": True,
            "reasoning": {"effort": "medium", "summary": "auto"},
            "store": False,
            "stream": True,
            "include": ["reasoning.encrypted_content"],
            "prompt_cache_key": "0199a213-81a0-7800-8aa0-bbcd1f4e0000",
            "text": {"verbosity": "low"},
            "extra_body": {"client_metadata": {"x-codex-installation-id": "1"}},
        }  # fmt: skip

    async def test_the_first_turn(self, client: AsyncOpenAI, double: OpenAIDouble) -> None:
        """It begins: the model is offered the one tool that Codex runs by a function, and calls it."""
        function = {"name": "shell", "arguments": '{"command":["ls"]}'}
        double.behave(deltas=({"tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": function}]},))
        events = await collect(await client.responses.create(**self.request()))
        (call,) = events[-1].response.output
        assert (events[-1].type, call.type, call.name, call.call_id) == (
            "response.completed",
            "function_call",
            "shell",
            "c1",
        )
        sent = double.last.json
        assert [tool["function"]["name"] for tool in sent["tools"]] == ["shell"]
        assert [message["role"] for message in sent["messages"]] == ["system", "developer", "user"]
        assert not sent.keys() & {"client_metadata", "prompt_cache_key", "include", "store"}

    async def test_a_later_turn(self, client: AsyncOpenAI, double: OpenAIDouble) -> None:
        """Thoughts without content, calls of every kind, text between a call and its output, and a picture as an output."""
        double.behave()
        items = [
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}], "content": None, "encrypted_content": "gAAA"},
            {"type": "function_call", "name": "shell", "arguments": "{}", "call_id": "c1"},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Running."}]},
            {"type": "function_call_output", "call_id": "c1", "output": '{"output":"a.txt","metadata":{"exit_code":0}}'},
            {"type": "custom_tool_call", "status": "completed", "call_id": "c2", "name": "apply_patch", "input": "*** Begin Patch"},
            {"type": "custom_tool_call_output", "call_id": "c2", "output": "Success"},
            {"type": "local_shell_call", "call_id": "c3", "status": "completed", "action": {"type": "exec", "command": ["ls"], "timeout_ms": None}},
            {"type": "function_call_output", "call_id": "c3", "output": "b.txt"},
            {"type": "web_search_call", "status": "completed", "action": {"type": "search", "query": "x"}},
            {"type": "function_call", "name": "view_image", "arguments": "{}", "call_id": "c4"},
            {"type": "function_call_output", "call_id": "c4", "output": [{"type": "input_image", "image_url": "data:image/png;base64,AAAA"}]},
        ]  # fmt: skip
        events = await collect(await client.responses.create(**self.request(*items)))
        assert events[-1].response.output_text == "Hello there, world!"
        messages = double.last.json["messages"]
        told = [
            (one["role"], one.get("tool_call_id") or [call["id"] for call in one.get("tool_calls") or ()])
            for one in messages
        ]
        assert told[3:] == [
            ("assistant", ["c1"]), ("tool", "c1"), ("assistant", ["c2"]), ("tool", "c2"),
            ("assistant", ["c3"]), ("tool", "c3"), ("assistant", ["c4"]), ("tool", "c4"), ("user", []),
        ]  # fmt: skip
        assert messages[5]["content"] == "Running."
        assert messages[-1]["content"][1]["image_url"]["url"] == "data:image/png;base64,AAAA"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "", 405, "method_not_allowed"),
        ("PUT", "", 405, "method_not_allowed"),
        ("PATCH", "/resp_1", 405, "method_not_allowed"),
        ("POST", "/resp_1", 405, "method_not_allowed"),
        ("GET", "/resp_1/cancel", 405, "method_not_allowed"),
        ("POST", "/resp_1/input_items", 405, "method_not_allowed"),
        ("GET", "/resp_1/output_items", 404, "not_found"),
        ("POST", "/resp_1/anything/else", 404, "not_found"),
        ("POST", "/input_tokens", 404, "not_found"),
        ("POST", "/compact", 404, "not_found"),
        ("POST", "/", 404, "not_found"),
        ("GET", "/resp_1", 404, "response_not_found"),
        ("POST", "/resp_1/cancel", 404, "response_not_found"),
    ],
)
async def test_paths_below_responses(cluster: Cluster, method: str, path: str, status: int, code: str) -> None:
    """What is not there is 404, what is there but not with this method 405; both with OpenAI's error object."""
    answer = await cluster.http.request(method, f"{cluster.url}/v1/responses{path}", json={})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.json()["error"]["type"] == "invalid_request_error"


class TestConversation:
    async def test_two_turns(self, client: AsyncOpenAI, elsewhere: AsyncOpenAI, double: OpenAIDouble) -> None:
        """`previous_response_id` brings the conversation along, through any gateway; instructions are not carried over."""
        double.behave(words=("Hi", "!"))
        first = await client.responses.create(model="double", input="hello", instructions="old ones")
        second = await elsewhere.responses.create(
            model="double", input="again", instructions="new ones", previous_response_id=first.id
        )
        assert second.previous_response_id == first.id
        assert double.last.json["messages"] == [
            {"role": "system", "content": "new ones"},
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "Hi!"},
            {"role": "user", "content": "again"},
        ]
        await client.responses.create(model="double", input="more", previous_response_id=second.id)
        assert [m["content"] for m in double.last.json["messages"]] == ["hello", "Hi!", "again", "Hi!", "more"]

    async def test_what_cannot_be_gone_on_from(self, client: AsyncOpenAI, stranger: AsyncOpenAI) -> None:
        """A response that is unknown, another's, not stored, or not done yet is none to go on from."""
        mine = await client.responses.create(model="echo", input="hi")
        unstored = await client.responses.create(model="echo", input="hi", store=False)
        for caller, previous in (
            (stranger, mine.id),
            (client, unstored.id),
            (client, "resp_" + "0" * 32),
            (client, "../x"),
        ):
            with pytest.raises(openai.NotFoundError) as caught:
                await caller.responses.create(model="echo", input="hi", previous_response_id=previous)
            assert (caught.value.code, caught.value.param) == ("previous_response_not_found", "previous_response_id")
        running = await client.responses.create(model="echo", input="hi", background=True, extra_body=HANGING)
        with pytest.raises(openai.BadRequestError) as bad:
            await client.responses.create(model="echo", input="hi", previous_response_id=running.id)
        assert bad.value.code == "previous_response_not_completed"
        await client.responses.cancel(running.id)

    async def test_input_items(self, client: AsyncOpenAI) -> None:
        """The input is listed newest first, or oldest first, page by page."""
        items: Any = [{"role": "user", "content": f"word {n}"} for n in range(5)]
        response = await client.responses.create(model="echo", input=items)
        listed = [item async for item in client.responses.input_items.list(response.id, limit=2)]
        texts = [item.content[0].text for item in listed]
        assert texts == [f"word {n}" for n in (4, 3, 2, 1, 0)]
        assert len({item.id for item in listed}) == 5
        page = await client.responses.input_items.list(response.id, order="asc", limit=3)
        assert [item.content[0].text for item in page.data] == ["word 0", "word 1", "word 2"]
        assert page.has_more
        single = await client.responses.create(model="echo", input="just this")
        only: Any = (await client.responses.input_items.list(single.id)).data[0]
        assert (only.type, only.role, only.content[0].type) == ("message", "user", "input_text")
        with pytest.raises(openai.BadRequestError) as caught:
            await client.responses.input_items.list(single.id, after="msg_none")
        assert caught.value.param == "after"


class TestKept:
    async def test_retrieve(self, client: AsyncOpenAI, elsewhere: AsyncOpenAI) -> None:
        """What was answered can be retrieved, the same through every gateway."""
        created = await client.responses.create(model="echo", input="one two")
        assert (await elsewhere.responses.retrieve(created.id)).to_dict() == created.to_dict()
        assert (await client.responses.retrieve(created.id)).to_dict() == created.to_dict()

    async def test_events_again(self, client: AsyncOpenAI, elsewhere: AsyncOpenAI) -> None:
        """A response's events come again as they were, from any gateway, whole or from any number on."""
        events = await collect(await client.responses.create(model="echo", input="one two three", stream=True))
        told = [event.to_dict() for event in events]
        response_id = events[0].response.id
        again = await collect(await elsewhere.responses.retrieve(response_id, stream=True))
        assert [event.to_dict() for event in again] == told
        for after in (0, 4, len(told) - 2, len(told) - 1, len(told) + 5):
            rest = await collect(await elsewhere.responses.retrieve(response_id, stream=True, starting_after=after))
            assert [event.to_dict() for event in rest] == told[after + 1 :]

    async def test_what_is_not_stored(self, client: AsyncOpenAI) -> None:
        """`store=False` answers as usual, streamed too, and leaves nothing to retrieve."""
        whole = await client.responses.create(model="echo", input="one two", store=False)
        assert (whole.output_text, whole.to_dict()["store"]) == ("one two", False)
        events = await collect(await client.responses.create(model="echo", input="one two", store=False, stream=True))
        assert check_events(events).output_text == "one two"
        for response_id in (whole.id, events[0].response.id):
            with pytest.raises(openai.NotFoundError):
                await client.responses.retrieve(response_id)
            with pytest.raises(openai.NotFoundError):
                await client.responses.retrieve(response_id, stream=True)
        with pytest.raises(openai.BadRequestError) as caught:
            await client.responses.create(model="echo", input="hi", store=False, background=True)
        assert caught.value.param == "store"

    async def test_delete(self, client: AsyncOpenAI) -> None:
        """What was deleted is gone, and cannot be deleted again."""
        response = await client.responses.create(model="echo", input="hi")
        await client.responses.delete(response.id)
        for call in (client.responses.retrieve, client.responses.delete, client.responses.input_items.list):
            with pytest.raises(openai.NotFoundError):
                await call(response.id)

    async def test_a_large_conversation(self, client: AsyncOpenAI) -> None:
        """Megabytes of input and output are kept too."""
        text = "x" * 700_000
        first = await client.responses.create(model="echo", input=text)
        assert first.output_text == text
        assert (await client.responses.retrieve(first.id)).output_text == text
        second = await client.responses.create(model="echo", input=f"{text} y", previous_response_id=first.id)
        assert second.output_text == f"{text} y"
        page = await client.responses.input_items.list(first.id)
        assert page.data[0].content[0].text == text
        events = await collect(await client.responses.retrieve(second.id, stream=True))
        assert check_events(events).output_text == f"{text} y"

    async def test_another_owner(self, client: AsyncOpenAI, stranger: AsyncOpenAI) -> None:
        """Another owner's response does not exist, whatever is asked of it."""
        mine = await client.responses.create(model="echo", input="hi", background=True)
        await ended(client, mine.id)
        for call in (
            stranger.responses.retrieve(mine.id),
            stranger.responses.retrieve(mine.id, stream=True),
            stranger.responses.cancel(mine.id),
            stranger.responses.delete(mine.id),
            stranger.responses.input_items.list(mine.id),
        ):
            with pytest.raises(openai.NotFoundError) as caught:
                await call
            assert caught.value.code == "response_not_found"
        assert (await client.responses.retrieve(mine.id)).status == "completed"


class TestBackground:
    async def test_create_and_poll(self, client: AsyncOpenAI, elsewhere: AsyncOpenAI) -> None:
        """A background response is `queued` at once, and has its answer later, at any gateway."""
        created = await client.responses.create(model="echo", input="one two", background=True, extra_body=SLOW)
        assert (created.status, created.background, created.output) == ("queued", True, [])
        response = await ended(elsewhere, created.id)
        assert (response.status, response.output_text, response.created_at) == (
            "completed",
            "one two",
            created.created_at,
        )
        # An end is an end.
        assert (await client.responses.cancel(created.id)).status == "completed"

    async def test_a_stream_resumed_elsewhere(
        self, client: AsyncOpenAI, elsewhere: AsyncOpenAI, eventually: Any
    ) -> None:
        """A caller who loses the stream of a background response goes on with `starting_after`, at another gateway, live."""
        stream = await client.responses.create(
            model="echo", input="one two three four five", background=True, stream=True, extra_body=SLOW
        )
        seen: list[Any] = []
        async for event in stream:
            seen.append(event)
            if event.type == "response.output_text.delta":
                break
        await stream.close()
        assert [event.type for event in seen[:3]] == ["response.created", "response.queued", "response.in_progress"]
        response_id = seen[0].response.id

        async def in_progress() -> bool:
            return (await client.responses.retrieve(response_id)).status == "in_progress"

        await eventually(in_progress)
        rest = await collect(
            await elsewhere.responses.retrieve(response_id, stream=True, starting_after=seen[-1].sequence_number)
        )
        final = check_events([*seen, *rest])
        assert final.output_text == "one two three four five"
        assert (await client.responses.retrieve(response_id)).to_dict() == final.to_dict()

    async def test_cancel(self, client: AsyncOpenAI, elsewhere: AsyncOpenAI) -> None:
        """Cancelling ends a response for everybody who watches it, and may be said twice."""
        stream = await client.responses.create(
            model="echo", input="one two", background=True, stream=True, extra_body=HANGING
        )
        first = await anext(aiter(stream))
        watching = asyncio.create_task(collect(stream))
        for caller in (elsewhere, client):
            assert (await caller.responses.cancel(first.response.id)).status == "cancelled"
        last: Any = (await watching)[-1]
        assert (last.type, last.response.status) == ("response.failed", "cancelled")
        response = await client.responses.retrieve(first.response.id)
        assert (response.status, response.error, response.output) == ("cancelled", None, [])

    async def test_a_synchronous_one_cannot_be_cancelled(self, client: AsyncOpenAI) -> None:
        """Only background responses are cancelled by a request."""
        response = await client.responses.create(model="echo", input="hi")
        with pytest.raises(openai.BadRequestError, match="created with 'background'"):
            await client.responses.cancel(response.id)

    async def test_a_failure(self, client: AsyncOpenAI) -> None:
        """A background response that failed says why."""
        failing: Any = {"echo": {"fail": "error"}}
        created = await client.responses.create(model="echo", input="hi", background=True, extra_body=failing)
        response = await ended(client, created.id)
        assert response.status == "failed"
        assert response.error is not None
        assert response.error.code == "server_error"
        events = await collect(await client.responses.retrieve(created.id, stream=True))
        assert check_events(events).error == response.error

    async def test_it_needs_a_scope(self, cluster: Cluster) -> None:
        """A key without the scope `jobs` gets answers, but none in the background."""
        made = (
            await cluster.post("/v1/keys", {"name": f"plain-{os.urandom(4).hex()}", "scopes": ["inference"]})
        ).json()
        async with sdk(cluster.url, api_key=made["key"]) as plain:
            assert (await plain.responses.create(model="echo", input="hi")).output_text == "hi"
            with pytest.raises(openai.PermissionDeniedError):
                await plain.responses.create(model="echo", input="hi", background=True)


class TestCallers:
    async def test_a_caller_who_hangs_up(self, cluster: Cluster, client: AsyncOpenAI, eventually: Any) -> None:
        """A response that somebody waits for ends with its caller; a background one goes on."""
        jobs = []
        for stream in (False, True):
            body: Any = {
                "model": "echo",
                "input": "one two",
                "stream": stream,
                **HANGING,
                "metadata": {"of": f"{stream}"},
            }
            recorded = cluster.record(body, path="/v1/responses")

            async def running(of: str = f"{stream}") -> Any:
                found = (await cluster.get(f"/v1/jobs?metadata[of]={of}")).json()["data"]
                return [job for job in found if job["status"] == "in_progress"]

            jobs.append((await eventually(running))[0]["id"])
            await recorded.hang_up()
        for job in jobs:

            async def cancelled(job: str = job) -> bool:
                return (await cluster.get(f"/v1/jobs/{job}")).json()["status"] == "cancelled"

            await eventually(cancelled)
            response = await client.responses.retrieve(job.replace("job_", "resp_"))
            assert response.status == "cancelled"

    async def test_one_key_one_response(self, client: AsyncOpenAI) -> None:
        """The same Idempotency-Key gives the same response, while it runs and afterwards; another body is refused."""
        headers = {"Idempotency-Key": "responses-1"}
        asked: Any = {"model": "echo", "input": "one two", "extra_headers": headers, "extra_body": SLOW}
        made = await asyncio.gather(*(client.responses.create(**asked) for _ in range(8)))
        made.append(await client.responses.create(**asked))
        assert len({response.id for response in made}) == 1
        assert {response.output_text for response in made} == {"one two"}
        with pytest.raises(openai.UnprocessableEntityError):
            await client.responses.create(**asked | {"input": "three"})


class TestErrors:
    async def test_a_wrong_key(self, cluster: Cluster) -> None:
        """A wrong key is an AuthenticationError, before anything else is looked at."""
        async with sdk(cluster.url, api_key="sk-wrong") as nobody:
            with pytest.raises(openai.AuthenticationError):
                await nobody.responses.create(model="none", input=[])
            with pytest.raises(openai.AuthenticationError):
                await nobody.responses.retrieve("resp_x")

    async def test_an_unknown_model(self, client: AsyncOpenAI) -> None:
        """An unknown model is a NotFoundError, however it is asked."""
        for options in ({}, {"stream": True}, {"background": True}):
            with pytest.raises(openai.NotFoundError) as caught:
                await client.responses.create(model="no-such-model", input="hi", **options)
            assert (caught.value.code, caught.value.param) == ("model_not_found", "model")

    @pytest.mark.parametrize(
        ("wrong", "param"),
        [
            ({"tools": [{"type": "web_search"}], "tool_choice": {"type": "web_search"}}, "tool_choice.type"),
            ({"conversation": "conv_1"}, "conversation"),
            ({"prompt": {"id": "p"}}, "prompt"),
            ({"truncation": "auto"}, "truncation"),
            ({"max_tokens": 5}, "max_tokens"),
            ({"temperature": "warm"}, "temperature"),
            ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice.name"),
            ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
            ({"input": []}, "input"),
            (
                {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]},
                "input.0.content.0.type",
            ),
            ({"input": [{"role": "nobody", "content": "x"}]}, "input.0.role"),
            ({"input": [{"type": "function_call_output", "output": "x"}]}, "input.0.call_id"),
            (
                {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://127.0.0.1/x"}]}]},
                "input",
            ),
            ({"max_output_tokens": 0}, "max_output_tokens"),
            ({"metadata": {"a": 5}}, "metadata.a"),
        ],
    )
    async def test_what_is_not_understood(self, cluster: Cluster, wrong: Any, param: str) -> None:
        """What cannot be honored is refused by name, and never left out in silence."""
        answer = await cluster.post("/v1/responses", {"model": "echo", "input": "hi"} | wrong)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert (error["type"], error["param"]) == ("invalid_request_error", param)

    async def test_a_failing_server(self, client: AsyncOpenAI) -> None:
        """A failure before anything was said is an HTTP error, also of a stream."""
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError) as caught:
                await client.responses.create(
                    model="echo", input="hi", stream=stream, extra_body={"echo": {"fail": "error"}}
                )
            assert (caught.value.status_code, caught.value.code) == (502, "backend_error")

    async def test_a_failure_in_the_middle(self, client: AsyncOpenAI) -> None:
        """A stream that fails after it began ends in `response.failed`, and the response is kept as failed."""
        events = await collect(
            await client.responses.create(
                model="echo",
                input="one two three four",
                stream=True,
                extra_body={"echo": {"fail": "crash", "delay_ms": 100}},
            )
        )
        assert any(event.type == "response.output_text.delta" for event in events)
        assert events[-1].type == "response.failed"
        final = events[-1].response
        assert (final.status, final.output) == ("failed", [])
        assert final.error is not None
        assert (await client.responses.retrieve(final.id)).to_dict() == final.to_dict()
        again = await collect(await client.responses.retrieve(final.id, stream=True))
        assert [event.to_dict() for event in again] == [event.to_dict() for event in events]

    async def test_another_attempt_after_a_passing_failure(self, client: AsyncOpenAI) -> None:
        """Who has seen half of an answer that is begun again is told so; who retrieves it gets the new one alone."""
        events = await collect(
            await client.responses.create(
                model="echo",
                input="one two three four",
                stream=True,
                extra_body={"echo": {"fail": "mid", "fail_times": 1, "delay_ms": 100}},
            )
        )
        assert [event.delta for event in events if event.type == "response.output_text.delta"] == ["one ", "two "]
        assert (events[-1].type, events[-1].code) == ("error", "worker_lost")
        assert [event.sequence_number for event in events] == list(range(len(events)))
        response_id = events[0].response.id
        assert (await ended(client, response_id)).output_text == "one two three four"
        again = await collect(await client.responses.retrieve(response_id, stream=True))
        assert check_events(again).output_text == "one two three four"
        with pytest.raises(openai.BadRequestError) as caught:
            await client.responses.retrieve(response_id, stream=True, starting_after=4)
        assert caught.value.code == "response_restarted"
        rest = await collect(await client.responses.retrieve(response_id, stream=True, starting_after=1))
        assert [event.to_dict() for event in rest] == [event.to_dict() for event in again[2:]]

    async def test_odd_requests(self, cluster: Cluster) -> None:
        """No body, bad JSON, wrong numbers in the query: OpenAI's error object each time."""
        url, http = cluster.url + "/v1/responses", cluster.http
        answers: list[httpx.Response] = [
            await http.post(url),
            await http.post(url, content=b"{"),
            await http.post(url, json=[]),
            await http.get(url + "/resp_" + "0" * 32, params={"stream": "true", "starting_after": "-1"}),
            await http.get(url + "/resp_" + "0" * 32 + "/input_items", params={"limit": "0"}),
        ]
        assert [answer.status_code for answer in answers] == [400] * 5
        assert all(answer.json()["error"]["type"] == "invalid_request_error" for answer in answers)
        assert (await http.get(url)).status_code == 405
        assert (await http.get(url + "/nonsense")).status_code == 404
