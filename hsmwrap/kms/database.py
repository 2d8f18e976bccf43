"""The database: SQLite by default, PostgreSQL by URL; read and write transactions on either.

SQLite runs in WAL mode; a writer takes its lock at the start (``BEGIN IMMEDIATE``), because an
upgrade from read to write can fail. On PostgreSQL a writer locks the rows it read (``SELECT … FOR
UPDATE``), and reading takes no transaction. No transaction is open during an HSM call. Every wait
has a limit: for a connection, for a lock, and for a stopped process with an open transaction.

SQLite's files are for this process's user only, mode 0600: the rows name keys and callers, and
hold sealed keys and used nonces.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import sqlite3
import stat
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from select import POLLIN, poll
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    URL,
    Dialect,
    Engine,
    create_engine,
    event,
    func,
    inspect,
    make_url,
    select,
    text,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    DisconnectionError,
    NoSuchModuleError,
)
from sqlalchemy.exc import TimeoutError as PoolExhausted
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry

from hsmwrap import forks
from hsmwrap.errors import ConfigurationError, strip_tracebacks
from hsmwrap.forks import ForkAware
from hsmwrap.kms.database_errors import typed_error
from hsmwrap.kms.errors import CommitUnknown
from hsmwrap.kms.revisions import REVISIONS
from hsmwrap.kms.schema import Row
from hsmwrap.locks import ReadWriteLock
from hsmwrap.privatefile import owner_fault

if TYPE_CHECKING:
    from hsmwrap.kms.libpq import Statements

BUSY_SECONDS = 10
"""How long a call waits for the locks of others."""
_BUSY_MILLISECONDS = BUSY_SECONDS * 1000
_SQLITE_ENDS = ("-wal", "-shm", "-journal")
_SQLITE_PRAGMAS = (
    f"PRAGMA busy_timeout={_BUSY_MILLISECONDS}",
    "PRAGMA foreign_keys=ON",
)
_CONNECT_SECONDS = 10
_TRUSTED_SECONDS = 1.0
_POSTGRESQL_SETTINGS = MappingProxyType(
    {
        "lock_timeout": str(_BUSY_MILLISECONDS),
        "idle_in_transaction_session_timeout": "60000",
    }
)
_OF_PSYCOPG_ITSELF = frozenset({"autocommit", "context", "prepare_threshold"})
# Each dialect has its own INSERT … ON CONFLICT, with the same interface.
_INSERT: Mapping[str, Callable[[type[Row]], Any]] = MappingProxyType(
    {"postgresql": postgresql.insert, "sqlite": sqlite.insert}
)
_NUMBERED = postgresql.dialect(paramstyle="numeric_dollar")  # type: ignore[no-untyped-call]
"""With ``$1`` for values, as libpq has it."""
# Any number, but the same in all processes that migrate.
_MIGRATION_LOCK = 0x68736D77

_log = logging.getLogger(__name__)


class Database(ForkAware):
    """Transactions on one database. Safe to share between threads and after ``fork()``."""

    @strip_tracebacks
    def __init__(self, url: str, *, pool_size: int = 16, sync: bool = True) -> None:
        """Take an SQLAlchemy URL; does not connect.

        Args:
            url: ``sqlite:///FILE`` or ``postgresql+psycopg://…``.
            pool_size: Number of connections to keep open.
            sync: False lets SQLite commit before data is on the disk: a crash of the machine (not
                of the process) may then lose committed transactions.

        Raises:
            ConfigurationError: The URL is neither SQLite nor PostgreSQL with psycopg. With SQLite
                also when it connects: the file or its directory belongs to another user, or every
                user can write the directory.
        """
        self.engine = _engine(url, pool_size, sync=sync)
        self._writing = self.engine.execution_options(writing=True)
        self._bare = _BarePostgresql(self.engine)
        # PostgreSQL gives each statement a snapshot of its own in any case (READ COMMITTED), so
        # BEGIN and ROLLBACK would be two round trips for nothing.
        single = self.engine.execution_options(isolation_level="AUTOCOMMIT")
        self._reading = single if self._is_postgresql else self.engine
        self._turn = ReadWriteLock(busy="others write the database", timeout=BUSY_SECONDS)
        forks.register(self)

    def after_fork_in_child(self) -> None:
        """Leave the connections to the parent."""
        _INHERITED.append(self.engine.pool)
        self.engine.dispose(close=False)

    def __repr__(self) -> str:
        return f"<Database {shown_url(self.engine.url)}>"

    @property
    def _is_postgresql(self) -> bool:
        return self.engine.dialect.name == "postgresql"

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A read-only transaction.

        Raises:
            ServiceUnavailable: The database is unavailable.
        """
        with _available(), Session(self._reading, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that commits at the end of the ``with`` block; rolled back on an error.

        Raises:
            ServiceUnavailable: The database is unavailable; nothing was written.
            CommitUnknown: The commit itself failed; it may have happened.
        """
        writing = Session(self._writing, expire_on_commit=False)
        # SQLite lets in one writer, and those that wait for it sleep and try again: unfair.
        turn = nullcontext() if self._is_postgresql else self._turn.write()
        with turn, _available(), writing as session, session.begin():
            yield session
            session.flush()
            _commit(session)

    def run(self, statement: str, values: Mapping[str, Any]) -> Ran:
        """Run one statement, which is a transaction of its own.

        Args:
            statement: SQL, with ``:name`` for each of the values.
            values: By name.

        Raises:
            ServiceUnavailable: The database is unavailable; whether the statement took effect is
                not known.
        """
        with _available():
            if self._is_postgresql:
                return self._bare.run(statement, values)
            with self._turn.write(), self._writing.begin() as connection:
                result = connection.execute(text(statement), values)
                return Ran(result.rowcount, list(result) if result.returns_rows else [])

    def insert(self, row: type[Row]) -> Any:
        """The dialect's INSERT into the table of ``row``, with support for ON CONFLICT."""
        return _INSERT[self.engine.dialect.name](row)

    def migrate(self) -> None:
        """Bring the schema up to date; several processes may do so at the same time.

        Raises:
            ServiceUnavailable: The database is unavailable.
        """
        from hsmwrap.kms import migrations  # noqa: PLC0415 (alembic is slow, and seldom needed)

        with _available(), self._writing.begin() as connection:
            if connection.dialect.name == "postgresql":
                # Wait as long as another process's migration takes.
                connection.execute(text("SET LOCAL lock_timeout = 0"))
                connection.execute(text(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})"))
            migrations.upgrade(connection)

    def schema(self) -> Schema:
        """Which schema the database has; changes nothing.

        Raises:
            ServiceUnavailable: The database is unavailable.
        """
        if self.file is not None and not self.file.exists():  # connecting would make it
            return Schema(None)
        with _available(), self.engine.connect() as connection:
            if not inspect(connection).has_table("alembic_version"):
                return Schema(None)
            return Schema(connection.scalar(text("SELECT version_num FROM alembic_version")))

    def prepare(self) -> None:
        """Bring the schema up to date where it is not; needs no right to change it where it is.

        Raises:
            ConfigurationError: The schema is newer than this program, or is old and this user may
                not change it.
            ServiceUnavailable: The database is unavailable.
        """
        schema = self.schema()
        schema.require_not_newer()
        if schema.is_current:
            return
        try:
            self.migrate()
        except ConfigurationError as error:
            raise ConfigurationError(
                f"{schema}; this user cannot bring it up to date: run `hsmwrap db upgrade` as the "
                f"owner of the tables ({error})"
            ) from None

    def faults(self) -> list[str]:
        """What of the schema or of this user's rights would stop a server; changes nothing.

        Raises:
            ServiceUnavailable: The database is unavailable.
        """
        schema = self.schema()
        if not schema.is_current:
            return [str(schema)]
        from hsmwrap.kms import migrations  # noqa: PLC0415 (as in migrate)

        with _available(), self.engine.connect() as connection:
            found = [f"the tables differ: {each}" for each in migrations.differences(connection)]
            if not found and connection.dialect.name == "postgresql":
                found += [
                    f"this user may not {right} in {table}"
                    for table in Row.metadata.tables
                    for right in ("SELECT", "INSERT", "UPDATE", "DELETE")
                    if not connection.scalar(select(func.has_table_privilege(table, right)))
                ]
        return found

    def ping(self) -> None:
        """Check that the database answers.

        Raises:
            ServiceUnavailable: It does not.
        """
        with self.read() as transaction:
            transaction.execute(text("SELECT 1"))

    @property
    def file(self) -> Path | None:
        """SQLite's file, without links; None with PostgreSQL."""
        url = self.engine.url
        return Path(str(url.database)).resolve() if url.drivername == "sqlite" else None

    def check_files(self) -> None:
        """Refuse SQLite's files and directory as connecting would; changes nothing.

        Raises:
            ConfigurationError: One belongs to another user, or every user can write the directory.
        """
        if self.file is not None and self.file.parent.exists():
            _require_private(self.file.parent)
            for each in filter(Path.exists, _files_of(self.file)):
                _require_own(each, each.stat())

    def check_options(self) -> None:
        """Refuse options of PostgreSQL's URL that psycopg would; does not connect.

        Raises:
            ConfigurationError: One is unknown, has a value that libpq does not take, or names a
                file that is not there.
        """
        from psycopg import ProgrammingError, pq  # noqa: PLC0415 (slow, and not for SQLite)
        from psycopg.conninfo import make_conninfo  # noqa: PLC0415 (the same)

        _, options = self.engine.dialect.create_connect_args(self.engine.url)
        for name in ("sslcert", "sslkey", "sslrootcert"):
            value = str(options.get(name, "system"))
            if value != "system" and not Path(value).exists():
                raise ConfigurationError(f"database_url: {name}: the file is not there")
        try:
            known = {k: v for k, v in options.items() if k not in _OF_PSYCOPG_ITSELF}
            make_conninfo(**known)
        except ProgrammingError as error:
            # Its text names the option, and no value.
            raise ConfigurationError(f"database_url: {str(error).strip()}") from None
        # libpq looks at values before it connects, which it cannot to this directory.
        nowhere = make_conninfo(**known | {"host": "/dev/null", "hostaddr": "", "port": ""})
        tried = pq.PGconn.connect_start(nowhere.encode())
        wrong = re.search(rb"invalid (\w+) value", tried.error_message)
        tried.finish()
        if wrong:
            raise ConfigurationError(
                f"database_url: {wrong[1].decode()}: this value is none of those that libpq takes"
            )

    def close(self) -> None:
        """Close the idle connections. Safe to call again."""
        self._bare.close()
        self.engine.dispose()


@dataclass(frozen=True, slots=True)
class Ran:
    """What a statement did.

    Attributes:
        changed: How many rows it changed.
        rows: What it returned.
    """

    changed: int
    rows: list[Any]


class _BarePostgresql(ForkAware):
    """Connections for what each request asks PostgreSQL, without SQLAlchemy.

    They stay in autocommit. Each time that the engine's pool lends a connection it is set to that
    and back, and rolled back, which takes longer than most statements.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._known: dict[str, tuple[bytes, bytes, list[str]]] = {}
        self._idle: deque[Statements] = deque()
        forks.register(self)

    def after_fork_in_child(self) -> None:
        """Leave the connections to the parent."""
        _INHERITED.append(self._idle)
        self._idle = deque()

    def run(self, statement: str, values: Mapping[str, Any]) -> Ran:
        dialect = self._engine.dialect
        known = self.known(statement)
        try:
            taken = self._taken()
            try:
                ran = Ran(*taken.run(*known, values))
            except BaseException:
                taken.connection.close()
                raise
        except dialect.loaded_dbapi.Error as error:
            base = dialect.loaded_dbapi.Error
            raise DBAPIError.instance(
                statement, None, error, base, hide_parameters=True, dialect=dialect
            ) from error
        taken.idle_since = time.monotonic()
        self._idle.append(taken)
        return ran

    def known(self, statement: str) -> tuple[bytes, bytes, list[str]]:
        """A name for the statement, its text for libpq, and the order of its values."""
        found = self._known.get(statement)
        if found is None:
            compiled = text(statement).compile(dialect=_NUMBERED)
            sql = str(compiled).encode()
            name = hashlib.sha256(sql).hexdigest()[:32].encode()
            found = self._known[statement] = name, sql, compiled.positiontup or []
        return found

    def close(self) -> None:
        """Close those that are idle."""
        with suppress(IndexError):
            while True:
                self._idle.pop().connection.close()

    def _taken(self) -> Statements:
        with suppress(IndexError):
            while True:
                idle = self._idle.pop()
                try:
                    _require_alive(self._engine.dialect, idle.connection, idle.idle_since)
                except DisconnectionError:
                    idle.connection.close()
                else:
                    return idle
        from hsmwrap.kms.libpq import Statements  # noqa: PLC0415 (psycopg is not for SQLite)

        lent = self._engine.raw_connection()
        connection: Any = lent.dbapi_connection
        lent.detach()
        return Statements(connection)


class BareSqlite(sqlite3.Connection):
    """A connection without SQLAlchemy, for what each request asks SQLite; no transaction is begun.

    One thread at a time uses it. Each call has a connection to itself, since a lock of Python would
    be held while its thread waits for the GIL, and all others with it.

    Attributes:
        status: The file's, when it was connected.
    """

    def __init__(self, file: Path) -> None:
        """Connect to a file, which is made closed to others where it is absent.

        Raises:
            ConfigurationError: As :class:`Database`.
            OSError, sqlite3.Error: It cannot be made or opened.
        """
        _make_private(file)
        super().__init__(file, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        _BARE.add(self)
        self.status = file.stat()

    def close(self) -> None:
        """Close it. Safe to call again."""
        super().close()
        _BARE.discard(self)


def use_wal(connection: sqlite3.Connection) -> None:
    """Put a file of SQLite in WAL mode, where it is not yet.

    Where several connections do so at once, SQLite refuses one of them without its busy timeout
    (field note 97).

    Raises:
        sqlite3.OperationalError: Others locked the file for :data:`BUSY_SECONDS`.
    """
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.005)
        else:
            return


def surely_rolled_back(error: BaseException) -> bool:
    """Whether a transaction that failed with this error was rolled back; False if unknown."""
    return isinstance(error, Exception) and not isinstance(error, CommitUnknown)


@dataclass(frozen=True, slots=True)
class Schema:
    """The schema of a database, beside the one that this program needs.

    Attributes:
        revision: Of the database; None: it has no tables of the KMS.
        newest: Of this program.
        known: All that this program can bring up to date.
    """

    revision: str | None
    newest: str = REVISIONS[-1]
    known: frozenset[str] = frozenset(REVISIONS)

    @property
    def is_current(self) -> bool:
        """Whether it is the one that this program needs."""
        return self.revision == self.newest

    @property
    def is_newer(self) -> bool:
        """Whether a newer program made it."""
        return self.revision is not None and self.revision not in self.known

    def require_not_newer(self) -> None:
        """Return unless it is newer.

        Raises:
            ConfigurationError: It is; says what to do.
        """
        if self.is_newer:
            raise ConfigurationError(f"{self}: update this hsmwrap, or restore a backup")

    def __str__(self) -> str:
        if self.is_newer:
            return (
                f"the database has schema {self.revision}, which is newer than this hsmwrap's "
                f"{self.newest}"
            )
        had = "no schema yet" if self.revision is None else f"schema {self.revision}"
        return f"the database has {had}; this hsmwrap needs {self.newest}"


def shown_url(url: URL) -> str:
    """The URL without its password and without its options, one of which may be a password."""
    return url.set(query={}).render_as_string(hide_password=True)


def _engine(url: str, pool_size: int, *, sync: bool) -> Engine:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # ValueError: the port
        raise ConfigurationError("database_url is not an SQLAlchemy URL") from None
    if parsed.drivername in ("postgresql", "postgresql+psycopg"):
        parsed = parsed.set(drivername="postgresql+psycopg")
        # psycopg numbers what it prepares for each connection: behind a connection pooler a number
        # may be another client's statement. Seen with PgBouncer 1.18, pool_mode=transaction.
        arguments: dict[str, Any] = {"prepare_threshold": None}
        if "connect_timeout" not in parsed.query:
            arguments["connect_timeout"] = _CONNECT_SECONDS
        options: dict[str, Any] = {"pool_size": pool_size, "connect_args": arguments}
    elif (
        parsed.drivername == "sqlite"
        and parsed.database not in (None, "", ":memory:")
        and not (parsed.host or parsed.query)
    ):
        options = {"pool_size": pool_size}
    else:
        raise ConfigurationError(
            "database_url has to be sqlite:///FILE or postgresql+psycopg://…; an absolute FILE has "
            "a fourth slash before it, and options are PostgreSQL's"
        )
    try:
        engine = create_engine(parsed, hide_parameters=True, **options)
    except (ImportError, NoSuchModuleError) as error:
        raise ConfigurationError(f"database_url: {error}") from None
    if engine.dialect.name == "sqlite":
        file = Path(str(parsed.database))
        event.listen(engine, "do_connect", lambda *_: _make_private(file))
        event.listen(engine, "connect", partial(_prepare_sqlite, sync=sync))
        event.listen(engine, "begin", _begin_sqlite)
    else:
        event.listen(engine, "connect", partial(_prepare_postgresql, url=parsed))
        event.listen(engine, "checkin", _note_time)
        event.listen(engine, "checkout", partial(_require_pooled_alive, engine.dialect))
    return engine


def _make_private(file: Path) -> None:
    """Make SQLite's files, or keep them, closed to others; SQLite makes them as ``umask`` says.

    The directory matters as much: who can write it can put other files in their place.
    """
    with suppress(OSError):  # SQLite fails at it too, and that is an outage
        _require_private(file.resolve().parent)
        with suppress(FileExistsError):
            os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        # SQLite makes the others with the mode of the file (field note 79).
        for each in _files_of(file):
            with suppress(FileNotFoundError):
                _close_to_others(each)


def _files_of(file: Path) -> tuple[Path, ...]:
    return file, *(file.with_name(file.name + end) for end in _SQLITE_ENDS)


def _require_private(directory: Path) -> None:
    status = directory.stat()
    _require_own(directory, status)
    if status.st_mode & stat.S_IWOTH:
        raise ConfigurationError(
            f"database_url: every user can write the directory {directory}; take another one, "
            "or chmod 0700 it"
        )


def _close_to_others(file: Path) -> None:
    status = file.stat()
    _require_own(file, status)
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        try:
            file.chmod(0o600)
        except PermissionError:
            raise ConfigurationError(
                f"database_url: {file} is open to others: chmod 0600 it"
            ) from None
        was = f"{stat.S_IMODE(status.st_mode):04o}"
        facts = {"file": str(file), "was": was}
        _log.warning("a database file was open to others: now it has mode 0600", extra=facts)


def _require_own(path: Path, status: os.stat_result) -> None:
    if fault := owner_fault(status):
        raise ConfigurationError(f"database_url: {path} {fault}")


def _prepare_sqlite(connection: Any, _record: object, *, sync: bool) -> None:
    # _begin_sqlite opens transactions, not the driver.
    connection.isolation_level = None
    for pragma in (*_SQLITE_PRAGMAS, f"PRAGMA synchronous={'FULL' if sync else 'OFF'}"):
        connection.execute(pragma)
    use_wal(connection)


def _begin_sqlite(connection: Connection) -> None:
    writing = connection.get_execution_options().get("writing", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")


def _prepare_postgresql(connection: Any, _record: object, *, url: URL) -> None:
    # The URL's own options win. Set by SQL and not by options, which connection poolers refuse.
    given = str(url.query.get("options", ""))
    for name, value in _POSTGRESQL_SETTINGS.items():
        if name not in given:
            connection.execute("SELECT set_config(%s, %s, false)", (name, value))
    connection.commit()


def _note_time(_connection: Any, record: ConnectionPoolEntry) -> None:
    record.info["idle_since"] = time.monotonic()


def _require_pooled_alive(
    dialect: Dialect, connection: Any, record: ConnectionPoolEntry, *_: Any
) -> None:
    # A new one was not idle.
    _require_alive(dialect, connection, record.info.get("idle_since", math.inf))


def _require_alive(dialect: Dialect, connection: Any, idle_since: float) -> None:
    """Raise DisconnectionError where the server has ended an idle connection.

    What the server said last, that it ends, is there to be read; this costs no round trip. After
    some time a network may have dropped the connection without a word: then the server is asked.
    """
    idle = time.monotonic() - idle_since
    said = poll()
    said.register(connection.pgconn.socket, POLLIN)
    if idle < _TRUSTED_SECONDS and not said.poll(0):
        return
    try:
        dialect.do_ping(connection)
    except dialect.loaded_dbapi.Error as error:
        raise DisconnectionError from error


def _commit(session: Session) -> None:
    try:
        session.commit()
    except DBAPIError as error:
        _log.warning("commit failed", extra={"error": type(error).__name__})
        raise CommitUnknown(
            "the database failed during a commit; check what was committed"
        ) from error


@contextmanager
def _available() -> Iterator[None]:
    try:
        yield
    except (DBAPIError, PoolExhausted) as error:
        known = typed_error(error)
        if known is None:
            raise
        _log.warning("database failed", extra={"error": type(error).__name__, "why": str(known)})
        raise known from error


# A child must not close inherited connections: that would end the parent's session on the server,
# or drop SQLite's locks. Keeping a reference prevents it.
_INHERITED: list[object] = []
_BARE: set[BareSqlite] = set()
