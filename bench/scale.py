"""What more workers bring: requests a second of a backend that is the bottleneck, for 1, 2 and 4 workers.

python -m bench.scale [--workers 1,2,4] [--slots 2] [--delay-ms 400] [--seconds 8]
python -m bench.scale --url http://127.0.0.1:8800 --key KEY      what runs already, as it is

Each worker's backend takes `slots` requests at a time, `delay-ms` each: no machine is the limit, so that a laptop shows it.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path

import httpx

from tests.cluster import KEY, Cluster, chat

LANES_PER_SLOT = 3
"""Callers for each slot: enough to keep all of them busy."""


async def rate(url: str, key: str, callers: int, seconds: float) -> float:
    """Requests a second that `callers` get answered, each asking again at once."""
    answered, end = 0, time.monotonic() + seconds

    async def ask(http: httpx.AsyncClient) -> None:
        nonlocal answered
        while time.monotonic() < end:
            (await http.post("/v1/chat/completions", json=chat())).raise_for_status()
            answered += 1

    limits = httpx.Limits(max_connections=None)
    headers = {"authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60, limits=limits) as http:
        began = time.monotonic()
        await asyncio.gather(*(ask(http) for _ in range(callers)))
        return answered / (time.monotonic() - began)


async def embedded(options: argparse.Namespace) -> None:
    """One gateway, and as many workers as each row says."""
    counts = [int(part) for part in options.workers.split(",")]
    with tempfile.TemporaryDirectory(prefix="nexus-scale-") as folder:
        async with Cluster(Path(folder), WORKER_CONCURRENCY=str(options.slots)) as cluster:
            await cluster.start_gateway()
            first = 0.0
            for count in counts:
                while len(cluster.workers) < count:
                    await cluster.start_worker("echo", WORKER_BACKEND_OPTIONS=f"first_delay_ms={options.delay_ms}")
                found = await rate(cluster.url, KEY, LANES_PER_SLOT * options.slots * count, options.seconds)
                first = first or found / count
                best = options.slots * count * 1000 / options.delay_ms
                print(
                    f"{count:3} workers: {found:7.1f}/s, {found / first:5.2f} times one; the backends' limit is {best:g}/s"
                )


def parse() -> argparse.Namespace:
    lines = (__doc__ or "").split("\n")
    parser = argparse.ArgumentParser(
        prog="python -m bench.scale",
        description=lines[0],
        epilog="\n".join(lines[2:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workers", default="1,2,4")
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--delay-ms", type=float, default=400.0)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--callers", type=int, default=24, help="with --url")
    parser.add_argument("--url", default="")
    parser.add_argument("--key", default=KEY)
    return parser.parse_args()


if __name__ == "__main__":
    given = parse()
    if given.url:
        print(f"{asyncio.run(rate(given.url, given.key, given.callers, given.seconds)):.1f}/s")
    else:
        asyncio.run(embedded(given))
