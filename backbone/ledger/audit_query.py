"""What is asked of the audit log, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from schemas.audit import AuditEvent, AuditResult


@dataclass(frozen=True, slots=True)
class AuditQuery:
    """Which events to read."""

    start_ms: int
    """Unix milliseconds, inclusive."""
    end_ms: int
    """Unix milliseconds, exclusive."""
    filters: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By field of `AuditEvent`: the values to find."""
    actions: tuple[str, ...] = ()
    """Names of actions, or `name.*` for all that begin with `name.`. Empty: all."""
    results: tuple[AuditResult, ...] = ()
    """Empty: all."""


class StoredAuditEvent(NamedTuple):
    """An event as it is stored."""

    sequence: int
    """Grows in the order in which events are stored, or get their result: a reader who goes on behind it misses none."""
    event: AuditEvent
