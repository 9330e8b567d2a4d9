"""The benchmarks' arithmetic. Nothing here measures."""

from typing import Any

import orjson
import pytest

from bench.gate import BASELINE, LIMIT, LOADS, compare, ratio_of_best
from bench.report import GOALS, Goal, figure, goals_table, middle, percentile, ratio, scenario_table, summary


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1), (0.5, 51), (0.99, 100), (1.0, 100)])
def test_a_percentile_is_one_of_the_values(share, expected):
    assert percentile(range(1, 101), share) == expected


def test_a_summary_sorts_and_nothing_has_none():
    assert summary([3.0, 1.0, 2.04]) == {"p50": 2.0, "p95": 3.0, "p99": 3.0, "max": 3.0}
    assert summary([]) is None


def test_a_figure_that_was_not_measured_is_none_and_not_an_error():
    assert figure({"ttft_us": {"p50": 7}}, "ttft_us.p50") == 7
    assert figure({"ttft_us": None}, "ttft_us.p50") is None
    assert middle([{"failed": 3}], "cpu_us") is None
    assert ratio(None, 5) is None
    assert ratio(5, 0) is None


def test_one_bad_round_of_three_does_not_change_the_median():
    assert middle([{"cpu_us": 10}, {"cpu_us": 900}, {"cpu_us": 12}], "cpu_us") == 12


def test_goals_judge_absolute_figures_and_shares_of_direct():
    results: dict[str, Any] = {
        "s512": {
            "direct": [{"tokens_per_s": 1000}],
            "nexus": [{"tokens_per_s": 995, "ttft_us": {"p99": 21_000}}],
        }
    }
    rows = {line.split("  ")[0]: line.split()[-1] for line in goals_table(results, GOALS).splitlines()[1:]}
    assert rows == {"s512 TTFT p99, ms": "NO", "s512 tokens/s, x direct": "yes"}
    assert Goal("", "s512", "ttft_us.p99", 20, scale=1e-3).measured(results) == 21


def test_the_table_compares_with_direct_and_shows_a_failed_target_with_its_error():
    runs: dict[str, Any] = {
        "direct": [{"per_s": 100.0, "failed": 0}],
        "naive": [{"failed": 64, "first_error": "no result"}],
        "nexus": [{"per_s": 50.0, "failed": 0}],
    }
    lines = scenario_table("closed", "per_s", runs).splitlines()
    assert lines[0].endswith("req/s, x direct  req/s, x naive")
    assert lines[3].split()[-2:] == ["0.500", "-"]
    assert lines[4] == "  naive: no result"


@pytest.mark.parametrize(("factor", "passes"), [(0.5, True), (1.0, True), (LIMIT, True), (1.5, False), (3.0, False)])
def test_the_gate_catches_a_slowdown_of_a_half(factor, passes):
    [verdict] = compare({"request": factor}, {"request": 1.0})
    assert verdict.passes is passes
    assert ("record" in verdict.describe()) is (factor not in {1.0, LIMIT})


def test_the_gate_without_a_baseline_says_what_to_do():
    [verdict] = compare({"request": 6.0}, {})
    assert not verdict.passes
    assert "make bench-gate" in verdict.describe()


def test_the_gate_compares_the_quietest_rounds():
    assert ratio_of_best({"nexus": [900.0, 300.0], "direct": [50.0, 150.0]}) == 6.0


def test_each_load_of_the_gate_has_a_baseline():
    recorded = orjson.loads(BASELINE.read_bytes())
    assert set(recorded) == set(LOADS)
    assert all(ratio > 0 for ratio in recorded.values())


def test_the_goals_include_what_a_start_costs():
    table = goals_table({"start": {"nexus": [{"gateway_cpu_s": 0.45, "worker_cpu_s": 0.31}]}}, GOALS)
    rows = {line.split("  ")[0]: line.split()[-1] for line in table.splitlines()[1:]}
    assert rows == {"CPU of the gateway's start, s": "yes", "CPU of a worker's start, s": "NO"}
