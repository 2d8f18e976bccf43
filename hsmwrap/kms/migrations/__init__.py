"""Schema migrations of the reference KMS, by alembic; used by ``hsmwrap.kms.database`` alone."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy.engine import Connection

from hsmwrap.kms.schema import Row


def upgrade(connection: Connection) -> None:
    """Bring the schema up to date, within the transaction of ``connection``."""
    command.upgrade(config(connection), "head")


def differences(connection: Connection) -> list[str]:
    """How the tables differ from those of the program: what alembic would do, a word for each."""
    context = MigrationContext.configure(connection, opts={"compare_type": True})
    # Where a row has several changes, alembic puts them into a list.
    found = compare_metadata(context, Row.metadata)
    return [str((each[0] if isinstance(each, list) else each)[0]) for each in found]


def config(connection: Connection | None = None) -> Config:
    """Alembic's configuration for the migrations that this package ships."""
    made = Config()
    made.set_main_option("script_location", str(Path(__file__).parent))
    made.attributes["connection"] = connection
    return made
