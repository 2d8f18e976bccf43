"""Key sets as the stored keys need them: usage, the move to the current set, safe retirement.

A sealed key opens only with the key set that it was sealed under. :class:`StoredKeys` moves the
keys of one backend to its current set, row by row: a row changes only if it still has the reference
that was moved. So it runs beside imports, deletions, expiry and use, in several processes at once,
and may be stopped at any time: what is left is done by the next run.

When a set was rotated, an HSM does not tell. So the database stores when a process of the KMS first
found that another set is current (:func:`note_current`): never before the rotation.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import func, select, update

from hsmwrap.backend import Backend, Custody, HasKeySets, KeyRef, KeySetInfo, ReSealsKeys
from hsmwrap.catalog import ProtectionLevel
from hsmwrap.errors import ConfigurationError, HsmError, KeyNotFound, UnsupportedOperation
from hsmwrap.kms.database import Database
from hsmwrap.kms.schema import Key, KeySetSeen

BATCH = 500
"""Rows that are read at a time."""
SETTLING = timedelta(minutes=2)
"""How long after a rotation a process may still seal under the old set (60 s), and some more."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run of :meth:`StoredKeys.reseal` is.

    Attributes:
        examined: Rows with a sealed key of this backend that were looked at.
        moved: Keys that are sealed under the current key set now.
        failed: Keys that did not move; the log says why.
    """

    examined: int = 0
    moved: int = 0
    failed: int = 0


class StoredKeys:
    """The keys of one backend that the database stores."""

    def __init__(
        self, database: Database, backend: Backend, audit: Callable[[str, str], None]
    ) -> None:
        """Take the database, the backend, and what writes an audit line of action and key id.

        Raises:
            UnsupportedOperation: The backend does not re-seal keys.
        """
        resealing, key_sets = ReSealsKeys.of(backend), HasKeySets.of(backend)
        if resealing is None or key_sets is None:
            raise UnsupportedOperation(f"backend {backend.name} does not re-seal keys")
        self._database = database
        self._backend = backend
        self._name = backend.name
        self._resealing = resealing
        self._key_sets = key_sets
        self._audit = audit

    @property
    def current_key_set(self) -> str:
        """Id of the key set that keys move to."""
        return self._key_sets.current_key_set()

    def usage(self) -> Mapping[str, int]:
        """How many stored keys need each key set, by its id.

        Raises:
            ServiceUnavailable: The database is unavailable.
        """
        return Counter(needed for _, _, _, needed in self._sealed())

    def reseal(
        self,
        *,
        most: int | None = None,
        report: Callable[[Progress], None] = lambda _progress: None,
    ) -> Progress:
        """Move the keys that need another key set than the current one.

        Args:
            most: Stop after as many that were tried; None: try all.
            report: Called after each row that was looked at; may wait, to make the run slower.

        Raises:
            ServiceUnavailable: The backend or the database is unavailable; call again later.
            AuditFailed: The audit log cannot be written. The key of the last row has moved.
        """
        current = self._key_sets.current_key_set()
        examined = moved = failed = 0
        for key_id, reference, check_value, needed in self._sealed():
            examined += 1
            if needed != current:
                if most is not None and moved + failed == most:
                    break
                if self._reseal_one(key_id, reference, check_value):
                    moved += 1
                elif self._is_still(key_id, reference):
                    failed += 1
            report(Progress(examined, moved, failed))
        return Progress(examined, moved, failed)

    def require_unneeded(self, key_set: str, wait: timedelta, now: datetime) -> None:
        """Refuse to retire a key set that a stored key or an unexpired import token may need.

        Args:
            key_set: Id of the key set to retire.
            wait: How long after a rotation something that the old set sealed may still be used:
                import tokens, key pairs in pools.
            now: The current time.

        Raises:
            ConfigurationError: It is needed; says by how many keys and until when.
            ServiceUnavailable: The backend or the database is unavailable.
        """
        note_current(self._database, self._backend, now)
        with self._database.write() as transaction:
            # A set that no process of this KMS has seen: it may have been current until now.
            unseen = {"backend": self._name, "key_set": key_set, "superseded_at": now}
            insert = self._database.insert(KeySetSeen).values(unseen)
            transaction.execute(insert.on_conflict_do_nothing())
            rotated = transaction.get_one(KeySetSeen, (self._name, key_set)).superseded_at
        if rotated is None:
            raise ConfigurationError(f"key set {key_set} is current; rotate first")
        needs = []
        if keys := self.usage().get(key_set, 0):
            needs.append(f"{keys} stored keys (`hsmwrap keys reseal` moves them)")
        if rotated + wait > now:
            end = (rotated + wait).replace(microsecond=0).isoformat()
            needs.append(f"import tokens, which may be valid until {end}")
        if needs:
            raise ConfigurationError(
                f"key set {key_set} of backend {self._name} is needed by {' and by '.join(needs)}. "
                "With --force it is retired all the same, and what needs it is lost"
            )

    def try_each(self) -> Progress:
        """Seal each key under the current set, and keep the row as it is: a drill.

        Each key that moves here opens, and has its check value.

        Raises:
            ServiceUnavailable: The backend or the database is unavailable.
        """
        rows = (row[:3] for row in self._sealed())
        tried = [self._resealed(*row) is not None for row in rows]
        return Progress(len(tried), tried.count(True), tried.count(False))

    def _resealed(self, key_id: str, reference: bytes, check_value: bytes | None) -> bytes | None:
        try:
            key = KeyRef.from_bytes(reference)
            return self._resealing.reseal(key, expected_check_value=check_value).to_bytes()
        except (KeyNotFound, UnsupportedOperation, HsmError) as error:
            facts = {"key_id": key_id, "error": type(error).__name__, "why": str(error)}
            _log.error("a key was not re-sealed", extra=facts)
            return None

    def _reseal_one(self, key_id: str, reference: bytes, check_value: bytes | None) -> bool:
        resealed = self._resealed(key_id, reference, check_value)
        if resealed is None:
            return False
        # An import, a deletion or another run may have changed the row meanwhile: theirs counts.
        change = (
            update(Key)
            .where(Key.key_id == key_id, Key.reference == reference)
            .values(reference=resealed, key_set=self._needed(key_id, resealed))
            .returning(Key.key_id)
        )
        with self._database.write() as transaction:
            changed = transaction.execute(change).first() is not None
        if changed:
            self._audit("ResealKey", key_id)
        return changed

    def _is_still(self, key_id: str, reference: bytes) -> bool:
        with self._database.read() as transaction:
            stored = transaction.scalar(select(Key.reference).where(Key.key_id == key_id))
        return stored == reference

    def _sealed(self) -> Iterator[tuple[str, bytes, bytes | None, str]]:
        """Key id, reference, check value and needed key set of each sealed key, in batches."""
        last = ""
        wanted = (
            select(Key.key_id, Key.reference, Key.check_value)
            .where(Key.reference.is_not(None))
            .order_by(Key.key_id)
            .limit(BATCH)
        )
        while True:
            with self._database.read() as transaction:
                rows = transaction.execute(wanted.where(Key.key_id > last)).all()
            for key_id, reference, check_value in rows:
                if reference and (needed := self._needed(key_id, reference)):
                    yield key_id, reference, check_value, needed
            if len(rows) < BATCH:
                return
            last = rows[-1].key_id

    def _needed(self, key_id: str, reference: bytes) -> str | None:
        try:
            key = KeyRef.from_bytes(reference)
            if key.backend != self._name or key.custody is Custody.HSM_INTERNAL:
                return None
            return self._resealing.key_set_of(key)
        except KeyNotFound as error:
            facts = {"key_id": key_id, "why": str(error)}
            _log.error("a stored key reference does not parse", extra=facts)
            return None


@dataclass(frozen=True, slots=True, order=True)
class Usage:
    """How many stored keys depend on a key set of a backend.

    Attributes:
        backend: Its name, as key references have it.
        level: Protection level of the keys.
        key_set: Id of the key set; empty for keys that are objects in the HSM.
        keys: How many.
    """

    backend: str
    level: ProtectionLevel
    key_set: str
    keys: int


def usage_of_backends(database: Database) -> list[Usage]:
    """What the stored keys depend on, by the rows alone: no backend is asked.

    Raises:
        ServiceUnavailable: The database is unavailable.
    """
    columns = (Key.backend, Key.protection_level, Key.key_set)
    counted = select(*columns, func.count()).where(Key.backend.is_not(None)).group_by(*columns)
    with database.read() as transaction:
        rows = transaction.execute(counted).all()
    return sorted(
        Usage(str(backend), level, key_set or "", keys) for backend, level, key_set, keys in rows
    )


def usage_of(database: Database, backend: str) -> Mapping[str, int]:
    """How many stored keys need each key set of a backend, by its id and by the rows alone.

    Raises:
        ServiceUnavailable: The database is unavailable.
    """
    if database.schema().revision is None:
        return {}
    counted: Counter[str] = Counter()
    for row in usage_of_backends(database):
        if row.backend == backend and row.key_set:
            counted[row.key_set] += row.keys
    return counted


def missing_from(sets: Iterable[KeySetInfo], usage: Mapping[str, int]) -> dict[str, int]:
    """Of how many stored keys need each key set, that of the sets that the backend lacks."""
    there = {each.key_set for each in sets if each.finished}
    return {key_set: keys for key_set, keys in sorted(usage.items()) if key_set not in there}


def note_current(database: Database, backend: Backend, now: datetime) -> str | None:
    """Store which key set is current, and that the ones before it are not any more.

    Returns:
        Id of the current key set; None where the backend has no key sets.

    Raises:
        ServiceUnavailable: The backend or the database is unavailable.
    """
    key_sets = HasKeySets.of(backend)
    if key_sets is None:
        return None
    current = key_sets.current_key_set()
    ours = KeySetSeen.backend == backend.name
    is_current = KeySetSeen.superseded_at.is_(None)
    with database.read() as transaction:
        noted = transaction.scalars(select(KeySetSeen.key_set).where(ours, is_current)).all()
    if noted == [current]:
        return current
    with database.write() as transaction:
        replaced = ours, is_current, KeySetSeen.key_set != current
        transaction.execute(update(KeySetSeen).where(*replaced).values(superseded_at=now))
        row = {"backend": backend.name, "key_set": current, "superseded_at": None}
        transaction.execute(
            database.insert(KeySetSeen)
            .values(row)
            .on_conflict_do_update(
                index_elements=[KeySetSeen.backend, KeySetSeen.key_set],
                set_={"superseded_at": None},
            )
        )
    return current


class Resealer:
    """The sweeper's part: moves the keys of each backend after a rotation, some in each sweep.

    A pass over all rows is made only until the current key set has settled, so that sweeps stay
    cheap while nothing is rotated.
    """

    def __init__(self, database: Database, audit: Callable[[str, str], None], most: int) -> None:
        """Take the database, the audit, and how many keys one call moves at most."""
        self._database = database
        self._audit = audit
        self._most = most
        self._first_seen: dict[str, tuple[str, datetime]] = {}
        self._settled: dict[str, str] = {}

    def __call__(self, backend: Backend, now: datetime) -> None:
        """Note the current key set, and move keys to it if it has not settled.

        Raises:
            ServiceUnavailable: The backend or the database is unavailable.
            AuditFailed: The audit log cannot be written.
        """
        current = note_current(self._database, backend, now)
        if not self._most or current is None or ReSealsKeys.of(backend) is None:
            return
        if self._settled.get(backend.name) == current:
            return
        seen, since = self._first_seen.get(backend.name, (None, now))
        if seen != current:
            since = now
            self._first_seen[backend.name] = current, now
        done = StoredKeys(self._database, backend, self._audit).reseal(most=self._most)
        if done.moved or done.failed:
            facts = {"backend": backend.name, "key_set": current}
            facts |= {"moved": str(done.moved), "failed": str(done.failed)}
            _log.info("keys re-sealed", extra=facts)
        if done.moved + done.failed < self._most and now - since >= SETTLING:
            self._settled[backend.name] = current
