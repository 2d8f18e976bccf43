"""Anchors: the database stores one line of each audit log, to detect that its end was cut off.

An anchor moves to the log's last line as long as the log still has the previously stored line. If
that line is missing, the anchor stays where it is, so that lines appended later cannot hide the
cut.
"""

from __future__ import annotations

import logging
import socket

from sqlalchemy.orm import Session

from hsmwrap.kms.audit import FIRST, Anchor, AuditLog
from hsmwrap.kms.database import Database
from hsmwrap.kms.schema import LOG_ID_LENGTH, AuditAnchor

_log = logging.getLogger(__name__)


def log_id(log: AuditLog) -> str:
    """The id of an audit log in the database: as configured, or host and path."""
    return log.log_id or f"{socket.gethostname()}:{log.path.resolve()}"[-LOG_ID_LENGTH:]


def remembered(database: Database, log: AuditLog) -> tuple[Anchor, ...]:
    """The line of this log that the database stores, if any.

    Raises:
        ServiceUnavailable: The database is unavailable.
    """
    with database.read() as transaction:
        row = transaction.get(AuditAnchor, log_id(log))
        return () if row is None else (_anchor(row),)


def remember(database: Database, log: AuditLog) -> None:
    """Store the log's last line in the database, unless the previously stored line is missing.

    Raises:
        AuditFailed: The log cannot be read.
        ServiceUnavailable: The database is unavailable.
    """
    with database.write() as transaction:
        row = _locked_row(database, transaction, log)
        # Read under the row lock: other processes append lines and move the anchor too.
        head = log.head()
        if not log.holds(_anchor(row)):
            facts = {"log": str(log.path), "sequence": row.sequence}
            _log.error("a line of the audit log is missing: run hsmwrap audit verify", extra=facts)
            return
        row.sequence, row.digest, row.position = head.sequence, head.digest, head.position


def _locked_row(database: Database, transaction: Session, log: AuditLog) -> AuditAnchor:
    first = {"log": log_id(log), "sequence": 0, "digest": FIRST, "position": 0}
    # Two processes that start at the same time may both insert.
    transaction.execute(database.insert(AuditAnchor).values(**first).on_conflict_do_nothing())
    return transaction.get_one(AuditAnchor, log_id(log), with_for_update=True)


def _anchor(row: AuditAnchor) -> Anchor:
    return Anchor(row.sequence, row.digest, row.position)
