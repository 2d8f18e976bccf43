"""The reaper: removes resident wrapping keys once their import tokens have expired.

A resident wrapping key's label says when it expires, so that any process can remove it, also one
that a dead process made.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Any

from pkcs11.constants import Attribute, ObjectClass
from pkcs11.exceptions import PKCS11Error

from hsmwrap.backend import ReapReport
from hsmwrap.pkcs11.pool import PooledSession
from hsmwrap.pkcs11.returncodes import recovery_of

_log = logging.getLogger(__name__)


def label(prefix: str, expires_at: datetime) -> str:
    """CKA_LABEL of a resident wrapping key."""
    return f"{prefix}:wrapping:{int(expires_at.timestamp())}"


def expiry(prefix: str, text: str) -> datetime | None:
    """When the key with this label expires; None for labels that are not :func:`label`'s."""
    start, _, seconds = text.rpartition(":")
    if start != f"{prefix}:wrapping":
        return None
    try:
        return datetime.fromtimestamp(int(seconds), UTC)
    except (ValueError, OverflowError, OSError):
        return None  # somebody else's idea of a label


def reap(pooled: PooledSession, prefix: str, now: datetime) -> ReapReport:
    """Destroy resident wrapping keys that expired before ``now``."""
    removed: list[str] = []
    failed: list[str] = []
    examined = 0
    for key in pooled.find({Attribute.CLASS: ObjectClass.PRIVATE_KEY, Attribute.TOKEN: True}):
        attributes = key.get_attributes([Attribute.LABEL, Attribute.ID])
        expires_at = expiry(prefix, attributes.get(Attribute.LABEL, ""))
        if expires_at is None:
            continue
        examined += 1
        if expires_at < now:
            gone = _destroy(pooled, key)
            (removed if gone else failed).append(attributes[Attribute.ID].hex())
    _log.info("reaped", extra={"examined": examined, "removed": removed, "failed": failed})
    return ReapReport(examined, tuple(removed), tuple(failed))


def _destroy(pooled: PooledSession, key: Any) -> bool:
    try:
        with pooled.token_writes:
            key.destroy()
    except PKCS11Error as error:
        if recovery_of(error) is not None:
            raise
        return False  # another process was faster, or may not
    return True
