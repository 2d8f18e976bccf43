"""Anchors: the database stores one line of each audit log, to detect that its end was cut off.

An anchor moves to the log's last line as long as the log still has the previously stored line. If
that line is missing, the anchor stays where it is, so that lines appended later cannot hide the
cut. It moves with the first line, with each sweep, after a number of lines (:class:`AnchoredLog`)
and when the KMS closes.
"""

from __future__ import annotations

import logging
import socket
from dataclasses import replace

from sqlalchemy import bindparam, select, update
from sqlalchemy.orm import Session

from hsmwrap.chain import Link
from hsmwrap.errors import HsmwrapError
from hsmwrap.kms.audit import START, AuditEntry, AuditFailed, AuditLog
from hsmwrap.kms.auditfiles import AuditReport, damaged_files, verify
from hsmwrap.kms.database import Database
from hsmwrap.kms.schema import LOG_ID_LENGTH, AuditAnchor
from hsmwrap.locks import ReadWriteLock

ANCHOR_LINES = 32
"""How many lines an audit log may grow by before its anchor moves, by default."""

_log = logging.getLogger(__name__)


def log_id(log: AuditLog) -> str:
    """The id of an audit log in the database: as configured, or host and path."""
    return log.log_id or f"{socket.gethostname()}:{log.path.resolve()}"[-LOG_ID_LENGTH:]


def remembered(database: Database, log: AuditLog) -> tuple[Link, ...]:
    """The line of this log that the database stores, if any.

    Raises:
        ServiceUnavailable: The database is unavailable.
    """
    with database.read() as transaction:
        row = transaction.get(AuditAnchor, log_id(log))
        return () if row is None else (_anchor(row),)


def remember(database: Database, log: AuditLog) -> int | None:
    """Store the log's last line in the database, unless the previously stored line is missing.

    Returns:
        The number of the line that is stored now; None if the previous one is missing.

    Raises:
        AuditFailed: The log cannot be read.
        ServiceUnavailable: The database is unavailable.
    """
    name = log_id(log)
    with database.write() as transaction:
        anchor = _locked(database, transaction, log, name)
        # Read under the row lock: other processes append lines and move the anchor too.
        head = log.head()
        if not log.holds(anchor):
            facts = {"log": str(log.path), "sequence": anchor.sequence}
            _log.error("a line of the audit log is missing: run hsmwrap audit verify", extra=facts)
            return None
        _move(transaction, log, name, head)
    return head.sequence


def accept(database: Database, log: AuditLog, reason: str) -> tuple[AuditReport, str]:
    """Accept the log as it is, whole or not: the first line of a new file says so.

    That line becomes the anchor. Processes that append go on with the new file.

    Returns:
        What was found before, and the name that the old file has now.

    Raises:
        AuditFailed: The files cannot be read or written; nothing has changed then.
        ServiceUnavailable: The database is unavailable.
        CommitUnknown: The new file has begun, but the anchor may still be a line of the old one:
            accept the log again.
    """
    try:
        report = verify(log.path, log.key, remembered(database, log))
        damaged = damaged_files(log.path, report)
    except OSError as error:
        raise AuditFailed(f"audit log {log.path}: {error}") from error
    name = log_id(log)
    with database.write() as transaction:
        last = max(_locked(database, transaction, log, name).sequence, report.sound)
        first, old = log.accept(reason, report.finding, damaged, last)
        _move(transaction, log, name, replace(first, position=0))
    return report, old


class AnchoredLog:
    """An audit log whose anchor follows its end: fewer than ``lines`` lines stay behind it.

    Each process counts from the anchor that it set last; others may have set a later one. Where
    the database is unavailable, more lines stay behind: of operations that failed for that reason.

    Attributes:
        log: The log.
        whole: False where the log did not have its anchor when this process looked last.
    """

    def __init__(self, database: Database, log: AuditLog, lines: int) -> None:
        """Take the log, where anchors are stored, and the bound."""
        self.log = log
        self._database = database
        self._lines = lines
        self._anchored = 0
        self._moving = ReadWriteLock()
        self.whole = True

    def append(self, entry: AuditEntry, *more: AuditEntry) -> None:
        """Write a line for each entry, and move the anchor where it is due: at once by the first.

        Raises:
            AuditFailed: The lines cannot be written; they are owed.
        """
        anchored = self._anchored
        sequence = self.log.append(entry, *more)
        if anchored and anchored < sequence < anchored + self._lines:
            return
        with self._moving.write():
            if self._anchored != anchored and self._anchored >= sequence:
                return  # another thread has moved it meanwhile
            self._anchored = 0
            self.try_to_anchor()
            self._anchored = self._anchored or sequence  # if it failed, not again with each line

    def anchor(self) -> None:
        """Move the anchor to the last line; raises as :func:`remember` does."""
        anchored = remember(self._database, self.log)
        self.whole = anchored is not None
        self._anchored = anchored or self._anchored

    def try_to_anchor(self) -> None:
        """:meth:`anchor`; a failure is logged only, and repaired by the next one."""
        try:
            self.anchor()
        except HsmwrapError as error:
            facts = {"code": error.code, "why": str(error)}
            _log.warning("the end of the audit log could not be anchored", extra=facts)


# Made once, and by columns: SQLAlchemy's unit of work takes longer than all the rest, and requests
# wait for this.
_LOCKED = (
    select(AuditAnchor.sequence, AuditAnchor.digest, AuditAnchor.position, AuditAnchor.set_at)
    .where(AuditAnchor.log == bindparam("log"))
    .with_for_update()
)
_MOVED = (
    update(AuditAnchor)
    .where(AuditAnchor.log == bindparam("of"))
    .values(
        {name: bindparam(f"to_{name}") for name in ("sequence", "digest", "position", "set_at")}
    )
    .execution_options(synchronize_session=False)
)


def _locked(database: Database, transaction: Session, log: AuditLog, name: str) -> Link:
    """The anchor, with its row locked; the row is made where there is none."""
    wanted, connection = {"log": name}, transaction.connection()
    row = connection.execute(_LOCKED, wanted).one_or_none()
    if row is None:
        first = wanted | {"sequence": 0, "digest": START.digest, "position": 0}
        made = database.insert(AuditAnchor).values(**first, set_at=log.clock())
        # Two processes that start at the same time may both insert.
        connection.execute(made.on_conflict_do_nothing())
        row = connection.execute(_LOCKED, wanted).one()
    return Link(*row)


def _move(transaction: Session, log: AuditLog, name: str, to: Link) -> None:
    values = {"to_sequence": to.sequence, "to_digest": to.digest, "to_position": to.position}
    transaction.connection().execute(_MOVED, values | {"to_set_at": log.clock(), "of": name})


def _anchor(row: AuditAnchor) -> Link:
    return Link(row.sequence, row.digest, row.position, row.set_at)
