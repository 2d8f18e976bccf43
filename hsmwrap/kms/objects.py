"""Token objects and rows stay in step, whatever crashes between them.

An import writes down the object that it is about to make as doomed; the commit that puts the
object into a key's row lifts that in the same transaction. A key that lets go of an object dooms
it in the same transaction. Whatever is doomed and due is destroyed, by whoever comes by: so an
object is in a row, or on its way out. Nothing of this is needed for sealed blobs.

A due row is condemned before its object is destroyed, and a commit lifts no condemned row: a
process that stalled past its lease fails rather than commit a key whose object is gone. If it
stalled before it made the object, there was nothing to destroy yet: then it dooms the object again
when it fails; and for one that is killed there, the row is kept and the object destroyed once more
a lease later.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session
from sqlalchemy.sql.elements import ColumnElement

from hsmwrap.backend import Backend, Custody, KeyRef
from hsmwrap.catalog import KeySpec
from hsmwrap.errors import HsmError
from hsmwrap.kms.database import Database, left_nothing
from hsmwrap.kms.errors import LeaseLost
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

    @contextmanager
    def making(self, backend: Backend, key_spec: KeySpec) -> Iterator[KeyRef | None]:
        """For the length of an import: write its object down, and destroy it if the import fails.

        Yields:
            Reference to the object, whose ``data`` is the object id for the import; None where
            keys are sealed blobs.

        Raises:
            ServiceUnavailable: The backend or the database is away for now.
        """
        intended = self._intend(backend, key_spec)
        self._step("intent written")
        try:
            yield intended
        except BaseException as error:
            if intended is not None:
                self._abandon(intended, error)
            raise

    def require_as_intended(self, made: KeyRef, intended: KeyRef | None) -> None:
        """Make sure that the object written down is the one that was made.

        Raises:
            HsmError: It is another, which a crash would orphan; it was destroyed.
        """
        if intended is not None and made != intended:
            self._backends[made.backend].destroy_key(made)
            raise HsmError(f"backend {made.backend} did not name a key's object as it was told")

    def destroy(self, reference: bytes | None) -> None:
        """Destroy an object that a commit doomed, if it did. Raises nothing: it remains doomed."""
        if reference is None:
            return
        now = self._clock()
        try:
            self._destroy_all(DoomedObject.reference == reference, now)
        except Exception as error:  # noqa: BLE001 (what was asked for is done already)
            _log.warning("object not destroyed yet", extra={"error": type(error).__name__})

    def destroy_due(self, now: datetime) -> None:
        """Destroy the objects that are due; those of an unreachable backend wait for next time.

        Raises:
            ServiceUnavailable: The database is away for now.
        """
        self._destroy_all(DoomedObject.due_at <= now, now)

    def _intend(self, backend: Backend, key_spec: KeySpec) -> KeyRef | None:
        capability = backend.capabilities().key_for(key_spec)
        if capability is None or capability.custody is not Custody.HSM_INTERNAL:
            return None
        object_id = secrets.token_bytes(OBJECT_ID_LENGTH)
        intended = KeyRef(backend.name, key_spec, Custody.HSM_INTERNAL, object_id)
        with self._database.write() as transaction:
            doom(transaction, intended, self._clock() + self._lease, twice=True)
        return intended

    def _abandon(self, intended: KeyRef, error: BaseException) -> None:
        reference = intended.to_bytes()
        due = {"due_at": self._clock(), "twice": False}
        # No row may be left to change: others swept it away. Then it has to be written anew; but
        # not where the commit may have happened, which took the row away to let the object live.
        again = self._database.insert(DoomedObject).values(
            reference=reference, condemned=False, **due
        )
        again = again.on_conflict_do_update(index_elements=[DoomedObject.reference], set_=due)
        if_there = update(DoomedObject).values(due).where(DoomedObject.reference == reference)
        try:
            with self._database.write() as transaction:
                transaction.execute(again if left_nothing(error) else if_there)
        except Exception as failed:  # noqa: BLE001 (the import's own failure is what is raised)
            facts = {"object_id": intended.data.hex(), "error": type(failed).__name__}
            _log.warning("abandoned import not cleaned up yet", extra=facts)
            return
        self.destroy(reference)

    def _destroy_all(self, which: ColumnElement[bool], now: datetime) -> None:
        for reference, due_at in self._condemn(which):
            self._step("object condemned")
            if self._destroy(reference):
                self._step("object destroyed")
                self._forget(reference, due_at, now)

    def _condemn(self, which: ColumnElement[bool]) -> list[tuple[bytes, datetime]]:
        with self._database.read() as transaction:
            if transaction.scalar(select(DoomedObject.due_at).where(which).limit(1)) is None:
                return []
        # In one order and past the locks of others, so that no two wait for each other.
        rows = select(DoomedObject).where(which).order_by(DoomedObject.reference)
        with self._database.write() as transaction:
            condemned = transaction.scalars(rows.with_for_update(skip_locked=True)).all()
            for row in condemned:
                row.condemned = True
            return [(row.reference, row.due_at) for row in condemned]

    def _destroy(self, reference: bytes) -> bool:
        try:
            key = KeyRef.from_bytes(reference)
            self._backends[key.backend].destroy_key(key)
        except Exception as error:  # noqa: BLE001 (one object keeps no other)
            _log.warning("object not destroyed yet", extra={"error": type(error).__name__})
            return False
        return True

    def _forget(self, reference: bytes, due_at: datetime, now: datetime) -> None:
        """Forget an object that was destroyed, or keep its row for the second time."""
        with self._database.write() as transaction:
            row = transaction.get(DoomedObject, reference, with_for_update=True)
            # Another sweep was here, or the object was made and doomed again since.
            if row is None or row.due_at != due_at:
                return
            if row.twice:
                row.twice, row.due_at = False, now + self._lease
            else:
                transaction.delete(row)


def doom(transaction: Session, key: KeyRef, due_at: datetime, *, twice: bool = False) -> None:
    """Have the object of ``key`` destroyed at ``due_at``; a sealed blob has none.

    ``twice`` has it destroyed again a lease later, for an object that may not have been made yet.
    """
    if key.custody is Custody.HSM_INTERNAL:
        row = DoomedObject(reference=key.to_bytes(), due_at=due_at, condemned=False, twice=twice)
        transaction.add(row)


def lift(transaction: Session, key: KeyRef) -> None:
    """Let the object of ``key`` live: this transaction puts it into a row.

    Raises:
        LeaseLost: The import took longer than its lease, and the object is going or gone.
    """
    if key.custody is not Custody.HSM_INTERNAL:
        return
    row = (DoomedObject.reference == key.to_bytes(), DoomedObject.condemned.is_(False))
    lifted = transaction.execute(delete(DoomedObject).where(*row).returning(DoomedObject.reference))
    if lifted.first() is None:
        raise LeaseLost("the import took too long and was given up; import again")
