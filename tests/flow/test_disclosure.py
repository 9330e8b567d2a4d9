"""Where servers run is nobody's business but the operators': whichever way an error takes to its caller."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.backends.doubles.openai import OpenAIDouble
from tests.cluster import Cluster, chat
from tests.conftest import Eventually

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

MODEL = "double"
WORDS = "this model's maximum context length is 4096 tokens"
LEAKY = f"{WORDS}: http://10.1.2.3:8000/v1 at host.internal:11434 has /var/lib/models/x.gguf, unix:/run/llm.sock"
HIDDEN = f"{WORDS}: [internal address] at [internal address] has [internal path], [internal address]"


async def failed_job(cluster: Cluster) -> dict[str, object]:
    body = {"endpoint": "/v1/chat/completions", "body": chat(model=MODEL)}
    job = (await cluster.post("/v1/jobs", body)).json()
    return dict((await cluster.get(f"/v1/jobs/{job['id']}?wait=60")).json())


async def test_a_servers_words_reach_callers_without_its_addresses(cluster: Cluster, eventually: Eventually) -> None:
    """A refusal, a stream that fails, a job's record and its events, and a response: all have the words, none the addresses."""
    async with OpenAIDouble() as server:
        worker = await cluster.start_worker("openai", WORKER_BACKEND_URL=server.url)
        server.behave(status=400, error={"error": {"message": LEAKY, "type": "invalid_request_error"}})
        answer = await cluster.post("/v1/chat/completions", chat(model=MODEL))
        assert (answer.status_code, answer.json()["error"]["message"]) == (400, HIDDEN)
        streamed = await cluster.post("/v1/chat/completions", chat(model=MODEL, stream=True))
        assert streamed.json()["error"]["message"] == HIDDEN
        job = await failed_job(cluster)
        assert isinstance(job["error"], dict)
        assert job["error"]["message"] == HIDDEN
        events = (await cluster.get(f"/v1/jobs/{job['id']}/events")).text
        result = (await cluster.get(f"/v1/jobs/{job['id']}/result")).text
        response = (await cluster.post("/v1/responses", {"model": MODEL, "input": "hi"})).text
        for text in (events, result, response):
            assert "[internal address]" in text
            assert "10.1.2.3" not in text
        line = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": chat(model=MODEL)}
        file = await cluster.http.post(
            cluster.url + "/v1/files",
            data={"purpose": "batch"},
            files={"file": ("lines.jsonl", json.dumps(line).encode())},
        )
        made = {"input_file_id": file.json()["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        batch = (await cluster.post("/v1/batches", made)).json()["id"]

        async def ended() -> bool:
            return (await cluster.get(f"/v1/batches/{batch}")).json()["status"] == "completed"

        await eventually(ended, timeout_s=60)
        errors = (await cluster.get(f"/v1/batches/{batch}")).json()["error_file_id"]
        text = (await cluster.get(f"/v1/files/{errors}/content")).text
        assert WORDS in text
        assert "10.1.2.3" not in text
        assert LEAKY in cluster.logs()
        await cluster.stop_workers(worker)


async def test_a_server_that_hangs_up_is_not_named(cluster: Cluster) -> None:
    """The errors of a connection that breaks do not say where to."""
    async with OpenAIDouble() as server:
        worker = await cluster.start_worker("openai", WORKER_BACKEND_URL=server.url)
        server.behave(drop="before")
        whole, streamed, job = await asyncio.gather(
            cluster.post("/v1/chat/completions", chat(model=MODEL)),
            cluster.post("/v1/chat/completions", chat(model=MODEL, stream=True)),
            failed_job(cluster),
        )
    for text in (whole.text, streamed.text, json.dumps(job)):
        assert "[internal address]" in text
        assert "127.0.0.1" not in text
    await cluster.stop_workers(worker)
