"""OpenAI's Batch API with the official SDK for Python, on a queue that holds four jobs."""

from __future__ import annotations

import asyncio
import base64
import json
import os
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI
from openai.types import Batch

from tests.cluster import KEY, Cluster, Crew
from tests.conftest import Eventually

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(180)]

CHAT = "/v1/chat/completions"
ENDED = {"completed", "failed", "cancelled", "expired"}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def client(cluster: Cluster) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=cluster.url + "/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


@pytest_asyncio.fixture(loop_scope="session")
async def crew(cluster: Cluster) -> AsyncIterator[Crew]:
    """Workers of the test's own, for a model of its own."""
    crew = Crew(cluster, f"batch-{os.urandom(4).hex()}")
    try:
        yield crew
    finally:
        await crew.stop()


def line(custom_id: str, content: str = "hello", *, url: str = CHAT, **body: Any) -> dict[str, Any]:
    if url == CHAT:
        body = {"model": "echo", "messages": [{"role": "user", "content": content}]} | body
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


async def made(client: AsyncOpenAI, *lines: dict[str, Any] | str, endpoint: str = CHAT, **fields: Any) -> Batch:
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in lines)
    file = await client.files.create(file=("in.jsonl", text.encode()), purpose="batch")
    return await client.batches.create(
        input_file_id=file.id,
        endpoint=endpoint,
        completion_window="24h",
        **fields,
    )


async def ended(client: AsyncOpenAI, batch: Batch, eventually: Eventually) -> Batch:
    async def look() -> Batch | None:
        now = await client.batches.retrieve(batch.id)
        return now if now.status in ENDED else None

    return await eventually(look, timeout_s=60, what=f"the end of {batch.id}")


async def rows(client: AsyncOpenAI, file_id: str | None) -> dict[str, dict[str, Any]]:
    """A file's lines by custom_id."""
    if file_id is None:
        return {}
    text = (await client.files.content(file_id)).text
    found = [json.loads(row) for row in text.splitlines()]
    by_id = {row["custom_id"]: row for row in found}
    assert len(by_id) == len(found)
    return by_id


class TestRuns:
    async def test_good_bad_and_failing_lines(self, client: AsyncOpenAI, eventually: Eventually) -> None:
        """The good ones are answered; each other one says what a synchronous caller would have been told."""
        good = [line(f"good-{number}", f"text {number}") for number in range(40)]
        bad = [
            line("no-model", model="nope"),
            line("wrong", messages="x"),
            line("streamed", stream=True),
            line("fails", echo={"fail": "error"}),
            line("refused", echo={"fail": "refuse"}),
        ]
        batch = await made(client, *good[:20], *bad, *good[20:], metadata={"project": "x"})
        assert (batch.object, batch.status, batch.metadata) == ("batch", "validating", {"project": "x"})
        assert batch.expires_at == batch.created_at + 86_400
        batch = await ended(client, batch, eventually)
        assert batch.status == "completed"
        assert batch.request_counts is not None
        assert batch.request_counts.model_dump() == {"total": 45, "completed": 40, "failed": 5}
        assert batch.usage is not None
        assert batch.usage.total_tokens == 40 * 4
        assert batch.model == "echo"
        output = await rows(client, batch.output_file_id)
        assert list(output) == [row["custom_id"] for row in good]
        for number in range(40):
            row = output[f"good-{number}"]
            assert row["error"] is None
            assert row["response"]["status_code"] == 200
            assert row["response"]["request_id"].startswith("req_")
            completion = openai.types.chat.ChatCompletion.model_validate(row["response"]["body"])
            assert completion.choices[0].message.content == f"text {number}"
        errors = await rows(client, batch.error_file_id)
        assert {
            name: (row["response"]["status_code"], row["response"]["body"]["error"]["code"])
            for name, row in errors.items()
        } == {
            "no-model": (404, "model_not_found"),
            "wrong": (400, None),
            "streamed": (400, None),
            "fails": (502, "backend_error"),
            "refused": (400, errors["refused"]["response"]["body"]["error"]["code"]),
        }
        assert batch.output_file_id is not None
        described = await client.files.retrieve(batch.output_file_id)
        assert (described.purpose, described.filename) == ("batch_output", f"{batch.id}_output.jsonl")

    async def test_other_endpoints(self, client: AsyncOpenAI, eventually: Eventually) -> None:
        """Vectors, sound and pictures, and transcriptions of uploaded files."""
        sound = await client.files.create(file=("a.wav", b"RIFF" + bytes(range(200))), purpose="user_data")
        asked: list[tuple[str, dict[str, Any]]] = [
            ("/v1/embeddings", {"model": "echo", "input": ["a", "b"]}),
            ("/v1/audio/speech", {"model": "echo", "input": "hello", "voice": "alloy", "response_format": "wav"}),
            ("/v1/images/generations", {"model": "echo", "prompt": "a cat", "response_format": "b64_json"}),
            ("/v1/audio/transcriptions", {"model": "echo", "file": sound.id}),
        ]
        batches = [await made(client, line("a", url=url, **body), endpoint=url) for url, body in asked]
        found = []
        for batch in batches:
            done = await ended(client, batch, eventually)
            assert done.status == "completed"
            assert done.output_file_id is not None, await rows(client, done.error_file_id)
            found.append((await rows(client, done.output_file_id))["a"]["response"]["body"])
        vectors, speech, picture, transcript = found
        assert len(vectors["data"]) == 2
        assert speech["content_type"] == "audio/wav"
        assert base64.b64decode(speech["b64"]).startswith(b"RIFF")
        assert base64.b64decode(picture["data"][0]["b64_json"]).startswith(b"\x89PNG")
        assert "204 bytes" in transcript["text"]
        assert (await client.files.retrieve(sound.id)).bytes == 204

    async def test_responses(self, client: AsyncOpenAI, eventually: Eventually) -> None:
        """Response objects, made from chat; what cannot be in a batch is that line's error."""
        url = "/v1/responses"
        lines = [
            line("a", url=url, model="echo", input="to be or not", instructions="Echo."),
            line("b", url=url, model="echo", input="large ", echo={"size": 1_000_000, "tokens": 50}),
            line("c", url=url, model="echo", input="x", background=True),
            line("d", url=url, model="echo", input="x", previous_response_id="resp_1"),
            line("e", url=url, model="echo", input="x", stream=True),
            line("f", url=url, model="nope", input="x"),
            line("g", url=url, model="echo"),
        ]
        done = await ended(client, await made(client, *lines, endpoint=url), eventually)
        assert done.status == "completed"
        output = await rows(client, done.output_file_id)
        assert list(output) == ["a", "b"]
        response = openai.types.responses.Response.model_validate(output["a"]["response"]["body"])
        assert (response.status, response.output_text, response.instructions) == ("completed", "to be or not", "Echo.")
        assert response.usage is not None
        assert response.usage.total_tokens > 0
        assert output["a"]["response"]["body"]["store"] is False
        large = openai.types.responses.Response.model_validate(output["b"]["response"]["body"])
        assert len(large.output_text) == 1_000_000
        errors = await rows(client, done.error_file_id)
        told = {name: row["response"]["body"]["error"]["param"] for name, row in errors.items()}
        assert told == {"c": "background", "d": "previous_response_id", "e": "stream", "f": "model", "g": "input"}

    async def test_a_picture_by_url(self, cluster: Cluster, client: AsyncOpenAI, eventually: Eventually) -> None:
        """It can be fetched without a key."""
        url = "/v1/images/generations"
        batch = await made(
            client, line("a", url=url, model="echo", prompt="a cat", response_format="url"), endpoint=url
        )
        done = await ended(client, batch, eventually)
        picture = (await rows(client, done.output_file_id))["a"]["response"]["body"]["data"][0]["url"]
        assert picture.startswith(cluster.url)
        answer = await cluster.http.get(picture, headers={"authorization": ""})
        assert answer.content.startswith(b"\x89PNG")

    async def test_a_large_answer(self, client: AsyncOpenAI, eventually: Eventually) -> None:
        """Two megabytes of text, on one line."""
        batch = await made(client, line("a", "word ", echo={"size": 2_000_000, "tokens": 50}), line("b", "short"))
        done = await ended(client, batch, eventually)
        output = await rows(client, done.output_file_id)
        assert list(output) == ["a", "b"]
        assert len(output["a"]["response"]["body"]["choices"][0]["message"]["content"]) == 2_000_000

    async def test_counts_while_it_runs(self, client: AsyncOpenAI, crew: Crew, eventually: Eventually) -> None:
        """They grow, and never fall."""
        await crew.start(options="delay_ms=150,slots=2")
        batch = await made(client, *[line(f"r{number}", "one two", model=crew.model) for number in range(30)])
        seen: list[int] = []
        while batch.status not in ENDED:
            batch = await client.batches.retrieve(batch.id)
            assert batch.request_counts is not None
            seen.append(batch.request_counts.completed)
            await asyncio.sleep(0.05)
        assert batch.status == "completed"
        assert seen == sorted(seen)
        assert len({count for count in seen if 0 < count < 30}) >= 2
        assert seen[-1] == 30


class TestWrongInput:
    async def test_a_file_with_mistakes_fails(self, client: AsyncOpenAI, eventually: Eventually) -> None:
        """Each wrong line is told, and nothing is run."""
        lines = [line("a"), "{no json", line("a"), line("b", url="/v1/embeddings"), '{"custom_id": "c"}']
        batch = await ended(client, await made(client, *lines), eventually)
        assert batch.status == "failed"
        assert batch.failed_at is not None
        assert batch.errors is not None
        assert batch.errors.object == "list"
        assert [(error.code, error.line, error.param) for error in batch.errors.data or ()] == [
            ("invalid_json_line", 2, None),
            ("duplicate_custom_id", 3, "custom_id"),
            ("invalid_url", 4, "url"),
            ("missing_required_parameter", 5, "method"),
        ]
        assert (batch.output_file_id, batch.error_file_id) == (None, None)

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"endpoint": "/v1/nonsense"}, "endpoint"),
            ({"completion_window": "1 day"}, "completion_window"),
            ({"metadata": {str(number): "x" for number in range(17)}}, "metadata"),
            ({"metadata": {"a": "x" * 513}}, "metadata.a"),
            ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after.seconds"),
        ],
    )
    async def test_wrong_fields(self, client: AsyncOpenAI, fields: dict[str, Any], param: str) -> None:
        """400, which names the field."""
        file = await client.files.create(file=("a", b"{}"), purpose="batch")
        body = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"} | fields
        with pytest.raises(openai.BadRequestError) as raised:
            await client.batches.create(**body)
        assert raised.value.param == param

    async def test_a_file_that_is_none(self, client: AsyncOpenAI) -> None:
        """404; and 400 for one of another purpose."""
        with pytest.raises(openai.NotFoundError) as missing:
            await client.batches.create(input_file_id="file-nope", endpoint=CHAT, completion_window="24h")
        assert (missing.value.code, missing.value.param) == ("file_not_found", "input_file_id")
        file = await client.files.create(file=("a", b"{}"), purpose="vision")
        with pytest.raises(openai.BadRequestError):
            await client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")


class TestEnds:
    async def test_cancel(self, cluster: Cluster, client: AsyncOpenAI, crew: Crew, eventually: Eventually) -> None:
        """What was answered is in the output, what ran is stopped, what waited is never run."""
        worker = await crew.start(options="slots=2")
        # Lines are submitted side by side: those that are answered must not wait behind those that hang.
        quick = await crew.start(WORKER_MODELS=f"{crew.model}-quick")
        lines = [line(f"r{number}", model=f"{crew.model}-quick") for number in range(3)]
        lines += [line(f"stuck{number}", model=crew.model, echo={"fail": "hang"}) for number in range(10)]
        batch = await made(client, *lines)

        async def stuck() -> bool:
            counts = (await client.batches.retrieve(batch.id)).request_counts
            return counts is not None and counts.completed == 3 and await crew.runs(2)

        await eventually(stuck)
        cancelling = await client.batches.cancel(batch.id)
        assert cancelling.status == "cancelling"
        assert cancelling.cancelling_at is not None
        assert (await client.batches.cancel(batch.id)).status in {"cancelling", "cancelled"}
        done = await ended(client, batch, eventually)
        assert done.status == "cancelled"
        assert done.request_counts is not None
        assert done.request_counts.model_dump() == {"total": 13, "completed": 3, "failed": 10}
        assert list(await rows(client, done.output_file_id)) == ["r0", "r1", "r2"]
        errors = await rows(client, done.error_file_id)
        assert [row["response"] for row in errors.values() if row["response"]] == []
        assert {row["error"]["code"] for row in errors.values()} == {"batch_cancelled"}
        await eventually(crew.idle)

        def outcomes(name: str) -> list[str]:
            return [attempt["outcome"] for attempt in cluster.attempts(name)]

        # What was taken when it was cancelled already is let go at once, and counts as an attempt all the same.
        await eventually(lambda: len(outcomes(worker)) >= 2)
        assert set(outcomes(worker)) == {"cancelled"}
        assert outcomes(quick) == ["completed"] * 3
        assert (await client.batches.cancel(batch.id)).status == "cancelled"

    async def test_an_ended_batch_cannot_be_cancelled(self, client: AsyncOpenAI, eventually: Eventually) -> None:
        """400."""
        batch = await ended(client, await made(client, line("a")), eventually)
        with pytest.raises(openai.BadRequestError) as raised:
            await client.batches.cancel(batch.id)
        assert raised.value.code == "batch_ended"


class TestLists:
    async def test_pages_end_and_belong_to_their_owner(self, cluster: Cluster, client: AsyncOpenAI) -> None:
        """The SDK walks through all of them; another owner's do not exist."""
        answer = await cluster.post("/v1/keys", {"name": f"batcher-{os.urandom(4).hex()}"})
        async with AsyncOpenAI(base_url=cluster.url + "/v1", api_key=answer.json()["key"], max_retries=0) as other:
            assert [batch async for batch in other.batches.list()] == []
            ids = sorted([(await made(other, line("a"))).id for _ in range(5)], reverse=True)
            assert [batch.id async for batch in other.batches.list(limit=2)] == ids
            mine = {batch.id async for batch in client.batches.list()}
            assert not mine & set(ids)
            for ask in (client.batches.retrieve, client.batches.cancel):
                with pytest.raises(openai.NotFoundError) as raised:
                    await ask(ids[0])
                assert raised.value.code == "batch_not_found"
            with pytest.raises(openai.NotFoundError):
                theirs = await other.batches.retrieve(ids[0])
                await client.batches.create(input_file_id=theirs.input_file_id, endpoint=CHAT, completion_window="24h")
