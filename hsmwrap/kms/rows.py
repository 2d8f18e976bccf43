"""Rows of keys, kept in memory until the database changes.

Each request asks the database whether a row is still the same, without a transaction, before it
uses the one in memory. So a key that was deleted, disabled or imported again by any process stops
working in all of them at once.

With SQLite the answer is a counter of the changes by other connections (``PRAGMA data_version``),
and where that has changed, whether the row is as it was: most changes are of other rows.
With PostgreSQL it is the row's own version (``xmin`` and ``ctid``): each change makes another one.
"""

from __future__ import annotations

import sqlite3
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

from sqlalchemy import String, literal_column, select

from hsmwrap import forks
from hsmwrap.forks import ForkAware
from hsmwrap.kms.database import BareSqlite, Database
from hsmwrap.kms.schema import Key

MOST_ROWS = 10_000
"""How many rows are kept: by a process with PostgreSQL, by each watcher of a process with SQLite.

A process has as many watchers as calls of it have looked for a row at the same time.
"""
_T = TypeVar("_T")
_VERSION = "xmin::text || ctid::text"
_WRITTEN = "SELECT * FROM keys WHERE key_id = ?"
_VERSION_OF_ONE = f"SELECT {_VERSION} FROM keys WHERE key_id = :key_id"  # noqa: S608 (a constant)


class KeyRows(Protocol):
    """Reads rows of keys. Safe to share between threads and after ``fork()``."""

    def get(self, key_id: str) -> Key | None:
        """The committed row of a key, detached and not to be changed; None: it does not exist.

        Raises:
            ServiceUnavailable: The database is unavailable.
        """

    def close(self) -> None:
        """Close what looks for changes. Safe to call again."""


def key_rows(database: Database) -> KeyRows:
    """The rows of keys in this database."""
    file = database.file
    return _OfPostgresql(database) if file is None else _OfSqlite(database, file)


class _OfPostgresql:
    def __init__(self, database: Database) -> None:
        self._database = database
        self._rows: dict[str, tuple[str, Key]] = {}

    def get(self, key_id: str) -> Key | None:
        found = self._database.run(_VERSION_OF_ONE, {"key_id": key_id}).rows
        version = found[0][0] if found else None
        known = self._rows.get(key_id)
        if known is None or known[0] != version:
            wanted = select(literal_column(_VERSION, String), Key).where(Key.key_id == key_id)
            with self._database.read() as transaction:
                row = transaction.execute(wanted).one_or_none()
            if row is None:
                self._rows.pop(key_id, None)
                return None
            known = row[0], row[1]
            _keep(self._rows, key_id, known)
        return known[1]

    def close(self) -> None:
        pass


class _OfSqlite(ForkAware):
    """Each call has a watcher to itself; see :class:`hsmwrap.kms.database.BareSqlite`."""

    def __init__(self, database: Database, file: Path) -> None:
        self._database = database
        self._file = file
        self.after_fork_in_child()
        forks.register(self)

    def after_fork_in_child(self) -> None:
        """Leave the connections to the parent."""
        self._idle: deque[_Watcher] = deque()

    def get(self, key_id: str) -> Key | None:
        try:
            watcher = self._idle.pop()
        except IndexError:
            watcher = _Watcher(self._file)
        row = watcher.unchanged(key_id)
        if row is None:
            # After the watcher has looked: a change from now on makes it look at the row again.
            with self._database.read() as transaction:  # one snapshot
                row = transaction.get(Key, key_id)
                written = transaction.connection().exec_driver_sql(_WRITTEN, (key_id,)).first()
            if row is not None and written is not None:
                _keep(watcher.rows, key_id, (watcher.seen, tuple(written), row))
        self._idle.append(watcher)
        return row

    def close(self) -> None:
        with suppress(IndexError):
            while True:
                self._idle.pop().close()


class _Watcher:
    """A connection that writes nothing, and rows that were read since it saw some change.

    Attributes:
        rows: By their ids: what it had seen when it looked at the row, the row as SQLite has it,
            and the row.
        seen: The counter of changes when it looked last; it means nothing to another connection.
    """

    def __init__(self, file: Path) -> None:
        self.rows: dict[str, tuple[int | None, tuple[Any, ...], Key]] = {}
        self.seen: int | None = None
        self._file = file
        self._connection: BareSqlite | None = None

    def unchanged(self, key_id: str) -> Key | None:
        """The row in memory if it is still that of the database."""
        try:
            if self._connection is None:
                self._connection = BareSqlite(self._file)
            (self.seen,) = self._connection.execute("PRAGMA data_version").fetchone()
            known = self.rows.get(key_id)
            if known is None:
                return None
            seen, written, row = known
            if seen != self.seen:
                if self._connection.execute(_WRITTEN, (key_id,)).fetchone() != written:
                    return None
                self.rows[key_id] = self.seen, written, row
        except sqlite3.Error:
            self.close()  # reading the row says what is wrong
            return None
        return row

    def close(self) -> None:
        self.rows.clear()
        self.seen = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _keep(rows: dict[str, _T], key_id: str, row: _T) -> None:
    if len(rows) >= MOST_ROWS:
        rows.clear()
    rows[key_id] = row
