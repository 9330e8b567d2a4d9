"""What callers and operators see of ordinary requests."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from tests.cluster import Cluster, Crew, free_port
from tests.conftest import Eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

SECRET = "zanzibar-confidential"


async def samples(url: str) -> dict[tuple[str, str], float]:
    """Metrics by name and model, summed over the other labels; histogram buckets are left out."""
    async with httpx.AsyncClient() as client:
        text = (await client.get(url + "/metrics")).text
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if not sample.name.endswith(("_bucket", "_created")):
                key = (sample.name, sample.labels.get("model", ""))
                found[key] = found.get(key, 0.0) + sample.value
    return found


@pytest_asyncio.fixture(loop_scope="module")
async def worker(crew: Crew) -> AsyncIterator[str]:
    yield await crew.start()


async def test_whole_and_streamed(crew: Crew, worker: str) -> None:
    """The same question is answered whole, and token by token with `[DONE]` at the end."""
    whole, stream = crew.ask("one two three"), crew.stream("one two three")
    await asyncio.gather(whole.end(), stream.end())
    assert whole.status == 200
    assert whole.text == "one two three"
    assert json.loads(whole.body)["model"] == crew.model
    assert stream.complete
    assert stream.texts == ["one ", "two ", "three"]
    assert stream.headers is not None
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert {answer.headers["x-nexus-job-id"][:4] for answer in (whole, stream) if answer.headers} == {"job_"}


async def test_tokens_come_as_they_are_made(crew: Crew, worker: str, eventually: Eventually) -> None:
    """A stream's first token is there long before its last."""
    stream = crew.stream(echo={"delay_ms": 300, "first_delay_ms": 0, "tokens": 10})
    await eventually(lambda: stream.texts)
    assert not stream.ended
    assert len((await stream.end()).texts) == 10


async def test_one_request_id(crew: Crew, worker: str, cluster: Cluster, eventually: Eventually) -> None:
    """The `x-request-id` that the caller gets stands in the gateway's log and in the worker's."""
    answer = await crew.ask().end()
    assert answer.headers is not None
    request_id = answer.headers["x-request-id"]
    assert request_id.startswith("req_")
    await eventually(lambda: [line for line in cluster.requests() if line["request_id"] == request_id])
    await eventually(lambda: [line for line in cluster.attempts(worker) if line["request_id"] == request_id])


async def test_prompts_are_in_no_log(crew: Crew, worker: str, cluster: Cluster, eventually: Eventually) -> None:
    """What callers say is in no log of any process, whether their request works, fails or is refused."""
    outcomes = ["", "crash", "error", "refuse", "drop"]
    answers = [crew.ask(SECRET, echo={"fail": fail}) for fail in outcomes]
    answers += [crew.ask(SECRET, n=SECRET), crew.ask(SECRET, echo={"fail": SECRET}), crew.ask(SECRET, model=SECRET)]
    await asyncio.gather(*(answer.end() for answer in answers))
    assert answers[0].text == SECRET
    assert all((answer.status or 0) >= 400 for answer in answers[1:])
    await eventually(lambda: len(cluster.attempts(worker)) >= len(outcomes))
    logs = [*cluster.folder.glob("*.log"), *cluster.folder.glob("*/*.log")]
    assert len(logs) >= 5
    assert [log.name for log in logs if SECRET in Path(log).read_text(errors="replace")] == []


async def test_metrics(cluster: Cluster, crew: Crew, eventually: Eventually) -> None:
    """After known traffic the metrics of gateway and worker say exactly what has happened."""
    port = free_port()
    await crew.start(WORKER_OBSERVABILITY_PORT=str(port), WORKER_CONCURRENCY="3")
    for _ in range(3):
        assert (await crew.ask("a b c d", echo={"delay_ms": 10}).end()).status == 200
        assert (await crew.stream("a b c d", echo={"delay_ms": 10}).end()).complete
    assert (await crew.ask(echo={"fail": "error"}).end()).status == 502
    assert (await crew.ask(echo={"fail": "before", "fail_times": 1}).end()).status == 200
    running = [crew.stream(echo={"delay_ms": 500, "tokens": 100}) for _ in range(2)]
    await eventually(lambda: all(stream.texts for stream in running))
    model, worker = crew.model, await samples(f"http://127.0.0.1:{port}")
    await eventually(lambda: in_flight(cluster.observability_url, 2))
    assert worker["nexus_worker_slots", ""] == 3
    assert worker["nexus_worker_slots_busy", ""] == 2
    assert worker["nexus_backend_up", ""] == 1
    for stream in running:
        await stream.hang_up()
    await eventually(lambda: counted(cluster.observability_url, model, 10))
    gateway, worker = await samples(cluster.observability_url), await samples(f"http://127.0.0.1:{port}")
    await eventually(lambda: in_flight(cluster.observability_url, 0))
    assert gateway["nexus_request_duration_seconds_count", model] == 10
    assert gateway["nexus_queue_wait_seconds_count", model] == 10
    assert 0 < gateway["nexus_queue_wait_seconds_sum", model] < 10
    assert gateway["nexus_time_to_first_token_seconds_count", model] == 9
    # Three streams of four tokens: three gaps and the one before the end each, unless two came together.
    assert 6 <= gateway["nexus_inter_token_latency_seconds_count", model] <= 3 * 4 + 2 * 3
    assert gateway["nexus_tokens_total", model] == 6 * (4 + 4) + (2 + 2)
    assert gateway["nexus_redelivered_requests_total", model] == 1
    assert worker["nexus_redeliveries_total", model] == 1
    await eventually(lambda: attempted(port, model, 11))
    assert worker["nexus_backend_errors_total", ""] == 2


async def in_flight(url: str, wanted: int) -> bool:
    return (await samples(url))["nexus_requests_in_flight", ""] == wanted


async def counted(url: str, model: str, wanted: int) -> bool:
    return (await samples(url)).get(("nexus_requests_total", model)) == wanted


async def attempted(port: int, model: str, wanted: int) -> bool:
    return (await samples(f"http://127.0.0.1:{port}")).get(("nexus_worker_attempts_total", model)) == wanted


async def raw_answer(cluster: Cluster, body: bytes, **head: str) -> bytes:
    """What a caller reads for a request in one write, and for another one on the same connection, without ids and times."""
    reader, writer = await cluster.send(body, **head)
    try:
        async with asyncio.timeout(60):
            answer = await reader.readuntil(b"\r\n\r\n")
            if length := re.search(rb"content-length: (\d+)", answer):
                answer += await reader.readexactly(int(length[1]))
            elif b"transfer-encoding: chunked" in answer:
                while (size := int(await reader.readline(), 16)) > 0:
                    answer += (await reader.readexactly(size + 2))[:-2]
                await reader.readline()
            with suppress(ConnectionError):  # the server has closed the connection, as it was told to
                writer.write(b"GET /health HTTP/1.1\r\nhost: nexus\r\nconnection: close\r\n\r\n")
                answer += await reader.read()
    finally:
        writer.close()
    return re.sub(rb"[0-9a-f]{20,}|date: .*|\"created\":\d+", b"#", answer)


async def test_requests_served_without_a_task_are_answered_alike(crew: Crew, worker: str, cluster: Cluster) -> None:
    """The bytes of an answer do not depend on whether the protocol serves the request or calls the ASGI app."""
    plain = {"model": crew.model, "messages": [{"role": "user", "content": "one two"}]}
    picture = {"type": "image_url", "image_url": {"url": "file:///x"}}
    scripts = ({"fail": "error"}, {"fail": "refuse"}, {"fail": "drop"}, {"fail": "crash"}, {"size": 700_000})
    fields: list[dict[str, Any]] = [{}, *({"echo": script, "stream": on} for script in scripts for on in (False, True))]
    fields += [{"stream": True}, {"n": 1.0, "metadata": {"a": "b"}}, {"n": "1"}, {"model": "missing"}]
    fields += [{"messages": []}, {"messages": [{"role": "user", "content": [picture]}]}]
    bodies = [json.dumps(plain | more).encode() for more in fields]
    requests: list[tuple[bytes, dict[str, str]]] = [
        *((body, {}) for body in (*bodies, b"", b"[]", b'{"model": NaN}', b"[" * 200 + b"]" * 200)),
        *((bodies[0], head) for head in ({"key": "wrong"}, {"lines": "connection: close\r\n"}, {"version": "1.0"})),
    ]
    for body, head in requests:
        called = head | {"lines": head.get("lines", "") + "content-encoding: identity\r\n"}
        assert await raw_answer(cluster, body, **head) == await raw_answer(cluster, body, **called), (head, body[:200])
