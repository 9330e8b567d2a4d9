"""What more processes bring: the same load on 1+1, 2+1, 1+2 and 2+2 gateway and worker processes, and its CPU by part.

python -m bench.processes [--processes 1+1,1+2] [--scenario s128] [--rounds 3]

Each combination has a NATS, etcd and Redis of its own, started for each round and stopped after it.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path

from bench.__main__ import SCENARIOS, some
from bench.report import Run, middle, show, table
from bench.stack import Stack, measure

PARTS = ("gateway", "worker", "nats")


async def run(gateways: int, workers: int, scenarios: list[str]) -> dict[str, Run]:
    """The runs of one round with so many processes, by scenario."""
    with tempfile.TemporaryDirectory(prefix="nexus-processes-") as folder:
        async with Stack(Path(folder), {"nexus"}, gateways, workers) as stack:
            target = stack.targets[0]
            await measure(target, {"mode": "closed", "conns": 4, "seconds": 0.5})
            return {name: await measure(target, SCENARIOS[name]) for name in scenarios}


def rows(runs: dict[str, list[Run]], stream: bool) -> str:
    """One line a combination: CPU and write calls a unit, by part, then times."""
    times = ["ttft_us.p50", "ttft_us.p99", "relay_us.p50"] if stream else ["latency_us.p50", "latency_us.p99", "per_s"]
    heads = ["ttft p50 us", "p99", "relay p50"] if stream else ["p50 us", "p99", "req/s"]
    paths = ["cpu_us", *(f"{kind}.{part}" for kind in ("parts_us", "writes") for part in PARTS), *times, "failed"]
    lines = [["", "cpu us", *PARTS, *(f"{part} writes" for part in PARTS), *heads, "errors"]]
    lines += [[name, *(show(middle(mine, path), 2) for path in paths)] for name, mine in runs.items()]
    return table(lines)


async def compare(given: argparse.Namespace) -> None:
    results: dict[str, dict[str, list[Run]]] = {name: {} for name in given.scenario}
    for _ in range(given.rounds):
        for processes in given.processes:
            gateways, workers = map(int, processes.split("+"))
            for name, one in (await run(gateways, workers, given.scenario)).items():
                results[name].setdefault(processes, []).append(one)
    for name, runs in results.items():
        print(f"\n{name}, per unit, median of {given.rounds}\n{rows(runs, SCENARIOS[name]['mode'] == 'stream')}")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.processes", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--processes", type=lambda text: text.split(","), default=["1+1", "2+1", "1+2", "2+2"], help="gateways+workers"
    )
    parser.add_argument("--scenario", type=some(SCENARIOS), default=["s128"], help=", ".join(SCENARIOS))
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    asyncio.run(compare(options()))
