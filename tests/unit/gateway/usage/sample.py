"""Usage events for tests."""

from __future__ import annotations

from typing import Any

from gateway.usage.events import Values
from schemas.usage import FIELDS, UsageEvent

HOUR_MS = 3_600_000
BEGAN_MS = 1_796_000_400_000
"""The beginning of an hour in November 2026."""


def event(number: int = 0, **fields: Any) -> UsageEvent:
    """Return the event of a completed chat request."""
    usual: dict[str, Any] = {
        "job": f"job_{number:032x}",
        "run": 1,
        "finished_ms": BEGAN_MS + number * 1000,
        "team": "red",
        "key": "key_1",
        "model": "smollm2",
        "public_model": "gpt-4o-mini",
        "worker": "w1",
        "endpoint": "/v1/chat/completions",
        "capability": "chat",
        "lane": "default",
        "status": "completed",
        "attempts": 1,
        "input_tokens": 100,
        "output_tokens": 10,
        "slot_us": 2_000_000,
    }
    return UsageEvent(**usual | fields)


def values(number: int = 0, **fields: Any) -> Values:
    """Return the same as the hot path makes it."""
    dumped = event(number, **fields).model_dump()
    return tuple(dumped[name] for name in FIELDS)
