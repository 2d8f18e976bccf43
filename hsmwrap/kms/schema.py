"""The tables of the reference KMS. They hold sealed blobs or object ids, never plaintext keys."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import BigInteger, Dialect, Enum, LargeBinary, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

from hsmwrap.backend import Exposure, ImportedKey
from hsmwrap.catalog import KeySpec, Origin, ProtectionLevel
from hsmwrap.imports import Cmk
from hsmwrap.kms.states import KeyState

LOG_ID_LENGTH = 512
"""Longest name of an audit log."""
ALIAS_LENGTH = 255
"""Longest name of an alias, without its prefix ``alias/``."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def microseconds(time: datetime) -> int:
    """Microseconds from 1970 to an aware time."""
    return (time - _EPOCH) // _MICROSECOND


class Instant(TypeDecorator[datetime]):
    """An aware time, stored as microseconds since 1970: same order and value on each database."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> int | None:  # noqa: ARG002 (the hook's signature)
        """Aware time → microseconds."""
        return None if value is None else microseconds(value)

    def process_result_value(self, value: Any | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002 (the hook's signature)
        """Microseconds → aware time."""
        return None if value is None else _EPOCH + value * _MICROSECOND


def _words(enum: type[StrEnum]) -> Enum:
    return Enum(
        enum,
        native_enum=False,
        length=32,
        values_callable=lambda members: [member.value for member in members],
    )


class Row(DeclarativeBase):
    """Base of all rows."""


class Key(Row):
    """A CMK.

    Attributes:
        key_id: A UUID.
        version_id: A UUID, the KeyVersionId; EXTERNAL keys never have a second version.
        check_value: Check value (KCV) of the first material. It stays when the material is
            deleted, because only the same material may be imported again.
        reference: :meth:`hsmwrap.backend.KeyRef.to_bytes`; None without material.
        backend: Name of the backend that has the material, as in the reference.
        key_set: Id of its key set that the material is sealed under; None: it is an object in the
            HSM, or the backend does not tell.
    """

    __tablename__ = "keys"

    key_id: Mapped[str] = mapped_column(String(36), primary_key=True)
    version_id: Mapped[str] = mapped_column(String(36))
    arn: Mapped[str] = mapped_column(String(255))
    key_spec: Mapped[KeySpec] = mapped_column(_words(KeySpec))
    origin: Mapped[Origin] = mapped_column(_words(Origin))
    protection_level: Mapped[ProtectionLevel] = mapped_column(_words(ProtectionLevel))
    state: Mapped[KeyState] = mapped_column(_words(KeyState))
    description: Mapped[str] = mapped_column(Text)
    creator: Mapped[str] = mapped_column(String(255))
    created_at: Mapped[datetime] = mapped_column(Instant, index=True)
    deletion_at: Mapped[datetime | None] = mapped_column(Instant, index=True)
    material_expires_at: Mapped[datetime | None] = mapped_column(Instant, index=True)
    check_value: Mapped[bytes | None] = mapped_column(LargeBinary)
    reference: Mapped[bytes | None] = mapped_column(LargeBinary)
    backend: Mapped[str | None] = mapped_column(String(32))
    key_set: Mapped[str | None] = mapped_column(String(32))
    exposure: Mapped[Exposure | None] = mapped_column(_words(Exposure))

    def hold(self, imported: ImportedKey, key_set: str | None) -> None:
        """Take imported material; ``key_set`` is what it is sealed under."""
        self.reference, self.backend = imported.key.to_bytes(), imported.key.backend
        self.key_set, self.exposure = key_set, imported.exposure
        self.check_value = imported.check_value

    def cmk(self) -> Cmk:
        """The key as the import service takes it."""
        return Cmk(self.key_id, self.key_spec, self.protection_level, self.origin, self.check_value)


class Alias(Row):
    """A name of a CMK; it goes with the key's row.

    Attributes:
        name: With the prefix ``alias/``.
    """

    __tablename__ = "aliases"

    name: Mapped[str] = mapped_column(String(len("alias/") + ALIAS_LENGTH), primary_key=True)
    key_id: Mapped[str] = mapped_column(String(36), index=True)


class ScheduledDestruction(Row):
    """A backend object that is destroyed at ``due_at``, unless a commit cancels that first.

    Written before an import makes the object (``due_at`` is the end of its lease), and when a key
    drops its object (``due_at`` is now). See :mod:`hsmwrap.kms.objects`.

    Attributes:
        reference: :meth:`hsmwrap.backend.KeyRef.to_bytes`.
        started: True once a process may have destroyed the object: too late to cancel.
        repeat: True for a pending object: a stalled import may make it after it was destroyed, so
            it is destroyed again one lease later.
    """

    __tablename__ = "scheduled_destructions"

    reference: Mapped[bytes] = mapped_column(LargeBinary, primary_key=True)
    due_at: Mapped[datetime] = mapped_column(Instant, index=True)
    started: Mapped[bool] = mapped_column(default=False)
    repeat: Mapped[bool]


class Nonce(Row):
    """A used nonce, or a floor; see :mod:`hsmwrap.kms.nonces`. Its rows are elsewhere with SQLite.

    Unlogged in PostgreSQL: not written to its log, not in its replicas, emptied after a crash.
    """

    __tablename__ = "nonces"

    digest: Mapped[bytes] = mapped_column(LargeBinary(32), primary_key=True)
    expires_at: Mapped[datetime] = mapped_column(Instant, index=True)


class NonceBound(Row):
    """Bound of an access key: no nonce was accepted whose mark expires at ``before`` or later."""

    __tablename__ = "nonce_bounds"

    digest: Mapped[bytes] = mapped_column(LargeBinary(32), primary_key=True)
    before: Mapped[datetime] = mapped_column(Instant, index=True)


class UsedOnce(Row):
    """A used import token."""

    __tablename__ = "used_once"

    digest: Mapped[bytes] = mapped_column(LargeBinary(32), primary_key=True)
    expires_at: Mapped[datetime] = mapped_column(Instant, index=True)


class FailedImport(Row):
    """How many imports under an import token failed."""

    __tablename__ = "failed_imports"

    digest: Mapped[bytes] = mapped_column(LargeBinary(32), primary_key=True)
    failures: Mapped[int]
    expires_at: Mapped[datetime] = mapped_column(Instant, index=True)


class ResidentKey(Row):
    """An outstanding wrapping key that is an object in an HSM; ``key_id`` is the CMK's."""

    __tablename__ = "resident_keys"

    claim: Mapped[bytes] = mapped_column(LargeBinary(32), primary_key=True)
    key_id: Mapped[str] = mapped_column(String(36), index=True)
    expires_at: Mapped[datetime] = mapped_column(Instant, index=True)


class AuditAnchor(Row):
    """A line that an audit log had at some time, and must still have.

    Attributes:
        set_at: When it was the last line.
    """

    __tablename__ = "audit_anchors"

    log: Mapped[str] = mapped_column(String(LOG_ID_LENGTH), primary_key=True)
    sequence: Mapped[int] = mapped_column(BigInteger)
    digest: Mapped[str] = mapped_column(String(64))
    position: Mapped[int] = mapped_column(BigInteger)
    set_at: Mapped[datetime] = mapped_column(Instant)


class KeySetSeen(Row):
    """A key set that has been a backend's current one.

    Attributes:
        superseded_at: When a process of the KMS first found another one current; None: it is.
    """

    __tablename__ = "key_sets_seen"

    backend: Mapped[str] = mapped_column(String(32), primary_key=True)
    key_set: Mapped[str] = mapped_column(String(32), primary_key=True)
    superseded_at: Mapped[datetime | None] = mapped_column(Instant)
