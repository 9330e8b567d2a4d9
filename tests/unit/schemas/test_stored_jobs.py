"""Job messages, records and outcomes that an earlier version stored: a rolling upgrade reads them, and the earlier version reads the new ones.

`stored_jobs.json` holds their bytes, sealed under `KEY`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from backbone.bus.seals import Seals
from schemas.jobs import Capability, Envelope, JobRecord, JobStatus, Lane, WebhookDelivery, WebhookState
from schemas.outcome import Outcome, outcome_of

STORED = {
    name: text.encode() for name, text in json.loads(Path(__file__).with_name("stored_jobs.json").read_text()).items()
}
SEALS = Seals(b"k" * 32)
WEBHOOK = "https://example.com/h?a=1"
SPEC: dict[str, Any] = {
    "job": "job_0193647f6c0070008000000000000001",
    "run": 2,
    "owner": "team-é",
    "endpoint": "/v1/responses",
    "capability": Capability.CHAT,
    "lane": Lane.FLEX,
    "model": "qwen3:8b",
    "public_model": "fast",
    "request_id": "req_1",
    "metadata": {"b": "2", "a": "1"},
    "key": "key_1",
    "webhook": WEBHOOK,
    "batch": "batch_1",
    "stream": True,
    "uploads": ("blob_b", "blob_u"),
}


@pytest.mark.parametrize("name", ["record", "running_record", "queued_event_payload"])
def test_a_stored_record_names_its_job(name: str) -> None:
    assert JobRecord.decode(STORED[name]).spec() == SPEC


def test_a_stored_message_names_its_job() -> None:
    envelope, body = Envelope.decode(STORED["message"])
    assert envelope.spec() == SPEC
    assert (envelope.endpoint, envelope.body_blob, len(envelope.uploads)) == ("/v1/chat/completions", "blob_b", 3)
    assert body == b'{"a": 1}\nxx'


def test_a_stored_message_without_optional_fields_is_read() -> None:
    """Fields that have their defaults are not stored."""
    envelope, body = Envelope.decode(STORED["sync_message"])
    assert (envelope.owner, envelope.lane, envelope.durable, body) == ("default", Lane.DEFAULT, False, b"{}")


@pytest.mark.parametrize("name", ["completed", "expired"])
def test_a_stored_outcome_names_its_job(name: str) -> None:
    assert Outcome.decode(STORED[name])[0].spec() == SPEC


def test_the_state_of_a_stored_record_stays() -> None:
    record = JobRecord.decode(STORED["running_record"])
    assert (record.status, record.worker, record.attempts, record.seq) == (JobStatus.IN_PROGRESS, "w1", 1, 7)
    deliveries = (WebhookDelivery(at=1, attempt=1, status=500),)
    assert record.webhook_state == WebhookState(url=WEBHOOK, state="failed", deliveries=deliveries)
    assert (record.created_at, record.queue_s, record.expires_at) == (1795000000, 120.0, 1795000500)


@pytest.mark.parametrize("name", ["record", "running_record"])
def test_an_earlier_gateway_reads_a_record(name: str) -> None:
    """Every field has the name and the value that earlier versions know; only nulls may be missing."""
    stored = json.loads(STORED[name])
    written = json.loads(JobRecord.decode(STORED[name]).encode())
    assert written == _without_nulls(stored)


@pytest.mark.parametrize("name", ["completed", "expired", "rejected"])
def test_an_earlier_gateway_reads_an_outcome(name: str) -> None:
    """It recomputes the seal of a gateway's outcome from the fields in its own order, so that the bytes stay the same."""
    outcome, payload = Outcome.decode(STORED[name])
    assert outcome.encode(payload) == STORED[name]


@pytest.mark.parametrize("name", ["message", "sync_message", "plain_message"])
def test_an_earlier_worker_reads_a_message(name: str) -> None:
    """The order of the fields may differ, their names and values not."""
    envelope, body = Envelope.decode(STORED[name])
    line, _, rest = envelope.encode(body).partition(b"\n")
    stored, _, stored_body = STORED[name].partition(b"\n")
    assert json.loads(line) == json.loads(stored)
    assert rest == stored_body


@pytest.mark.parametrize("name", ["completed", "expired", "rejected"])
def test_a_stored_seal_of_an_outcome_holds(name: str) -> None:
    assert SEALS.is_outcome(Outcome.decode(STORED[name])[0])


@pytest.mark.parametrize("name", ["message", "plain_message"])
def test_a_failed_job_of_an_earlier_version_can_be_retried(name: str) -> None:
    envelope, _ = Envelope.decode(STORED[name])
    outcome = outcome_of(envelope, JobStatus.FAILED)
    assert SEALS.is_outcome(outcome)
    assert SEALS.is_message(STORED[name], outcome)


@pytest.mark.parametrize(
    ("old", "new"), [(b'"qwen3:8b"', b'"qwen3:9b"'), (b'{"a": 1}', b'{"a": 2}'), (b'"}\n', b'" }\n')]
)
def test_a_changed_message_is_refused(old: bytes, new: bytes) -> None:
    """The seal covers the bytes of envelope and body."""
    outcome = outcome_of(Envelope.decode(STORED["message"])[0], JobStatus.FAILED)
    assert old in STORED["message"]
    assert not SEALS.is_message(STORED["message"].replace(old, new), outcome)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
