"""What an error of the database means, by SQLSTATE, SQLite's name or errno, and what to do.

The texts of drivers are not passed on: they quote statements, users and hosts.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from types import MappingProxyType

from sqlalchemy.exc import (
    DBAPIError,
    InterfaceError,
    InternalError,
    OperationalError,
    ProgrammingError,
)
from sqlalchemy.exc import TimeoutError as PoolExhausted

from hsmwrap.errors import ConfigurationError, HsmwrapError, ServiceUnavailable

_UPGRADE = "the schema is missing or old: run `hsmwrap db upgrade`"
_RIGHTS = "look at owner and mode of the file and its directory"
_UNREACHED = "look at the host and port of database_url, and at the network"
_BACKUP = "restore a backup"
# The longest key that a code begins with counts. SQLSTATE: PostgreSQL's documentation, appendix A.
_ADVICE: Mapping[str, str] = MappingProxyType(
    {
        "08": "look at the server and the network",
        "22": "the server's log",
        "25006": "the server is a replica or read-only: name the primary in database_url",
        "25P03": "a process stood still inside a transaction; if it repeats, look at that machine",
        "28": "user or password of database_url, or the server's pg_hba.conf",
        "3D": "make the database, or correct its name in database_url",
        "40": "another transaction was in the way; call again",
        "42501": "give the KMS's user SELECT, INSERT, UPDATE and DELETE on all tables",
        "42P01": _UPGRADE,
        "42703": _UPGRADE,
        "53100": "the server's disk is full",
        "53200": "the server has no memory left",
        "53300": "lower limits.database_pool_size, or raise the server's max_connections",
        "53": "the server has no resources left",
        "55P03": "a lock was held for more than 10 s: pg_stat_activity shows by which transaction",
        "57": "the server stops or starts: wait for it",
        "58": "the server's log",
        "XX": "the server's log",
        "SQLITE_BUSY": "a process held the lock for more than 10 s: `fuser` on the file names it",
        "SQLITE_LOCKED": "a process held the lock for more than 10 s: `fuser` on the file names it",
        "SQLITE_FULL": "the disk is full",
        "SQLITE_IOERR": "look at the disk",
        "SQLITE_READONLY": _RIGHTS,
        "SQLITE_PERM": _RIGHTS,
        "SQLITE_CANTOPEN": f"make the directory, or {_RIGHTS}",
        "SQLITE_CORRUPT": _BACKUP,
        "SQLITE_NOTADB": f"database_url names a file that is not a database, or {_BACKUP}",
        "SQLITE_ERROR": _UPGRADE,
        "ECONNREFUSED": f"the server does not run there: start it, or {_UNREACHED}",
        "ENOENT": "no server has its socket in the directory that database_url names: start it",
        "EACCES": "the KMS's user may not use the server's socket",
        "E": _UNREACHED,
        "TLS": "look at sslmode and the certificates that database_url names",
        "pool": "all connections are in use: raise limits.database_pool_size",
    }
)
_MENDED_BY_HAND = ("28", "3D", "42", "SQLITE_ERROR", "SQLITE_NOTADB", "SQLITE_CORRUPT")
# What libpq says where it has no SQLSTATE, and what it would be.
_OF_LIBPQ = (
    ("the database system is", "57P03"),  # starting up, shutting down, in recovery mode
    ("authentication failed", "28P01"),
    ("pg_hba.conf", "28000"),
    ("role ", "28000"),
    ("database ", "3D000"),
    ("too many", "53300"),
    ("certificate", "TLS"),
    ("SSL", "TLS"),
    ("timeout expired", "ETIMEDOUT"),
    ("resolve host", "EAI_NONAME"),
    ("translate host name", "EAI_NONAME"),
)
_ERRNO = {os.strerror(number): name for number, name in errno.errorcode.items()}
_OUTAGES = (OperationalError, InterfaceError, InternalError)


def typed_error(error: DBAPIError | PoolExhausted) -> HsmwrapError | None:
    """The error that a caller gets for one of SQLAlchemy; None: it is a mistake of this program.

    ``ConfigurationError`` where an operator has to change something, ``ServiceUnavailable`` for an
    outage; the text has SQLSTATE, SQLite's name or errno, and what to do.
    """
    code = _code(error)
    if not code and isinstance(error, ProgrammingError) and error.statement is None:
        # psycopg refuses the options, and names one; no statement was sent.
        return ConfigurationError(f"database_url: {str(error.orig).strip()}")
    if not isinstance(error, (*_OUTAGES, PoolExhausted)) and not code.startswith(_MENDED_BY_HAND):
        return None
    if isinstance(error, InternalError) and code.startswith("XX"):
        return None
    known = max((key for key in _ADVICE if code.startswith(key)), key=len, default="")
    named = type(getattr(error, "orig", None) or error).__name__
    said = f"{_kind(code)}{code} ({named})" if code else named
    text = f"{said}; {_ADVICE[known]}" if known else said
    if code.startswith(_MENDED_BY_HAND):
        return ConfigurationError(f"the database cannot be used: {text}")
    return ServiceUnavailable(f"the database is unavailable: {text}")


def _kind(code: str) -> str:
    return "" if code.startswith(("SQLITE", "E", "TLS", "pool")) else "SQLSTATE "


def _code(error: DBAPIError | PoolExhausted) -> str:
    """SQLSTATE, SQLite's name of the error, or errno's name; empty where there is none."""
    if isinstance(error, PoolExhausted):
        return "pool"
    driver = error.orig
    code = getattr(driver, "sqlstate", None) or getattr(driver, "sqlite_errorname", None)
    if code:
        return str(code)
    said = str(driver)
    return next(
        (name for text, name in (*_ERRNO.items(), *_OF_LIBPQ) if text in said),
        "",
    )
