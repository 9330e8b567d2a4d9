"""The ledger's tables. `migrations/` creates them; a test compares both.

Numbers are integers, so that sums are exact on every database: times in milliseconds or microseconds, money in billionths of
its currency's unit.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, Index, MetaData, PrimaryKeyConstraint, Table, Text

from schemas.audit import FIELDS as AUDIT_FIELDS
from schemas.usage import FIELDS, HOURLY_DIMENSIONS, SUMS

FLAGS = frozenset({"durable", "batch"})
ADDED = (*SUMS, "cost_nanos")
"""The columns of `usage_hours` that are sums, besides `requests`."""
HOUR_KEY = ("hour", *HOURLY_DIMENSIONS, "currency")
_NUMBERS = frozenset({*SUMS, "finished_ms", "run", "attempts", "at_ms", "count"})

metadata = MetaData()


def _column(name: str) -> Column[object]:
    if name in FLAGS:
        return Column(name, Boolean, nullable=False)
    return Column(name, BigInteger if name in _NUMBERS else Text, nullable=False)


usage_runs = Table(
    "usage_runs",
    metadata,
    *(_column(name) for name in FIELDS),
    Column("cost_nanos", BigInteger, nullable=False),
    Column("currency", Text, nullable=False),
    PrimaryKeyConstraint("job", "run", name="usage_runs_pk"),
    Index("usage_runs_finished", "finished_ms"),
)
"""One row for each finished run of a job."""

usage_hours = Table(
    "usage_hours",
    metadata,
    Column("hour", BigInteger, nullable=False),
    *(_column(name) for name in HOURLY_DIMENSIONS),
    Column("currency", Text, nullable=False),
    Column("requests", BigInteger, nullable=False),
    *(Column(name, BigInteger, nullable=False) for name in ADDED),
    PrimaryKeyConstraint(*HOUR_KEY, name="usage_hours_pk"),
)
"""Sums of `usage_runs` by hour (Unix seconds of its beginning) and dimensions, changed in the same transaction."""

audit_events = Table(
    "audit_events",
    metadata,
    *(Column(name, BigInteger, nullable=False) if name == "status" else _column(name) for name in AUDIT_FIELDS),
    Column("sequence", BigInteger, nullable=False),
    PrimaryKeyConstraint("id", name="audit_events_pk"),
    Index("audit_events_sequence", "sequence", unique=True),
    Index("audit_events_target", "target", "id"),
)
"""One row for each audit event. `sequence` grows in the order in which rows are stored, or get their result."""
