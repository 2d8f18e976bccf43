"""Things that may be used once, or a few times: single-use tokens, failed imports.

And things of which there may be a bounded number: resident wrapping keys.

The database decides, so this holds for all threads, processes and machines that share it.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from datetime import datetime

from sqlalchemy import delete, func, select

from hsmwrap.imports import MARK_MARGIN, ResidentBounds
from hsmwrap.kms.database import Database
from hsmwrap.kms.schema import FailedImport, ResidentKey, UsedOnce


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
        """Delete the expired marks and counts."""
        with self._database.write() as transaction:
            for table in (UsedOnce, FailedImport, ResidentKey):
                transaction.execute(delete(table).where(table.expires_at <= now))


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
        return self._once.use(digest("import token", token_id), expires_at + MARK_MARGIN)

    def release(self, token_id: bytes) -> None:
        """Release a claim after a failed import."""
        self._once.release(digest("import token", token_id))


class FailedImportTokens:
    """:class:`hsmwrap.imports.FailedImports` in the database."""

    def __init__(self, database: Database) -> None:
        """Take the database."""
        self._database = database

    def count(self, token_id: bytes) -> int:
        """The number of failed imports under this token, on all processes."""
        with self._database.read() as transaction:
            row = transaction.get(FailedImport, digest("failed import", token_id))
            return 0 if row is None else row.failures

    def record(self, token_id: bytes, expires_at: datetime) -> int:
        """Count one more, atomically; returns the number.

        It is kept longer than the token is valid, by :data:`hsmwrap.imports.MARK_MARGIN`.
        """
        first = self._database.insert(FailedImport).values(
            digest=digest("failed import", token_id),
            failures=1,
            expires_at=expires_at + MARK_MARGIN,
        )
        one_more = first.on_conflict_do_update(
            index_elements=[FailedImport.digest], set_={"failures": FailedImport.failures + 1}
        ).returning(FailedImport.failures)
        with self._database.write() as transaction:
            failures: int = transaction.execute(one_more).scalar_one()
            return failures


class ResidentWrappingKeys:
    """:class:`hsmwrap.imports.ResidentKeys` in the database."""

    def __init__(self, database: Database, clock: Callable[[], datetime]) -> None:
        """Take the database, and the clock that says which keys have expired."""
        self._database = database
        self._clock = clock

    def claim(self, cmk_id: str, expires_at: datetime, bounds: ResidentBounds) -> bytes:
        """Count one more, on all processes, until ``expires_at``."""
        claim = secrets.token_bytes(32)
        outstanding = select(func.count()).where(ResidentKey.expires_at > self._clock())
        with self._database.write() as transaction:
            of_cmk = transaction.scalar(outstanding.where(ResidentKey.key_id == cmk_id)) or 0
            bounds.require(of_cmk, transaction.scalar(outstanding) or 0)
            transaction.add(ResidentKey(claim=claim, key_id=cmk_id, expires_at=expires_at))
        return claim

    def release(self, claim: bytes) -> None:
        """Take a claim back."""
        with self._database.write() as transaction:
            transaction.execute(delete(ResidentKey).where(ResidentKey.claim == claim))


def digest(purpose: str, *parts: bytes) -> bytes:
    """SHA-256 of a purpose and its parts."""
    # Each part is hashed on its own, so different parts never give the same input.
    pieces = b"".join(hashlib.sha256(part).digest() for part in (purpose.encode(), *parts))
    return hashlib.sha256(pieces).digest()
