"""Anchors: the database remembers a line of each audit log, so that cutting its end is noticed."""

from __future__ import annotations

import logging
import socket
from pathlib import Path

from hsmwrap.kms.audit import Anchor, AuditLog
from hsmwrap.kms.database import Database
from hsmwrap.kms.schema import AuditAnchor

_log = logging.getLogger(__name__)


def log_name(path: Path) -> str:
    """What the database calls an audit log: host and path."""
    return f"{socket.gethostname()}:{path.resolve()}"[-512:]


def remembered(database: Database, path: Path) -> tuple[Anchor, ...]:
    """The line that the database remembers of this log, if any."""
    with database.read() as transaction:
        row = transaction.get(AuditAnchor, log_name(path))
        return () if row is None else (Anchor(row.sequence, row.digest),)


def remember(database: Database, log: AuditLog) -> None:
    """Have the database remember the log's last line; one that went backwards is left to verify."""
    head = log.head()
    with database.write() as transaction:
        row = transaction.get(AuditAnchor, log_name(log.path), with_for_update=True)
        if row is not None and row.sequence > head.sequence:
            _log.error("audit log is shorter than it was", extra={"log": str(log.path)})
            return
        transaction.merge(
            AuditAnchor(log=log_name(log.path), sequence=head.sequence, digest=head.digest)
        )
