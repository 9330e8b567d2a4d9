"""A batch of 50,000 lines from end to end; its gateway is killed in the middle. Part of `make soak`.

    .venv/bin/python -m tests.soak.batches [--lines 50000] [--keep-gateways]

Two gateways, two echo workers. Every line must be once in the output, in order, with its own answer, and be run once. Says the rate,
and the most memory that each gateway had.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from tests.cluster import Cluster
from tests.servers import Process

CHAT = "/v1/chat/completions"
LOOK_S = 1.0
SETTINGS: dict[str, Any] = {"ACK_WAIT_S": "5", "WORKER_CONCURRENCY": "32", "WORKER_LEASE_S": "5"}


def input_lines(count: int) -> bytes:
    """As OpenAI wants them."""
    return b"".join(
        json.dumps(
            {
                "custom_id": f"request-{number}",
                "method": "POST",
                "url": CHAT,
                "body": {"model": "echo", "messages": [{"role": "user", "content": f"number {number} " + "x" * 200}]},
            }
        ).encode()
        + b"\n"
        for number in range(count)
    )


def most_memory(process: Process) -> int:
    """The most resident memory that a process had, in MiB; 0: it is gone."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return 0
    found = (int(line.split()[1]) // 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    return next(found, 0)


class Soak:
    """One batch on one cluster."""

    def __init__(self, cluster: Cluster, lines: int, *, kill: bool) -> None:
        self._cluster = cluster
        self._lines = lines
        self._kill = kill
        self._memory: dict[str, int] = {}

    async def run(self) -> None:
        """Fails by AssertionError."""
        cluster = self._cluster
        for _ in range(2):
            await cluster.start_gateway()
        for name in ("one", "two"):
            await cluster.start_worker(name=name)
        batch = await self._create()
        began = time.monotonic()
        victim = await self._runner(batch)
        url = next(url for one, url in zip(cluster.gateways, cluster.urls, strict=True) if one is not victim)
        ended = await self._follow(url, batch, victim)
        seconds = time.monotonic() - began
        assert ended["status"] == "completed", ended
        assert ended["request_counts"] == {"total": self._lines, "completed": self._lines, "failed": 0}
        assert ended["error_file_id"] is None
        await self._check_output(url, ended["output_file_id"])
        runs = Counter(event["job"] for name in cluster.workers for event in cluster.attempts(name))
        assert len(runs) == self._lines
        repeated = [job for job, count in runs.items() if count > 1]
        assert repeated == [], f"{len(repeated)} lines were run more than once"
        print(f"{self._lines} lines in {seconds:.0f} s: {self._lines / seconds:.0f} a second")
        print("most memory, MiB:", ", ".join(f"{name} {mib}" for name, mib in self._memory.items()))

    async def _create(self) -> str:
        http, url = self._cluster.http, self._cluster.url
        data = input_lines(self._lines)
        began = time.monotonic()
        answer = await http.post(url + "/v1/files", files={"file": ("in.jsonl", data)}, data={"purpose": "batch"})
        print(f"{len(data) / 1e6:.1f} MB uploaded in {time.monotonic() - began:.2f} s")
        body = {"input_file_id": answer.json()["id"], "endpoint": CHAT, "completion_window": "24h"}
        return str((await http.post(url + "/v1/batches", json=body)).json()["id"])

    async def _runner(self, batch: str) -> Process:
        while True:
            for gateway in self._cluster.gateways:
                if any(event.get("batch") == batch for event in self._cluster.log_events(gateway)):
                    return gateway
            await asyncio.sleep(0.1)

    async def _follow(self, url: str, batch: str, victim: Process) -> dict[str, Any]:
        shown = 0
        while True:
            now: dict[str, Any] = (await self._cluster.http.get(f"{url}/v1/batches/{batch}")).json()
            done = now["request_counts"]["completed"]
            assert done >= shown, "counts fell"
            shown = done
            for gateway in self._cluster.gateways:
                self._memory[gateway.name] = max(self._memory.get(gateway.name, 0), most_memory(gateway))
            if self._kill and done > self._lines // 2 and victim.running:
                print(f"{victim.name} killed after {done} lines")
                victim.kill()
            if now["status"] in {"completed", "failed", "expired", "cancelled"}:
                return now
            await asyncio.sleep(LOOK_S)

    async def _check_output(self, url: str, file_id: str) -> None:
        number = 0
        async with self._cluster.http.stream("GET", f"{url}/v1/files/{file_id}/content") as response:
            lines: AsyncIterator[str] = response.aiter_lines()
            async for line in lines:
                row = json.loads(line)
                assert row["custom_id"] == f"request-{number}", (number, row)
                text = row["response"]["body"]["choices"][0]["message"]["content"]
                assert text.startswith(f"number {number} "), (number, row)
                number += 1
        assert number == self._lines


async def main(lines: int, *, kill: bool) -> None:
    """Run it once."""
    with tempfile.TemporaryDirectory() as folder:
        async with Cluster(Path(folder), **SETTINGS) as cluster:
            try:
                await Soak(cluster, lines, kill=kill).run()
            except BaseException:
                print(cluster.logs(), file=sys.stderr)
                raise


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--lines", type=int, default=50_000)
    parser.add_argument("--keep-gateways", action="store_true", help="kill none")
    options = parser.parse_args()
    asyncio.run(main(options.lines, kill=not options.keep_gateways))
