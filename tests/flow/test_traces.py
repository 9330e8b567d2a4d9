"""Traces of requests and jobs over gateways and workers, as a collector receives them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from tests.cluster import Cluster, Crew, chat, free_port
from tests.collector import CollectedSpan, Collector, collecting
from tests.conftest import Eventually
from tests.flow.conftest import SETTINGS
from tests.servers import here

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = "zanzibar-confidential"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="module")
def cluster_settings(collector: Collector) -> dict[str, str]:
    return SETTINGS | {
        "TRACING": "true",
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "WEBHOOK_PRIVATE_HOSTS": here(),
    }


class Traced:
    """A caller's trace, and what the collector has of it."""

    def __init__(self, collector: Collector) -> None:
        self._collector = collector
        self.id, self.span = secrets.token_hex(16), secrets.token_hex(8)
        self.headers = {"traceparent": f"00-{self.id}-{self.span}-01", "tracestate": "vendor=7"}

    def has(self, *names: str) -> dict[str, CollectedSpan] | None:
        """The spans by name, once there is one of each of these."""
        found = {span.name: span for span in self._collector.trace(self.id)}
        return found if set(names) <= found.keys() else None


async def test_a_stream_is_one_trace(
    crew: Crew, cluster: Cluster, collector: Collector, eventually: Eventually
) -> None:
    """From the caller's span to the first token, over two processes; what callers and models write is in no span."""
    worker = await crew.start(options="tokens=3,first_delay_ms=50")
    trace, before = Traced(collector), time.time()
    body = chat(PROMPT, model=crew.model, stream=True)
    answer = await cluster.record(body, **trace.headers).end()
    assert answer.complete
    call = f"chat {crew.model}"
    spans = await eventually(
        lambda: trace.has("POST /v1/chat/completions", "publish", "wait in queue", "attempt", call)
    )
    request, attempt = spans["POST /v1/chat/completions"], spans["attempt"]
    assert [(span.service, span.kind, span.parent) for span in (request, spans["publish"], attempt, spans[call])] == [
        ("nexus-gateway", "SERVER", trace.span),
        ("nexus-gateway", "PRODUCER", request.id),
        ("nexus-worker", "CONSUMER", request.id),
        ("nexus-worker", "CLIENT", attempt.id),
    ]
    assert {span.state for span in spans.values()} == {"vendor=7"}
    assert not any(span.is_error for span in spans.values())
    assert before - 1 < request.start_s <= attempt.start_s <= spans[call].events["first_token"] <= time.time() + 1
    assert "first_token" in request.events
    assert request.attributes["http.response.status_code"] == 200
    assert request.attributes["nexus.team"] == attempt.attributes["nexus.team"]
    assert (attempt.attributes["nexus.worker"], attempt.attributes["nexus.attempt.outcome"]) == (worker, "completed")
    about = spans[call].attributes
    assert (about["gen_ai.operation.name"], about["gen_ai.request.model"]) == ("chat", crew.model)
    assert about["gen_ai.usage.output_tokens"] == 3
    assert about["gen_ai.response.finish_reasons"] == ["stop"]
    assert PROMPT.encode() not in collector.received
    [line] = [line for line in cluster.requests() if line.get("trace_id") == trace.id]
    assert line["model"] == crew.model
    await eventually(lambda: [line["trace_id"] for line in cluster.attempts(worker)] == [trace.id])
    assert trace.id in await exemplars(cluster)


async def exemplars(cluster: Cluster) -> set[str]:
    """The traces that the gateway's metrics name, for a scraper that reads OpenMetrics."""
    accept = {"accept": "application/openmetrics-text; version=1.0.0"}
    answer = await cluster.get("/metrics", headers=accept)
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    families = text_string_to_metric_families(answer.text)
    samples = [sample for family in families for sample in family.samples if sample.exemplar is not None]
    assert {sample.name for sample in samples} == {
        "nexus_request_duration_seconds_bucket",
        "nexus_time_to_first_token_seconds_bucket",
    }
    return {sample.exemplar.labels["trace_id"] for sample in samples if sample.exemplar is not None}


async def test_a_job_is_one_trace(crew: Crew, cluster: Cluster, collector: Collector, eventually: Eventually) -> None:
    """From its submission to its webhook; the job names its trace."""
    await crew.start()
    trace = Traced(collector)
    job = {
        "endpoint": "/v1/chat/completions",
        "body": chat(PROMPT, model=crew.model),
        "webhook": {"url": collector.url + "/hook"},
    }
    answer = await cluster.post("/v1/jobs", job, headers=trace.headers)
    assert answer.status_code == 202, answer.text
    ended = (await cluster.get(f"/v1/jobs/{answer.json()['id']}?wait=30")).json()
    assert (ended["status"], ended["trace_id"]) == ("completed", trace.id)
    names = (
        "POST /v1/jobs",
        "publish",
        "wait in queue",
        "attempt",
        f"chat {crew.model}",
        "record outcome",
        "POST webhook",
    )
    spans = await eventually(lambda: trace.has(*names))
    assert spans["publish"].parent == spans["POST /v1/jobs"].id
    assert {spans[name].parent for name in ("attempt", "wait in queue", "record outcome", "POST webhook")} == {
        spans["publish"].id
    }
    assert spans["POST webhook"].attributes["http.response.status_code"] == 200
    assert spans["record outcome"].attributes["nexus.job.status"] == "completed"
    assert collector.others == ["/hook"]
    assert PROMPT.encode() not in collector.received


async def test_each_attempt_is_a_span(
    crew: Crew, collector: Collector, cluster: Cluster, eventually: Eventually
) -> None:
    """A worker that is killed cannot record its attempt; its gateway does, and says why it ended."""
    old = await crew.start(options="first_delay_ms=60000")
    trace = Traced(collector)
    answer = cluster.record(chat(model=crew.model), **trace.headers)
    await eventually(lambda: crew.runs(1))
    await eventually(lambda: crew.busy(old))
    new = await crew.start()
    crew.kill(old)
    assert (await answer.end()).status == 200

    def attempts() -> list[CollectedSpan] | None:
        found = [span for span in collector.trace(trace.id) if span.name == "attempt"]
        return found if len(found) == 2 else None

    lost, second = await eventually(attempts)
    assert (lost.service, lost.attributes["nexus.worker"], lost.is_error) == ("nexus-gateway", old, True)
    assert lost.attributes["error.type"] == "worker_lost"
    assert (second.service, second.attributes["nexus.worker"], second.is_error) == ("nexus-worker", new, False)
    assert (lost.attributes["nexus.delivery"], second.attributes["nexus.delivery"]) == (1, 2)


async def test_a_failure_is_an_error_of_its_spans(
    crew: Crew, collector: Collector, cluster: Cluster, eventually: Eventually
) -> None:
    """Of the attempt and the call; a caller's own mistake is none of the server's span. A wrong `traceparent` begins a new trace."""
    await crew.start()
    failed, refused = Traced(collector), Traced(collector)
    body: dict[str, Any] = chat(model=crew.model, echo={"fail": "refuse"})
    assert (await cluster.record(body, **failed.headers).end()).status == 400
    wrong = refused.headers | {"traceparent": f"00-{refused.id}-{'0' * 16}-01"}
    assert (await cluster.record({"model": crew.model}, **wrong).end()).status == 400
    call = f"chat {crew.model}"
    spans = await eventually(lambda: failed.has("POST /v1/chat/completions", "attempt", call))
    assert [spans[name].is_error for name in ("attempt", call, "POST /v1/chat/completions")] == [True, True, False]
    assert "error.type" in spans["POST /v1/chat/completions"].attributes
    assert collector.trace(refused.id) == []


async def test_the_collector_may_be_away(crew: Crew, cluster: Cluster, eventually: Eventually) -> None:
    """Requests are answered, more of them than the queue of spans holds, and the gateway stops in time."""
    await crew.start()
    away = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{free_port()}",
        "OTEL_BSP_MAX_QUEUE_SIZE": "32",
        "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "8",
    }
    gateway = await cluster.start_gateway(**away)
    url = cluster.urls[-1]

    async def serves() -> bool:
        return (await crew.ask(url=url).end()).status == 200

    await eventually(serves)
    answers = [crew.ask(url=url) for _ in range(30)]
    assert [(await answer.end()).status for answer in answers] == [200] * 30
    assert await gateway.stop(15) == 0
