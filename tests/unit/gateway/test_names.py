"""Names of workers and jobs become parts of NATS subjects: whatever a worker says of itself stays one token."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from backbone.bus.subjects import (
    InvalidSubject,
    is_reply_subject,
    job_subject,
    require_pattern,
    require_subject,
    work_item_subject,
)
from schemas.errors import InvalidRequest
from schemas.frames import AttemptStarted, FrameKind
from schemas.job_events import GateRequest
from schemas.jobs import Capability, Envelope, Lane
from schemas.presence import WorkerPresence

HOSTILE = [
    "",
    "a.b",
    "*",
    ">",
    "a b",
    "a\r\nPUB nexus.control.b 0\r\n",
    "a\n",
    "\x00",
    "a\x7f",
    "é",
    "a" * 201,
    "$JS",
    "a/b",
]
NAME = st.one_of(
    st.text(max_size=30),
    st.text("ab-_.*> \r\n\t\0$", max_size=10),
    st.sampled_from(HOSTILE),
    st.text("abcXYZ019_-", min_size=1),
)
ENVELOPE = {
    "job": "job_1", "request_id": "req_1", "endpoint": "/v1/x", "capability": "chat", "model": "m", "public_model": "m", "reply": "a.b",
}  # fmt: skip
ASK = {"kind": FrameKind.STARTED, "job": "job_1", "run": 1, "delivery": 1, "token": "t", "owner": "o", "worker": "w"}


def _takes(kind: type[BaseModel], fields: Mapping[str, object]) -> bool:
    try:
        kind.model_validate(fields)
    except ValidationError:
        return False
    return True


@given(NAME)
def test_a_token_is_one_token(name: str) -> None:
    """Presence, STARTED, a question and an envelope hold names that are one token, and no others."""
    good = re.fullmatch(r"[A-Za-z0-9_-]{1,200}", name) is not None
    assert _takes(WorkerPresence, {"id": name, "backend": "echo", "host": "h"}) is good
    assert _takes(AttemptStarted, {"worker": name, "backend": "echo"}) is good
    for field in ("worker", "job"):
        assert _takes(GateRequest, ASK | {field: name}) is good
    assert _takes(Envelope, ENVELOPE | {"job": name}) is good


@given(NAME, NAME)
def test_a_reply_is_a_subject(first: str, second: str) -> None:
    """What an envelope gives as the address for events can be published to."""
    reply = f"{first}.{second}"
    if _takes(Envelope, ENVELOPE | {"reply": reply}):
        require_subject(reply.encode())


@given(st.sampled_from(Capability), st.sampled_from(Lane), st.text(max_size=60))
def test_every_model_has_a_subject(capability: Capability, lane: Lane, model: str) -> None:
    """A model's name may hold anything: its subject is one that a connection takes, or the name is refused as too long."""
    try:
        subject = job_subject(capability, lane, model)
    except InvalidRequest:
        return
    require_subject(subject.encode())
    assert len(subject.split(".")) == 5


@given(NAME)
def test_an_item_has_a_subject_of_its_own(name: str) -> None:
    """An id of the gateways' own work is one token, or is refused."""
    try:
        subject = work_item_subject("hooks", name)
    except ValueError:
        return
    require_subject(subject.encode())
    assert len(subject.split(".")) == 3


@pytest.mark.parametrize(
    "subject", ["a", "a.b", "_INBOX.gpu1.x.1", "_R_.abc.xyz", "$JS.API.INFO", "$O.nexus-blobs.M.a=="]
)
def test_subjects(subject: str) -> None:
    """What Nexus and NATS use passes."""
    require_subject(subject.encode())
    require_pattern(subject.encode())


@pytest.mark.parametrize("pattern", [">", "*", "a.*", "a.>", "*.a.>"])
def test_wildcards_are_for_subscribing(pattern: str) -> None:
    """A wildcard is a whole token, and never part of what is published to."""
    require_pattern(pattern.encode())
    with pytest.raises(InvalidSubject):
        require_subject(pattern.encode())


@pytest.mark.parametrize("pattern", ["", ".", "a..b", ">.a", "a*", "a.>b", "a b", "a\tb", "a\n"])
def test_patterns_that_are_none(pattern: str) -> None:
    """Neither published nor subscribed to."""
    with pytest.raises(InvalidSubject):
        require_pattern(pattern.encode())


@pytest.mark.parametrize(
    ("reply", "good"),
    [
        ("_INBOX.gpu1.x", True), ("_R_.x.y", True), ("inbox.of.mine", True), ("nexus.control.gpu2", False), ("$JS.API.INFO", False),
        ("$KV.nexus-idempotency.x", False), ("a.*", False), ("", False), ("a" * 600, False), ("a b", False), ("nexus.jobs.a.b.c", False),
    ],
)  # fmt: skip
def test_addresses(reply: str, good: bool) -> None:
    """A gateway answers to inboxes, never to what orders somebody about."""
    assert is_reply_subject(reply.encode()) is good
