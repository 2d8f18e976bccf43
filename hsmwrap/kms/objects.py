"""Objects in a backend and rows in the database stay consistent when a process crashes.

An import makes an object in the backend before it commits the row that refers to it. So:

* Before the import, a row schedules the destruction of the object that it is about to make, for the
  end of the import's lease. Until the commit, the object is *pending*.
* The commit that stores the reference cancels that destruction in the same transaction.
* A commit that drops a reference schedules the destruction of its object in the same transaction.
* Every process destroys objects whose destruction is due.

An object is therefore either in a key's row or scheduled for destruction. Sealed blobs need none of
this.

A process can stall for longer than its lease. So a destruction is first marked as started, and a
commit cannot cancel one that has started: the stalled import fails with ``LeaseLost``, and its key
never refers to a destroyed object. If the process stalled before it made the object, the first
destruction found nothing. Then the failing import schedules a second one. For a process that is
killed there, the row of a pending object is kept, and repeated one lease later.
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
from hsmwrap.kms.database import Database, surely_rolled_back
from hsmwrap.kms.errors import LeaseLost
from hsmwrap.kms.schema import ScheduledDestruction

LEASE = timedelta(minutes=10)
"""How long an import may take before other processes treat it as dead."""
OBJECT_ID_LENGTH = 16

_log = logging.getLogger(__name__)


class Objects:
    """Keeps the objects in the backends consistent with the rows."""

    def __init__(
        self,
        database: Database,
        backends: Mapping[str, Backend],
        clock: Callable[[], datetime],
        lease: timedelta = LEASE,
        step: Callable[[str], None] = lambda _name: None,
    ) -> None:
        """Take the database, the backends by name, the clock, and the lease of an import.

        ``step`` is called with the name of each step after which a crash matters; for tests.
        """
        self._database = database
        self._backends = dict(backends)
        self._clock = clock
        self._lease = lease
        self._step = step

    @contextmanager
    def pending(self, backend: Backend, key_spec: KeySpec) -> Iterator[KeyRef | None]:
        """Schedule the destruction of an import's object, and destroy it if the import fails.

        Yields:
            Reference to the pending object; its ``data`` is the object id for the import. None if
            the backend keeps such keys as sealed blobs.

        Raises:
            ServiceUnavailable: The backend or the database is unavailable.
        """
        pending = self._schedule_pending(backend, key_spec)
        self._step("destruction scheduled")
        try:
            yield pending
        except BaseException as error:
            if pending is not None:
                self._destroy_pending(pending, error)
            raise

    def require_pending(self, made: KeyRef, pending: KeyRef | None) -> None:
        """Make sure that the import made the object whose destruction was scheduled.

        Raises:
            HsmError: It made another object, which a crash would orphan; that one was destroyed.
        """
        if pending is not None and made != pending:
            self._backends[made.backend].destroy_key(made)
            raise HsmError(f"backend {made.backend} did not give a key's object the requested id")

    def destroy(self, reference: bytes | None) -> None:
        """Destroy an object at once if its destruction is scheduled; a sealed blob has none.

        Raises nothing: what fails remains scheduled.
        """
        if reference is None:
            return
        now = self._clock()
        try:
            if KeyRef.from_bytes(reference).custody is not Custody.HSM_INTERNAL:
                return
            self._destroy_all(ScheduledDestruction.reference == reference, now)
        except Exception as error:  # noqa: BLE001 (the caller's operation is already committed)
            _log.warning("object not destroyed yet", extra={"error": type(error).__name__})

    def destroy_due(self, now: datetime) -> None:
        """Destroy the objects that are due; those of an unreachable backend remain scheduled.

        Raises:
            ServiceUnavailable: The database is unavailable.
        """
        self._destroy_all(ScheduledDestruction.due_at <= now, now)

    def _schedule_pending(self, backend: Backend, key_spec: KeySpec) -> KeyRef | None:
        capability = backend.capabilities().key_for(key_spec)
        if capability is None or capability.custody is not Custody.HSM_INTERNAL:
            return None
        object_id = secrets.token_bytes(OBJECT_ID_LENGTH)
        pending = KeyRef(backend.name, key_spec, Custody.HSM_INTERNAL, object_id)
        with self._database.write() as transaction:
            schedule_destruction(transaction, pending, self._clock() + self._lease, repeat=True)
        return pending

    def _destroy_pending(self, pending: KeyRef, error: BaseException) -> None:
        reference = pending.to_bytes()
        due = {"due_at": self._clock(), "repeat": False}
        # Another process may have finished the destruction and deleted the row: then insert it
        # again. Not if the commit may have happened, since that also deletes the row.
        upsert = self._database.insert(ScheduledDestruction).values(
            reference=reference, started=False, **due
        )
        upsert = upsert.on_conflict_do_update(
            index_elements=[ScheduledDestruction.reference], set_=due
        )
        only_existing = (
            update(ScheduledDestruction)
            .values(due)
            .where(ScheduledDestruction.reference == reference)
        )
        try:
            with self._database.write() as transaction:
                transaction.execute(upsert if surely_rolled_back(error) else only_existing)
        except Exception as failed:  # noqa: BLE001 (the import's own failure is what is raised)
            facts = {"object_id": pending.data.hex(), "error": type(failed).__name__}
            _log.warning("object of a failed import not destroyed yet", extra=facts)
            return
        self.destroy(reference)

    def _destroy_all(self, which: ColumnElement[bool], now: datetime) -> None:
        for reference, due_at in self._start(which):
            self._step("destruction started")
            try:
                key = KeyRef.from_bytes(reference)
                self._backends[key.backend].destroy_key(key)
            except Exception as error:  # noqa: BLE001 (the other objects are destroyed all the same)
                _log.warning("object not destroyed yet", extra={"error": type(error).__name__})
                continue
            self._step("object destroyed")
            self._finish(reference, due_at, now)

    def _start(self, which: ColumnElement[bool]) -> list[tuple[bytes, datetime]]:
        """Mark destructions as started; returns reference and due time of each."""
        any_due = select(ScheduledDestruction.due_at).where(which).limit(1)
        with self._database.read() as transaction:  # most often there are none: lock nothing
            if transaction.scalar(any_due) is None:
                return []
        # In one order, and without waiting for locked rows: this cannot deadlock.
        rows = select(ScheduledDestruction).where(which).order_by(ScheduledDestruction.reference)
        with self._database.write() as transaction:
            started = transaction.scalars(rows.with_for_update(skip_locked=True)).all()
            for row in started:
                row.started = True
            return [(row.reference, row.due_at) for row in started]

    def _finish(self, reference: bytes, due_at: datetime, now: datetime) -> None:
        """Delete the row of a destroyed object, or schedule its second destruction."""
        with self._database.write() as transaction:
            row = transaction.get(ScheduledDestruction, reference, with_for_update=True)
            # Another process finished it, or the object was made and scheduled again since.
            if row is None or row.due_at != due_at:
                return
            if row.repeat:
                row.repeat, row.due_at = False, now + self._lease
            else:
                transaction.delete(row)


def schedule_destruction(
    transaction: Session, key: KeyRef, due_at: datetime, *, repeat: bool = False
) -> None:
    """Schedule the destruction of the object of ``key``; does nothing for a sealed blob.

    ``repeat`` destroys it a second time one lease later: for an object that is not made yet.
    """
    if key.custody is Custody.HSM_INTERNAL:
        transaction.add(
            ScheduledDestruction(
                reference=key.to_bytes(), due_at=due_at, started=False, repeat=repeat
            )
        )


def cancel_destruction(transaction: Session, key: KeyRef) -> None:
    """Cancel the destruction of the object of ``key``: this transaction puts it into a row.

    Raises:
        LeaseLost: The import took longer than its lease, and the destruction has started.
    """
    if key.custody is not Custody.HSM_INTERNAL:
        return
    cancelled = transaction.execute(
        delete(ScheduledDestruction)
        .where(
            ScheduledDestruction.reference == key.to_bytes(),
            ScheduledDestruction.started.is_(False),
        )
        .returning(ScheduledDestruction.reference)
    )
    if cancelled.first() is None:
        raise LeaseLost("the import took longer than its lease and was cancelled; import again")
