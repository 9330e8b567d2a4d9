"""Positions in a trace, as callers send them and envelopes carry them."""

from __future__ import annotations

import pytest

from schemas.jobs import Capability, Envelope, EnvelopeTemplate, JobRecord, JobStatus, with_trace
from schemas.outcome import Outcome, outcome_of
from schemas.traces import TraceContext, read_trace_context

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
STATE = 'vendor=a"b\\7'
ENVELOPE = Envelope(
    job="job_1", endpoint="/v1/chat/completions", capability=Capability.CHAT, model="m", public_model="m", reply="a.b"
)


@pytest.mark.parametrize(
    "wrong",
    [
        b"", b"00", PARENT.encode().upper(), PARENT.encode() + b"-x", b"ff" + PARENT.encode()[2:], PARENT.encode() + b"\n",
        b"00-" + b"0" * 32 + PARENT.encode()[35:], PARENT.encode()[:36] + b"0" * 16 + b"-01", b"\xff" * 55,
    ],
)  # fmt: skip
def test_a_wrong_traceparent_is_none(wrong: bytes) -> None:
    """It cannot become a header, a line of JSON, or a trace."""
    assert read_trace_context(wrong) is None


def test_a_wrong_tracestate_is_left_out() -> None:
    """The trace goes on without it."""
    assert read_trace_context(PARENT, STATE) == TraceContext(PARENT, STATE)
    for wrong in (b"a=\r\nx: y", b"a" * 513, b"\xff"):
        assert read_trace_context(PARENT.encode(), wrong) == TraceContext(PARENT)


@pytest.mark.parametrize("state", ["", STATE])
def test_an_envelope_carries_its_trace(state: str) -> None:
    """Made from a template or by itself; a job without a trace has not one byte more."""
    trace = TraceContext(PARENT, state)
    filled, line = EnvelopeTemplate(ENVELOPE).fill("job_2", "req_1", "c.d")
    for envelope, message in (with_trace(filled, line, trace), with_trace(ENVELOPE, b"", trace)):
        read, _ = Envelope.decode((message or envelope.encode(b"")[:-1]) + b"\n{}")
        assert read == envelope
        assert read.trace == trace
    assert ENVELOPE.trace is None
    assert b"trace" not in ENVELOPE.encode(b"")


def test_a_job_keeps_its_trace() -> None:
    """In its record, also one that is made of its outcome; no gateway's seal covers it."""
    traced = ENVELOPE.model_copy(update={"traceparent": PARENT})
    outcome, _ = Outcome.decode(outcome_of(traced, JobStatus.COMPLETED).encode())
    assert JobRecord.of(outcome, created_at=1).traceparent == PARENT
    record = JobRecord.decode(JobRecord.of(traced, created_at=1).encode())
    assert record.traceparent == PARENT
    assert outcome_of(record, JobStatus.CANCELLED).traceparent == ""
    assert b"trace" not in JobRecord.of(ENVELOPE, created_at=1).encode()
