"""The official Anthropic SDK for Python, changed only in `base_url`."""

from __future__ import annotations

import asyncio
import base64
import json
import zlib
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import pytest
import pytest_asyncio
from anthropic import AsyncAnthropic

from tests.backends.doubles.openai import OpenAIDouble
from tests.cluster import KEY, Cluster

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]

QUESTION: Any = [{"role": "user", "content": "one two three"}]
WEATHER: Any = [{"name": "weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}]
ASK: Any = {"model": "echo", "max_tokens": 20, "messages": QUESTION}


def sdk(url: str, *, api_key: str = KEY, **options: Any) -> AsyncAnthropic:
    return AsyncAnthropic(base_url=url, api_key=api_key, **{"max_retries": 0, "timeout": 30, **options})


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def client(cluster: Cluster) -> AsyncIterator[AsyncAnthropic]:
    async with sdk(cluster.url) as client:
        yield client


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


class TestMessages:
    async def test_an_answer_in_one_piece(self, client: AsyncAnthropic) -> None:
        """`messages.create` returns a message with usage, under the name that was asked for."""
        message = await client.messages.create(**ASK)
        assert (message.type, message.role, message.model) == ("message", "assistant", "echo")
        assert (text_of(message), message.stop_reason, message.stop_sequence) == ("one two three", "end_turn", None)
        assert (message.usage.input_tokens, message.usage.output_tokens) == (3, 3)
        assert message.id.startswith("msg_")
        assert str(message._request_id).startswith("req_")

    async def test_a_stream(self, client: AsyncAnthropic) -> None:
        """The raw events come in Anthropic's order."""
        stream = await client.messages.create(**ASK, stream=True)
        events = [event async for event in stream]
        kinds = [event.type for event in events]
        assert kinds[:2] == ["message_start", "content_block_start"]
        assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
        assert set(kinds[2:-3]) == {"content_block_delta"}

    async def test_the_streaming_helper(self, client: AsyncAnthropic) -> None:
        """`messages.stream` accumulates a message from the events."""
        async with client.messages.stream(**ASK) as stream:
            said = [text async for text in stream.text_stream]
            message = await stream.get_final_message()
        assert "".join(said) == text_of(message) == "one two three"
        assert (message.usage.input_tokens, message.usage.output_tokens) == (3, 3)

    async def test_a_bearer(self, cluster: Cluster) -> None:
        """`auth_token` is sent as a bearer, as gateways want it."""
        async with AsyncAnthropic(base_url=cluster.url, auth_token=KEY) as client:
            assert text_of(await client.messages.create(**ASK)) == "one two three"

    async def test_a_limit_of_tokens(self, client: AsyncAnthropic) -> None:
        message = await client.messages.create(**{**ASK, "max_tokens": 2})
        assert (text_of(message), message.stop_reason) == ("one two", "max_tokens")

    async def test_an_odd_name(self, client: AsyncAnthropic) -> None:
        """A model's name may hold anything, and comes back as it was asked for."""
        message = await client.messages.create(**{**ASK, "model": "a.b *c>/d"})
        assert (message.model, text_of(message)) == ("a.b *c>/d", "one two three")


class TestPassingThrough:
    """Through the adapter for OpenAI-compatible servers, on a double that shows what reached it."""

    async def test_what_reaches_the_server(self, client: AsyncAnthropic, double: OpenAIDouble) -> None:
        """System blocks, an image and the options of the request arrive in chat's form."""
        double.behave()
        picture: Any = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}
        system: Any = [{"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral"}}]
        await client.messages.create(
            model="double",
            max_tokens=9,
            system=system,
            messages=[{"role": "user", "content": [{"type": "text", "text": "look"}, picture]}],
            stop_sequences=["END"],
            metadata={"user_id": "ann"},
            extra_body={"min_p": 0.1, "top_k": 4},
        )
        sent = double.last.json
        assert sent["messages"][0] == {"role": "system", "content": "be brief"}
        assert sent["messages"][1]["content"][1]["image_url"]["url"] == f"data:image/png;base64,{PNG}"
        expected = {"stop": ["END"], "user": "ann", "min_p": 0.1, "top_k": 4, "max_tokens": 9}
        assert {name: sent.get(name) for name in expected} == expected

    @pytest.mark.parametrize("stream", [False, True])
    async def test_a_tool_loop(self, client: AsyncAnthropic, double: OpenAIDouble, stream: bool) -> None:
        """A call arrives as a block; its result goes back to the server under the call's id."""
        head = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}}
        pieces = [{"index": 0, "function": {"arguments": text}} for text in ('{"city": ', '"Bern"}')]
        calls = [{"tool_calls": [head]}, *({"tool_calls": [piece]} for piece in pieces)]
        double.behave(deltas=({"reasoning_content": "hm"}, {"content": "Let me see."}, *calls), finish="tool_calls")
        asked: Any = {"model": "double", "max_tokens": 2000, "messages": QUESTION, "tools": WEATHER}
        asked |= {"thinking": {"type": "enabled", "budget_tokens": 1024}, "tool_choice": {"type": "any"}}
        if stream:
            async with client.messages.stream(**asked) as events:
                message: Any = await events.get_final_message()
        else:
            message = await client.messages.create(**asked)
        thought, said, call = message.content
        assert (thought.thinking, said.text, message.stop_reason) == ("hm", "Let me see.", "tool_use")
        assert (call.type, call.id, call.name, call.input) == ("tool_use", "call_1", "weather", {"city": "Bern"})
        sent = double.last.json
        assert (sent["tool_choice"], sent["reasoning_effort"]) == ("required", "low")

        double.behave()
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
        turns: Any = [
            *QUESTION,
            {"role": "assistant", "content": message.content},
            {"role": "user", "content": [result]},
        ]
        await client.messages.create(**{**asked, "messages": turns, "tool_choice": {"type": "auto"}})
        _, assistant, tool = double.last.json["messages"]
        assert json.loads(assistant["tool_calls"][0]["function"]["arguments"]) == {"city": "Bern"}
        assert (assistant["content"], assistant["reasoning_content"]) == ("Let me see.", "hm")
        assert tool == {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}

    async def test_a_refusal_of_the_server(self, client: AsyncAnthropic, double: OpenAIDouble) -> None:
        """What the server finds wrong with a request is the caller's 400, in the server's words."""
        double.behave(status=400, error={"error": {"message": "no such grammar", "type": "invalid_request_error"}})
        with pytest.raises(anthropic.BadRequestError, match="no such grammar"):
            await client.messages.create(**{**ASK, "model": "double"})

    async def test_a_failure_in_the_middle_of_a_stream(self, client: AsyncAnthropic, double: OpenAIDouble) -> None:
        """A stream that fails after it began raises; it never looks complete."""
        double.behave(error_in_stream={"message": "out of memory", "code": 500}, token_delay_s=0.1)
        stream = await client.messages.create(**{**ASK, "model": "double"}, stream=True)
        kinds: list[str] = []
        with pytest.raises(anthropic.APIStatusError):
            async for event in stream:
                kinds.append(event.type)  # noqa: PERF401 - what came before the error counts
        assert "content_block_delta" in kinds
        assert "message_delta" not in kinds

    async def test_a_caller_who_leaves(self, client: AsyncAnthropic, double: OpenAIDouble, eventually: Any) -> None:
        """Closing a stream stops the server's work; so does a time-out of a call without one."""
        for stream in (True, False):
            double.behave(hang="mid")
            double.disconnected.clear()
            asked: Any = {**ASK, "model": "double"}
            if stream:
                events = await client.messages.create(**asked, stream=True)
                async for _ in events:
                    break
                await events.close()
            else:
                with pytest.raises(anthropic.APITimeoutError):
                    await client.with_options(timeout=1).messages.create(**asked)
            async with asyncio.timeout(10):
                await double.disconnected.wait()
            await eventually(lambda: double.streaming == 0)


class TestTokenCounts:
    async def test_an_exact_count(self, client: AsyncAnthropic) -> None:
        """A server that counts gives the number that an answer has as its input tokens."""
        counted = await client.messages.with_raw_response.count_tokens(
            model="echo", messages=QUESTION, system="be brief"
        )
        assert counted.headers["x-nexus-token-count"] == "exact"
        assert (await counted.parse()).input_tokens == 5

    async def test_an_estimate(self, client: AsyncAnthropic, double: OpenAIDouble) -> None:
        """Where the server cannot count, the count is an estimate, and says so."""
        double.behave()
        counted = await client.messages.with_raw_response.count_tokens(model="double", messages=QUESTION, tools=WEATHER)
        assert counted.headers["x-nexus-token-count"] == "estimate"
        assert 10 < (await counted.parse()).input_tokens < 100

    async def test_wrong_counts(self, client: AsyncAnthropic) -> None:
        """What is wrong with a request is an error here too, and no estimate."""
        with pytest.raises(anthropic.NotFoundError):
            await client.messages.count_tokens(model="no-such-model", messages=QUESTION)
        wrong: Any = [{"name": "x"}]
        with pytest.raises(anthropic.BadRequestError, match=r"tools\.0"):
            await client.messages.count_tokens(model="echo", messages=QUESTION, tools=wrong)


class TestModels:
    async def test_the_list(self, client: AsyncAnthropic) -> None:
        """`models.list` shows the models that chat, page by page; `models.retrieve` finds each of them."""
        models = [model async for model in client.models.list(limit=2)]
        names = {model.id for model in models}
        assert {"echo", "org/name:tag", "a.b *c>/d", "modèle-日本"} <= names
        assert len(names) == len(models)
        assert (await client.models.retrieve("org/name:tag")).display_name == "org/name:tag"
        with pytest.raises(anthropic.NotFoundError):
            await client.models.retrieve("no/such:model")


class TestBatches:
    async def test_a_batch(self, client: AsyncAnthropic, eventually: Any) -> None:
        """A batch ends, its results are messages and errors, and it can be listed and deleted."""
        good: Any = {"custom_id": "good", "params": ASK}
        bad: Any = {"custom_id": "bad", "params": {**ASK, "temperature": "warm"}}
        batch = await client.messages.batches.create(requests=[good, bad])
        assert (batch.processing_status, batch.request_counts.processing) == ("in_progress", 2)

        async def ended() -> Any:
            found = await client.messages.batches.retrieve(batch.id)
            return found if found.processing_status == "ended" else None

        found = await eventually(ended, timeout_s=30)
        assert (found.request_counts.succeeded, found.request_counts.errored) == (1, 1)
        results = {one.custom_id: one.result async for one in await client.messages.batches.results(batch.id)}
        assert text_of(results["good"].message) == "one two three"
        assert results["bad"].error.error.type == "invalid_request_error"
        listed = [one.id async for one in client.messages.batches.list(limit=1)]
        assert batch.id in listed
        assert (await client.messages.batches.delete(batch.id)).type == "message_batch_deleted"
        with pytest.raises(anthropic.NotFoundError):
            await client.messages.batches.retrieve(batch.id)

    async def test_a_batch_that_is_canceled(self, client: AsyncAnthropic, eventually: Any) -> None:
        """The requests of a canceled batch are canceled."""
        slow: Any = {**ASK, "echo": {"delay_ms": 60_000}}
        batch = await client.messages.batches.create(requests=[{"custom_id": "slow", "params": slow}])
        await client.messages.batches.cancel(batch.id)

        async def ended() -> Any:
            found = await client.messages.batches.retrieve(batch.id)
            return found if found.processing_status == "ended" else None

        found = await eventually(ended, timeout_s=30)
        assert found.request_counts.canceled == 1
        results = [one async for one in await client.messages.batches.results(batch.id)]
        assert [one.result.type for one in results] == ["canceled"]

    async def test_wrong_batches(self, client: AsyncAnthropic) -> None:
        """An id that occurs twice is refused before anything is stored."""
        twice: Any = {"custom_id": "a", "params": ASK}
        with pytest.raises(anthropic.BadRequestError, match="twice"):
            await client.messages.batches.create(requests=[twice, twice])


class TestJobs:
    async def test_a_message_as_a_job(self, cluster: Cluster, client: AsyncAnthropic) -> None:
        """`Prefer: respond-async` makes a job, whose result is a message; so does `POST /v1/jobs`."""
        answer = await client.messages.with_raw_response.create(**ASK, extra_headers={"prefer": "respond-async"})
        assert answer.http_response.status_code == 202
        made = await cluster.post("/v1/jobs", {"endpoint": "/v1/messages", "body": ASK})
        for job in (answer.headers["x-nexus-job-id"], made.json()["id"]):
            ended = (await cluster.get(f"/v1/jobs/{job}?wait=30")).json()
            assert (ended["status"], ended["endpoint"]) == ("completed", "/v1/messages")
            result = (await cluster.get(f"/v1/jobs/{job}/result")).json()
            assert (result["type"], result["content"][0]["text"]) == ("message", "one two three")

    async def test_an_idempotency_key(self, client: AsyncAnthropic) -> None:
        """The same key is the same message, whole or streamed."""
        headers = {"idempotency-key": "the same message"}
        first, second = [await client.messages.create(**ASK, extra_headers=headers) for _ in range(2)]
        assert first.id == second.id
        headers = {"idempotency-key": "the same stream"}
        texts = []
        for _ in range(2):
            async with client.messages.stream(**ASK, extra_headers=headers) as stream:
                texts.append(text_of(await stream.get_final_message()))
        assert texts == ["one two three"] * 2


class TestErrors:
    async def test_a_wrong_key(self, cluster: Cluster) -> None:
        """A wrong key is an AuthenticationError, and is not repeated in it."""
        async with sdk(cluster.url, api_key="sk-secret-and-wrong") as stranger:
            with pytest.raises(anthropic.AuthenticationError) as caught:
                await stranger.messages.create(**ASK)
        assert (caught.value.type, caught.value.error_code) == ("authentication_error", "invalid_api_key")
        assert "sk-secret-and-wrong" not in str(caught.value)
        assert str(caught.value.request_id).startswith("req_")

    async def test_an_unknown_model(self, client: AsyncAnthropic) -> None:
        """An unknown model is a NotFoundError, also for a stream."""
        for stream in (False, True):
            with pytest.raises(anthropic.NotFoundError, match="no-such-model") as caught:
                await client.messages.create(**{**ASK, "model": "no-such-model"}, stream=stream)
            assert (caught.value.type, caught.value.error_code) == ("not_found_error", "model_not_found")

    async def test_wrong_requests(self, client: AsyncAnthropic, cluster: Cluster) -> None:
        """Wrong fields, bodies that are no JSON, unknown paths and wrong methods have Anthropic's form."""
        with pytest.raises(anthropic.BadRequestError, match="temperature") as caught:
            await client.messages.create(**ASK, extra_body={"temperature": "warm"})
        assert caught.value.type == "invalid_request_error"
        with pytest.raises(anthropic.NotFoundError):
            await client.post("/v1/messages/none", cast_to=object, body={})
        headers = {"x-api-key": KEY, "content-type": "application/json"}
        answer = await cluster.http.post(cluster.url + "/v1/messages", content=b"{", headers=headers)
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
        answer = await cluster.http.get(cluster.url + "/v1/messages", headers=headers)
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")

    async def test_a_failing_backend(self, client: AsyncAnthropic) -> None:
        """A backend that fails is an InternalServerError, before a stream's first event too."""
        for stream in (False, True):
            with pytest.raises(anthropic.InternalServerError) as caught:
                await client.messages.create(**ASK, stream=stream, extra_body={"echo": {"fail": "error"}})
            assert (caught.value.status_code, caught.value.error_code) == (502, "backend_error")


class TestRealModel:
    """SmolLM2 on a real llama.cpp server."""

    async def test_an_answer(self, client: AsyncAnthropic, smollm2: str) -> None:
        """A real model answers, with usage that counts the prompt; a stop sequence ends the answer."""
        asked: Any = {"model": smollm2, "max_tokens": 16, "extra_body": {"temperature": 0}}
        asked["messages"] = [
            {"role": "user", "content": "What is the capital of France? Answer in one short sentence."}
        ]
        async with client.messages.stream(**asked) as stream:
            message = await stream.get_final_message()
        assert "Paris" in text_of(message)
        assert message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0) > 10
        assert message.usage.output_tokens > 2
        counted = await client.messages.with_raw_response.count_tokens(model=smollm2, messages=asked["messages"])
        usage = message.usage
        assert counted.headers["x-nexus-token-count"] == "exact"
        assert (await counted.parse()).input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)
        stopped = await client.messages.create(**asked, stop_sequences=["Paris"])
        assert "Paris" not in text_of(stopped)


def _png() -> str:
    """Return a red picture of 8 by 8 pixels, in Base64."""

    def part(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = (8).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    rows = zlib.compress((b"\0" + b"\xff\0\0" * 8) * 8)
    picture = b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", rows) + part(b"IEND", b"")
    return base64.b64encode(picture).decode()


PNG = _png()
