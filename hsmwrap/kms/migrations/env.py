"""Alembic's environment: runs the migrations in the transaction that the caller opened."""

from __future__ import annotations

from alembic import context

from hsmwrap.kms.schema import Row

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Row.metadata,
    transactional_ddl=True,
)
context.run_migrations()
