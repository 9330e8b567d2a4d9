"""Create the tables of usage."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

SUMS = (
    "input_tokens", "output_tokens", "cached_tokens", "reasoning_tokens", "images", "audio_ms", "characters",
    "bytes_in", "bytes_out", "queue_us", "run_us", "slot_us",
)  # fmt: skip


def _texts(*names: str) -> list[sa.Column[str]]:
    return [sa.Column(name, sa.Text, nullable=False) for name in names]


def _numbers(*names: str) -> list[sa.Column[int]]:
    return [sa.Column(name, sa.BigInteger, nullable=False) for name in names]


def upgrade() -> None:
    """Create both tables."""
    op.create_table(
        "usage_runs",
        *_texts("job"),
        *_numbers("run", "finished_ms"),
        *_texts("team", "key", "person", "model", "public_model", "worker", "endpoint", "capability", "lane"),
        *_texts("status", "error", "image_size", "currency"),
        sa.Column("durable", sa.Boolean, nullable=False),
        sa.Column("batch", sa.Boolean, nullable=False),
        *_numbers("attempts", *SUMS, "cost_nanos"),
        sa.PrimaryKeyConstraint("job", "run", name="usage_runs_pk"),
    )
    op.create_index("usage_runs_finished", "usage_runs", ["finished_ms"])
    dimensions = ("team", "key", "person", "model", "public_model", "endpoint", "capability", "lane", "status")
    op.create_table(
        "usage_hours",
        *_numbers("hour"),
        *_texts(*dimensions, "image_size", "currency"),
        sa.Column("durable", sa.Boolean, nullable=False),
        sa.Column("batch", sa.Boolean, nullable=False),
        *_numbers("requests", *SUMS, "cost_nanos"),
        sa.PrimaryKeyConstraint(
            "hour", *dimensions, "durable", "batch", "image_size", "currency", name="usage_hours_pk"
        ),
    )
