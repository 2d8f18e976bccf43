"""The first schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create the tables."""
    _create_keys()
    op.create_table(
        "aliases",
        sa.Column("name", sa.String(261), nullable=False),
        sa.Column("key_id", sa.String(36), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_index("ix_aliases_key_id", "aliases", ["key_id"])
    op.create_table(
        "scheduled_destructions",
        sa.Column("reference", sa.LargeBinary(), nullable=False),
        sa.Column("due_at", sa.BigInteger(), nullable=False),
        sa.Column("started", sa.Boolean(), nullable=False),
        sa.Column("repeat", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("reference"),
    )
    op.create_index("ix_scheduled_destructions_due_at", "scheduled_destructions", ["due_at"])
    # It may be emptied by a crash, which hsmwrap.kms.nonces notices.
    unlogged = ["UNLOGGED"] if op.get_bind().dialect.name == "postgresql" else []
    op.create_table(
        "nonces",
        sa.Column("digest", sa.LargeBinary(32), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("digest"),
        prefixes=unlogged,
    )
    op.create_index("ix_nonces_expires_at", "nonces", ["expires_at"])
    op.create_table(
        "nonce_bounds",
        sa.Column("digest", sa.LargeBinary(32), nullable=False),
        sa.Column("before", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("digest"),
    )
    op.create_index("ix_nonce_bounds_before", "nonce_bounds", ["before"])
    op.create_table(
        "used_once",
        sa.Column("digest", sa.LargeBinary(32), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("digest"),
    )
    op.create_index("ix_used_once_expires_at", "used_once", ["expires_at"])
    op.create_table(
        "failed_imports",
        sa.Column("digest", sa.LargeBinary(32), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("digest"),
    )
    op.create_index("ix_failed_imports_expires_at", "failed_imports", ["expires_at"])
    op.create_table(
        "resident_keys",
        sa.Column("claim", sa.LargeBinary(32), nullable=False),
        sa.Column("key_id", sa.String(36), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("claim"),
    )
    for column in ("key_id", "expires_at"):
        op.create_index(f"ix_resident_keys_{column}", "resident_keys", [column])
    op.create_table(
        "audit_anchors",
        sa.Column("log", sa.String(512), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("set_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("log"),
    )
    op.create_table(
        "key_sets_seen",
        sa.Column("backend", sa.String(32), nullable=False),
        sa.Column("key_set", sa.String(32), nullable=False),
        sa.Column("superseded_at", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("backend", "key_set"),
    )


def downgrade() -> None:
    """Drop the tables."""
    for table in (
        *("key_sets_seen", "audit_anchors", "resident_keys", "failed_imports", "used_once"),
        *("nonce_bounds", "nonces"),
        *("scheduled_destructions", "aliases", "keys"),
    ):
        op.drop_table(table)


def _create_keys() -> None:
    op.create_table(
        "keys",
        sa.Column("key_id", sa.String(36), nullable=False),
        sa.Column("version_id", sa.String(36), nullable=False),
        sa.Column("arn", sa.String(255), nullable=False),
        sa.Column("key_spec", sa.String(32), nullable=False),
        sa.Column("origin", sa.String(32), nullable=False),
        sa.Column("protection_level", sa.String(32), nullable=False),
        sa.Column("state", sa.String(32), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("creator", sa.String(255), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("deletion_at", sa.BigInteger(), nullable=True),
        sa.Column("material_expires_at", sa.BigInteger(), nullable=True),
        sa.Column("check_value", sa.LargeBinary(), nullable=True),
        sa.Column("reference", sa.LargeBinary(), nullable=True),
        sa.Column("backend", sa.String(32), nullable=True),
        sa.Column("key_set", sa.String(32), nullable=True),
        sa.Column("exposure", sa.String(32), nullable=True),
        sa.PrimaryKeyConstraint("key_id"),
    )
    for column in ("created_at", "deletion_at", "material_expires_at"):
        op.create_index(f"ix_keys_{column}", "keys", [column])
