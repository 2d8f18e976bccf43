"""Anchors: the database remembers a line of each audit log, so that cutting its end is noticed.

An anchor moves on to the log's last line as long as the log still has the line before; from then
on it stays, so that lines appended afterwards do not hide what was cut off.
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
    """What the database calls an audit log: the configured id, or host and path."""
    return log.log_id or f"{socket.gethostname()}:{log.path.resolve()}"[-LOG_ID_LENGTH:]


def remembered(database: Database, log: AuditLog) -> tuple[Anchor, ...]:
    """The line that the database remembers of this log, if any.

    Raises:
        ServiceUnavailable: The database cannot answer now.
    """
    with database.read() as transaction:
        row = transaction.get(AuditAnchor, log_id(log))
        return () if row is None else (_anchor(row),)


def remember(database: Database, log: AuditLog) -> None:
    """Have the database remember the log's last line, unless the log lacks the one before.

    Raises:
        AuditFailed: The log cannot be read.
        ServiceUnavailable: The database cannot answer now.
    """
    with database.write() as transaction:
        row = _locked_row(database, transaction, log)
        # Read behind the lock: other processes append, and remember what they appended.
        head = log.head()
        if not log.holds(_anchor(row)):
            facts = {"log": str(log.path), "sequence": row.sequence}
            _log.error("audit log lacks a line that it had: run hsmwrap audit verify", extra=facts)
            return
        row.sequence, row.digest, row.position = head.sequence, head.digest, head.position


def _locked_row(database: Database, transaction: Session, log: AuditLog) -> AuditAnchor:
    first = {"log": log_id(log), "sequence": 0, "digest": FIRST, "position": 0}
    # Two processes that start at once both find no row.
    transaction.execute(database.insert(AuditAnchor).values(**first).on_conflict_do_nothing())
    return transaction.get_one(AuditAnchor, log_id(log), with_for_update=True)


def _anchor(row: AuditAnchor) -> Anchor:
    return Anchor(row.sequence, row.digest, row.position)
