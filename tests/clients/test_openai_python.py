"""The official OpenAI SDK for Python, changed only in `base_url`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionChunk

from tests.backends.doubles.openai import OpenAIDouble
from tests.cluster import KEY, Cluster

QUEUE = 4
"""As in conftest."""

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]

QUESTION: Any = [{"role": "user", "content": "one two three"}]
WEATHER: Any = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def sdk(url: str, *, api_key: str = KEY, **options: Any) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=url + "/v1", api_key=api_key, **{"max_retries": 0, "timeout": 30, **options})


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def client(cluster: Cluster) -> AsyncIterator[AsyncOpenAI]:
    async with sdk(cluster.url) as client:
        yield client


@pytest.fixture(scope="module")
def sync_client(cluster: Cluster) -> Iterator[OpenAI]:
    with OpenAI(base_url=cluster.url + "/v1", api_key=KEY, max_retries=0, timeout=30) as client:
        yield client


def check_chunks(chunks: list[ChatCompletionChunk], model: str, *, usage: bool = False) -> str:
    """Everything that strict readers of a stream count on. Returns the text."""
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
    assert chunks[0].model == model
    assert chunks[0].object == "chat.completion.chunk"
    assert chunks[0].id
    assert isinstance(chunks[0].created, int)
    assert chunks[0].choices[0].delta.role == "assistant"
    told = [chunk for chunk in chunks if chunk.choices]
    reasons = [choice.finish_reason for chunk in told for choice in chunk.choices]
    assert reasons[:-1] == [None] * (len(reasons) - 1)
    assert reasons[-1] is not None
    if usage:
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.total_tokens == chunks[-1].usage.prompt_tokens + chunks[-1].usage.completion_tokens
        assert all(chunk.usage is None and "usage" in chunk.model_fields_set for chunk in chunks[:-1])
        assert len(told) == len(chunks) - 1
    else:
        assert told == chunks
        assert all(chunk.usage is None for chunk in chunks)
    return "".join(choice.delta.content or "" for chunk in told for choice in chunk.choices)


async def stores(cluster: Cluster, model: str, count: int) -> bool:
    return await cluster.stored(model) >= count


class TestChat:
    async def test_an_answer_in_one_piece(self, client: AsyncOpenAI) -> None:
        """`chat.completions.create` returns a complete answer with usage, under the name that was asked for."""
        answer = await client.chat.completions.create(model="echo", messages=QUESTION)
        assert answer.object == "chat.completion"
        assert answer.model == "echo"
        choice = answer.choices[0]
        assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
        assert (choice.message.role, choice.message.content) == ("assistant", "one two three")
        assert choice.message.refusal is None
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 3, 6)

    async def test_a_stream(self, client: AsyncOpenAI) -> None:
        """A stream begins with the role, keeps its id, and says exactly once why it ended."""
        stream = await client.chat.completions.create(model="echo", messages=QUESTION, stream=True)
        assert check_chunks([chunk async for chunk in stream], "echo") == "one two three"

    async def test_a_stream_with_usage(self, client: AsyncOpenAI) -> None:
        """`include_usage` adds one last chunk without choices; the others say `usage: null`."""
        options: Any = {"include_usage": True}
        stream = await client.chat.completions.create(
            model="echo", messages=QUESTION, stream=True, stream_options=options
        )
        assert check_chunks([chunk async for chunk in stream], "echo", usage=True) == "one two three"

    async def test_the_synchronous_client(self, sync_client: OpenAI) -> None:
        """The synchronous client gets the same, streamed or not."""
        answer = sync_client.chat.completions.create(model="echo", messages=QUESTION)
        assert answer.choices[0].message.content == "one two three"
        chunks = list(sync_client.chat.completions.create(model="echo", messages=QUESTION, stream=True))
        assert check_chunks(chunks, "echo") == "one two three"

    async def test_the_streaming_helper(self, client: AsyncOpenAI) -> None:
        """`chat.completions.stream` accumulates an answer from the chunks."""
        async with client.chat.completions.stream(model="echo", messages=QUESTION) as stream:
            answer = await stream.get_final_completion()
        assert answer.choices[0].message.content == "one two three"
        assert answer.choices[0].finish_reason == "stop"

    async def test_several_choices(self, client: AsyncOpenAI) -> None:
        """`n` answers come for `n`, streamed or not."""
        answer = await client.chat.completions.create(model="echo", messages=QUESTION, n=3)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        stream = await client.chat.completions.create(model="echo", messages=QUESTION, n=2, stream=True)
        choices = [choice async for chunk in stream for choice in chunk.choices]
        assert sorted(choice.index for choice in choices if choice.finish_reason) == [0, 1]
        assert [choice.index for choice in choices if choice.delta.role] == [0, 1]

    @pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
    async def test_a_limit_of_tokens(self, client: AsyncOpenAI, field: str) -> None:
        """An answer cut by a limit says `length`."""
        limit: Any = {field: 2}
        answer = await client.chat.completions.create(model="echo", messages=QUESTION, **limit)
        assert answer.choices[0].finish_reason == "length"
        assert answer.choices[0].message.content == "one two"

    async def test_all_that_chat_messages_may_hold(self, client: AsyncOpenAI) -> None:
        """Content parts, `content: null`, tool results and the `developer` role are accepted."""
        call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
        messages: Any = [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "old"}], "name": "ann"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
            {"role": "user", "content": [{"type": "text", "text": "new "}, {"type": "text", "text": "words"}]},
        ]
        answer = await client.chat.completions.create(model="echo", messages=messages)
        assert answer.choices[0].message.content == "new words"

    async def test_text_of_every_script(self, client: AsyncOpenAI) -> None:
        """Text comes back byte for byte, whatever it is written in."""
        text = 'ä 日本 👩‍👩‍👧 \u2028 "quoted" \\ \x7f data: [DONE]\n\ndata: {}'
        messages: Any = [{"role": "user", "content": text}]
        stream = await client.chat.completions.create(model="echo", messages=messages, stream=True)
        assert check_chunks([chunk async for chunk in stream], "echo") == text


class TestCompletions:
    async def test_text_completions(self, client: AsyncOpenAI) -> None:
        """Legacy completions, streamed or not; a list of prompts gets a list of choices."""
        answer = await client.completions.create(model="echo", prompt="to be or", max_tokens=8)
        assert (answer.object, answer.choices[0].text) == ("text_completion", "to be or")
        stream = await client.completions.create(model="echo", prompt="to be or", stream=True)
        chunks = [chunk async for chunk in stream]
        assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == "to be or"
        several = await client.completions.create(model="echo", prompt=["a b", "c"])
        assert [choice.text for choice in several.choices] == ["a b", "c"]


class TestModels:
    async def test_the_list(self, client: AsyncOpenAI, cluster: Cluster) -> None:
        """`models.list` shows what can be used, each with `created` and `owned_by`."""
        models = {model.id: model async for model in client.models.list()}
        assert {"echo", "org/name:tag", "a.b *c>/d", "modèle-日本"} <= set(models)
        assert all(model.object == "model" and model.owned_by for model in models.values())
        assert all(isinstance(model.created, int) for model in models.values())

    @pytest.mark.parametrize("name", ["echo", "org/name:tag", "a.b *c>/d", "modèle-日本"])
    async def test_one_model(self, client: AsyncOpenAI, name: str) -> None:
        """`models.retrieve` finds every model of the list, slashes and colons included (the SDK encodes them)."""
        assert (await client.models.retrieve(name)).id == name

    @pytest.mark.parametrize("name", ["org/name:tag", "a.b *c>/d", "modèle-日本"])
    async def test_a_model_with_an_odd_name_answers(self, client: AsyncOpenAI, name: str) -> None:
        """A model's name may hold anything, and comes back as it was asked for."""
        answer = await client.chat.completions.create(model=name, messages=QUESTION)
        assert (answer.model, answer.choices[0].message.content) == (name, "one two three")
        stream = await client.chat.completions.create(model=name, messages=QUESTION, stream=True)
        assert check_chunks([chunk async for chunk in stream], name) == "one two three"

    @pytest.mark.parametrize("path", ["org/name:tag", "org%2Fname:tag", "org%2Fname%3Atag"])
    async def test_a_name_raw_and_encoded(self, cluster: Cluster, path: str) -> None:
        """`/v1/models/{id}` takes the id raw and percent-encoded."""
        answer = await cluster.get(f"/v1/models/{path}")
        assert (answer.status_code, answer.json()["id"]) == (200, "org/name:tag")


class TestPassingThrough:
    """Through the adapter for OpenAI-compatible servers, on a double that shows what reached it."""

    async def test_unknown_fields(self, client: AsyncOpenAI, double: OpenAIDouble) -> None:
        """Fields that Nexus does not know reach the server untouched."""
        extra = {"top_k": 40, "chat_template_kwargs": {"thinking": [True, None, 0.1]}, "grammar": "root ::= [a]"}
        double.behave()
        await client.chat.completions.create(
            model="double", messages=QUESTION, extra_body=extra, stop=["x", "y"], seed=7, logit_bias={"5": -100}
        )
        sent = double.last.json
        expected = extra | {"stop": ["x", "y"], "seed": 7, "logit_bias": {"5": -100}, "messages": QUESTION}
        assert {name: sent.get(name) for name in expected} == expected

    @pytest.mark.parametrize("stream", [False, True])
    async def test_tool_calls(self, client: AsyncOpenAI, double: OpenAIDouble, stream: bool) -> None:
        """Tool calls arrive whole: name, id, and arguments as a JSON string."""
        head = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}}
        pieces = [{"index": 0, "function": {"arguments": text}} for text in ('{"city": ', '"Bern"}')]
        double.behave(
            deltas=({"tool_calls": [head]}, *({"tool_calls": [piece]} for piece in pieces)), finish="tool_calls"
        )
        asked: Any = {"model": "double", "messages": QUESTION, "tools": WEATHER, "tool_choice": "required"}
        if stream:
            async with client.chat.completions.stream(**asked) as events:
                choice: Any = (await events.get_final_completion()).choices[0]
        else:
            choice = (await client.chat.completions.create(**asked)).choices[0]
        assert choice.finish_reason == "tool_calls"
        call = choice.message.tool_calls[0]
        assert (call.id, call.type, call.function.name) == ("call_1", "function", "weather")
        assert json.loads(call.function.arguments) == {"city": "Bern"}
        assert double.last.json["tools"] == WEATHER
        assert double.last.json["tool_choice"] == "required"

    async def test_a_refusal_of_the_server(self, client: AsyncOpenAI, double: OpenAIDouble) -> None:
        """What the server finds wrong with a request is the caller's 400, in the server's words, and is not retried."""
        error = {"message": "context is 512", "type": "invalid_request_error", "param": "messages", "code": "too_long"}
        double.behave(status=400, error={"error": error})
        with pytest.raises(openai.BadRequestError) as caught:
            await client.with_options(max_retries=2).chat.completions.create(model="double", messages=QUESTION)
        assert "context is 512" in caught.value.message
        assert (caught.value.param, caught.value.code) == ("messages", "too_long")
        double.behave(status=400, error={"error": {"message": "no code", "type": "invalid_request_error"}})
        with pytest.raises(openai.BadRequestError, match="no code") as caught:
            await client.chat.completions.create(model="double", messages=QUESTION)
        assert caught.value.code is None

    async def test_a_failure_in_the_middle_of_a_stream(self, client: AsyncOpenAI, double: OpenAIDouble) -> None:
        """A stream that fails after it began raises; it never looks complete."""
        double.behave(error_in_stream={"message": "out of memory", "code": 500}, token_delay_s=0.1)
        stream = await client.chat.completions.create(model="double", messages=QUESTION, stream=True)
        seen: list[ChatCompletionChunk] = []
        with pytest.raises(openai.APIError):
            async for chunk in stream:
                seen.append(chunk)  # noqa: PERF401 - what came before the error counts
        assert seen
        assert all(choice.finish_reason is None for chunk in seen for choice in chunk.choices)

    async def test_a_caller_who_leaves_a_stream(
        self, client: AsyncOpenAI, double: OpenAIDouble, eventually: Any
    ) -> None:
        """Closing a stream stops the server's work."""
        double.behave(hang="mid")
        double.disconnected.clear()
        stream = await client.chat.completions.create(model="double", messages=QUESTION, stream=True)
        async for _ in stream:
            break
        await stream.close()
        async with asyncio.timeout(10):
            await double.disconnected.wait()
        await eventually(lambda: double.streaming == 0)

    async def test_a_caller_who_stops_waiting(self, client: AsyncOpenAI, double: OpenAIDouble) -> None:
        """`with_options(timeout=…)` raises APITimeoutError, and the server's work stops."""
        double.behave(hang="mid")
        double.disconnected.clear()
        with pytest.raises(openai.APITimeoutError):
            await client.with_options(timeout=1).chat.completions.create(model="double", messages=QUESTION)
        async with asyncio.timeout(10):
            await double.disconnected.wait()


class TestErrors:
    async def test_a_wrong_key(self, cluster: Cluster) -> None:
        """A wrong key is an AuthenticationError, and is not repeated in it."""
        async with sdk(cluster.url, api_key="sk-secret-and-wrong") as stranger:
            with pytest.raises(openai.AuthenticationError) as caught:
                await stranger.models.list()
            assert (caught.value.code, caught.value.type) == ("invalid_api_key", "authentication_error")
            assert "sk-secret-and-wrong" not in str(caught.value)
            with pytest.raises(openai.AuthenticationError):
                await stranger.chat.completions.create(model="nope", messages=[])

    async def test_an_unknown_model(self, client: AsyncOpenAI) -> None:
        """An unknown model is a NotFoundError, also for a stream and for `models.retrieve`."""
        for stream in (False, True):
            with pytest.raises(openai.NotFoundError) as caught:
                await client.chat.completions.create(model="no-such-model", messages=QUESTION, stream=stream)
            assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
            assert "no-such-model" in caught.value.message
        with pytest.raises(openai.NotFoundError) as caught:
            await client.models.retrieve("no/such:model")
        assert caught.value.code == "model_not_found"

    async def test_a_wrong_field(self, client: AsyncOpenAI) -> None:
        """A field of the wrong type is a BadRequestError that names the field."""
        wrong: Any = {"temperature": "warm"}
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model="echo", messages=QUESTION, **wrong)
        assert (caught.value.param, caught.value.type) == ("temperature", "invalid_request_error")

    async def test_an_unknown_path(self, client: AsyncOpenAI) -> None:
        """What Nexus does not serve is a NotFoundError with a message."""
        with pytest.raises(openai.NotFoundError) as caught:
            await client.post("/no/such/endpoint", cast_to=object, body={})
        assert caught.value.code == "not_found"

    async def test_a_full_queue(self, cluster: Cluster, client: AsyncOpenAI, eventually: Any) -> None:
        """A full queue is a RateLimitError with `queue_full` and a Retry-After."""
        await cluster.start_worker(WORKER_MODELS="narrow", WORKER_BACKEND_OPTIONS="slots=1,delay_ms=60000")
        waiting = []
        for count in range(1, QUEUE + 3):  # one runs, and the one that is next to start does not count
            waiting.append(cluster.record({"model": "narrow", "messages": QUESTION}))
            await eventually(lambda count=count: stores(cluster, "narrow", count))
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError) as caught:
                await client.chat.completions.create(model="narrow", messages=QUESTION, stream=stream)
            assert caught.value.code == "queue_full"
            assert int(caught.value.response.headers["retry-after"]) >= 1
        await asyncio.gather(*(recorded.hang_up() for recorded in waiting))

    async def test_a_failing_backend(self, client: AsyncOpenAI) -> None:
        """A backend that fails is an InternalServerError, before a stream's first byte too."""
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError) as caught:
                await client.chat.completions.create(
                    model="echo", messages=QUESTION, stream=stream, extra_body={"echo": {"fail": "error"}}
                )
            assert (caught.value.status_code, caught.value.code) == (502, "backend_error")


class TestRequestIds:
    async def test_every_answer_has_its_own(self, client: AsyncOpenAI) -> None:
        """`x-request-id` is on every answer, on streams and on errors too, and never twice the same."""
        ids = []
        whole = await client.chat.completions.with_raw_response.create(model="echo", messages=QUESTION)
        ids.append(whole.headers["x-request-id"])
        assert whole.parse()._request_id == ids[0]
        assert whole.headers["x-nexus-job-id"].startswith("job_")
        stream = await client.chat.completions.with_raw_response.create(model="echo", messages=QUESTION, stream=True)
        ids.append(stream.headers["x-request-id"])
        assert "content-length" not in stream.headers
        assert stream.headers["content-type"].startswith("text/event-stream")
        _ = [chunk async for chunk in stream.parse()]
        ids.append((await client.models.with_raw_response.list()).headers["x-request-id"])
        ids.append(str((await client.models.retrieve("echo"))._request_id))
        with pytest.raises(openai.NotFoundError) as caught:
            await client.chat.completions.create(model="none", messages=QUESTION)
        ids.append(str(caught.value.request_id))
        with pytest.raises(openai.BadRequestError) as bad:
            await client.chat.completions.create(model="echo", messages=[])
        ids.append(str(bad.value.request_id))
        async with sdk(str(client.base_url).removesuffix("/v1/"), api_key="wrong") as stranger:
            with pytest.raises(openai.AuthenticationError) as refused:
                await stranger.models.list()
        ids.append(str(refused.value.request_id))
        assert all(request_id.startswith("req_") for request_id in ids)
        assert len(set(ids)) == len(ids)


class TestRetries:
    """The SDK numbers its attempts in `x-stainless-retry-count`."""

    async def _retries(self, client: AsyncOpenAI, **request: Any) -> tuple[int, openai.APIStatusError]:
        with pytest.raises(openai.APIStatusError) as caught:
            await client.chat.completions.create(**{"model": "echo", "messages": QUESTION, **request})
        return int(caught.value.request.headers["x-stainless-retry-count"]), caught.value

    async def test_what_a_retry_cannot_mend_is_not_retried(self, impatient_url: str) -> None:
        """The SDK obeys `x-should-retry: false`: a first-token limit that ran out costs one request, not three."""
        async with sdk(impatient_url, max_retries=2) as client:
            retries, error = await self._retries(client, extra_body={"echo": {"delay_ms": 60_000}})
        assert (error.status_code, error.response.headers["x-should-retry"]) == (504, "false")
        assert retries == 0

    async def test_wrong_requests_are_not_retried(self, cluster: Cluster) -> None:
        """A 400 and a 404 cost one request each."""
        async with sdk(cluster.url, max_retries=2) as client:
            assert (await self._retries(client, model="none"))[0] == 0
            assert (await self._retries(client, messages=[]))[0] == 0

    async def test_a_passing_failure_is_retried(self, cluster: Cluster) -> None:
        """A backend's failure is retried by the SDK as often as it was told to."""
        async with sdk(cluster.url, max_retries=1) as client:
            retries, error = await self._retries(client, extra_body={"echo": {"fail": "error"}})
        assert (retries, error.status_code) == (1, 502)


class TestRealModel:
    """SmolLM2 on a real llama.cpp server."""

    ASK: Any = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}]

    async def test_an_answer(self, client: AsyncOpenAI, smollm2: str) -> None:
        """A real model answers, with usage that adds up."""
        answer = await client.chat.completions.create(model=smollm2, messages=self.ASK, max_tokens=30, temperature=0)
        assert "Paris" in (answer.choices[0].message.content or "")
        assert answer.model == smollm2
        assert answer.usage is not None
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens

    async def test_a_stream(self, client: AsyncOpenAI, smollm2: str) -> None:
        """Its stream has the form that the SDK expects, usage included."""
        options: Any = {"include_usage": True}
        stream = await client.chat.completions.create(
            model=smollm2, messages=self.ASK, max_tokens=30, temperature=0, stream=True, stream_options=options
        )
        chunks = [chunk async for chunk in stream]
        assert "Paris" in check_chunks(chunks, smollm2, usage=True)
        assert len(chunks) > 5

    async def test_limits_and_stops(self, client: AsyncOpenAI, smollm2: str) -> None:
        """`max_tokens` ends in `length`, a stop word in `stop` and without the word."""
        short = await client.chat.completions.create(model=smollm2, messages=self.ASK, max_tokens=2)
        assert short.choices[0].finish_reason == "length"
        stopped = await client.chat.completions.create(
            model=smollm2, messages=self.ASK, max_tokens=30, temperature=0, stop=["Paris"]
        )
        assert stopped.choices[0].finish_reason == "stop"
        assert "Paris" not in (stopped.choices[0].message.content or "")

    async def test_an_answer_by_a_schema(self, client: AsyncOpenAI, smollm2: str) -> None:
        """`response_format` with a JSON schema gives an answer that parses by it."""
        schema = {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}, "people": {"type": "integer"}},
            "required": ["city", "people"],
            "additionalProperties": False,
        }
        wanted: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema, "strict": True}}
        answer = await client.chat.completions.create(
            model=smollm2, messages=self.ASK, max_tokens=60, temperature=0, response_format=wanted
        )
        parsed = json.loads(answer.choices[0].message.content or "")
        assert set(parsed) == {"city", "people"}
        assert isinstance(parsed["people"], int)

    async def test_text_completion(self, client: AsyncOpenAI, smollm2: str) -> None:
        """Legacy completions continue a text."""
        answer = await client.completions.create(
            model=smollm2, prompt="The capital of France is", max_tokens=5, temperature=0
        )
        assert "Paris" in answer.choices[0].text

    async def test_it_is_listed(self, client: AsyncOpenAI, smollm2: str) -> None:
        """It is in the list of models, with the context that one request has."""
        model = await client.models.retrieve(smollm2)
        assert (model.model_extra or {})["context_length"] == 2048
