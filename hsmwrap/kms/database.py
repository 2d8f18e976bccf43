"""The database: SQLite by default, PostgreSQL by URL; read and write transactions on either.

SQLite runs in WAL mode; a writer takes its lock at the start (``BEGIN IMMEDIATE``), for one that
upgrades later can fail. On PostgreSQL a writer locks the rows it read (``SELECT … FOR UPDATE``).
Nothing here is held while an HSM works.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

from alembic import command
from alembic.config import Config
from sqlalchemy import Engine, create_engine, event, make_url, text
from sqlalchemy.engine import Connection
from sqlalchemy.exc import ArgumentError, InterfaceError, NoSuchModuleError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolExhausted
from sqlalchemy.orm import Session
from sqlalchemy.pool import Pool

from hsmwrap.errors import ConfigurationError, ServiceUnavailable

_BUSY_MILLISECONDS = 10_000
_SQLITE_PRAGMAS = (
    f"PRAGMA busy_timeout={_BUSY_MILLISECONDS}",
    "PRAGMA journal_mode=WAL",
    "PRAGMA foreign_keys=ON",
)
# Arbitrary, but the same in each process that migrates.
_MIGRATION_LOCK = 0x68736D77

_log = logging.getLogger(__name__)


class Database:
    """Transactions on one database. Safe to share between threads, and after ``fork()``."""

    def __init__(self, url: str, *, pool_size: int = 16, sync: bool = True) -> None:
        """Take an SQLAlchemy URL; nothing is opened yet.

        Args:
            url: ``sqlite:///FILE`` or ``postgresql+psycopg://…``.
            pool_size: Connections that are kept open.
            sync: False lets SQLite answer before the disk has it: a crash of the machine (not
                of the process) may then take back what was acknowledged.

        Raises:
            ConfigurationError: Neither SQLite nor PostgreSQL by psycopg.
        """
        self.engine = _engine(url, pool_size, sync=sync)
        self._writing = self.engine.execution_options(writing=True)
        _DATABASES.add(self)

    def __repr__(self) -> str:
        return f"<Database {self.engine.url!r}>"

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction that only reads.

        Raises:
            ServiceUnavailable: The database cannot answer now.
        """
        with _available(), Session(self.engine, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that commits at the end of the ``with`` block, or not at all.

        Raises:
            ServiceUnavailable: The database cannot answer now.
        """
        writing = Session(self._writing, expire_on_commit=False)
        with _available(), writing as session, session.begin():
            yield session

    def migrate(self) -> None:
        """Bring the schema up to date; several processes may do so at once."""
        with _available(), self._writing.begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(text(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})"))
            command.upgrade(migration_config(connection), "head")

    def ping(self) -> None:
        """Ask the database for a sign of life.

        Raises:
            ServiceUnavailable: There is none.
        """
        with self.read() as transaction:
            transaction.execute(text("SELECT 1"))

    def close(self) -> None:
        """Close the idle connections. Safe to call again."""
        self.engine.dispose()


def migration_config(connection: Connection) -> Config:
    """Alembic's configuration for the migrations that this package ships."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    return config


def _engine(url: str, pool_size: int, *, sync: bool) -> Engine:
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise ConfigurationError("database_url is no SQLAlchemy URL") from None
    if parsed.drivername in ("postgresql", "postgresql+psycopg"):
        parsed = parsed.set(drivername="postgresql+psycopg")
        options: dict[str, Any] = {"pool_pre_ping": True, "pool_size": pool_size}
    elif parsed.drivername == "sqlite" and parsed.database not in (None, "", ":memory:"):
        options = {"pool_size": pool_size}
    else:
        raise ConfigurationError("database_url: sqlite:///FILE or postgresql+psycopg://…")
    try:
        engine = create_engine(parsed, hide_parameters=True, **options)
    except (ImportError, NoSuchModuleError) as error:
        raise ConfigurationError(f"database_url: {error}") from None
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", partial(_prepare_sqlite, sync=sync))
        event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _record: object, *, sync: bool) -> None:
    # The driver's own way of opening transactions is replaced by _begin_sqlite.
    connection.isolation_level = None
    for pragma in (*_SQLITE_PRAGMAS, f"PRAGMA synchronous={'FULL' if sync else 'OFF'}"):
        connection.execute(pragma)


def _begin_sqlite(connection: Connection) -> None:
    writing = connection.get_execution_options().get("writing", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")


@contextmanager
def _available() -> Iterator[None]:
    try:
        yield
    except (InterfaceError, OperationalError, PoolExhausted) as error:
        _log.warning("database failed", extra={"error": type(error).__name__})
        raise ServiceUnavailable(f"the database cannot answer: {type(error).__name__}") from error


_DATABASES: WeakSet[Database] = WeakSet()
# Closing an inherited connection would speak to the parent's server, or drop SQLite's locks.
_INHERITED: list[Pool] = []


def _leave_connections_to_the_parent() -> None:
    for database in list(_DATABASES):
        _INHERITED.append(database.engine.pool)
        database.engine.dispose(close=False)


os.register_at_fork(after_in_child=_leave_connections_to_the_parent)
