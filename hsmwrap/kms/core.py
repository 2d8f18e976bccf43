"""What all operations share: database, backends, import service, clock, and access to keys' rows.

Every operation first deletes the material of its key if that has expired, and treats a key whose
deletion date has passed as deleted. So both take effect on time, with or without a sweeper. Each
expiry leaves a line in the audit log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import or_
from sqlalchemy.orm import Session
from sqlalchemy.sql.elements import ColumnElement

from hsmwrap.backend import Backend, KeyRef, ReSealsKeys
from hsmwrap.catalog import ProtectionLevel
from hsmwrap.errors import KeyNotFound, UnsupportedProtectionLevel
from hsmwrap.imports import ImportService, UsedTokens
from hsmwrap.kms.config import same_name
from hsmwrap.kms.database import Database
from hsmwrap.kms.errors import KeyUnusable
from hsmwrap.kms.objects import Objects, schedule_destruction
from hsmwrap.kms.rows import KeyRows
from hsmwrap.kms.schema import Key
from hsmwrap.kms.states import KeyState
from hsmwrap.kms.unusable import UnusableKeys
from hsmwrap.policy import Deployment


def no_step(_name: str) -> None:
    """The step hook outside of tests: does nothing."""


def by_name(backends: Iterable[Backend]) -> dict[str, Backend]:
    """The backends by the name that key references carry; the same backend may occur repeatedly.

    Raises:
        ConfigurationError: Two have the same name, so key references would be ambiguous.
    """
    named: dict[str, Backend] = {}
    for backend in backends:
        if named.setdefault(backend.name, backend) is not backend:
            raise same_name(backend.name)
    return named


@dataclass(frozen=True, slots=True)
class Core:
    """The parts of a KMS.

    Attributes:
        database: The database.
        backends: The backend of each protection level.
        named: All backends by name: these, and those of which only the keys are used.
        deployment: Where this runs, for the policy.
        imports: The import service over the same backends.
        objects: Keeps the backends' objects consistent with the rows.
        clock: Returns the current aware time.
        arn_prefix: The part of an ARN before the key id.
        rows: Reads rows of keys.
        audit: Writes an audit line for an action of the KMS itself: action and key id.
        unusable: Keys that cannot be used.
        used_tokens: Records used import tokens; None: tokens are reusable.
        step: Called with the name of each step after which a crash matters; for tests.
    """

    database: Database
    backends: Mapping[ProtectionLevel, Backend]
    named: Mapping[str, Backend]
    deployment: Deployment
    imports: ImportService
    objects: Objects
    clock: Callable[[], datetime]
    arn_prefix: str
    rows: KeyRows
    audit: Callable[[str, str], None]
    unusable: UnusableKeys
    used_tokens: UsedTokens | None = None
    step: Callable[[str], None] = no_step

    def backend_for(self, level: ProtectionLevel) -> Backend:
        """The backend of a protection level.

        Raises:
            UnsupportedProtectionLevel: None is configured.
        """
        backend = self.backends.get(level)
        if backend is None:
            raise UnsupportedProtectionLevel("no-backend", f"no backend is configured for {level}")
        return backend

    def backend_of(self, key: Key, reference: KeyRef) -> Backend:
        """The backend that has the key of a row.

        Raises:
            KeyUnusable: It is not configured, or may not serve the row's protection level.
        """
        backend = self.named.get(reference.backend)
        if backend is None:
            raise KeyUnusable(
                f"key {key.key_id} is in backend {reference.backend}, which is not configured: "
                f"add [former_backends.{reference.backend}]"
            )
        if key.protection_level not in backend.capabilities().protection_levels:
            raise KeyUnusable(
                f"key {key.key_id} has level {key.protection_level}, which backend "
                f"{backend.name} does not serve"
            )
        return backend

    def key_set_of(self, key: KeyRef) -> str | None:
        """Id of the key set that a sealed key needs; None for others, and where none is told."""
        resealing = ReSealsKeys.of(self.named[key.backend])
        return None if resealing is None else resealing.key_set_of(key)

    def current(self, key_id: str, now: datetime | None = None) -> Key:
        """The row of a key after expiry was applied, not to be changed; ``now``: not the clock's.

        Raises:
            KeyNotFound: The key does not exist.
            AuditFailed: The material expired and was deleted, but the audit log cannot be written.
        """
        now = now or self.clock()
        key = _existing(self.rows.get(key_id), now)
        if not _is_expired(key, now):
            return key
        expired = key.reference
        self.expire(key_id, now)
        self.objects.destroy(expired)
        return _existing(self.rows.get(key_id), now)

    @contextmanager
    def locked(self, key_id: str, now: datetime) -> Iterator[tuple[Session, Key]]:
        """A transaction with the row of a key locked, after expiry was applied.

        Raises:
            KeyNotFound: The key does not exist.
            AuditFailed: As :meth:`current`.
        """
        # In its own transaction: expired material stays deleted if the operation is then refused.
        self.current(key_id, now)
        with self.database.write() as transaction:
            yield transaction, _existing(transaction.get(Key, key_id, with_for_update=True), now)

    def expire(self, key_id: str, now: datetime) -> bool:
        """Delete the material if it has expired at ``now``; False if not, or if it is deleted.

        Raises:
            AuditFailed: It was deleted, but the audit log cannot be written.
        """
        with self.database.write() as transaction:
            key = transaction.get(Key, key_id, with_for_update=True)
            if key is None or not _is_expired(key, now):
                return False
            remove_material(transaction, key, now)
        self.audit("ExpireKeyMaterial", key_id)
        return True


def existing(now: datetime) -> ColumnElement[bool]:
    """Which rows are keys that exist at ``now``."""
    return or_(Key.deletion_at.is_(None), Key.deletion_at > now)


def remove_material(transaction: Session, key: Key, now: datetime) -> None:
    """Delete the material of a locked row and schedule its object's destruction.

    The check value stays. After the commit, :meth:`hsmwrap.kms.objects.Objects.destroy` destroys
    the object at once.
    """
    if key.reference is not None:
        schedule_destruction(transaction, KeyRef.from_bytes(key.reference), now)
    key.reference = key.backend = key.key_set = key.exposure = key.material_expires_at = None
    if key.state is not KeyState.PENDING_DELETION:
        key.state = KeyState.PENDING_IMPORT


def _existing(key: Key | None, now: datetime) -> Key:
    # After its deletion date a key does not exist, even if the sweeper has not deleted the row yet.
    if key is None or (key.deletion_at is not None and key.deletion_at <= now):
        raise KeyNotFound("no key has this id")
    return key


def _is_expired(key: Key, now: datetime) -> bool:
    return key.material_expires_at is not None and key.material_expires_at <= now
