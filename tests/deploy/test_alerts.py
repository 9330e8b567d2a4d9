"""Alarms and dashboards: made of metrics that a running gateway and a running worker have, and of PromQL that parses."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.cluster import ROOT, Cluster, chat, free_port
from tests.conftest import Eventually

ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yml"
DASHBOARDS = sorted((ROOT / "deploy" / "grafana").glob("*.json"))
PROMETHEUS = {"up"}
"""What Prometheus makes itself."""
JOBS = {"nexus-gateway", "nexus-worker"}
RANGES = {"$__rate_interval": "5m", "$__interval": "1m", "$__range": "1h"}

AROUND_ONE = (
    promql_parser.AggregateExpr,
    promql_parser.ParenExpr,
    promql_parser.SubqueryExpr,
    promql_parser.UnaryExpr,
)


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def panels(path: Path) -> list[dict[str, Any]]:
    return [panel for panel in json.loads(path.read_text())["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[tuple[str, str]]:
    """Where it stands, and the PromQL, with Grafana's variables as it would put them in."""
    for rule in rules():
        yield rule["alert"], rule["expr"]
    for path in DASHBOARDS:
        for panel in panels(path):
            for target in panel["targets"]:
                text = target["expr"]
                for name, value in RANGES.items():
                    text = text.replace(name, value)
                yield f"{path.stem}: {panel['title']}", re.sub(r"\$\w+", ".*", text)


def selectors(node: Any) -> Iterator[Any]:
    """Every selector of an expression."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    elif isinstance(node, promql_parser.MatrixSelector):
        yield node.vector_selector
    elif isinstance(node, promql_parser.BinaryExpr):
        yield from selectors(node.lhs)
        yield from selectors(node.rhs)
    elif isinstance(node, promql_parser.Call):
        for arg in node.args:
            yield from selectors(arg)
    elif isinstance(node, AROUND_ONE):
        yield from selectors(node.expr)
    else:
        assert isinstance(node, promql_parser.NumberLiteral | promql_parser.StringLiteral), type(node)


def names_in(text: str) -> set[str]:
    """Names that a text of an exporter would have: every one that is declared, with or without a sample so far."""
    found = set()
    for family in text_string_to_metric_families(text):
        found |= {sample.name for sample in family.samples}
        ends = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
        found |= {family.name + end for end in ends}
    return found


def labels_in(text: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def sample(text: str, name: str, **labels: str) -> float | None:
    for family in text_string_to_metric_families(text):
        for each in family.samples:
            if each.name == name and labels.items() <= each.labels.items():
                return each.value
    return None


def test_every_expression_is_promql() -> None:
    for where, text in expressions():
        try:
            promql_parser.parse(text)
        except Exception as error:
            pytest.fail(f"{where}: {error}")


def test_every_alarm_says_what_it_is_and_where_to_read_on() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(names) == len(set(names))
    for rule in rules():
        assert rule["labels"]["severity"] in {"page", "warn"}
        assert rule["annotations"]["summary"]
        assert re.fullmatch(r"https://\S+/docs/how-to/alarms\.md#alarm-[a-z-]+", rule["annotations"]["runbook_url"])


def test_an_alarms_words_name_labels_that_it_has() -> None:
    """What an aggregation has dropped would be shown as nothing."""
    for rule in rules():
        for label in re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]):
            grouped = re.findall(r"by \(([^)]*)\)", rule["expr"])
            assert not grouped or any(label in re.split(r",\s*", group) for group in grouped), rule["alert"]


def test_every_alarm_is_in_the_operators_handbook() -> None:
    headings = re.findall(r"^#+ (.+)$", (ROOT / "docs" / "how-to" / "alarms.md").read_text(), re.MULTILINE)
    slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    anchors = {rule["annotations"]["runbook_url"].partition("#")[2] for rule in rules()}
    if not anchors & slugs:
        pytest.skip("the handbook has no chapter on alarms yet")
    assert anchors <= slugs


def test_queues_are_never_summed_over_gateways() -> None:
    """Each shows all of them."""
    for where, text in expressions():
        for found in re.finditer(
            r"(\w+)(?: by \([^)]*\))? ?\((?:nexus_queue_depth|nexus_queue_in_progress|nexus_stream_\w+)\b", text
        ):
            assert found[1] == "max", where


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_can_be_imported(path: Path) -> None:
    board = json.loads(path.read_text())
    assert board["uid"] == path.stem
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells
    variables = {each["name"] for each in board["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]\w*)", path.read_text())) - {"__all"}
    assert used <= variables


def test_prometheus_is_told_to_read_the_alarms_and_the_jobs_that_they_name() -> None:
    config = yaml.safe_load((ALERTS.parent / "prometheus.yml").read_text())
    assert config["rule_files"] == [ALERTS.name]
    assert {job["job_name"] for job in config["scrape_configs"]} == JOBS
    named = {value for _, text in expressions() for value in re.findall(r'job="([^"]*)"', text)}
    assert named <= JOBS


async def test_alarms_and_dashboards_are_made_of_metrics_that_exist(tmp_path: Path, eventually: Eventually) -> None:
    """As a running gateway and a running worker have them, with their labels; and they say what is the matter."""
    port = free_port()
    worker_url = f"http://127.0.0.1:{port}/metrics"
    async with Cluster(tmp_path) as cluster:
        await cluster.start_gateway(WEBHOOK_RETRIES_S="", WEBHOOK_PRIVATE_HOSTS="127.0.0.1")
        worker = await cluster.start_worker(WORKER_OBSERVABILITY_PORT=str(port))

        async def said(name: str, **labels: str) -> float | None:
            return sample((await cluster.get("/metrics")).text, name, **labels)

        async def until(value: float, name: str, **labels: str) -> None:
            async def reached() -> bool:
                return await said(name, **labels) == value

            await eventually(reached, timeout_s=30)

        assert (await cluster.post("/v1/chat/completions", chat("hello"))).status_code == 200
        assert [text async for text in cluster.stream(chat("hello there"))][-1] == "[DONE]"
        refused = {"url": f"http://127.0.0.1:{free_port()}/"}
        job = await cluster.post(
            "/v1/jobs", {"endpoint": "/v1/chat/completions", "body": chat("hello"), "webhook": refused}
        )
        assert job.status_code == 202, job.text
        await until(1, "nexus_webhook_tries_total", state="failed")
        await eventually(lambda: said("nexus_stream_max_bytes", stream="NEXUS_JOBS"), timeout_s=30)
        await until(1, "nexus_part_up", part="redis")
        await until(1, "nexus_workers", state="ready")
        await until(1, "nexus_model_workers", capability="chat", model="echo")
        of_worker = (await cluster.http.get(worker_url)).text
        await cluster.stop_workers(worker)
        await cluster.wait_for_worker(worker, None)
        await until(0, "nexus_model_workers", capability="chat", model="echo")
        await until(0, "nexus_unserved_requests_total", capability="chat", model="echo")
        assert (await cluster.post("/v1/chat/completions", chat("hello"))).status_code == 503
        await until(1, "nexus_unserved_requests_total", capability="chat", model="echo")
        waiting = await cluster.post("/v1/jobs", {"endpoint": "/v1/chat/completions", "body": chat("hello")})
        assert waiting.status_code == 202, "a model without workers is still known: what wakes them is a job that waits"
        await until(1, "nexus_queue_depth", capability="chat", lane="default", model="echo")
        cluster.redis.kill()
        await until(0, "nexus_part_up", part="redis")
        exported = (await cluster.get("/metrics")).text + of_worker
    known, labels = names_in(exported) | PROMETHEUS, labels_in(exported)
    for where, text in expressions():
        for selector in selectors(promql_parser.parse(text)):
            assert selector.name in known, f"{where}: {selector.name}"
            if selector.name in labels:
                asked = {matcher.name for matcher in selector.matchers.matchers} - {"__name__"}
                assert asked <= labels[selector.name] | {"instance", "job"}, f"{where}: {selector.name}"


def test_what_is_checked_here_can_be_wrong() -> None:
    """A metric that nothing exports, and a label that none has, would be found."""
    [selector] = selectors(promql_parser.parse('sum(rate(nexus_nothing_total{color="red"}[5m]))'))
    assert selector.name == "nexus_nothing_total"
    assert {matcher.name for matcher in selector.matchers.matchers} == {"color"}
