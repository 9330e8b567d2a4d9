"""Several gateways, and what a gateway says about itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cluster import Cluster, Crew, chat
from tests.conftest import Eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def serves(cluster: Cluster, url: str, model: str) -> bool:
    models = (await cluster.http.get(url + "/v1/models")).json()["data"]
    return any(entry["id"] == model for entry in models)


async def test_two_gateways(crew: Crew, cluster: Cluster, eventually: Eventually) -> None:
    """Two gateways serve the same workers at once; each caller gets the answer to its own question. The overview of either shows
    what both have answered.
    """
    await crew.start_all("delay_ms=5", "delay_ms=5")
    second = await cluster.start_gateway()
    urls = [cluster.url, cluster.urls[-1]]
    await eventually(lambda: serves(cluster, urls[1], crew.model))
    asked = {f"question {number}": crew.ask(f"question {number}", url=urls[number % 2]) for number in range(60)}
    streamed = {f"stream {number}": crew.stream(f"stream {number}", url=urls[number % 2]) for number in range(60)}
    for question, answer in asked.items():
        assert (await answer.end()).text == question
    for question, stream in streamed.items():
        await stream.end()
        assert stream.complete
        assert "".join(stream.texts) == question
    await both_log_about(crew, cluster, urls, eventually)
    await crew.ask("words that only the first gateway has passed on", url=urls[0]).end()

    async def seen_at(url: str) -> tuple[int, float]:
        overview = (await cluster.http.get(url + "/v1/overview")).json()
        [row] = [row for row in overview["models"] if row["model"] == crew.model]
        return overview["gateways"], row["tokens_per_second"]

    async def see_the_same() -> bool:
        first, second = await seen_at(urls[0]), await seen_at(urls[1])
        return first == second and first[0] == 2 and first[1] > 0

    await eventually(see_the_same)
    assert await second.stop(15) == 0


async def both_log_about(crew: Crew, cluster: Cluster, urls: list[str], eventually: Eventually) -> None:
    """Any gateway finds what another one and a worker have logged about a request."""
    answer = crew.ask(url=urls[1])
    await answer.end()
    assert answer.headers is not None
    query = {"id": answer.headers["x-request-id"]}

    async def found() -> dict[str, Any] | None:
        searched = (await cluster.http.get(urls[0] + "/v1/logs", params=query)).json()
        return searched if len(searched["data"]) == 2 else None

    searched = await eventually(found)
    assert {line["event"] for line in searched["data"]} == {"request.finished", "attempt.finished"}
    assert {line["kind"] for line in searched["data"]} == {"gateway", "worker"}
    processes = [(one["kind"], one["answered"], one["is_complete"]) for one in searched["processes"]]
    assert sorted(processes) == [("gateway", True, True)] * 2 + [("worker", True, True)] * 2


async def test_several_processes_behind_one_port(crew: Crew, cluster: Cluster, eventually: Eventually) -> None:
    """`GATEWAY_WORKERS=2` runs two processes on one port; SIGTERM ends them all."""
    await crew.start()
    gateway = await cluster.start_gateway(GATEWAY_WORKERS="2", OBSERVABILITY_PORT="0")
    url = cluster.urls[-1]
    ids: set[str] = set()

    async def both() -> bool:
        answers = [crew.ask(url=url) for _ in range(20)]
        await asyncio.gather(*(answer.end() for answer in answers))
        assert [answer.status for answer in answers if answer.status not in {200, 503}] == []
        ids.update(line["gateway"] for line in cluster.log_events(gateway) if line.get("event") == "request.finished")
        return len(ids) == 2

    await eventually(lambda: serves(cluster, url, crew.model))
    await eventually(both, timeout_s=30)
    children = processes_of(gateway.pid or 0)
    assert len(children) == 2
    assert await gateway.stop(15) == 0
    assert [pid for pid in children if Path(f"/proc/{pid}").exists()] == []
    with pytest.raises(httpx.ConnectError):
        await cluster.http.get(url + "/health")


def processes_of(parent: int) -> list[int]:
    """The children of a process."""
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


async def overview_frames(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The data of each event of the overview."""
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


async def test_readiness(cluster: Cluster, eventually: Eventually) -> None:
    """`/readyz` is 503 without NATS and 200 again when it is back; `/health` does not care."""

    async def ready() -> tuple[int, str]:
        response = await cluster.get("/readyz")
        return response.status_code, response.json()["status"]

    async def says(*wanted: object) -> bool:
        return await ready() == wanted

    assert await ready() == (200, "ready")
    cluster.nats.pause()
    await eventually(lambda: says(503, "unavailable"))
    assert (await cluster.get("/health")).status_code == 200
    cluster.nats.resume()
    await eventually(lambda: says(200, "ready"))
    async with cluster.http.stream("GET", cluster.url + "/v1/overview/events") as response:
        frames = overview_frames(response)
        attention = (await anext(frames))["attention"]
        cluster.nats.kill()
        await cluster.nats.process.wait()
        async for frame in frames:  # the stream goes on, and says what is wrong
            attention = frame.get("attention", attention)
            if frame["stale_since"] is not None:
                break
        assert attention[0]["subject"] == "nats"
    await eventually(lambda: says(503, "unavailable"))
    await cluster.nats.restart()
    await eventually(lambda: says(200, "ready"))


async def test_held_queue(crew: Crew, cluster: Cluster, eventually: Eventually) -> None:
    """Held jobs stay through a restart of NATS, and requests on an open connection are told so; once released, all jobs run."""
    await crew.start()
    queue = f"/v1/queues/{crew.model}"

    async def statuses(jobs: list[str]) -> list[str]:
        return [(await cluster.get(f"/v1/jobs/{job}")).json()["status"] for job in jobs]

    async def submit(tier: str = "default") -> str:
        body = chat(model=crew.model, service_tier=tier)
        answer = await cluster.post("/v1/chat/completions", body, headers={"prefer": "respond-async"})
        assert answer.status_code == 202
        return str(answer.json()["id"])

    before = await submit()
    await eventually(lambda: _is(statuses([before]), ["completed"]))
    held = await cluster.post(f"{queue}/hold", {"reason": "maintenance"})
    assert (held.status_code, held.json()["is_held"]) == (200, True)
    jobs = [await submit() for _ in range(6)]
    refused = await crew.ask().end()
    assert refused.status == 503
    assert (refused.error or {})["code"] == "model_held"
    assert "maintenance" in (refused.error or {})["message"]
    cluster.nats.kill()
    await cluster.nats.process.wait()
    await cluster.nats.restart()
    await eventually(lambda: _ready(cluster))
    jobs.append(await submit())

    async def all_wait() -> bool:
        rows = (await cluster.get("/v1/overview")).json()["models"]
        seen = [(row["state"], row["waiting"]["default"], row["running"]) for row in rows if row["model"] == crew.model]
        return seen == [("held", len(jobs), 0)]

    await eventually(all_wait)
    assert await statuses(jobs) == ["queued"] * len(jobs)
    jobs += [await submit(tier) for tier in ("flex", "priority", "flex")]
    listed = await pages_of(cluster, f"{queue}/jobs")
    assert [one["id"] for one in listed] == [jobs[-2], *jobs[:-3], jobs[-3], jobs[-1]]
    assert [one["queue_position"] for one in listed] == list(range(len(jobs)))
    assert {one["team"] for one in listed} == {"default"}
    assert all(one["size_bytes"] > 50 and one["kind"] == "job" and one["eta_seconds"] is None for one in listed)
    lane = await cluster.post(f"/v1/admin/jobs/{jobs[-1]}/lane?team=default", {"lane": "priority"})
    assert (lane.status_code, lane.json()["service_tier"]) == (200, "priority"), lane.text
    listed = await pages_of(cluster, f"{queue}/jobs")
    # The lower lane comes after eight jobs of higher ones.
    assert [one["id"] for one in listed] == [jobs[-2], jobs[-1], *jobs[:6], jobs[-3], jobs[6]]
    bad = await cluster.get(f"{queue}/jobs", params={"after": "nonsense"})
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "after")
    assert (await cluster.post(f"{queue}/release", {})).json()["is_held"] is False
    await eventually(lambda: _is(statuses(jobs), ["completed"] * len(jobs)))
    assert (await cluster.post("/v1/queues/nobody/hold", {})).json()["error"]["code"] == "model_not_found"


async def pages_of(cluster: Cluster, path: str) -> list[dict[str, Any]]:
    """All waiting jobs, from pages of three."""
    found: list[dict[str, Any]] = []
    after = ""
    while True:
        page = (await cluster.get(path, params={"limit": 3, "after": after})).json()
        found += page["data"]
        assert page["has_more"] == (page["next"] is not None) == (len(found) < page["total"])
        if not page["has_more"]:
            return found
        after = page["next"]


async def _ready(cluster: Cluster) -> bool:
    return (await cluster.get("/readyz")).status_code == 200


async def _is(found: Awaitable[object], wanted: object) -> bool:
    return await found == wanted
