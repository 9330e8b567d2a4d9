"""What models did lately, from the counters of several gateways."""

from __future__ import annotations

from backbone.testing.bus import MemoryBroker, MemoryGatewayBus
from gateway.metrics import GatewayMetrics, ModelTotals
from gateway.overview.traffic import NO_TRAFFIC, Traffic, TrafficExchange, TrafficHistory
from tests.conftest import Eventually


def test_tokens_count_for_a_minute_and_errors_for_five() -> None:
    """Counters only grow: what they grew by leaves the sums after its time."""
    history = TrafficHistory()
    history.add({"m": ModelTotals(tokens=100, errors=1, answers=2, seconds=3.0)}, 0.0)
    history.add({"m": ModelTotals(tokens=160, errors=1, answers=3, seconds=4.0)}, 30.0)
    assert history.recent(31.0) == {"m": Traffic(160, 1, 3, 4.0)}
    assert history.recent(61.0) == {"m": Traffic(60, 1, 3, 4.0)}
    history.add({"m": ModelTotals(tokens=160, errors=1, answers=3, seconds=4.0)}, 301.0)
    assert history.recent(301.0) == {"m": Traffic(0, 0, 1, 1.0)}


def test_counters_of_requests_and_jobs_are_summed_by_model() -> None:
    """Answers below 500 are no errors; the wait in the queue is no time on a worker."""
    metrics = GatewayMetrics()
    for status in (200, 429, 502):
        metrics.child(metrics.requests, "/v1/chat/completions", "m", status).inc()
    metrics.child(metrics.jobs_ended, "chat", "m", "failed").inc()
    metrics.child(metrics.jobs_ended, "chat", "m", "completed").inc()
    metrics.child(metrics.tokens, "completion", "m").inc(7)
    metrics.child(metrics.tokens, "prompt", "m").inc(100)
    metrics.duration.observe(3.0, "/v1/chat/completions", "m")
    metrics.queue_wait.observe(1.0, "chat", "default", "m")
    assert metrics.model_totals()["m"] == ModelTotals(tokens=7, errors=2, answers=1, seconds=2.0)


async def test_gateways_add_up_what_all_of_them_report(eventually: Eventually) -> None:
    """A reader at either gateway sees the whole system."""
    broker = MemoryBroker()
    first = TrafficExchange(MemoryGatewayBus(broker), lambda: {"m": ModelTotals(tokens=30)})
    second = TrafficExchange(MemoryGatewayBus(broker), lambda: {"m": ModelTotals(tokens=12)})
    await first.start()
    await second.start()
    try:
        first.begin_following()  # all report at once, not after seconds
        await eventually(lambda: first.recent().get("m", NO_TRAFFIC).tokens == 42 and first.gateways == 2)
        await eventually(lambda: second.recent().get("m", NO_TRAFFIC).tokens == 42)
    finally:
        await first.close()
        await second.close()


async def test_an_unreadable_report_changes_nothing() -> None:
    """Any client of NATS may have sent it."""
    exchange = TrafficExchange(MemoryGatewayBus(MemoryBroker()), dict)
    await exchange.start()
    try:
        for data in (b"", b"[]", b'{"gateway":"x","models":{"m":[1]}}', b'{"gateway":"x","models":7}'):
            exchange._on_report(data)
        assert exchange.recent() == {}
        assert exchange.gateways == 1
    finally:
        await exchange.close()
