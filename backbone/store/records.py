"""What every store does to a record, whatever holds it."""

from __future__ import annotations

from typing import Any

from backbone.store.base import IllegalMove
from schemas.jobs import LEGAL_MOVES, JobRecord, JobStatus

FIXED = frozenset({"id", "owner", "status", "created_at"})
"""Fields that a move's `changes` may not touch."""


def moved(record: JobRecord, to: JobStatus, changes: dict[str, Any]) -> JobRecord:
    """The record after a move. Raises IllegalMove; ValueError when `changes` make no record."""
    wrong = sorted(name for name in changes if name in FIXED or name not in JobRecord.model_fields)
    if wrong:
        raise ValueError(f"a move cannot change {', '.join(wrong)}")
    if to not in LEGAL_MOVES[record.status]:
        raise IllegalMove(f"job {record.id} cannot go from {record.status} to {to}")
    return JobRecord.model_validate(record.model_dump() | changes | {"status": to})
