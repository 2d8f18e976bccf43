"""Objects that an import may yet make are destroyed twice."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the mark; whether an older row needs it is not known, and twice does no harm."""
    op.add_column(
        "doomed_objects",
        sa.Column("twice", sa.Boolean(), nullable=False, server_default=sa.true()),
    )


def downgrade() -> None:
    """Drop the mark."""
    op.drop_column("doomed_objects", "twice")
