"""Anchors know where their line is in the audit log."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the position; an older anchor's line is looked for from the beginning once."""
    op.add_column(
        "audit_anchors", sa.Column("position", sa.BigInteger(), nullable=False, server_default="0")
    )


def downgrade() -> None:
    """Drop the position."""
    op.drop_column("audit_anchors", "position")
