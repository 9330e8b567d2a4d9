"""Envelopes of jobs."""

from __future__ import annotations

from typing import Any

from schemas.jobs import Capability, Envelope, EnvelopeTemplate, Limits


def test_a_filled_template_is_the_envelope_that_would_be_made() -> None:
    """A template changes the ids alone, in the object and on the wire, and leaves the envelopes that it filled before as they are."""
    fields: dict[str, Any] = {
        "endpoint": "/v1/chat/completions",
        "capability": Capability.CHAT,
        "model": "m",
        "public_model": 'a"ü',
    }
    fields |= {"limits": Limits(queue_s=1.5), "stream": True, "unsupported": "adapt", "owner": "o"}
    template = EnvelopeTemplate(Envelope(job="-", reply="-", **fields))
    filled = [template.fill(f"job_{n}", f"req_{n}", f"nexus.reply.g.{n}") for n in range(2)]
    for n, (envelope, line) in enumerate(filled):
        expected = Envelope(job=f"job_{n}", request_id=f"req_{n}", reply=f"nexus.reply.g.{n}", **fields)
        assert envelope == expected
        assert envelope.encode(b"{}") == expected.encode(b"{}")
        assert Envelope.decode(line + b"\n{}") == (expected, b"{}")
        assert envelope.model_copy(update={"hops": 1}).encode(b"") != envelope.encode(b"")
