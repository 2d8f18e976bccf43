"""The database: SQLite by default, PostgreSQL by URL; read and write transactions on either.

SQLite runs in WAL mode; a writer takes its lock at the start (``BEGIN IMMEDIATE``), for one that
upgrades later can fail. On PostgreSQL a writer locks the rows it read (``SELECT … FOR UPDATE``).
Nothing here is held while an HSM works, and nobody waits for long: not for a connection, not for a
lock, and not for a process that stopped with a transaction open.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any
from weakref import WeakSet

from alembic import command
from alembic.config import Config
from sqlalchemy import URL, Engine, create_engine, event, make_url, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    InterfaceError,
    InternalError,
    NoSuchModuleError,
    OperationalError,
)
from sqlalchemy.exc import TimeoutError as PoolExhausted
from sqlalchemy.orm import Session
from sqlalchemy.pool import Pool

from hsmwrap.errors import ConfigurationError, ServiceUnavailable
from hsmwrap.kms.errors import CommitUnknown
from hsmwrap.kms.schema import Row

_BUSY_MILLISECONDS = 10_000
_SQLITE_PRAGMAS = (
    f"PRAGMA busy_timeout={_BUSY_MILLISECONDS}",
    "PRAGMA journal_mode=WAL",
    "PRAGMA foreign_keys=ON",
)
_CONNECT_SECONDS = 10
_POSTGRESQL_SETTINGS = MappingProxyType(
    {
        "lock_timeout": str(_BUSY_MILLISECONDS),
        "idle_in_transaction_session_timeout": "60000",
    }
)
# read_only_sql_transaction (a replica), idle_in_transaction_session_timeout.
_AWAY_STATES = frozenset({"25006", "25P03"})
# Each dialect has its own INSERT … ON CONFLICT; both are called the same way.
_INSERT: Mapping[str, Callable[[type[Row]], Any]] = MappingProxyType(
    {"postgresql": postgresql.insert, "sqlite": sqlite.insert}
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
            ServiceUnavailable: The database cannot answer now; nothing was written.
            CommitUnknown: It failed during the commit itself.
        """
        writing = Session(self._writing, expire_on_commit=False)
        with _available(), writing as session, session.begin():
            yield session
            session.flush()
            _commit(session)

    def insert(self, row: type[Row]) -> Any:
        """The dialect's own INSERT into the table of ``row``, which has ON CONFLICT."""
        return _INSERT[self.engine.dialect.name](row)

    def migrate(self) -> None:
        """Bring the schema up to date; several processes may do so at once.

        Raises:
            ServiceUnavailable: The database cannot answer now.
        """
        with _available(), self._writing.begin() as connection:
            if connection.dialect.name == "postgresql":
                # However long the others' migration takes.
                connection.execute(text("SET LOCAL lock_timeout = 0"))
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


def surely_rolled_back(error: BaseException) -> bool:
    """Whether a transaction that failed with this error was rolled back; False if unknown."""
    return isinstance(error, Exception) and not isinstance(error, CommitUnknown)


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
        if "connect_timeout" not in parsed.query:
            options["connect_args"] = {"connect_timeout": _CONNECT_SECONDS}
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
    else:
        event.listen(engine, "connect", partial(_prepare_postgresql, url=parsed))
    return engine


def _prepare_sqlite(connection: Any, _record: object, *, sync: bool) -> None:
    # The driver's own way of opening transactions is replaced by _begin_sqlite.
    connection.isolation_level = None
    for pragma in (*_SQLITE_PRAGMAS, f"PRAGMA synchronous={'FULL' if sync else 'OFF'}"):
        connection.execute(pragma)


def _begin_sqlite(connection: Connection) -> None:
    writing = connection.get_execution_options().get("writing", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")


def _prepare_postgresql(connection: Any, _record: object, *, url: URL) -> None:
    # What the URL's options say stands. Not by options ourselves: connection poolers refuse them.
    said = str(url.query.get("options", ""))
    for name, value in _POSTGRESQL_SETTINGS.items():
        if name not in said:
            connection.execute("SELECT set_config(%s, %s, false)", (name, value))
    connection.commit()


def _commit(session: Session) -> None:
    try:
        session.commit()
    except DBAPIError as error:
        _log.warning("commit failed", extra={"error": type(error).__name__})
        raise CommitUnknown("the database failed during a commit; look what is there") from error


@contextmanager
def _available() -> Iterator[None]:
    try:
        yield
    except (InterfaceError, OperationalError, PoolExhausted) as error:
        raise _away(error) from error
    except InternalError as error:
        if getattr(error.orig, "sqlstate", None) not in _AWAY_STATES:
            raise
        raise _away(error) from error


def _away(error: Exception) -> ServiceUnavailable:
    _log.warning("database failed", extra={"error": type(error).__name__})
    return ServiceUnavailable(f"the database cannot answer: {type(error).__name__}")


_DATABASES: WeakSet[Database] = WeakSet()
# Closing an inherited connection would speak to the parent's server, or drop SQLite's locks.
_INHERITED: list[Pool] = []


def _leave_connections_to_the_parent() -> None:
    for database in list(_DATABASES):
        _INHERITED.append(database.engine.pool)
        database.engine.dispose(close=False)


os.register_at_fork(after_in_child=_leave_connections_to_the_parent)
