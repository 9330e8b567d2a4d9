"""What limits hold, and what a team at its bound costs the others.

make bench ARGS="--scenario limits"
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx

from tests.cluster import Cluster, chat

GATEWAYS = 3
REQUESTS_PER_MINUTE = 600
CALLERS = 8
"""Tasks of the limited key at each gateway."""
NOISE_PER_S = 50
"""Refused requests a second of a team at its bound: what a client sends that does not wait."""
UPLOADS = 16
PAUSE_S = 0.01
"""Between two requests of the quiet team."""


def headers(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def make(cluster: Cluster, name: str, **limits: Any) -> str:
    made = await cluster.post("/v1/keys", {"name": name} | limits)
    made.raise_for_status()
    return str(made.json()["key"])


async def admitted(cluster: Cluster, seconds: float) -> int:
    """Return how many requests all gateways together admit in the time for a key with `REQUESTS_PER_MINUTE`."""
    key = await make(cluster, "limited", requests_per_minute=REQUESTS_PER_MINUTE)
    count = 0

    async def call(url: str) -> None:
        nonlocal count
        while True:
            answer = await cluster.http.post(url + "/v1/chat/completions", json=chat(), headers=headers(key))
            if answer.status_code == 200:
                count += 1
            else:
                await asyncio.sleep(0.05)

    # Every gateway has to know the key first.
    for url in cluster.urls:
        while (await cluster.http.get(url + "/v1/models", headers=headers(key))).status_code != 200:
            await asyncio.sleep(0.05)
    tasks = [asyncio.create_task(call(url)) for url in cluster.urls for _ in range(CALLERS)]
    await asyncio.sleep(seconds)
    await end(tasks)
    return count


async def end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError, httpx.HTTPError):
            await task


async def latency(cluster: Cluster, key: str, seconds: float) -> tuple[float, float]:
    """Return median and 95th percentile of a quiet team's requests, in milliseconds."""
    took = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        began = time.monotonic()
        answer = await cluster.http.post(cluster.url + "/v1/chat/completions", json=chat(), headers=headers(key))
        answer.raise_for_status()
        took.append((time.monotonic() - began) * 1000)
        await asyncio.sleep(PAUSE_S)
    return statistics.median(took), statistics.quantiles(took, n=20)[-1]


# What a greedy team does; each goes on until it is cancelled.


async def too_many_requests(cluster: Cluster, key: str) -> None:
    """Hold as many requests open as it may, and send more."""
    slow = chat(echo={"first_delay_ms": 600_000})

    async def call() -> None:
        with contextlib.suppress(httpx.HTTPError):
            await cluster.http.post(cluster.url + "/v1/chat/completions", json=slow, headers=headers(key))

    running: set[asyncio.Task[None]] = set()
    try:
        while True:
            task = asyncio.create_task(call())
            running.add(task)
            task.add_done_callback(running.discard)
            await asyncio.sleep(1 / NOISE_PER_S)
    finally:
        await end(list(running))


async def slow_uploads(cluster: Cluster, key: str) -> None:
    """Send bodies of unknown length, a byte a second."""

    async def body() -> AsyncIterator[bytes]:
        while True:
            yield b" "
            await asyncio.sleep(1)

    async def upload() -> None:
        for _ in itertools.count():
            with contextlib.suppress(httpx.HTTPError):
                await cluster.http.post(cluster.url + "/v1/embeddings", content=body(), headers=headers(key))
            await asyncio.sleep(UPLOADS / NOISE_PER_S)

    await asyncio.gather(*(upload() for _ in range(UPLOADS)))


async def many_batches(cluster: Cluster, key: str) -> None:
    """Start batches of one line, for a model that nobody serves."""
    line = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": chat(model="nobody")}
    file = {"file": ("input.jsonl", json.dumps(line).encode())}
    uploaded = await cluster.http.post(
        cluster.url + "/v1/files", data={"purpose": "batch"}, files=file, headers=headers(key)
    )
    uploaded.raise_for_status()
    batch = {
        "input_file_id": uploaded.json()["id"],
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
    }
    while True:
        await cluster.post("/v1/batches", batch, headers=headers(key))
        await asyncio.sleep(10 / NOISE_PER_S)


NOISES: tuple[Callable[[Cluster, str], Coroutine[Any, Any, None]], ...] = (
    too_many_requests,
    slow_uploads,
    many_batches,
)


async def run(*, quick: bool) -> dict[str, Any]:
    """Measure, and print the figures."""
    seconds = 8.0 if quick else 30.0
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="nexus-limits-") as folder:
        async with Cluster(Path(folder)) as cluster:
            for _ in range(GATEWAYS):
                await cluster.start_gateway()
            await cluster.start_worker("echo", WORKER_CONCURRENCY="64")
            window = 20.0 if quick else 60.0
            count = await admitted(cluster, window)
            found["admitted"] = count / REQUESTS_PER_MINUTE
            print(
                f"\nlimits: {REQUESTS_PER_MINUTE} requests a minute over {GATEWAYS} gateways, all of them asked for more"
            )
            print(f"  {count} admitted in {window:g} s: {found['admitted'] - 1:+.1%}; goal: 5 %")
            quiet = await make(cluster, "quiet")
            await latency(cluster, quiet, 3)
            for noise in NOISES:
                greedy = await make(cluster, noise.__name__.replace("_", "-"), max_open=8)
                alone = await latency(cluster, quiet, seconds)
                task = asyncio.create_task(noise(cluster, greedy))
                await asyncio.sleep(2)
                beside = await latency(cluster, quiet, seconds)
                if task.done():
                    task.result()
                await end([task])
                again = await latency(cluster, quiet, seconds)
                p50, p95 = (beside[at] / statistics.mean((alone[at], again[at])) - 1 for at in (0, 1))
                found[noise.__name__] = (p50, p95)
                print(f"limits: another team's latency beside {noise.__name__.replace('_', ' ')}")
                print(
                    f"  median {p50:+.1%}, 95th percentile {p95:+.1%} ({beside[0]:.1f} and {beside[1]:.1f} ms); goal: 10 %"
                )
    return found
