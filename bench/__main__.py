"""Benchmarks of Nexus against the backend itself and a naive queue. See README.md.

python -m bench [--quick] [--rounds N] [--scenario c64,s512] [--target direct,nexus] [--out FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import orjson

from bench import console, fair, limits
from bench.report import Results, goals_table, key_figure, middle, scenario_table
from bench.stack import ROOT, SYNCED, Stack, Target, measure

PAUSE_S = 0.3
NOISE = 0.2
"""Cores used by others above which a run is called noisy."""
NAMES = ("direct", "naive", "nexus", SYNCED)
SCENARIOS: dict[str, dict[str, Any]] = {
    "c1": {"mode": "closed", "conns": 1, "seconds": 2.0},
    "c64": {"mode": "closed", "conns": 64, "seconds": 3.0},
    "c256": {"mode": "closed", "conns": 256, "seconds": 4.0},
    "s32": {"mode": "stream", "conns": 32, "tokens": 100, "delay_us": 20_000, "ramp_s": 0.5},
    "s128": {"mode": "stream", "conns": 128, "tokens": 150, "delay_us": 20_000, "ramp_s": 1.0},
    "s512": {"mode": "stream", "conns": 512, "tokens": 200, "delay_us": 20_000, "ramp_s": 2.0},
    "s1000": {"mode": "stream", "conns": 1000, "tokens": 60, "delay_us": 100_000, "ramp_s": 2.0},
    "flood64": {"mode": "stream", "conns": 64, "tokens": 500, "delay_us": 0},
    "image1m": {"mode": "closed", "what": "image", "size": 2**20, "conns": 4, "delay_us": 50_000, "seconds": 3.0},
    "image4m": {"mode": "closed", "what": "image", "size": 2**22, "conns": 4, "delay_us": 50_000, "seconds": 3.0},
    "image4m0": {"mode": "closed", "what": "image", "size": 2**22, "conns": 1, "delay_us": 0, "seconds": 2.0},
    "embed1": {"mode": "closed", "what": "embeddings", "size": 1, "conns": 16, "delay_us": 5_000, "seconds": 3.0},
    "embed64": {"mode": "closed", "what": "embeddings", "size": 64, "conns": 4, "delay_us": 50_000, "seconds": 3.0},
    "submit": {"mode": "closed", "what": "submit", "model": "parked", "conns": 64, "seconds": 3.0, "delay_us": 0},
    "sync": {"mode": "closed", "conns": 1, "seconds": 2.0},
    "durable": {"mode": "closed", "what": "durable", "conns": 1, "seconds": 2.0, "delay_us": 0},
    "durable64": {"mode": "closed", "what": "durable", "conns": 64, "seconds": 3.0, "delay_us": 0},
    "poll": {"mode": "closed", "what": "poll", "conns": 16, "seconds": 2.0, "delay_us": 0},
    "resume": {"mode": "closed", "what": "events", "size": 10_000, "conns": 1, "seconds": 3.0, "delay_us": 0},
    "speech": {"mode": "closed", "what": "speech", "size": 96_000, "conns": 8, "delay_us": 20_000, "seconds": 3.0},
}
APART = {"fair": fair.run, "limits": limits.run, "console": console.run}
"""What teams cost each other, and what the console weighs; measured only where it is named."""
WITHOUT_NAIVE = ("image", "embeddings", "speech")
"""What an afternoon's queue does not do."""
JOBS = ("submit", "durable", "poll", "events")
"""What only Nexus does."""


def table_of(load: dict[str, Any]) -> str:
    """Which columns fit."""
    if load.get("what") in JOBS:
        return "closed"
    return "media" if "what" in load else str(load["mode"])


def quick(load: dict[str, Any]) -> dict[str, Any]:
    """The same, shorter."""
    shorter = dict(load)
    if "seconds" in load:
        shorter["seconds"] = load["seconds"] / 2
    elif load["delay_us"]:
        shorter["tokens"] = min(50, load["tokens"])
    return shorter


def some(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Reads names separated by commas."""

    def read(text: str) -> list[str]:
        if unknown := set(text.split(",")) - set(known):
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are: {', '.join(known)}")
        return text.split(",")

    return read


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one short round: one to two minutes")
    parser.add_argument("--rounds", type=int, help="rounds of each scenario; figures are medians (default 3)")
    parser.add_argument(
        "--scenario", type=some((*SCENARIOS, *APART)), default=list(SCENARIOS), help=", ".join((*SCENARIOS, *APART))
    )
    parser.add_argument("--target", type=some(NAMES), default=list(NAMES), help=", ".join(NAMES))
    parser.add_argument("--out", type=Path, help="where the JSON goes (default bench/results/<time>.json)")
    given = parser.parse_args()
    given.rounds = given.rounds or (1 if given.quick else 3)
    return given


async def bench(given: argparse.Namespace, folder: Path) -> Results:
    results: Results = {}
    async with Stack(folder, set(given.target)) as stack:
        if stack.starts:
            results["start"] = {"nexus": [dict(stack.starts)]}
        for target in stack.targets:
            await measure(target, {"mode": "closed", "conns": 4, "seconds": 0.5})
        for name in given.scenario:
            load = quick(SCENARIOS[name]) if given.quick else SCENARIOS[name]
            targets = [one for one in stack.targets if does(one, load)]
            if not targets:
                continue
            if load.get("what") in {"poll", "events"}:
                load = load | {"job": await stack.long_job(load.get("size", 100))}
            runs = results[name] = {target.name: [] for target in targets}
            for number in range(given.rounds):
                # What drifts in the machine falls on all alike.
                for target in targets[:: 1 if number % 2 == 0 else -1]:
                    runs[target.name].append(await one(target, load))
                    await asyncio.sleep(PAUSE_S)
            shown = " ".join(f"{key}={value}" for key, value in load.items())
            print(f"\n{name}: {shown}, median of {given.rounds}")
            kind = table_of(load)
            print(scenario_table(kind, key_figure(kind, load.get("delay_us", 0)), runs), flush=True)
    return results


def does(target: Target, load: dict[str, Any]) -> bool:
    """Whether this load makes sense there."""
    if target.name == SYNCED:
        return load.get("what") == "submit"
    if load.get("what") in JOBS:
        return target.name == "nexus"
    return target.name != "naive" or load.get("what") not in WITHOUT_NAIVE


async def one(target: Target, load: dict[str, Any]) -> dict[str, Any]:
    """A target that fails is a result too."""
    try:
        return await measure(target, load)
    except (OSError, ValueError) as error:
        return {"failed": load["conns"], "first_error": f"no result: {error!r}"}


def neighbours(results: Results) -> str:
    """What to think of the figures, if the machine was not ours alone; else nothing."""
    runs = [run for targets in results.values() for mine in targets.values() for run in mine]
    others = middle(runs, "others_cores") or 0.0
    if others < NOISE:
        return ""
    return f"Others used {others:.1f} of {os.cpu_count()} cores meanwhile: take the times with care, and CPU rather than times.\n"


def keep(results: Results, given: argparse.Namespace) -> Path:
    path: Path = given.out or ROOT / "bench" / "results" / f"{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = {"cpus": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()}
    kept = {"when": int(time.time()), "machine": machine, "quick": given.quick, "results": results}
    path.write_bytes(orjson.dumps(kept, option=orjson.OPT_INDENT_2))
    return path


def main() -> int:
    given = options()
    for name in [name for name in given.scenario if name in APART]:
        asyncio.run(APART[name](quick=given.quick))
        given.scenario.remove(name)
    if not given.scenario:
        return 0
    with tempfile.TemporaryDirectory(prefix="nexus-bench-") as folder:
        results = asyncio.run(bench(given, Path(folder)))
    print(f"\n{goals_table(results)}\n\n{neighbours(results)}Kept in {keep(results, given)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
