"""Things that may be used once: signature nonces, and import tokens if they are single-use.

The database decides, so this holds for all threads, processes and machines that share it.
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
    """Marks things as used, each by a digest."""

    def __init__(self, database: Database, clock: Callable[[], datetime]) -> None:
        """Take the database, and the clock that decides which marks have expired."""
        self._database = database
        self._clock = clock

    def use(self, digest: bytes, expires_at: datetime) -> bool:
        """Mark it as used, atomically; False if an unexpired mark exists."""
        insert = self._database.insert(UsedOnce).values(digest=digest, expires_at=expires_at)
        unless_used = insert.on_conflict_do_update(
            index_elements=[UsedOnce.digest],
            set_={"expires_at": expires_at},
            where=UsedOnce.expires_at <= self._clock(),
        ).returning(UsedOnce.digest)
        with self._database.write() as transaction:
            return transaction.execute(unless_used).first() is not None

    def is_expired(self, expires_at: datetime) -> bool:
        """Whether the time has passed on the store's clock."""
        return expires_at <= self._clock()

    def release(self, digest: bytes) -> None:
        """Delete the mark."""
        with self._database.write() as transaction:
            transaction.execute(delete(UsedOnce).where(UsedOnce.digest == digest))

    def purge(self, now: datetime) -> None:
        """Delete the expired marks."""
        with self._database.write() as transaction:
            transaction.execute(delete(UsedOnce).where(UsedOnce.expires_at <= now))


class NonceStore:
    """Signature nonces, shared between the processes on one database."""

    def __init__(self, once: OnceStore) -> None:
        """Take the store."""
        self._once = once

    def use(self, access_key_id: str, nonce: str, expires_at: datetime) -> bool:
        """Mark the nonce as used, atomically; False if this access key used it before.

        Args:
            access_key_id: The access key that signed with the nonce.
            nonce: The nonce, of any length.
            expires_at: Aware time when the mark expires: then the request itself is too old.
        """
        return self._once.use(_digest("nonce", access_key_id.encode(), nonce.encode()), expires_at)


class UsedImportTokens:
    """:class:`hsmwrap.imports.UsedTokens` in the database."""

    def __init__(self, once: OnceStore) -> None:
        """Take the store."""
        self._once = once

    def claim(self, token_id: bytes, expires_at: datetime) -> bool:
        """Mark the id as used, atomically; False if it was used before or its token has expired.

        The mark is kept longer than the token is valid, by :data:`hsmwrap.imports.MARK_MARGIN`.
        """
        if self._once.is_expired(expires_at):
            return False
        return self._once.use(_digest("import token", token_id), expires_at + MARK_MARGIN)

    def release(self, token_id: bytes) -> None:
        """Release a claim after a failed import."""
        self._once.release(_digest("import token", token_id))


def _digest(purpose: str, *parts: bytes) -> bytes:
    # Each part is hashed on its own, so different parts never give the same input.
    pieces = b"".join(hashlib.sha256(part).digest() for part in (purpose.encode(), *parts))
    return hashlib.sha256(pieces).digest()
