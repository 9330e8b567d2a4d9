"""Durable jobs on memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from gateway.jobs import records
from schemas.jobs import Limits
from tests.conftest import Eventually
from tests.unit.gateway.jobs.rig import Rig


@pytest.fixture
async def rig(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> AsyncIterator[Rig]:
    """One gateway. `@pytest.mark.parametrize("rig", [{...}], indirect=True)` gives it other times."""
    wanted: dict[str, Any] = dict(getattr(request, "param", {}))
    ack_wait_s, sealed = wanted.pop("ack_wait_s", 15.0), wanted.pop("sealed", False)
    made = Rig(eventually, ack_wait_s=ack_wait_s, limits=Limits(**wanted), sealed=sealed)
    monkeypatch.setattr(records, "clock", made.clock)
    monkeypatch.setattr("gateway.jobs.expiry.POLL_INTERVAL_S", 0.02)
    monkeypatch.setattr("gateway.jobs.outcome_recorder.RETRY_DELAY_S", 0.02)
    monkeypatch.setattr("gateway.jobs.attempt_gate.MIN_LIMIT_DELAY_S", 0.05)
    monkeypatch.setattr("workers.event_outbox.backoff_s", lambda attempt: 0.01 * attempt)
    monkeypatch.setattr("workers.attempt.REQUEST_RETRY_S", 0.01)
    monkeypatch.setattr("workers.event_outbox.STORE_RETRY_S", 0.02)
    monkeypatch.setattr("workers.worker.LIMIT_CHECK_INTERVAL_S", 0.02)
    monkeypatch.setattr("workers.puller.POLL_ROUND_S", 0.05)
    await made.gateway()
    yield made
    await made.close()
