"""Token objects and rows stay in step, whatever crashes between them.

An import writes down the object that it is about to make as doomed; the commit that puts the
object into a key's row lifts that in the same transaction. A key that lets go of an object dooms
it in the same transaction. Whatever is doomed and due is destroyed, by whoever comes by: so an
object is in a row, or on its way out. Nothing of this is needed for sealed blobs.

A due row is condemned before its object is destroyed, and a commit lifts no condemned row: a
process that stalled past its lease fails rather than commit a key whose object is gone.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from hsmwrap.backend import Backend, Custody, KeyRef
from hsmwrap.catalog import KeySpec
from hsmwrap.errors import HsmError, HsmwrapError, ServiceUnavailable
from hsmwrap.kms.database import Database
from hsmwrap.kms.schema import DoomedObject

LEASE = timedelta(minutes=10)
"""How long an import may take before others take it for dead."""
OBJECT_ID_LENGTH = 16

_log = logging.getLogger(__name__)


class Objects:
    """Keeps the backends' objects in step with the rows."""

    def __init__(
        self,
        database: Database,
        backends: Mapping[str, Backend],
        clock: Callable[[], datetime],
        lease: timedelta = LEASE,
        step: Callable[[str], None] = lambda _name: None,
    ) -> None:
        """Take the database, the backends by name, the clock, and how long imports may take.

        ``step`` is called with the name of each step that a crash could fall behind; for tests.
        """
        self._database = database
        self._backends = dict(backends)
        self._clock = clock
        self._lease = lease
        self._step = step

    def intend(self, backend: Backend, key_spec: KeySpec) -> KeyRef | None:
        """Write down an object before it is made; None where keys are sealed blobs.

        Returns:
            Reference to the object, whose ``data`` is the object id for the import.
        """
        capability = backend.capabilities().key_for(key_spec)
        if capability is None or capability.custody is not Custody.HSM_INTERNAL:
            return None
        object_id = secrets.token_bytes(OBJECT_ID_LENGTH)
        intended = KeyRef(backend.name, key_spec, Custody.HSM_INTERNAL, object_id)
        with self._database.write() as transaction:
            doom(transaction, intended, self._clock() + self._lease)
        return intended

    def require_as_intended(self, made: KeyRef, intended: KeyRef | None) -> None:
        """Make sure that the object written down is the one that was made.

        Raises:
            HsmError: It is another, which a crash would orphan; it was destroyed.
        """
        if intended is not None and made != intended:
            self._backends[made.backend].destroy_key(made)
            raise HsmError(f"backend {made.backend} did not name a key's object as it was told")

    def abandon(self, intended: KeyRef | None) -> None:
        """Destroy what an import that failed may have made. Raises nothing: the lease remains."""
        if intended is None:
            return
        try:
            with self._database.write() as transaction:
                due = update(DoomedObject).values(due_at=self._clock())
                transaction.execute(due.where(DoomedObject.reference == intended.to_bytes()))
            self.destroy_due(self._clock())
        except HsmwrapError as error:
            _log.warning("abandoned import not cleaned up yet", extra={"code": error.code})

    def destroy_due(self, now: datetime) -> None:
        """Destroy the objects that are due; those of an unreachable backend wait for next time."""
        for reference in self._condemn(now):
            self._step("object condemned")
            if self._destroy(reference):
                self._step("object destroyed")
                with self._database.write() as transaction:
                    transaction.execute(
                        delete(DoomedObject).where(DoomedObject.reference == reference)
                    )

    def _condemn(self, now: datetime) -> list[bytes]:
        due = DoomedObject.due_at <= now
        with self._database.read() as transaction:
            if transaction.scalar(select(DoomedObject.due_at).where(due).limit(1)) is None:
                return []
        with self._database.write() as transaction:
            transaction.execute(update(DoomedObject).where(due).values(condemned=True))
            return list(
                transaction.scalars(
                    select(DoomedObject.reference).where(DoomedObject.condemned.is_(True))
                )
            )

    def _destroy(self, reference: bytes) -> bool:
        try:
            key = KeyRef.from_bytes(reference)
            self._backends[key.backend].destroy_key(key)
        except (HsmwrapError, KeyError) as error:
            _log.warning("object not destroyed yet", extra={"error": type(error).__name__})
            return False
        return True


def doom(transaction: Session, key: KeyRef, due_at: datetime) -> None:
    """Have the object of ``key`` destroyed at ``due_at``; a sealed blob has none."""
    if key.custody is Custody.HSM_INTERNAL:
        transaction.add(DoomedObject(reference=key.to_bytes(), due_at=due_at, condemned=False))


def lift(transaction: Session, key: KeyRef) -> None:
    """Let the object of ``key`` live: this transaction puts it into a row.

    Raises:
        ServiceUnavailable: The import took longer than its lease, and the object is going or
            gone.
    """
    if key.custody is not Custody.HSM_INTERNAL:
        return
    row = (DoomedObject.reference == key.to_bytes(), DoomedObject.condemned.is_(False))
    lifted = transaction.execute(delete(DoomedObject).where(*row).returning(DoomedObject.reference))
    if lifted.first() is None:
        raise ServiceUnavailable("the import took too long and was given up; import again")
