"""Figures and tables: pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

Run = dict[str, Any]
"""What one run of the load generator gave, with what stack.py added."""
Results = dict[str, dict[str, list[Run]]]
"""Runs by scenario and target."""


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of `ordered` lies: the nearest rank, never an invented value."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def summary(values: Sequence[float]) -> dict[str, float] | None:
    """p50, p95, p99 and max, to a tenth; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    figures = {f"p{share}": percentile(ordered, share / 100) for share in (50, 95, 99)} | {"max": ordered[-1]}
    return {name: round(value, 1) for name, value in figures.items()}


def figure(run: Run, path: str) -> float | None:
    """`run["ttft_us"]["p50"]` for `ttft_us.p50`; None where there is none."""
    value: Any = run
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def middle(runs: list[Run], path: str) -> float | None:
    """The median over rounds; None when no round has this figure."""
    values = [value for run in runs if (value := figure(run, path)) is not None]
    return median(values) if values else None


def ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


# One scenario


def columns(text: str) -> list[tuple[str, str]]:
    """Titles and paths of figures, from `title=path` separated by commas."""
    return [(title.strip(), path) for title, _, path in (part.partition("=") for part in text.split(","))]


CLOSED = columns(
    "req/s=per_s, p50 us=latency_us.p50, p95 us=latency_us.p95, p99 us=latency_us.p99, cpu us/req=cpu_us,"
    "gw MB=gateway_mb, errors=failed"
)
STREAM = columns(
    "ttft p50 us=ttft_us.p50, ttft p99=ttft_us.p99, relay p50=relay_us.p50, relay p99=relay_us.p99,"
    "gap p99=gap_us.p99, tok/s=tokens_per_s, cpu us/tok=cpu_us, gw MB=gateway_mb, errors=failed"
)

MEDIA = columns(
    "req/s=per_s, p50 us=latency_us.p50, p99 us=latency_us.p99, first byte p50 us=ttft_us.p50, cpu us/req=cpu_us,"
    "gw MB=gateway_mb, errors=failed"
)


def show(value: float | None, digits: int = 1) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:,.{digits}f}"


def table(rows: list[list[str]]) -> str:
    """Columns as wide as they need; the first one is left-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def scenario_table(mode: str, key: str, runs: dict[str, list[Run]]) -> str:
    """One line a target; the last columns compare the scenario's key figure with the other targets'."""
    shown = {"closed": CLOSED, "stream": STREAM, "media": MEDIA}[mode]
    bases = [name for name in ("direct", "naive") if name in runs]
    title = next(title for title, path in shown if path == key)
    rows = [["", *(title for title, _ in shown), *(f"{title}, x {base}" for base in bases)]]
    for name, mine in runs.items():
        ratios = [ratio(middle(mine, key), middle(runs[base], key)) for base in bases]
        rows.append([name, *(show(middle(mine, path)) for _, path in shown), *(show(r, 3) for r in ratios)])
    notes = [f"  {name}: {run['first_error']}" for name, mine in runs.items() for run in mine if run.get("first_error")]
    return "\n".join([table(rows), *dict.fromkeys(notes)])


# Against the targets


@dataclass(frozen=True, slots=True)
class Goal:
    """One figure of the target `nexus` and its bound."""

    name: str
    scenario: str
    path: str
    bound: float
    least: bool = False
    """The figure must be at least the bound; otherwise at most."""
    of_direct: bool = False
    """The figure is taken as a share of direct's."""
    beyond_direct: bool = False
    """The figure is what it is more than direct's."""
    scale: float = 1.0

    def measured(self, results: Results) -> float | None:
        runs = results.get(self.scenario, {})
        value = middle(runs.get("nexus", []), self.path)
        if self.of_direct:
            return ratio(value, middle(runs.get("direct", []), self.path))
        if self.beyond_direct:
            base = middle(runs.get("direct", []), self.path)
            value = None if value is None or base is None else value - base
        return None if value is None else value * self.scale

    def met(self, value: float) -> bool:
        return value >= self.bound if self.least else value <= self.bound


GOALS = [
    Goal("c1 latency p50, ms", "c1", "latency_us.p50", 0.79, scale=1e-3),
    Goal("c64 req/s", "c64", "per_s", 6000, least=True),
    Goal("c64 CPU, us/req", "c64", "cpu_us", 150),
    Goal("c256 latency p99, ms", "c256", "latency_us.p99", 120, scale=1e-3),
    Goal("s32 TTFT p50, ms", "s32", "ttft_us.p50", 2, scale=1e-3),
    Goal("s128 CPU, us/token", "s128", "cpu_us", 80),
    Goal("s512 TTFT p99, ms", "s512", "ttft_us.p99", 20, scale=1e-3),
    Goal("s512 relay p99, ms", "s512", "relay_us.p99", 12, scale=1e-3),
    Goal("s512 CPU, us/token", "s512", "cpu_us", 38),
    Goal("s512 errors", "s512", "failed", 0),
    Goal("s512 tokens/s, x direct", "s512", "tokens_per_s", 0.99, least=True, of_direct=True),
    Goal("s1000 TTFT p99, ms", "s1000", "ttft_us.p99", 100, scale=1e-3),
    Goal("s1000 errors", "s1000", "failed", 0),
    Goal("flood64 tokens/s, x direct", "flood64", "tokens_per_s", 0.5, least=True, of_direct=True),
    Goal("gateway memory at s512, MB", "s512", "gateway_mb", 70),
    Goal("CPU of the gateway's start, s", "start", "gateway_cpu_s", 0.5),
    Goal("CPU of a worker's start, s", "start", "worker_cpu_s", 0.3),
    Goal("1 MB pictures/s, x direct", "image1m", "per_s", 0.85, least=True, of_direct=True),
    Goal("4 MB pictures/s, x direct", "image4m", "per_s", 0.7, least=True, of_direct=True),
    Goal("4 MB picture without work, ms added", "image4m0", "latency_us.p50", 30, beyond_direct=True, scale=1e-3),
    Goal("texts embedded alone, ms added", "embed1", "latency_us.p50", 5, beyond_direct=True, scale=1e-3),
    Goal("batches of 64 embedded/s, x direct", "embed64", "per_s", 0.9, least=True, of_direct=True),
    Goal("durable submissions/s", "submit", "per_s", 3000, least=True),
    Goal("first sound, ms added", "speech", "ttft_us.p50", 5, beyond_direct=True, scale=1e-3),
]


def goals_table(results: Results, goals: Sequence[Goal] = GOALS) -> str:
    """`figure | target | measured | met?`, of what was measured; empty when none was."""
    rows = [["figure", "target", "measured", "met?"]]
    for goal in goals:
        value = goal.measured(results)
        if value is not None:
            bound = f"{'>=' if goal.least else '<='} {goal.bound:g}"
            rows.append([goal.name, bound, show(value, 2), "yes" if goal.met(value) else "NO"])
    return table(rows) if len(rows) > 1 else ""


def key_figure(mode: str, delay_us: int) -> str:
    """What a scenario's targets are compared by."""
    if mode in ("closed", "media"):
        return "per_s"
    return "ttft_us.p50" if delay_us else "tokens_per_s"
