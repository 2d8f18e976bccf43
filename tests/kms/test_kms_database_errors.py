"""What a caller gets for errors of the database: typed, with SQLSTATE or errno and what to do."""

import sqlite3
from contextlib import closing

import psycopg
import pytest
from psycopg import errors as states
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolExhausted

from hsmwrap.errors import ConfigurationError, ServiceUnavailable
from hsmwrap.kms.database import Database
from hsmwrap.kms.database_errors import typed_error


def of_postgresql(state):
    error = states.lookup(state)("said by the server, with a user's name")
    return DBAPIError.instance("SELECT 1", {}, error, psycopg.Error, dialect=None)


def of_libpq(said):
    error = psycopg.OperationalError(f"connection failed: {said}")
    return DBAPIError.instance(None, None, error, psycopg.Error, dialect=None)


def of_sqlite(name):
    error = sqlite3.OperationalError("said by SQLite")
    error.sqlite_errorname = name
    return OperationalError("SELECT 1", {}, error)


OUTAGE, TO_MEND = ServiceUnavailable, ConfigurationError
CASES = [
    (of_postgresql("57P01"), OUTAGE, "SQLSTATE 57P01 (AdminShutdown); the server stops or starts"),
    (of_postgresql("53300"), OUTAGE, "SQLSTATE 53300 (TooManyConnections); lower limits.database"),
    (of_postgresql("53100"), OUTAGE, "SQLSTATE 53100 (DiskFull); the server's disk is full"),
    (of_postgresql("55P03"), OUTAGE, "SQLSTATE 55P03 (LockNotAvailable); a lock was held"),
    (of_postgresql("40P01"), OUTAGE, "SQLSTATE 40P01 (DeadlockDetected); another transaction"),
    (of_postgresql("25006"), OUTAGE, "SQLSTATE 25006 (ReadOnlySqlTransaction); the server is a"),
    (of_postgresql("42501"), TO_MEND, "SQLSTATE 42501 (InsufficientPrivilege); give the KMS's"),
    (of_postgresql("42P01"), TO_MEND, "SQLSTATE 42P01 (UndefinedTable); the schema is missing"),
    (of_libpq("Connection refused\n\tIs the server running"), OUTAGE, "ECONNREFUSED (Operational"),
    (of_libpq("FATAL:  password authentication failed for user"), TO_MEND, "28P01 (OperationalE"),
    (of_libpq('FATAL:  database "kms" does not exist'), TO_MEND, "3D000 (OperationalError); make"),
    (of_libpq("could not translate host name"), OUTAGE, "EAI_NONAME (OperationalError); look at"),
    (of_libpq("something new"), OUTAGE, "the database is unavailable: OperationalError"),
    (of_sqlite("SQLITE_BUSY"), OUTAGE, "SQLITE_BUSY (OperationalError); a process held the lock"),
    (of_sqlite("SQLITE_IOERR_WRITE"), OUTAGE, "SQLITE_IOERR_WRITE (OperationalError); look at the"),
    (of_sqlite("SQLITE_FULL"), OUTAGE, "SQLITE_FULL (OperationalError); the disk is full"),
    (of_sqlite("SQLITE_ERROR"), TO_MEND, "SQLITE_ERROR (OperationalError); the schema is missing"),
    (PoolExhausted("QueuePool limit"), OUTAGE, "pool (TimeoutError); all connections are in use"),
]


@pytest.mark.parametrize(("error", "kind", "said"), CASES, ids=[said for _, _, said in CASES])
def test_code_and_advice(error, kind, said):
    found = typed_error(error)
    assert type(found) is kind
    assert said in str(found)
    assert "said by" not in str(found)


@pytest.mark.parametrize("state", ["23505", "22003", "22P02"])
def test_mistakes_of_this_program_stay_what_they_are(state):
    assert typed_error(of_postgresql(state)) is None


def test_a_database_without_a_schema(empty_database_url):
    database = Database(empty_database_url, sync=False)
    with (
        closing(database),
        pytest.raises(ConfigurationError, match="run `hsmwrap db upgrade`"),
        database.read() as transaction,
    ):
        transaction.execute(text("SELECT * FROM keys"))


def test_a_server_that_is_not_there(tmp_path):
    database = Database(f"postgresql+psycopg://kms@/kms?host={tmp_path}")
    with closing(database), pytest.raises(ServiceUnavailable, match=r"ENOENT .* start it"):
        database.ping()
