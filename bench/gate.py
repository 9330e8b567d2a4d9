"""Fail when a request or a token costs clearly more CPU than when the baseline was recorded: `make bench-gate`.

What is compared is the CPU time of gateway, worker and NATS as a multiple of what the mock backend takes for the same load without
Nexus, in the same run on the same machine. So a slower machine or a busy one changes little.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from bench.stack import ROOT, Stack, Target, measure

BASELINE = ROOT / "bench" / "baseline.json"
LIMIT = 1.35
"""Times the baseline at which the gate fails: above the noise of a busy machine, below a slowdown of a half."""
FASTER = 0.8
"""Times the baseline below which a new one should be recorded."""
MAX_ROUNDS = 4
MIN_ROUNDS = 2
LOADS: dict[str, dict[str, Any]] = {
    "request": {"mode": "closed", "conns": 64, "seconds": 2.0},
    "token": {"mode": "stream", "conns": 64, "tokens": 60, "delay_us": 20_000, "ramp_s": 0.5},
}
RECORD_COMMAND = 'make bench-gate ARGS="--record"'


@dataclass(frozen=True, slots=True)
class Verdict:
    """The comparison of one load with its baseline."""

    load: str
    factor: float | None
    """Times the baseline; None: there is none."""

    @property
    def passes(self) -> bool:
        """Whether the cost is within the limit."""
        return self.factor is not None and self.factor <= LIMIT

    def describe(self) -> str:
        """Return what the factor means and what to do."""
        if self.factor is None:
            return f"no baseline: record one with {RECORD_COMMAND}"
        if not self.passes:
            return (
                f"above {LIMIT:g}: find what made it slower, or record a new baseline with {RECORD_COMMAND} and say why"
            )
        return f"faster: record a new baseline with {RECORD_COMMAND}" if self.factor < FASTER else "ok"


def compare(ratios: Mapping[str, float], baseline: Mapping[str, float]) -> list[Verdict]:
    """Return a verdict for each load."""
    return [Verdict(load, ratio / baseline[load] if baseline.get(load) else None) for load, ratio in ratios.items()]


def ratio_of_best(runs: Mapping[str, list[float]]) -> float:
    """Return Nexus's least cost as a multiple of the mock's least cost: others on the machine only add to both."""
    return min(runs["nexus"]) / min(runs["direct"])


async def run_gate(baseline: Mapping[str, float], *, record: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Measure until all loads pass, or MAX_ROUNDS. Return each load's ratio, and Nexus's microseconds."""
    runs: dict[str, dict[str, list[float]]] = {load: {"direct": [], "nexus": []} for load in LOADS}
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="nexus-gate-") as folder:
        async with Stack(Path(folder), {"direct", "nexus"}) as stack:
            for target in stack.targets:
                await measure(target, {"mode": "closed", "conns": 16, "seconds": 0.5})
            for number in range(1, MAX_ROUNDS + 1):
                for load, spec in LOADS.items():
                    for target in stack.targets:
                        runs[load][target.name].append(await cost_us(target, spec))
                ratios = {load: ratio_of_best(found) for load, found in runs.items()}
                passed = all(verdict.passes for verdict in compare(ratios, baseline))
                if number >= MIN_ROUNDS and passed and not record:
                    break
    return ratios, {load: min(found["nexus"]) for load, found in runs.items()}


async def cost_us(target: Target, load: dict[str, Any]) -> float:
    """Return the microseconds of CPU per request or token. Raises RuntimeError when an answer was wrong."""
    run = await measure(target, load)
    if run.get("failed") or not run["cpu_us"]:
        raise RuntimeError(f"{target.name} failed under the load {load}: {run.get('first_error')}")
    return float(str(run["cpu_us"]))


def main() -> int:
    """Run the gate; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gate", description=__doc__)
    parser.add_argument("--record", action="store_true", help=f"write {BASELINE.name} instead of comparing with it")
    record: bool = parser.parse_args().record
    baseline: dict[str, float] = orjson.loads(BASELINE.read_bytes()) if BASELINE.exists() else {}
    ratios, costs = asyncio.run(run_gate(baseline, record=record))
    if record:
        rounded = {load: round(ratio, 2) for load, ratio in ratios.items()}
        BASELINE.write_bytes(orjson.dumps(rounded, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
        print(f"{BASELINE} holds {rounded}")
        return 0
    print(f"{'CPU per':10} {'µs':>7} {'x direct':>9} {'baseline':>9} {'factor':>7}")
    verdicts = compare(ratios, baseline)
    for one in verdicts:
        factor = f"{one.factor:7.2f}" if one.factor is not None else "      -"
        print(
            f"{one.load:10} {costs[one.load]:7.1f} {ratios[one.load]:9.2f} {baseline.get(one.load, 0):9.2f} {factor}  {one.describe()}"
        )
    return 0 if all(one.passes for one in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
