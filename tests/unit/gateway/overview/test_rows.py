"""The rows of the overview, and what it says needs attention."""

from __future__ import annotations

from typing import Any

from backbone.bus.bus import Queue, QueueDepth, StorageUsage, StreamUsage
from gateway.health import ComponentHealth, Readiness
from gateway.overview.attention import attention
from gateway.overview.rows import OverviewInputs, Row, make_rows
from gateway.overview.traffic import Traffic
from schemas.jobs import Capability, Lane
from schemas.presence import ModelOffer, RegistrySnapshot, WorkerPresence, WorkerState

MODEL = "org/chat:8b"


def worker(name: str = "w", *, state: WorkerState = WorkerState.READY, slots: int = 2, **offer: Any) -> WorkerPresence:
    models = (ModelOffer(name=MODEL, capabilities=(Capability.CHAT,), **offer),)
    return WorkerPresence(id=name, backend="echo", host="here", models=models, state=state, slots=slots)


def snapshot(*workers: WorkerPresence) -> RegistrySnapshot:
    return RegistrySnapshot(workers={one.id: one for one in workers})


def depth(lane: Lane = Lane.DEFAULT, *, waiting: int = 0, running: int = 0, model: str = MODEL) -> QueueDepth:
    return QueueDepth(Queue(Capability.CHAT, lane, model), waiting, running)


def rows(seen: RegistrySnapshot, *depths: QueueDepth, **more: Any) -> dict[str, Row]:
    return make_rows(OverviewInputs(seen, list(depths), **more))


class TestRows:
    def test_queues_of_all_lanes_and_slots_of_all_ready_workers_are_one_row(self) -> None:
        """A worker that takes no jobs adds no slots; the oldest job of any lane counts."""
        busy = [depth(Lane.PRIORITY, waiting=1, running=3), depth(Lane.FLEX, waiting=4)]
        oldest = {busy[0].queue: 1_700_000_050, busy[1].queue: 1_700_000_000}
        seen = snapshot(worker("a", loaded=False), worker("b", loaded=True), worker("c", state=WorkerState.UNHEALTHY))
        [row] = rows(seen, *busy, oldest=oldest).values()
        assert row["waiting"] == {"priority": 1, "default": 0, "flex": 4}
        assert (row["running"], row["slots"], row["workers"], row["loaded"]) == (3, 4, 2, True)
        assert (row["oldest_queued_at"], row["state"]) == (1_700_000_000, "ready")

    def test_a_model_without_worker_is_listed_while_it_has_jobs_or_dead_letters(self) -> None:
        """Its state says why nothing starts."""
        assert rows(snapshot(), depth(waiting=1))[MODEL]["state"] == "unserved"
        assert rows(snapshot(), dead_letters={MODEL: 2})[MODEL]["dead_letters"] == 2
        away = snapshot(worker(state=WorkerState.UNHEALTHY))
        assert rows(away)[MODEL]["state"] == "unhealthy"
        assert rows(snapshot(worker()), is_paused=lambda _: True)[MODEL]["state"] == "paused"

    def test_a_new_job_waits_for_the_jobs_of_its_lane_and_above(self) -> None:
        """Each round of the slots takes one service time; without a service time or a slot, nobody knows."""

        def eta(*depths: QueueDepth, slots: int = 2, service_s: float | None = 10.0) -> float | None:
            service = {} if service_s is None else {MODEL: service_s}
            return rows(snapshot(worker(slots=slots)), *depths, service_s=service)[MODEL]["eta_seconds"]

        assert eta() == 10.0
        assert eta(depth(running=2)) == 20.0
        assert eta(depth(waiting=4, running=2), depth(Lane.FLEX, waiting=100)) == 40.0
        assert eta(service_s=None) is None
        assert rows(snapshot(), depth(waiting=1), service_s={MODEL: 1.0})[MODEL]["eta_seconds"] is None

    def test_traffic_gives_the_rates_and_a_service_time_where_no_job_has_ended(self) -> None:
        """Requests are not recorded in Redis, but they take slots as well."""
        [row] = rows(snapshot(worker()), traffic={MODEL: Traffic(600, 3, 4, 8.0)}).values()
        assert (row["tokens_per_second"], row["errors"], row["eta_seconds"]) == (10.0, 3, 2.0)

    def test_jobs_that_manage_models_have_no_row(self) -> None:
        """Their queue belongs to a worker, not to a model that callers know."""
        own = ModelOffer(name="worker:w", capabilities=(Capability.MODELS,))
        seen = snapshot(WorkerPresence(id="w", backend="echo", host="here", models=(own,)))
        assert rows(seen, QueueDepth(Queue(Capability.MODELS, Lane.DEFAULT, "worker:w"), 1, 0)) == {}


class TestAttention:
    def test_a_quiet_system_needs_none(self) -> None:
        """Nor does one whose parts were not checked yet."""
        seen = snapshot(worker())
        made = rows(seen, depth(waiting=5, running=1))
        assert attention(made, seen, readiness=None, storage=None, connected=True) == []
        well = Readiness(status="ready", parts={"nats": ComponentHealth(ok=True)})
        assert attention(made, seen, readiness=well, storage=StorageUsage((), 0), connected=True) == []

    def test_each_kind_says_what_it_is_about_and_what_to_do(self) -> None:
        """The most urgent come first."""
        sick = worker("sick", state=WorkerState.UNHEALTHY).model_copy(update={"problems": ("no route to host",)})
        seen = snapshot(sick)
        made = rows(seen, depth(waiting=3), dead_letters={"other": 1})
        parts = {"redis": ComponentHealth(ok=False, error="refused"), "etcd": ComponentHealth(ok=True)}
        storage = StorageUsage(
            (
                StreamUsage("NEXUS_EVENTS", 1, 85, 100),
                StreamUsage("NEXUS_DONE", 1, 10, 100),
                StreamUsage("X", 1, 1, None),
            ),
            0,
        )
        found = attention(
            made,
            seen,
            readiness=Readiness(status="degraded", parts=parts),
            storage=storage,
            connected=False,
            ledger_lag_s=12.0,
        )
        assert [(item["kind"], item["subject"]) for item in found] == [
            ("server_away", "nats"),
            ("server_away", "redis"),
            ("jobs_without_worker", MODEL),
            ("server_away", "ledger"),
            ("dead_letters", "other"),
            ("stream_full", "NEXUS_EVENTS"),
            ("worker_unhealthy", "sick"),
        ]
        assert all(item["message"] and item["action"] for item in found)
        assert found[2]["count"] == 3
        assert "no route to host" in found[-1]["message"]

    def test_one_kind_does_not_crowd_out_the_others(self) -> None:
        """A thousand unhealthy workers are not a thousand lines."""
        seen = snapshot(*(worker(f"w{number}", state=WorkerState.UNHEALTHY) for number in range(1000)))
        found = attention({}, seen, readiness=None, storage=None, connected=True)
        assert len(found) == 50
