"""Seals: what a gateway wrote, and what a worker was given, is known again; whatever was changed is not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backbone.bus.seals import Seals, attempt_token
from schemas.errors import ErrorInfo
from schemas.frames import BlobRef
from schemas.jobs import Capability, Envelope, JobStatus, Lane, Upload, Usage
from schemas.outcome import Outcome, outcome_of

SEALS, OTHERS = Seals(b"a" * 32), Seals(b"b" * 32)
JOB = "job_" + "1" * 32
ENVELOPE = Envelope(
    job=JOB, request_id="req_1", endpoint="/v1/chat/completions", capability=Capability.CHAT, model="m", public_model="alias",
    reply="nexus.events.x", owner="alice", metadata={"b": "2", "a": "1"}, key="key_1", webhook="https://x.example/", batch="batch_1",
    stream=True, uploads=(Upload(field="file", size=1, blob="f" * 32),), body_blob="e" * 32, durable=True,
)  # fmt: skip
GIVEN = SEALS.envelope(ENVELOPE, b"{}")
ANSWERED = outcome_of(
    GIVEN, JobStatus.COMPLETED, token="t", usage=Usage(prompt_tokens=1, extra={"x": 1.5}), seconds=0.25, attempts=2,
    blob=BlobRef(name="a" * 32, size=3),
)  # fmt: skip

CHANGED = {
    "job": "job_" + "2" * 32, "run": 2, "owner": "bob", "endpoint": "/v1/embeddings", "capability": Capability.SPEECH,
    "lane": Lane.FLEX, "model": "other", "public_model": "other", "request_id": "req_2", "metadata": {"a": "1"}, "key": "key_2",
    "webhook": "https://y.example/", "batch": "", "stream": False, "uploads": (),
}  # fmt: skip


def travelled(outcome: Outcome) -> Outcome:
    return Outcome.decode(outcome.encode())[0]


@pytest.mark.parametrize("status", [JobStatus.COMPLETED, JobStatus.FAILED])
def test_what_a_worker_says_of_a_job_that_it_was_given_is_believed(status: JobStatus) -> None:
    assert SEALS.is_outcome(travelled(ANSWERED.model_copy(update={"status": status})))
    assert not OTHERS.is_outcome(ANSWERED)


@pytest.mark.parametrize("status", [JobStatus.CANCELLED, JobStatus.EXPIRED, JobStatus.QUEUED])
def test_a_worker_cannot_say_what_only_gateways_say(status: JobStatus) -> None:
    assert not SEALS.is_outcome(ANSWERED.model_copy(update={"status": status}))


@pytest.mark.parametrize("name", CHANGED)
def test_a_worker_changes_nothing_of_what_its_job_is(name: str) -> None:
    assert not SEALS.is_outcome(ANSWERED.model_copy(update={name: CHANGED[name]}))


def test_every_field_of_an_outcome_is_the_jobs_or_the_attempts() -> None:
    """A new field of outcomes is one or the other: say which."""
    attempts = {
        *("status", "token", "delivery", "events", "worker", "attempts", "seconds", "content_type", "usage", "size", "blob"),
        *("error", "dead", "granted", "seal", "adapted", "media", "input_size", "sealed", "first_output_s", "traceparent"),
    }  # fmt: skip
    assert set(CHANGED) | attempts == set(Outcome.model_fields)


def test_a_gateways_outcome_is_believed_as_it_is_and_no_other() -> None:
    outcome = SEALS.outcome(
        ANSWERED.model_copy(
            update={"status": JobStatus.CANCELLED, "error": ErrorInfo(message="m", type="t", status=400)}
        )
    )
    assert SEALS.is_outcome(travelled(outcome))
    for name, value in [
        *CHANGED.items(),
        ("status", JobStatus.COMPLETED),
        ("worker", "w"),
        ("error", None),
        ("dead", True),
    ]:
        assert not SEALS.is_outcome(outcome.model_copy(update={name: value})), name


@pytest.mark.parametrize("seal", ["", "g", "w", "gAAAA", "é", GIVEN.message_seal, GIVEN.ticket])
def test_no_other_text_is_a_seal(seal: str) -> None:
    assert not SEALS.is_outcome(ANSWERED.model_copy(update={"seal": seal}))


def test_an_attempt_names_itself_by_the_ticket_of_its_job() -> None:
    token = attempt_token(GIVEN.ticket)
    assert token != attempt_token(GIVEN.ticket)
    assert " " not in token
    assert SEALS.is_attempt(JOB, token)
    assert not SEALS.is_attempt("job_" + "2" * 32, token)
    for other in (
        "",
        "-",
        token[:-1],
        "x" + token[1:],
        token + "x",
        token[:12],
        attempt_token(""),
        attempt_token("x"),
        "é" * 40,
    ):
        assert not SEALS.is_attempt(JOB, other), other


def test_a_message_is_what_was_stored_for_the_job() -> None:
    message = GIVEN.encode(b"{}")
    assert SEALS.is_message(message, ANSWERED)
    assert SEALS.is_message(message, ANSWERED.model_copy(update={"run": 2}))
    assert not SEALS.is_message(message, ANSWERED.model_copy(update={"job": "job_" + "2" * 32}))
    assert not SEALS.is_message(message + b" ", ANSWERED)
    assert not SEALS.is_message(b"garbage", ANSWERED)
    for name, value in (
        ("owner", "bob"),
        ("webhook", ""),
        ("key", ""),
        ("model", "n"),
        ("reply", "x"),
        ("ticket", ""),
        ("durable", False),
    ):
        assert not SEALS.is_message(GIVEN.model_copy(update={name: value}).encode(b"{}"), ANSWERED), name


@given(st.binary(), st.binary())
def test_a_record_and_an_item_are_as_they_were(data: bytes, other: bytes) -> None:
    token = SEALS.record(JOB, data)
    assert SEALS.is_record(JOB, data, token)
    assert SEALS.is_record(JOB, other, token) == (other == data)
    assert not SEALS.is_record("job_" + "2" * 32, data, token)
    assert not SEALS.is_record(JOB, data, "-")
    sealed = SEALS.item("hooks", data)
    assert SEALS.open_item("hooks", sealed) == data
    assert SEALS.open_item("batches", sealed) is None
    assert SEALS.open_item("hooks", other) is None
