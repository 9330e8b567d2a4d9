"""Create the table of audit events."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

TEXTS = (
    "id", "actor", "team", "key", "person", "action", "target_type", "target", "target_team", "address", "request_id", "error", "changes", "details",
)  # fmt: skip


def upgrade() -> None:
    """Create the table, and the indexes for exports and for the history of one target."""
    op.create_table(
        "audit_events",
        *(sa.Column(name, sa.Text, nullable=False) for name in TEXTS),
        *(sa.Column(name, sa.BigInteger, nullable=False) for name in ("at_ms", "status", "count", "sequence")),
        sa.PrimaryKeyConstraint("id", name="audit_events_pk"),
    )
    op.create_index("audit_events_sequence", "audit_events", ["sequence"], unique=True)
    op.create_index("audit_events_target", "audit_events", ["target", "id"])
