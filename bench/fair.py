"""How teams share a queue: how long one request waits beside another team's thousands, and what busy teams get.

make bench ARGS="--scenario fair"
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from tests.cluster import Cluster, chat

SERVICE_S = 0.1
WEIGHTS = {"one": 1, "two": 2, "five": 5}
SLOTS = 4
CALLERS = 24
"""Open requests of each team, all of which but the slots wait."""
ROUNDS = 10


class Team:
    """Calls the gateway with a key of a team of its own."""

    def __init__(self, cluster: Cluster, key: str) -> None:
        limits = httpx.Limits(max_connections=None)
        headers = {"authorization": f"Bearer {key}"}
        self.http = httpx.AsyncClient(base_url=cluster.url, headers=headers, timeout=600, limits=limits)

    @classmethod
    async def make(cls, cluster: Cluster, name: str, weight: int = 1) -> Team:
        (await cluster.post("/v1/teams", {"id": name, "weight": weight})).raise_for_status()
        made = await cluster.post("/v1/keys", {"name": name, "owner": name})
        made.raise_for_status()
        return cls(cluster, made.json()["key"])

    async def ask(self, model: str) -> None:
        (await self.http.post("/v1/chat/completions", json=chat(model=model))).raise_for_status()

    async def submit(self, model: str, count: int) -> None:
        """Submit jobs, 16 at a time."""
        numbers = iter(range(count))

        async def some() -> None:
            for _ in numbers:
                body = {"endpoint": "/v1/chat/completions", "body": chat(model=model)}
                (await self.http.post("/v1/jobs", json=body)).raise_for_status()

        await asyncio.gather(*(some() for _ in range(16)))


async def newcomer(cluster: Cluster, waiting: int) -> list[float]:
    """Return how many service times a single request took until its answer, beside `waiting` jobs of another team."""
    await cluster.start_worker(
        "echo",
        WORKER_MODELS="newcomer",
        WORKER_CONCURRENCY="1",
        WORKER_BACKEND_OPTIONS=f"first_delay_ms={SERVICE_S * 1000:g},tokens=1",
    )
    many, single = await Team.make(cluster, "many"), await Team.make(cluster, "single")
    await many.submit("newcomer", waiting)
    took = []
    for _ in range(ROUNDS):
        began = time.monotonic()
        await single.ask("newcomer")
        took.append((time.monotonic() - began) / SERVICE_S)
        await asyncio.sleep(3 * SERVICE_S)
    return took


async def shares(cluster: Cluster, seconds: float, weights: dict[str, int]) -> Counter[str]:
    """Return how many requests of each busy team were answered."""
    answered: Counter[str] = Counter()
    model = f"shares-{len(weights)}"
    await cluster.start_worker(
        "echo",
        WORKER_MODELS=model,
        WORKER_CONCURRENCY=str(SLOTS),
        WORKER_BACKEND_OPTIONS=f"first_delay_ms={SERVICE_S * 1000:g},tokens=1",
    )
    teams = {name: await Team.make(cluster, f"{name}-{len(weights)}", weight) for name, weight in weights.items()}

    async def call(name: str) -> None:
        for _ in itertools.count():
            await teams[name].ask(model)
            answered[name] += 1

    tasks = [asyncio.create_task(call(name)) for name in teams for _ in range(CALLERS)]
    await asyncio.sleep(2)
    answered.clear()
    await asyncio.sleep(seconds)
    found = Counter(answered)
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError, httpx.HTTPError):
            await task
    return found


async def run(*, quick: bool) -> dict[str, Any]:
    """Measure, and print the figures."""
    waiting, seconds = (500, 15.0) if quick else (10_000, 60.0)
    with tempfile.TemporaryDirectory(prefix="nexus-fair-") as folder:
        async with Cluster(Path(folder), TEAM_MAX_QUEUED="20000", MAX_QUEUED_PER_MODEL="20000") as cluster:
            await cluster.start_gateway()
            took = await newcomer(cluster, waiting)
            busy = await shares(cluster, seconds, WEIGHTS)
            alone = await shares(cluster, seconds / 3, {"alone": 1})
    total, weight = sum(busy.values()), sum(WEIGHTS.values())
    errors = {name: busy[name] / total / (WEIGHTS[name] / weight) - 1 for name in WEIGHTS}
    best = SLOTS / SERVICE_S
    print(f"\nfair: one request beside {waiting:,} waiting jobs of another team, one slot, {SERVICE_S:g} s each")
    print(f"  waits {statistics.median(took) - 1:.2f} service times (median), {max(took) - 1:.2f} (most); goal: 2")
    print(f"fair: three busy teams of weights 1, 2 and 5, {SLOTS} slots, {seconds:g} s")
    print("  " + ", ".join(f"{name}: {busy[name]} ({error:+.1%})" for name, error in errors.items()) + "; goal: 5 %")
    print(f"  {total / seconds:.1f}/s of {best:g}/s; a team alone: {alone['alone'] / (seconds / 3):.1f}/s")
    return {"waited": [one - 1 for one in took], "answered": dict(busy), "errors": errors}
