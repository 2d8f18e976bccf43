"""What may be used once: signature nonces, and import tokens where they are single-use.

The database decides, so it holds for all threads, processes and machines on it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import datetime

from sqlalchemy import delete

from hsmwrap.imports import MARK_MARGIN
from hsmwrap.kms.database import Database
from hsmwrap.kms.schema import UsedOnce


class OnceStore:
    """Marks things as used, each by a digest of what it is."""

    def __init__(self, database: Database, clock: Callable[[], datetime]) -> None:
        """Take the database, and the clock that says which marks are over."""
        self._database = database
        self._clock = clock

    def use(self, digest: bytes, expires_at: datetime) -> bool:
        """Use it, atomically; False if it was used before and that mark is not over."""
        insert = self._database.insert(UsedOnce).values(digest=digest, expires_at=expires_at)
        unless_used = insert.on_conflict_do_update(
            index_elements=[UsedOnce.digest],
            set_={"expires_at": expires_at},
            where=UsedOnce.expires_at <= self._clock(),
        ).returning(UsedOnce.digest)
        with self._database.write() as transaction:
            return transaction.execute(unless_used).first() is not None

    def is_over(self, expires_at: datetime) -> bool:
        """Whether the time has come, by the clock that says which marks are over."""
        return expires_at <= self._clock()

    def forget(self, digest: bytes) -> None:
        """Take the mark away."""
        with self._database.write() as transaction:
            transaction.execute(delete(UsedOnce).where(UsedOnce.digest == digest))

    def purge(self, now: datetime) -> None:
        """Drop the marks that are over."""
        with self._database.write() as transaction:
            transaction.execute(delete(UsedOnce).where(UsedOnce.expires_at <= now))


class NonceStore:
    """Signature nonces, shared between the processes on one database."""

    def __init__(self, once: OnceStore) -> None:
        """Take the store."""
        self._once = once

    def use(self, access_key_id: str, nonce: str, expires_at: datetime) -> bool:
        """Use the nonce, atomically; False if this access key used it and that is not over.

        Args:
            access_key_id: The access key that signed with the nonce.
            nonce: The nonce, of any length.
            expires_at: Aware time from which the request's timestamp is too old anyway.
        """
        return self._once.use(_digest("nonce", access_key_id.encode(), nonce.encode()), expires_at)


class UsedImportTokens:
    """:class:`hsmwrap.imports.UsedTokens` in the database."""

    def __init__(self, once: OnceStore) -> None:
        """Take the store."""
        self._once = once

    def claim(self, token_id: bytes, expires_at: datetime) -> bool:
        """Mark the id as used, atomically; False if it was already, or if its token is over.

        The mark outlasts the token by :data:`hsmwrap.imports.MARK_MARGIN`.
        """
        if self._once.is_over(expires_at):
            return False
        return self._once.use(_digest("import token", token_id), expires_at + MARK_MARGIN)

    def release(self, token_id: bytes) -> None:
        """Take a claim back after a failed import."""
        self._once.forget(_digest("import token", token_id))


def _digest(purpose: str, *parts: bytes) -> bytes:
    # Digesting each part first leaves no two ways of splitting one input.
    pieces = b"".join(hashlib.sha256(part).digest() for part in (purpose.encode(), *parts))
    return hashlib.sha256(pieces).digest()
