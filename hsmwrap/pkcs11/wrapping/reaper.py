"""The reaper: removes resident wrapping keys once their import tokens have expired.

A resident wrapping key's label says when it expires, so that any process can remove it, also one
that a dead process made. Several may do so at the same time: a key that vanishes meanwhile is one
that another has removed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from pkcs11.constants import Attribute, ObjectClass
from pkcs11.exceptions import FunctionFailed, PKCS11Error

from hsmwrap.backend import ReapReport
from hsmwrap.pkcs11.binding.returncodes import recovery_of
from hsmwrap.pkcs11.sessions.session import HANDLE_INVALID, SEARCHES, PooledSession, search

GRACE = timedelta(minutes=15)
"""How long after its expiry a key is left alone. The clock is this machine's, the expiry was set
by another's: one that is ahead would destroy keys whose import tokens are still good elsewhere.
Machines that check signed requests agree to 15 minutes; a key more for that long costs nothing."""

_RESIDENT = {Attribute.CLASS: ObjectClass.PRIVATE_KEY, Attribute.TOKEN: True}

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
        return None  # a label that was not made here


def reap(pooled: PooledSession, prefix: str, now: datetime) -> ReapReport:
    """Destroy resident wrapping keys that expired :data:`GRACE` before ``now``, or earlier.

    Returns:
        What was done. Keys that others removed meanwhile are in no list.

    Raises:
        PKCS11Error: A return code that says something about the connection.
    """
    removed: list[str] = []
    failed: list[str] = []
    examined: set[bytes] = set()  # by id: SoftHSM may list one key twice, see material.py
    for key in _resident(pooled):
        expires_at, object_id = _described(pooled, prefix, key)
        if expires_at is None:
            continue
        examined.add(object_id)
        if expires_at + GRACE < now:
            outcome = _destroy(pooled, key, object_id)
            if outcome is not None:
                (removed if outcome else failed).append(object_id.hex())
    _log.info("reaped", extra={"examined": len(examined), "removed": removed, "failed": failed})
    return ReapReport(len(examined), tuple(removed), tuple(failed))


def _resident(pooled: PooledSession) -> Iterator[Any]:
    """Each private token object, once."""
    seen: set[int] = set()
    for _ in range(SEARCHES):
        found, complete = _search(pooled)
        yield from (key for key in found if key.handle not in seen)
        if complete:
            return
        seen |= {key.handle for key in found}


def _search(pooled: PooledSession) -> tuple[list[Any], bool]:
    """What a search finds, and whether it came to its end."""
    found: list[Any] = []
    try:
        found.extend(search(pooled.session, _RESIDENT))
    except HANDLE_INVALID:
        # python-pkcs11 reads attributes of what it has found, which may have vanished.
        pooled.require_login()
        return found, False
    if not found:
        pooled.require_login()
    return found, True


def _described(pooled: PooledSession, prefix: str, key: Any) -> tuple[datetime | None, bytes]:
    """When the key expires, None if it is not ours or has vanished; and its id."""
    try:
        attributes = key.get_attributes([Attribute.LABEL, Attribute.ID])
    except (*HANDLE_INVALID, FunctionFailed):
        # FUNCTION_FAILED is what python-pkcs11 makes of every return code here (field note 33).
        pooled.require_login()
        return None, b""
    expires_at = expiry(prefix, attributes.get(Attribute.LABEL, ""))
    return expires_at, attributes.get(Attribute.ID, b"")


def _destroy(pooled: PooledSession, key: Any, object_id: bytes) -> bool | None:
    """Whether it could be destroyed; None if another was faster."""
    try:
        with pooled.token_writes:
            key.destroy()
    except HANDLE_INVALID:
        pooled.require_login()
        return None
    except PKCS11Error as error:
        if recovery_of(error) is not None:
            raise
    else:
        return True
    # The token refuses, or another process destroys the key at the same time (field note 34).
    try:
        return pooled.destroy(_RESIDENT | {Attribute.ID: object_id}) > 0 or None
    except PKCS11Error as error:
        if recovery_of(error) is not None:
            raise
        return False
