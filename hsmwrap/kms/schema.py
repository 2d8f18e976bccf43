"""The rows of the reference KMS. They hold sealed blobs or object ids, never plaintext."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import BigInteger, Dialect, Enum, LargeBinary, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

from hsmwrap.backend import Exposure
from hsmwrap.catalog import KeySpec, Origin, ProtectionLevel
from hsmwrap.imports import Cmk
from hsmwrap.kms.states import KeyState

LOG_ID_LENGTH = 512
"""Longest name of an audit log."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class Instant(TypeDecorator[datetime]):
    """An aware time, kept as microseconds since 1970: the same order and value on each database."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> int | None:  # noqa: ARG002 (the hook's signature)
        """Aware time → microseconds."""
        return None if value is None else (value - _EPOCH) // _MICROSECOND

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
        check_value: Of the first material; kept when the material goes, for it alone may return.
        reference: :meth:`hsmwrap.backend.KeyRef.to_bytes`; None while there is no material.
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
    exposure: Mapped[Exposure | None] = mapped_column(_words(Exposure))

    def cmk(self) -> Cmk:
        """What the import service has to know of this key."""
        return Cmk(self.key_id, self.key_spec, self.protection_level, self.origin, self.check_value)


class DoomedObject(Row):
    """A backend object that will be destroyed at ``due_at``, unless a commit lifts the row first.

    Written before an import makes the object (``due_at`` is then the end of its lease) and when
    a key lets go of one (``due_at`` is then). ``condemned`` rows are past lifting. ``twice`` rows
    are kept one lease more and destroyed again: a stalled import may yet make the object.
    """

    __tablename__ = "doomed_objects"

    reference: Mapped[bytes] = mapped_column(LargeBinary, primary_key=True)
    due_at: Mapped[datetime] = mapped_column(Instant, index=True)
    condemned: Mapped[bool] = mapped_column(default=False)
    twice: Mapped[bool]


class UsedOnce(Row):
    """Something that may be used once: a nonce, or a single-use import token."""

    __tablename__ = "used_once"

    digest: Mapped[bytes] = mapped_column(LargeBinary(32), primary_key=True)
    expires_at: Mapped[datetime] = mapped_column(Instant, index=True)


class AuditAnchor(Row):
    """A line that an audit log had at some time, and must have for ever."""

    __tablename__ = "audit_anchors"

    log: Mapped[str] = mapped_column(String(LOG_ID_LENGTH), primary_key=True)
    sequence: Mapped[int] = mapped_column(BigInteger)
    digest: Mapped[str] = mapped_column(String(64))
    position: Mapped[int] = mapped_column(BigInteger)
