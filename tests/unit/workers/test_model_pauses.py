"""When a worker pauses a model, for how long, and what the gateway answers meanwhile."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from gateway import paused_models
from gateway.paused_models import PausedModels
from schemas.jobs import Capability
from schemas.presence import ModelOffer, Pause, RegistrySnapshot, WorkerPresence, WorkerState
from workers.adapter_kit.error_mapping import (
    LOADING_PAUSE_S,
    MAX_ESTIMATE_S,
    MAX_WAIT_S,
    error_from_response,
    parse_retry_after,
)
from workers.backends.base import BackendError, BackendUnavailable, is_unreachable
from workers.backends.ollama.client import error_from_answer
from workers.model_pauses import MAX_FLOOR_S, MAX_OUTAGE_PAUSE_S, MAX_PAUSE_S, MIN_PAUSE_S, UNRAISED_PAUSES, ModelPauses

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def date(seconds: float) -> str:
    return format_datetime(NOW + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("10", 10.0), ("0", 0.0), ("1.5", 1.5), (" 7 ", 7.0), ("-3", 0.0), ("1e12", MAX_WAIT_S), ("inf", MAX_WAIT_S),
        ("nan", None), ("soon", None), ("", None), (None, None),
        (date(20), 20.0), (date(-20), 0.0), (date(1e9), MAX_WAIT_S), ("Mon, 99 Foo 2026", None),
    ],
)  # fmt: skip
def test_retry_after_is_seconds_or_a_date(value: str | None, seconds: float | None) -> None:
    """A date is compared with the response's own `Date`."""
    assert parse_retry_after(value, date(0)) == seconds


@pytest.mark.parametrize("value", [date(20), "Thu, 01 Jan 2026 00:00:20", "20"])
def test_a_date_without_the_answers_own_counts_from_now(value: str) -> None:
    found = parse_retry_after(value)
    assert found is not None
    assert 0.0 <= found <= MAX_WAIT_S


@pytest.mark.parametrize(
    ("status", "headers", "body", "pause_s"),
    [
        (503, {"retry-after": "10"}, b"busy", 10.0),
        (429, {"retry-after": "10"}, b'{"error":{"message":"slow down"}}', 10.0),
        (503, {}, b'{"error":{"code":503,"message":"Loading model","type":"unavailable_error"}}', LOADING_PAUSE_S),
        (503, {}, b'{"error":"Model x is currently loading","estimated_time":20.5}', 20.5),
        (503, {}, b'{"error":"Model x is currently loading","estimated_time":1e9}', MAX_ESTIMATE_S),
        (503, {}, b'{"detail":"model not ready yet"}', LOADING_PAUSE_S),
        (503, {}, b'{"error":"server busy, please try again.  maximum pending requests exceeded"}', None),
        (429, {}, b'{"error":{"message":"Rate limit reached","code":"rate_limit_exceeded"}}', None),
        (429, {"retry-after": "nonsense"}, b"", None),
    ],
)
def test_what_asks_to_wait(status: int, headers: dict[str, str], body: bytes, pause_s: float | None) -> None:
    error = error_from_response(status, headers, body)
    assert isinstance(error, BackendUnavailable)
    assert error.pause_s == pause_s


def test_ollama_that_loads_asks_to_wait() -> None:
    error = error_from_answer(500, {}, b'{"error":"unexpected server status: llm server loading model"}')
    assert isinstance(error, BackendUnavailable)
    assert error.pause_s == LOADING_PAUSE_S
    failed = error_from_answer(500, {}, b'{"error":"error loading model: no such file"}')
    assert not isinstance(failed, BackendUnavailable)


def test_pauses_are_as_long_as_the_server_says_within_bounds() -> None:
    pauses = ModelPauses(lambda: 100.0)
    assert pauses.record_wait_request("a", 10.0, "busy") == 10.0
    assert pauses.record_wait_request("a", 3.0, "busy") == 10.0, "the longer one counts"
    assert pauses.record_wait_request("b", 1e9, "busy") == MAX_PAUSE_S
    assert pauses.record_wait_request("c", 0.0, "busy") == MIN_PAUSE_S
    assert [pause.model for pause in pauses.active_pauses()] == ["a", "b", "c"]


def test_a_server_that_says_the_same_again_and_again_is_asked_less_often() -> None:
    """The pauses grow until an attempt succeeds."""
    now = 0.0
    pauses, waits = ModelPauses(lambda: now), []
    for _ in range(UNRAISED_PAUSES + 8):
        waits.append(pauses.record_wait_request("m", 1.0, "busy"))
        now += waits[-1]
    assert waits[:UNRAISED_PAUSES] == [1.0] * UNRAISED_PAUSES
    assert waits[UNRAISED_PAUSES : UNRAISED_PAUSES + 3] == [2.0, 4.0, 8.0]
    assert waits[-1] == MAX_FLOOR_S
    assert pauses.active_pauses() == ()
    pauses.record_success("m")
    assert pauses.record_wait_request("m", 1.0, "busy") == 1.0


def test_a_lost_server_is_tried_less_and_less_often() -> None:
    pauses = ModelPauses()
    waits = [pauses.record_lost_server() for _ in range(10)]
    assert waits[:3] == [0.1, 0.2, 0.4]
    assert waits[-1] == MAX_OUTAGE_PAUSE_S
    pauses.record_success("m")
    assert pauses.record_lost_server() == 0.1


def test_what_says_that_a_server_may_be_gone() -> None:
    refused = BackendUnavailable("no connection", unsent=True)
    broken = BackendError("closed")
    broken.unanswered = True
    assert is_unreachable(refused)
    assert is_unreachable(broken)
    assert not is_unreachable(BackendUnavailable("busy", pause_s=3.0))
    assert not is_unreachable(BackendError("closed in the middle", transient=True))
    try:
        raise BackendUnavailable("wrapped") from refused
    except BackendUnavailable as error:
        assert is_unreachable(error)
        assert not error.unsent


def worker(name: str, *pauses: Pause, state: WorkerState = WorkerState.READY) -> WorkerPresence:
    offers = tuple(ModelOffer(name=model, capabilities=(Capability.CHAT,)) for model in ("m", "n"))
    return WorkerPresence(id=name, backend="openai", host="h", models=offers, state=state, pauses=pauses)


def test_a_model_is_paused_while_all_its_live_workers_are(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(paused_models, "monotonic", lambda: now)
    paused = PausedModels()

    def load(*workers: WorkerPresence) -> None:
        paused.load(RegistrySnapshot(workers={one.id: one for one in workers}))

    def pause(seconds: float) -> dict[str, Any]:
        return {"model": "m", "reason": "busy", "seconds": seconds, "until": 0}

    long, short = Pause(**pause(100.0)), Pause(**pause(50.0))
    load(worker("a", long), worker("b"))
    assert paused.resumes_at("m") is None
    load(worker("a", long), worker("b", short))
    assert paused.resumes_at("m") == 1050.0
    assert paused.resumes_at("n") is None
    load(worker("a", long), worker("b", state=WorkerState.UNHEALTHY))
    assert paused.resumes_at("m") == 1100.0
    now += 60.0
    load(worker("a", long), worker("b", state=WorkerState.DRAINING))
    assert paused.resumes_at("m") == 1100.0, "it counts from when it was first seen"
    load(worker("a"), worker("b"))
    assert paused.resumes_at("m") is None
