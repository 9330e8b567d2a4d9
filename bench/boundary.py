"""How long a stream waits for its first token where there are as many callers as slots, or a few more, over several models.

python -m bench.boundary [--slots 96] [--models 1,3,8] [--load 1.0,1.25] [--tokens 8] [--delay-ms 150]

The echo backend takes `slots` streams at a time, of `tokens` times `delay-ms` each, so that no machine is the limit. With as many callers as
slots nobody should wait: what is above some milliseconds is a slot that was idle beside a waiting job. With a quarter
more, a caller waits for the slot that is free next; `ideal` is what that costs on average.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp

from bench.report import percentile
from tests.cluster import KEY, Cluster, chat

SETTLE_S = 1.0
"""Waits of requests sent before this are not counted: all callers begin at once."""


async def first_tokens(url: str, models: list[str], callers: int, given: argparse.Namespace) -> list[float]:
    """Return the milliseconds to the first token, of callers that ask again at once."""
    waits: list[float] = []
    begin, end = time.monotonic() + SETTLE_S, time.monotonic() + SETTLE_S + given.seconds
    echo = {"delay_ms": given.delay_ms, "first_delay_ms": 0, "tokens": given.tokens}

    async def ask(http: aiohttp.ClientSession, number: int) -> None:
        while (sent := time.monotonic()) < end:
            body = chat(model=models[number % len(models)], stream=True, echo=echo)
            async with http.post("/v1/chat/completions", json=body) as answer:
                answer.raise_for_status()
                first = 0.0
                async for _ in answer.content.iter_any():
                    first = first or time.monotonic()
            if sent >= begin:
                waits.append((first - sent) * 1e3)

    connections = aiohttp.TCPConnector(limit=0)
    headers = {"authorization": f"Bearer {KEY}"}
    async with aiohttp.ClientSession(url, headers=headers, connector=connections) as http:
        for model in models:  # their other lanes are quiet, and were used once
            for tier in ("priority", "flex"):
                body = chat(model=model, service_tier=tier)
                async with http.post("/v1/chat/completions", json=body) as answer:
                    answer.raise_for_status()
        await asyncio.gather(*(ask(http, number) for number in range(callers)))
    return sorted(waits)


async def measure(given: argparse.Namespace) -> None:
    """One row for each number of models and each load."""
    with tempfile.TemporaryDirectory(prefix="nexus-boundary-") as folder:
        async with Cluster(Path(folder)) as cluster:
            await cluster.start_gateway()
            for count in map(int, given.models.split(",")):
                models = [f"of-{count}-{number}" for number in range(count)]
                settings: dict[str, Any] = {"WORKER_MODELS": ",".join(models), "WORKER_CONCURRENCY": str(given.slots)}
                worker = await cluster.start_worker("echo", **settings)
                for load in map(float, given.load.split(",")):
                    callers = round(given.slots * load)
                    waits = await first_tokens(cluster.url, models, callers, given)
                    p50, p90, p99 = (percentile(waits, share) for share in (0.5, 0.9, 0.99))
                    ideal = max(0.0, (load - 1.0) * given.tokens * given.delay_ms)
                    print(
                        f"{given.slots} slots, {callers} callers, {count} models: {len(waits)} streams, TTFT "
                        f"p50 {p50:.0f}, p90 {p90:.0f}, p99 {p99:.0f} ms (ideal mean {ideal:.0f})",
                        flush=True,
                    )
                await cluster.stop_workers(worker)


def parse() -> argparse.Namespace:
    lines = (__doc__ or "").split("\n")
    parser = argparse.ArgumentParser(prog="python -m bench.boundary", description=lines[0], epilog="\n".join(lines[4:]))
    parser.add_argument("--slots", type=int, default=96)
    parser.add_argument("--models", default="1,3,8")
    parser.add_argument("--load", default="1.0,1.25")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--delay-ms", type=float, default=150.0)
    parser.add_argument("--seconds", type=float, default=8.0)
    return parser.parse_args()


if __name__ == "__main__":
    asyncio.run(measure(parse()))
