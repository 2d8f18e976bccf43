"""A private PostgreSQL cluster of the distribution's package, in a temporary directory.

It listens on a Unix socket in that directory alone, so it needs no port and cannot be reached
from outside. PostgreSQL refuses to run as root: then it runs as ``postgres``, or ``nobody``.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Self

import psycopg

from hsmwrap.kms.database import Database
from support.fast import needs_service

_CANDIDATES = ("postgres", "nobody")


def binaries() -> Path | None:
    """The newest installed version's programs, or None."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: int(p.parts[-3]))
    return found[-1].parent if found else None


class PrivateCluster:
    """Runs for the length of a ``with`` block."""

    def __init__(self) -> None:
        needs_service()
        self._bin = binaries()
        # Not pytest's own: a socket's path is at most 107 bytes, and the user has to reach it.
        self._home = Path(tempfile.mkdtemp(prefix="hsmwrap-pg-"))
        self._as_user = self._give_away() if os.geteuid() == 0 else []
        self._made: list[str] = []

    def __enter__(self) -> Self:
        data = self._home / "data"
        self._run("initdb", "-D", data, "-U", "hsmwrap", "-A", "trust", "-N", "-E", "UTF8",
                  "--locale=C.UTF-8")  # fmt: skip
        settings = (
            f"-k {self._home} -c listen_addresses= -c fsync=off -c max_connections=200 "
            # It is in memory: little is written for a server that crashes or has a replica.
            "-c wal_level=minimal -c max_wal_senders=0 -c max_wal_size=64MB -c min_wal_size=32MB"
        )
        self._run("pg_ctl", "-D", data, "-w", "-l", self._home / "log", "-o", settings, "start")
        return self

    def __exit__(self, *_exc: object) -> None:
        try:
            self._run("pg_ctl", "-D", self._home / "data", "-m", "immediate", "-w", "stop")
        finally:
            shutil.rmtree(self._home)

    def url(self, database: str) -> str:
        return f"postgresql+psycopg://hsmwrap@/{database}?host={self._home}"

    @cached_property
    def _template(self) -> str:
        url = self.new_database()
        database = Database(url)
        database.migrate()
        database.close()
        return database.engine.url.database

    def new_database(self, *, migrated: bool = False) -> str:
        """Make an empty database, or a copy of one that was migrated, and return its URL."""
        template = self._template if migrated else "template1"
        name = f"t{uuid.uuid4().hex}"
        self._execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        self._made.append(name)
        return self.url(name)

    def made(self) -> frozenset[str]:
        """Names of the databases that were made, but of the one that others are copied from."""
        return frozenset(self._made) - {self.__dict__.get("_template")}

    def drop(self, names: Iterable[str]) -> None:
        """Drop databases; each takes 8 MB of memory."""
        for name in names:
            self._execute(f"DROP DATABASE {name} WITH (FORCE)")
            self._made.remove(name)

    def dump(self, url: str) -> bytes:
        """What ``pg_dump`` makes of a database, to be restored in place of another one."""
        options = ("--clean", "--if-exists", "--dbname", url.replace("+psycopg", ""))
        done = subprocess.run([self._bin / "pg_dump", *options], capture_output=True, check=True)
        return done.stdout

    def restore(self, dump: bytes, url: str) -> None:
        """Restore what :meth:`dump` made."""
        options = ("--quiet", "--set", "ON_ERROR_STOP=1", "--dbname", url.replace("+psycopg", ""))
        subprocess.run([self._bin / "psql", *options], input=dump, capture_output=True, check=True)

    def _execute(self, statement: str) -> None:
        with psycopg.connect(
            host=str(self._home), user="hsmwrap", dbname="postgres", autocommit=True
        ) as connection:
            connection.execute(statement)

    def _give_away(self) -> list[str]:
        known = {entry.pw_name: entry for entry in pwd.getpwall()}
        user = next(known[name] for name in _CANDIDATES if name in known)
        os.chown(self._home, user.pw_uid, user.pw_gid)
        return ["runuser", "-u", user.pw_name, "--"]

    def _run(self, program: str, *arguments: object) -> None:
        command = [*self._as_user, str(self._bin / program), *map(str, arguments)]
        # To files: the server would keep a pipe open for ever.
        with tempfile.TemporaryFile() as output:
            done = subprocess.run(
                command, cwd="/", stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                check=False,
            )  # fmt: skip
            output.seek(0)
            assert done.returncode == 0, output.read().decode(errors="replace")
