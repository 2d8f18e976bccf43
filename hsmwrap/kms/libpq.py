"""Single statements over a connection of psycopg, by the functions of libpq that psycopg offers.

A cursor does much that these statements do not need. Measured with psycopg 3.3 beside other work: a
statement takes 82 to 86 µs of this process's processor time with one, and 34 to 48 µs without.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from psycopg import Connection, OperationalError
from psycopg.adapt import PyFormat, Transformer
from psycopg.errors import error_from_result
from psycopg.pq import ConnStatus, DiagnosticField, ExecStatus
from psycopg.pq.abc import PGresult

_NOT_OURS = frozenset({b"26000", b"42P05"})
"""SQLSTATE of a prepared statement that is not there, and of one that is there already."""


class Statements:
    """Runs statements, each of them a transaction of its own. For one thread at a time.

    Attributes:
        connection: Of psycopg; in autocommit from now on.
        idle_since: Monotonic time of the last use.
    """

    def __init__(self, connection: Connection[Any]) -> None:
        """Take over a connection."""
        self.connection = connection
        self.idle_since = 0.0
        connection.autocommit = True
        self._adapting = Transformer(connection)
        self._prepared: set[bytes] = set()
        self._prepares = True

    def run(
        self, name: bytes, sql: bytes, order: Sequence[str], values: Mapping[str, Any]
    ) -> tuple[int, list[Any]]:
        """Run a statement.

        Args:
            name: What it is prepared under.
            sql: With ``$1`` and so on.
            order: The names of these values.
            values: By name; the server infers their types.

        Returns:
            How many rows it changed or found, and what it returned.

        Raises:
            psycopg.Error: It failed; the connection has to be closed.
        """
        given = self._adapting.dump_sequence(
            [values[each] for each in order], [PyFormat.TEXT] * len(order)
        )
        result = self._run_prepared(name, sql, given) if self._prepares else None
        if result is None or result.error_field(DiagnosticField.SQLSTATE) in _NOT_OURS:
            # A connection pooler gives each transaction another session. Nothing was run.
            self._prepares = False
            result = self.connection.pgconn.exec_params(sql, given)
        self._require(result)
        self._adapting.set_pgresult(result)
        return result.command_tuples or 0, self._adapting.load_rows(0, result.ntuples, tuple)

    def _run_prepared(self, name: bytes, sql: bytes, given: Sequence[Any]) -> PGresult:
        server = self.connection.pgconn
        if name not in self._prepared:
            result = server.prepare(name, sql)
            if result.status != ExecStatus.COMMAND_OK:
                return result
            self._prepared.add(name)
        return server.exec_prepared(name, given)

    def _require(self, result: PGresult) -> None:
        if result.status in (ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK):
            return
        if self.connection.pgconn.status == ConnStatus.BAD:
            raise OperationalError(result.get_error_message())
        raise error_from_result(result)
