"""Signature nonces: each is used once, and no request waits for the disk.

Nonces are kept where all processes of the database see them at once and where they outlive each of
these processes: with PostgreSQL in an unlogged table, with SQLite in a file of its own beside the
database, which is never flushed to the disk. Such a store can be lost only as a whole, and this is
noticed: PostgreSQL empties unlogged tables when the server crashes, and the file is named after the
boot of the machine, so that a file of an earlier boot is never read.

For that case the database has a *bound* for each access key: no nonce was accepted whose mark
expires at the bound or later. It is committed before the first such nonce is accepted, and it is
:data:`STEP` ahead of that one, so it costs one commit in that time. A store that begins again takes
the bounds over as *floors*: a request below the floor of its access key may have been accepted
before, and is refused. So a request is never accepted twice, and after a crash an access key waits
for at most :data:`STEP` (if the clocks of its clients agree).

A dump of PostgreSQL brings the table along. So what marks a store as begun has the identity of its
table, and a restored store begins again. Its floors are those of the dump: what was accepted later
than that is not known.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import delete, select, text

from hsmwrap import forks
from hsmwrap.errors import ServiceUnavailable
from hsmwrap.forks import ForkAware
from hsmwrap.kms.database import BareSqlite, Database, use_wal
from hsmwrap.kms.once import digest
from hsmwrap.kms.schema import NonceBound, microseconds

STEP = timedelta(seconds=5)
"""How far the bound of an access key is ahead of its latest request."""
_BATCH = 500
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_FOREVER = 2**62
_BEGUN = "store of nonces"
_CLUSTER_IS_READABLE = "SELECT has_function_privilege('pg_control_system()', 'EXECUTE')"
_CLUSTER = "SELECT system_identifier::text FROM pg_control_system()"
_TABLE = """
SELECT oid::text, 'nonces'::regclass::oid::text FROM pg_database
WHERE datname = current_database()"""

_PREPARE = (
    "PRAGMA synchronous=OFF",
    "PRAGMA cache_size=-256",  # in KiB; what others wrote drops it in any case
    """CREATE TABLE IF NOT EXISTS nonces
    (digest BLOB PRIMARY KEY, expires_at INTEGER NOT NULL) WITHOUT ROWID""",
    "CREATE INDEX IF NOT EXISTS ix_nonces_expires_at ON nonces (expires_at)",
)
_USE = """
INSERT INTO nonces (digest, expires_at)
SELECT :digest, :expires_at
WHERE EXISTS (SELECT 1 FROM nonces WHERE digest = :begun)
AND NOT EXISTS (SELECT 1 FROM nonces WHERE digest = :access_key AND expires_at > :expires_at)
ON CONFLICT (digest) DO UPDATE SET expires_at = excluded.expires_at
WHERE nonces.expires_at <= :now"""
_LOOK = "SELECT digest FROM nonces WHERE digest IN (:digest, :begun)"
_BEGIN = """
INSERT INTO nonces (digest, expires_at) VALUES (:digest, :expires_at)
ON CONFLICT (digest) DO NOTHING"""
_TAKE_OVER = """
INSERT INTO nonces (digest, expires_at) SELECT digest, before FROM nonce_bounds WHERE true
ON CONFLICT (digest) DO UPDATE SET expires_at = excluded.expires_at
WHERE nonces.expires_at < excluded.expires_at"""
_PURGE = f"""
DELETE FROM nonces WHERE digest IN
(SELECT digest FROM nonces WHERE expires_at <= :now LIMIT {_BATCH})"""  # noqa: S608 (a number)

_log = logging.getLogger(__name__)


class NonceStore(ForkAware):
    """Used nonces, shared by the processes on one database. Safe to share between threads."""

    def __init__(self, database: Database, clock: Callable[[], datetime]) -> None:
        """Take the database, and the clock that decides which marks have expired."""
        self._database = database
        self._clock = clock
        self._store = _store(database)
        self._bounds: dict[bytes, int] = {}
        self._raising = threading.Lock()
        forks.register(self)

    def after_fork_in_child(self) -> None:
        """Be free: the thread that raised a bound is not here."""
        self._raising = threading.Lock()

    def use(self, access_key_id: str, nonce: str, expires_at: datetime) -> bool:
        """Mark the nonce as used, atomically; False if this access key used it before.

        Args:
            access_key_id: The access key that signed with the nonce.
            nonce: The nonce, of any length.
            expires_at: Aware time when the mark expires: then the request itself is too old.

        Raises:
            ServiceUnavailable: The store is unavailable; or marks were lost in a crash, and this
                may be one of them: a request that is signed later is accepted.
        """
        access_key = digest("access key", access_key_id.encode())
        wanted = {
            "digest": digest("nonce", access_key_id.encode(), nonce.encode()),
            "expires_at": microseconds(expires_at),
            "access_key": access_key,
            "begun": self._store.begun,
            "now": microseconds(self._clock()),
        }
        self._require_below_bound(access_key, expires_at)
        while not self._store.change(_USE, wanted):
            found = {bytes(row[0]) for row in self._store.select(_LOOK, wanted)}
            if wanted["digest"] in found:
                return False
            if wanted["begun"] in found:
                raise ServiceUnavailable(
                    "the record of used nonces was lost in a crash or is restored, and this "
                    "request may have been answered before; sign it again"
                )
            self._store.begin()
        return True

    def purge(self, now: datetime) -> None:
        """Delete the expired marks and bounds; in small steps, between which others use nonces."""
        while self._store.change(_PURGE, {"now": microseconds(now)}) == _BATCH:
            pass
        with self._database.write() as transaction:
            transaction.execute(delete(NonceBound).where(NonceBound.before <= now))

    def close(self) -> None:
        """Close the file, if there is one. Safe to call again."""
        self._store.close()

    def _require_below_bound(self, access_key: bytes, expires_at: datetime) -> None:
        if self._bounds.get(access_key, 0) > microseconds(expires_at):
            return
        with self._raising:  # of several threads one commits
            if self._bounds.get(access_key, 0) > microseconds(expires_at):
                return
            self._store.begin()  # first, so that the new bound is not one of its floors
            before = expires_at + STEP
            insert = self._database.insert(NonceBound).values(digest=access_key, before=before)
            unless_higher = insert.on_conflict_do_update(
                index_elements=[NonceBound.digest],
                set_={"before": before},
                where=NonceBound.before < before,
            )
            with self._database.write() as transaction:
                transaction.execute(unless_higher)
            self._bounds[access_key] = microseconds(before)


class _Store(Protocol):
    """Where nonces are kept: the table ``nonces`` of some database."""

    @property
    def begun(self) -> bytes:
        """Digest of the row that is in the store when it has begun."""

    def change(self, statement: str, values: Mapping[str, Any]) -> int:
        """Run one statement in a transaction of its own; returns how many rows it changed."""

    def select(self, statement: str, values: Mapping[str, Any]) -> list[Any]:
        """Read rows."""

    def begin(self) -> None:
        """Take the bounds over as floors, unless another process has begun the store."""

    def close(self) -> None: ...


class _Table:
    """In the database itself."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @cached_property
    def begun(self) -> bytes:
        if self._database.file is not None:
            return digest(_BEGUN)
        cluster = b""
        if self.select(_CLUSTER_IS_READABLE, {})[0][0]:
            cluster = self.select(_CLUSTER, {})[0][0].encode()
        return digest(_BEGUN, cluster, *(oid.encode() for oid in self.select(_TABLE, {})[0]))

    def change(self, statement: str, values: Mapping[str, Any]) -> int:
        return self._database.run(statement, values).changed

    def select(self, statement: str, values: Mapping[str, Any]) -> list[Any]:
        return self._database.run(statement, values).rows

    def begin(self) -> None:
        if self.select(_LOOK, {"digest": self.begun, "begun": self.begun}):
            return
        mark = {"digest": self.begun, "expires_at": _FOREVER}
        with self._database.write() as transaction:
            if transaction.connection().execute(text(_BEGIN), mark).rowcount:
                # After the mark: no bound was raised for a store before this one any more.
                transaction.execute(text(_TAKE_OVER))
                _log.info("the store of used nonces begins")

    def close(self) -> None:
        pass


class _File(ForkAware):
    """In a file of SQLite that lives as long as the machine runs, never flushed to the disk.

    What a process has written is the kernel's, so it survives the process, however that ends.

    Each call has a connection to itself. SQLite lets one of them write at a time, for microseconds.
    """

    def __init__(self, database: Database, file: Path) -> None:
        self._database = database
        self._file = file
        self._prefix = f"{file.name.rpartition('-')[0]}-"
        self.begun = digest(_BEGUN)
        self.after_fork_in_child()
        forks.register(self)

    def after_fork_in_child(self) -> None:
        """Leave the connections to the parent."""
        self._idle: deque[BareSqlite] = deque()
        self._opening = threading.Lock()

    def change(self, statement: str, values: Mapping[str, Any]) -> int:
        with self._connection() as connection:
            return connection.execute(statement, values).rowcount

    def select(self, statement: str, values: Mapping[str, Any]) -> list[Any]:
        with self._connection() as connection:
            return connection.execute(statement, values).fetchall()

    def begin(self) -> None:
        with self._connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            mark = {"digest": self.begun, "expires_at": _FOREVER}
            if connection.execute(_BEGIN, mark).rowcount:
                bounds = select(NonceBound.digest, NonceBound.before)
                with self._database.read() as transaction:
                    floors = [(row[0], microseconds(row[1])) for row in transaction.execute(bounds)]
                connection.executemany("INSERT INTO nonces VALUES (?, ?)", floors)
                _log.info("the store of used nonces begins", extra={"file": str(self._file)})
            connection.execute("COMMIT")

    def close(self) -> None:
        with suppress(IndexError):
            while True:
                self._idle.pop().close()

    @contextmanager
    def _connection(self) -> Iterator[BareSqlite]:
        """A connection for one call; closed where the call fails, and with it a transaction."""
        try:
            connection = self._taken()
            try:
                yield connection
            except BaseException:
                connection.close()
                raise
        except (OSError, sqlite3.Error) as error:
            _log.warning("the store of used nonces failed", extra={"error": type(error).__name__})
            raise ServiceUnavailable(
                f"the store of used nonces is unavailable: {type(error).__name__}"
            ) from error
        self._idle.append(connection)

    def _taken(self) -> BareSqlite:
        with suppress(IndexError):
            while True:
                connection = self._idle.pop()
                with suppress(FileNotFoundError):
                    # A file that was removed is one that other processes do not see.
                    if os.path.samestat(self._file.stat(), connection.status):
                        return connection
                connection.close()
        with self._opening:
            return self._open()

    def _open(self) -> BareSqlite:
        for other in self._file.parent.iterdir():
            if other.name.startswith(self._prefix) and not other.name.startswith(self._file.name):
                other.unlink(missing_ok=True)  # of an earlier boot
        connection = BareSqlite(self._file)
        try:
            use_wal(connection)
            for statement in _PREPARE:
                connection.execute(statement)
        except BaseException:
            connection.close()
            raise
        return connection


def _store(database: Database) -> _Store:
    file = database.file
    with suppress(OSError):
        boot = _BOOT_ID.read_text("ascii").strip().replace("-", "")
        if file is not None:
            return _File(database, file.with_name(f"{file.name}-nonces-{boot}"))
    return _Table(database)
