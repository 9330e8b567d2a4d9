"""Usage events on their way: what is written is what is read, and nothing a worker says breaks the ledger."""

from __future__ import annotations

from typing import Any

from gateway.usage.events import HEADER, decode_events, encode_event, event_of_outcome, text, token_counts
from schemas.errors import ErrorInfo
from schemas.jobs import Usage
from schemas.outcome import Outcome
from schemas.usage import UsageEvent
from tests.unit.gateway.usage.sample import event, values


def decoded(data: bytes) -> list[UsageEvent | str]:
    return [one if isinstance(one, UsageEvent) else "malformed" for one in decode_events(data)]


def test_events_survive_the_way() -> None:
    """A batch decodes into the events it was made of."""
    assert decoded(HEADER + encode_event(values(1)) + encode_event(values(2, team="blue", durable=True))) == [
        event(1),
        event(2, team="blue", durable=True),
    ]


def test_versions_mix() -> None:
    """A reader fills in what an older gateway does not say, and ignores what a newer one says."""
    older = (
        b'["job","run","finished_ms","team","model","public_model","endpoint","capability","lane","status","mood"]\n'
    )
    line = b'["job_1",1,5,"red","m","m","/v1/embeddings","embeddings","flex","completed","good"]\n'
    [found] = decoded(older + line)
    assert isinstance(found, UsageEvent)
    assert (found.lane, found.input_tokens) == ("flex", 0)


def test_malformed_events_spoil_only_themselves() -> None:
    """A line that is no event is reported, and the others count."""
    bad = [b"[1]\n", b"nonsense\n", encode_event(values(3, finished_ms=0))[:-20] + b"\n"]
    assert decoded(HEADER + encode_event(values(1)) + b"".join(bad) + encode_event(values(2))) == [
        event(1), *["malformed"] * 3, event(2)
    ]  # fmt: skip
    assert decoded(b"") == []
    assert decoded(b"{}\n[1]\n") == ["malformed"]
    assert decoded(HEADER + encode_event((*values(1)[:3], "a\0b", *values(1)[4:]))) == ["malformed"]
    assert decoded(HEADER + encode_event((*values(1)[:2], -1, *values(1)[3:]))) == ["malformed"]


def test_token_counts_of_backends_are_not_trusted() -> None:
    """Details that are no numbers, and negative or absurd numbers, count as nothing."""
    details = {"prompt_tokens_details": {"cached_tokens": 4}, "completion_tokens_details": {"reasoning_tokens": 2}}
    assert token_counts(None) == (0, 0, 0, 0)
    assert token_counts(Usage.model_validate({"prompt_tokens": 9, "completion_tokens": 5} | details)) == (9, 5, 4, 2)
    odd = {
        "prompt_tokens": -1,
        "completion_tokens": 2**40 + 1,
        "prompt_tokens_details": 7,
        "completion_tokens_details": {},
    }
    assert token_counts(Usage.model_validate(odd)) == (0, 0, 0, 0)
    assert text("a\0b" + "c" * 600) == "ab" + "c" * 509


def test_an_outcome_becomes_an_event() -> None:
    """Status, error, tokens and times of a durable job are those of its outcome; the wait is what the attempt did not take."""
    fields = {
        "job": "job_1", "run": 2, "owner": "red", "endpoint": "/v1/chat/completions", "capability": "chat",
        "model": "smollm2", "public_model": "gpt", "key": "key_1", "batch": "batch_1", "status": "failed",
        "worker": "w1", "attempts": 3, "seconds": 1.5, "input_size": 10,
    }  # fmt: skip
    error = ErrorInfo(status=502, type="server_error", code="worker_lost", message="lost")
    line = HEADER + encode_event(event_of_outcome(Outcome.model_validate(fields | {"error": error}), 10_000, 7_000))
    [found] = decoded(line)
    assert isinstance(found, UsageEvent)
    assert (found.run, found.status, found.error, found.attempts) == (2, "failed", "worker_lost", 3)
    assert (found.durable, found.batch, found.key) == (True, True, "key_1")
    assert (found.queue_us, found.run_us, found.slot_us) == (1_500_000, 1_500_000, 1_500_000)


def test_a_hostile_worker_cannot_block_the_ledger() -> None:
    """Whatever numbers and texts a worker reports, the event is valid, and its numbers can be added up."""
    fields: dict[str, Any] = {
        "job": "job_1", "owner": "red", "endpoint": "/v1/chat/completions", "capability": "chat", "model": "m",
        "public_model": "m", "status": "completed", "worker": "w\0" * 999, "attempts": -5, "seconds": 1e300, "size": 2**70,
        "input_size": -1, "usage": {"prompt_tokens": 2**63}, "media": {"images": 2**63, "audio_s": -1.0, "image_size": "\0"},
    }  # fmt: skip
    [found] = decoded(HEADER + encode_event(event_of_outcome(Outcome.model_validate(fields), 10**12, -(10**15))))
    assert isinstance(found, UsageEvent)
    assert (found.attempts, found.run_us, found.bytes_out, found.bytes_in, found.input_tokens, found.images) == (0,) * 6
    assert found.queue_us == 2**40
