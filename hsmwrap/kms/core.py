"""What all operations share: database, backends, import service, clock; and a key's row, settled.

A row is settled when material whose time is over has been taken out. Every operation settles the
row that it looks at, so expiry is on time whether or not a sweeper runs; so is deletion. Material
that goes leaves a line in the audit log, whoever took it out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.orm import Session

from hsmwrap.backend import Backend, KeyRef
from hsmwrap.catalog import ProtectionLevel
from hsmwrap.errors import KeyNotFound, UnsupportedProtectionLevel
from hsmwrap.imports import ImportService, UsedTokens
from hsmwrap.kms.config import same_name
from hsmwrap.kms.database import Database
from hsmwrap.kms.objects import Objects, schedule_destruction
from hsmwrap.kms.schema import Key
from hsmwrap.kms.states import KeyState
from hsmwrap.policy import Deployment


def no_step(_name: str) -> None:
    """The step hook of production: nothing happens between the steps."""


def by_name(backends: Iterable[Backend]) -> dict[str, Backend]:
    """The backends by the name that key references have; one backend may be there repeatedly.

    Raises:
        ConfigurationError: Two have the same name, so that keys of one would be looked for in
            the other.
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
        database: Where the rows are.
        backends: The backend of each protection level.
        deployment: Where this runs, for the policy.
        imports: The import service over the same backends.
        objects: Keeps the backends' objects in step with the rows.
        clock: Returns the current aware time.
        arn_prefix: What comes before the key id in an ARN.
        audit: Writes a line on what the KMS does by itself: action and key id.
        used_tokens: Where import tokens are marked as used; None: they are reusable.
        step: Called with the name of each step that a crash could fall behind; for tests.
    """

    database: Database
    backends: Mapping[ProtectionLevel, Backend]
    deployment: Deployment
    imports: ImportService
    objects: Objects
    clock: Callable[[], datetime]
    arn_prefix: str
    audit: Callable[[str, str], None]
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

    def current(self, key_id: str, now: datetime | None = None) -> Key:
        """The settled row of a key, detached; ``now`` is instead of the clock's time.

        Raises:
            KeyNotFound: There is no such key.
            AuditFailed: The material was over and is gone, but the audit log cannot say so.
        """
        now = now or self.clock()
        with self.database.read() as transaction:
            key = _find(transaction, key_id, now)
        if not _is_expired(key, now):
            return key
        over = key.reference
        self.expire(key_id, now)
        self.objects.destroy(over)
        with self.database.read() as transaction:
            return _find(transaction, key_id, now)

    @contextmanager
    def locked(self, key_id: str, now: datetime) -> Iterator[tuple[Session, Key]]:
        """A transaction on the settled row of a key; other writers stay off it until it ends.

        Raises:
            KeyNotFound: There is no such key.
            AuditFailed: As :meth:`current`.
        """
        # In a transaction of its own: what is over stays out if the operation is then refused.
        self.current(key_id, now)
        with self.database.write() as transaction:
            yield transaction, _find(transaction, key_id, now, lock=True)

    def expire(self, key_id: str, now: datetime) -> bool:
        """Take material out that is over at ``now``; False if there is none (any more).

        Raises:
            AuditFailed: It is out, but the audit log cannot say so.
        """
        with self.database.write() as transaction:
            key = transaction.get(Key, key_id, with_for_update=True)
            if key is None or not _is_expired(key, now):
                return False
            remove_material(transaction, key, now)
        self.audit("ExpireKeyMaterial", key_id)
        return True


def remove_material(transaction: Session, key: Key, now: datetime) -> None:
    """Delete the material of a locked row and schedule its object's destruction.

    The check value stays. After the commit, :meth:`hsmwrap.kms.objects.Objects.destroy` destroys
    the object at once.
    """
    if key.reference is not None:
        schedule_destruction(transaction, KeyRef.from_bytes(key.reference), now)
    key.reference = key.exposure = key.material_expires_at = None
    if key.state is not KeyState.PENDING_DELETION:
        key.state = KeyState.PENDING_IMPORT


def _find(transaction: Session, key_id: str, now: datetime, *, lock: bool = False) -> Key:
    key = transaction.get(Key, key_id, with_for_update=lock)
    # Past its date a key is gone, also where the sweeper has not come by yet.
    if key is None or (key.deletion_at is not None and key.deletion_at <= now):
        raise KeyNotFound("there is no key of this id")
    return key


def _is_expired(key: Key, now: datetime) -> bool:
    return key.material_expires_at is not None and key.material_expires_at <= now
