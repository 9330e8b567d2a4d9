"""NATS is away, dead or frozen: no route keeps its caller for longer than is promised, and none needs a restart afterwards."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.cluster import Cluster, Crew, chat
from tests.conftest import Eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

REFUSED_S = 5.0
"""Promised for every route, from the moment at which NATS goes away."""
AT_ONCE_S = 2.0
"""Where it is known to be away: less than any wait for NATS, on a busy machine."""
FEW = 4
"""Routes used at the same time where the time of each one counts: this process shares the machine with what it measures."""
BACK_S = 10.0
"""Promised: requests work again this long after NATS is back."""
WAV = b"RIFF$\x00\x00\x00WAVEfmt \x10\x00\x00\x00\x01\x00\x01\x00@\x1f\x00\x00\x80>\x00\x00\x02\x00\x10\x00data\x00\x00\x00\x00"
PNG = b"\x89PNG\r\n\x1a\n" + b"\x00" * 32
LARGE = 700_000
"""Bytes of a body that travels as a blob."""


@dataclass
class Items:
    """What the routes are used on, made while NATS was there."""

    model: str
    worker: str
    done: str = ""
    queued: str = ""
    file: str = ""
    batch: str = ""
    response: str = ""


@dataclass
class Answered:
    """One use of a route."""

    route: str
    seconds: float = 0.0
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: str = ""


def submission(model: str) -> dict[str, Any]:
    return {"endpoint": "/v1/chat/completions", "body": chat(model=model)}


def walk(items: Items) -> list[tuple[str, str, dict[str, Any]]]:
    """Every route that may need NATS: method, path, and what httpx sends."""
    model, job = items.model, items.done
    inference: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {"json": chat(model=model)}),
        ("/v1/chat/completions", {"json": chat(model=model, stream=True)}),
        ("/v1/chat/completions", {"json": chat("x" * LARGE, model=model)}),
        ("/v1/completions", {"json": {"model": model, "prompt": "hello"}}),
        ("/v1/embeddings", {"json": {"model": model, "input": "hello"}}),
        ("/v1/rerank", {"json": {"model": model, "query": "a", "documents": ["b"]}}),
        ("/v1/images/generations", {"json": {"model": model, "prompt": "a cat"}}),
        ("/v1/images/edits", {"data": {"model": model, "prompt": "a"}, "files": {"image": ("a.png", PNG)}}),
        ("/v1/audio/speech", {"json": {"model": model, "input": "hello", "voice": "x"}}),
        ("/v1/audio/transcriptions", {"data": {"model": model}, "files": {"file": ("a.wav", WAV)}}),
        ("/v1/audio/translations", {"data": {"model": model}, "files": {"file": ("a.wav", WAV)}}),
        ("/v1/responses", {"json": {"model": model, "input": "hello"}}),
        ("/v1/responses", {"json": {"model": model, "input": "hello", "background": True}}),
    ]
    calls = [("POST", path, options) for path, options in inference]
    for headers in ({"prefer": "respond-async"}, {"idempotency-key": secrets.token_hex(8)}):
        calls += [("POST", path, options | {"headers": headers}) for path, options in inference]
    upload = {"data": {"purpose": "batch"}, "files": {"file": ("lines.jsonl", b"{}\n")}}
    return [
        *calls,
        ("POST", "/v1/models/pull", {"json": {"model": model, "worker": items.worker}}),
        ("POST", "/v1/jobs", {"json": submission(model)}),
        ("POST", "/v1/jobs", {"json": submission(model), "headers": {"idempotency-key": secrets.token_hex(8)}}),
        ("GET", "/v1/jobs", {}),
        ("GET", f"/v1/jobs/{job}", {}),
        ("GET", f"/v1/jobs/{job}/result", {}),
        ("GET", f"/v1/jobs/{job}/events", {}),
        ("POST", f"/v1/jobs/{job}/cancel", {}),
        ("POST", f"/v1/jobs/{job}/retry", {}),
        ("GET", f"/v1/jobs/{items.queued}", {}),
        ("GET", f"/v1/jobs/{items.queued}/events", {}),
        ("POST", f"/v1/jobs/{items.queued}/cancel", {}),
        ("POST", "/v1/files", upload),
        ("GET", "/v1/files", {}),
        ("GET", f"/v1/files/{items.file}", {}),
        ("GET", f"/v1/files/{items.file}/content", {}),
        ("POST", "/v1/batches", {"json": {"input_file_id": items.file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}}),
        ("GET", "/v1/batches", {}),
        ("GET", f"/v1/batches/{items.batch}", {}),
        ("POST", f"/v1/batches/{items.batch}/cancel", {}),
        ("GET", f"/v1/responses/{items.response}", {}),
        ("GET", "/v1/dlq", {}),
        ("GET", "/v1/dlq/" + job, {}),
        ("POST", f"/v1/dlq/{job}/replay", {}),
        ("GET", "/v1/queues", {}),
        ("GET", "/v1/workers", {}),
        ("GET", "/v1/models", {}),
        ("GET", "/v1/keys", {}),
        ("POST", "/v1/keys", {"json": {"name": "made while NATS is away"}}),
        ("GET", "/readyz", {}),
    ]  # fmt: skip


async def use(cluster: Cluster, method: str, path: str, options: dict[str, Any]) -> Answered:
    loop = asyncio.get_running_loop()
    answered, began = Answered(f"{method} {path} {options.get('headers', '')}"), loop.time()
    try:
        answer = await cluster.http.request(method, cluster.url + path, **options)
    except httpx.HTTPError as error:
        answered.body = repr(error)
    else:
        answered.status, answered.headers, answered.body = answer.status_code, dict(answer.headers), answer.text
    answered.seconds = loop.time() - began
    return answered


async def use_all(cluster: Cluster, items: Items, *, at_once: int = 1000) -> list[Answered]:
    """Use every route."""
    turn = asyncio.Semaphore(at_once)

    async def one(call: tuple[str, str, dict[str, Any]]) -> Answered:
        async with turn:
            return await use(cluster, *call)

    return await asyncio.gather(*(one(call) for call in walk(items)))


def wrong(answers: list[Answered], bound_s: float) -> list[str]:
    """A line for those that took too long, or were refused without saying what is wrong and when to retry."""

    def right(one: Answered) -> bool:
        if one.seconds > bound_s:
            return False
        if one.route.startswith("GET /readyz"):
            return one.status == 503
        if one.status != 503:
            return 200 <= one.status < 500
        error = json.loads(one.body)["error"]
        return error["code"] == "unavailable" and "NATS" in error["message"] and int(one.headers["retry-after"]) >= 1

    return [f"{one.seconds:.1f} s {one.route}: {one.status} {one.body[:200]}" for one in answers if not right(one)]


@pytest_asyncio.fixture(loop_scope="module")
async def items(cluster: Cluster, crew: Crew) -> AsyncIterator[Items]:
    """A worker, and one thing of each kind."""
    made = Items(crew.model, await crew.start())

    async def make(path: str, **options: Any) -> str:
        answer = await cluster.http.post(cluster.url + path, **options)
        assert answer.is_success, answer.text
        return str(answer.json()["id"])

    made.done = await make("/v1/jobs", json=submission(crew.model))
    await cluster.get(f"/v1/jobs/{made.done}?wait=30")
    slow = submission(crew.model) | {"body": chat(model=crew.model, echo={"first_delay_ms": 3_000})}
    made.queued = await make("/v1/jobs", json=slow)
    line = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": chat(model=crew.model)}
    files = {"file": ("lines.jsonl", json.dumps(line).encode())}
    made.file = await make("/v1/files", data={"purpose": "batch"}, files=files)
    batch = {"input_file_id": made.file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    made.batch = await make("/v1/batches", json=batch)
    made.response = await make("/v1/responses", json={"model": crew.model, "input": "hello"})
    yield made


FAULTS: dict[str, Callable[[Cluster], None]] = {
    "dead": lambda cluster: cluster.nats.kill(),
    "frozen": lambda cluster: cluster.nats.pause(),
}


async def mend(cluster: Cluster, fault: str) -> None:
    if fault == "dead":
        await cluster.nats.process.wait()
        await cluster.nats.restart()
    else:
        cluster.nats.resume()


@pytest.mark.parametrize("fault", FAULTS)
async def test_every_route_while_nats_is_away(
    cluster: Cluster, items: Items, eventually: Eventually, fault: str
) -> None:
    """Refused within 5 s, at once where NATS is known to be away, with what is away and when to retry; works again after."""
    process = cluster.gateways[0].pid
    FAULTS[fault](cluster)
    try:
        unknown = await use_all(cluster, items, at_once=FEW)
        known = await use_all(cluster, items, at_once=FEW)
    finally:
        await mend(cluster, fault)
    assert wrong(unknown, REFUSED_S) == []
    assert wrong(known, AT_ONCE_S) == []
    refused = {one.route for one in known if one.status == 503}
    assert {"POST /v1/jobs ", "POST /v1/chat/completions ", f"GET /v1/jobs/{items.done}/result "} <= refused

    async def works() -> bool:
        answers = [
            await cluster.post("/v1/jobs", submission(items.model)),
            await cluster.post("/v1/chat/completions", chat(model=items.model)),
            await cluster.post("/v1/chat/completions", chat("x" * LARGE, model=items.model)),
            await cluster.get(f"/v1/jobs/{items.done}/result"),
        ]
        return all(answer.is_success for answer in answers)

    await eventually(works, timeout_s=BACK_S)
    assert cluster.gateways[0].pid == process


async def test_requests_met_by_an_outage_that_ends_soon_are_served(cluster: Cluster, items: Items) -> None:
    """NATS is frozen for less than it takes to notice: nobody sees more than the delay."""
    cluster.nats.pause()
    calls = [
        asyncio.create_task(use(cluster, "POST", "/v1/jobs", {"json": submission(items.model)})),
        asyncio.create_task(use(cluster, "POST", "/v1/chat/completions", {"json": chat(model=items.model)})),
    ]
    await asyncio.sleep(1.0)  # the freeze is the fault
    cluster.nats.resume()
    answers = await asyncio.gather(*calls)
    assert [answer.status for answer in answers] == [202, 200], answers
