"""The usage of durable jobs: every run that has an outcome has an event, wherever a gateway dies."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import pytest

from gateway.jobs.outcome_recorder import OutcomeRecorder
from schemas.errors import Unavailable
from schemas.jobs import JobStatus
from tests.unit.gateway.jobs.rig import OWNER, Rig


async def _never(*_: Any) -> None:
    await asyncio.Event().wait()


def stop_recorders(rig: Rig) -> None:
    """Let no gateway record an outcome from now on, as if it had died with it in hand."""
    for gateway in rig.gateways:
        gateway._tasks[0].cancel()


async def test_each_run_has_an_event(rig: Rig) -> None:
    """Its status, error, tokens and worker are those of the outcome, for each run of a job that is retried."""
    await rig.worker("w")
    job = await rig.submit("again", key="key_7", echo={"fail": "error", "fail_times": 1})
    await rig.ended(job)
    await rig.jobs.retry(OWNER, job)
    await rig.until(job, JobStatus.COMPLETED)
    await rig.eventually(lambda: len(rig.usage(job)) == 2)
    first, second = rig.usage(job)
    assert (first.run, first.status, second.run, second.status) == (1, "failed", 2, "completed")
    assert first.error
    record = await rig.ended(job)
    assert record.usage is not None
    assert (second.input_tokens, second.output_tokens) == (
        record.usage["prompt_tokens"],
        record.usage["completion_tokens"],
    )
    assert (second.team, second.key, second.worker, second.durable, second.attempts) == (OWNER, "key_7", "w", True, 1)


async def test_a_cancelled_job_has_an_event(rig: Rig) -> None:
    """A job that no worker ran is counted with what it waited."""
    await rig.open_queues()
    job = await rig.submit()
    await rig.jobs.cancel(OWNER, job)
    await rig.ended(job)
    await rig.eventually(lambda: len(rig.usage(job)) == 1)
    [event] = rig.usage(job)
    assert (event.status, event.worker, event.slot_us) == ("cancelled", "", 0)


async def test_a_retry_stores_what_nobody_has_recorded(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateways die before they record the first run; its outcome is deleted by the retry, and its usage is not lost."""
    await rig.worker("w")
    monkeypatch.setattr(OutcomeRecorder, "_record", _never)
    job = await rig.submit("again", echo={"fail": "error", "fail_times": 1})
    await rig.eventually(lambda: job in rig.broker.job_log.outcomes)
    assert rig.usage(job) == []
    await rig.jobs.retry(OWNER, job)
    assert [event.run for event in rig.usage(job)] == [1]


@pytest.mark.parametrize("step", ["before", "after"])
async def test_a_recorder_that_dies_leaves_the_outcome_to_another(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """It dies just before or just after it has stored the usage: another gateway records the outcome, and the event is there once."""
    first = rig.gateways[0]
    died = asyncio.Event()
    store = first.recorder._usage
    assert store is not None
    original = store.store

    async def dying(*arguments: Any) -> None:
        if step == "after":
            await original(*arguments)
        died.set()
        await _never()

    monkeypatch.setattr(store, "store", dying)
    await rig.worker("w")
    job = await rig.submit()
    await died.wait()
    assert len(rig.usage(job)) == (step == "after")
    stop_recorders(rig)
    await rig.gateway()
    await rig.eventually(lambda: not rig.broker.job_log.outcome_queue.items)
    assert [event.run for event in rig.usage(job)] == [1]


async def test_outcomes_wait_while_their_usage_cannot_be_stored(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """An outcome is settled after its usage is stored, not before; its record does not wait."""
    fails = 2
    store = rig.gateways[0].recorder._usage
    assert store is not None
    original = store.store

    def failing(*arguments: Any) -> Awaitable[None]:
        nonlocal fails
        fails -= 1
        if fails >= 0:
            raise Unavailable
        return original(*arguments)

    monkeypatch.setattr("gateway.jobs.outcome_recorder.RETRY_DELAY_S", 0.01)
    monkeypatch.setattr(store, "store", failing)
    await rig.worker("w")
    job = await rig.submit()
    assert (await rig.ended(job)).status is JobStatus.COMPLETED
    await rig.eventually(lambda: not rig.broker.job_log.outcome_queue.items)
    assert len(rig.usage(job)) == 1
    assert rig.gateways[0].counted("jobs_ended") == 1
