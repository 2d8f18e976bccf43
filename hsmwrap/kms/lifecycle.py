"""Keys: create, describe, list, enable, disable, schedule and cancel deletion."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import delete, func, select

from hsmwrap import policy
from hsmwrap.arguments import checked_methods
from hsmwrap.backend import KeyRef
from hsmwrap.catalog import KeySpec, Origin, ProtectionLevel, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.errors import InvalidParameter
from hsmwrap.kms.core import Core, existing, remove_material
from hsmwrap.kms.material import generate_material
from hsmwrap.kms.objects import cancel_destruction
from hsmwrap.kms.schema import Alias, Key
from hsmwrap.kms.states import KeyState, require


@dataclass(frozen=True, slots=True)
class KeyPage:
    """One page of ListKeys; ``total`` counts the keys of all pages."""

    keys: tuple[Key, ...]
    total: int


@checked_methods
class KeyLifecycle:
    """Operations on keys. Each raises KeyNotFound for an unknown key id."""

    def __init__(self, core: Core) -> None:
        """Take the parts of the KMS."""
        self._core = core

    def create_key(
        self,
        creator: str,
        *,
        key_spec: KeySpec = KeySpec.ALIYUN_AES_256,
        origin: Origin = Origin.ALIYUN_KMS,
        protection_level: ProtectionLevel = ProtectionLevel.SOFTWARE,
        description: str = "",
    ) -> Key:
        """Create a key: without material if EXTERNAL, else with material that the KMS generates.

        Raises:
            UnsupportedProtectionLevel: The region has no HSM, or the level has no backend.
            InvalidParameter: The backend does not support this key spec or this origin.
        """
        self._require_served(key_spec, protection_level)
        key_id = str(uuid.uuid4())
        key = Key(
            key_id=key_id,
            version_id=str(uuid.uuid4()),
            arn=self._core.arn_prefix + key_id,
            key_spec=key_spec,
            origin=origin,
            protection_level=protection_level,
            state=KeyState.PENDING_IMPORT,
            description=description,
            creator=creator,
            created_at=self._core.clock(),
        )
        if origin is Origin.EXTERNAL:
            return self._add(key)
        return self._add_with_generated_material(key)

    def describe_key(self, key_id: str) -> Key:
        """The key's row."""
        return self._core.current(key_id)

    def list_keys(self, page_number: int, page_size: int) -> KeyPage:
        """One page of the keys, oldest first; pages count from 1."""
        which = existing(self._core.clock())
        page = select(Key).where(which).order_by(Key.created_at, Key.key_id)
        page = page.offset((page_number - 1) * page_size).limit(page_size)
        with self._core.database.read() as transaction:
            total = transaction.scalar(select(func.count()).select_from(Key).where(which)) or 0
            return KeyPage(tuple(transaction.scalars(page)), total)

    def update_key_description(self, key_id: str, description: str) -> Key:
        """Replace the key's description; an empty one deletes it.

        Raises:
            RejectedPendingDeletion: It is scheduled for deletion.
        """
        with self._changing("UpdateKeyDescription", key_id) as key:
            key.description = description
        return key

    def enable_key(self, key_id: str) -> Key:
        """Enable the key.

        Raises:
            StateModifiedFailed: It has no material, or is scheduled for deletion.
        """
        with self._changing("EnableKey", key_id) as key:
            key.state = KeyState.ENABLED
        return key

    def disable_key(self, key_id: str) -> Key:
        """Disable the key.

        Raises:
            StateModifiedFailed: It has no material, or is scheduled for deletion.
        """
        with self._changing("DisableKey", key_id) as key:
            key.state = KeyState.DISABLED
        return key

    def schedule_key_deletion(self, key_id: str, pending_window_in_days: int) -> Key:
        """Schedule the permanent deletion of the key.

        Raises:
            StateModifiedFailed: It is scheduled already.
        """
        deletion_at = self._core.clock() + timedelta(days=pending_window_in_days)
        with self._changing("ScheduleKeyDeletion", key_id) as key:
            key.state, key.deletion_at = KeyState.PENDING_DELETION, deletion_at
        return key

    def cancel_key_deletion(self, key_id: str) -> Key:
        """Cancel the deletion: the key is Enabled if it has material, PendingImport if not.

        Raises:
            StateModifiedFailed: It is not scheduled for deletion.
        """
        with self._changing("CancelKeyDeletion", key_id) as key:
            key.state = KeyState.PENDING_IMPORT if key.reference is None else KeyState.ENABLED
            key.deletion_at = None
        return key

    def delete_due(self, key_id: str, now: datetime) -> bool:
        """Delete the key if its deletion date has passed; False if not, or if it does not exist."""
        with self._core.database.write() as transaction:
            key = transaction.get(Key, key_id, with_for_update=True)
            if key is None or key.deletion_at is None or key.deletion_at > now:
                return False
            remove_material(transaction, key, now)
            transaction.execute(delete(Alias).where(Alias.key_id == key_id))
            transaction.delete(key)
        return True

    @contextmanager
    def _changing(self, operation: str, key_id: str) -> Iterator[Key]:
        """The locked row of a key whose state allows the operation; committed at the end."""
        with self._core.locked(key_id, self._core.clock()) as (_, key):
            require(operation, key.state)
            yield key

    def _require_served(self, key_spec: KeySpec, level: ProtectionLevel) -> None:
        # This row of the table is allowed everywhere, so only the protection level can be refused.
        verdict = policy.check(
            WrappingKeySpec.RSA_2048,
            WrappingAlgorithm.RSAES_OAEP_SHA_256,
            level,
            self._core.deployment,
        )
        if not verdict.allowed:
            raise verdict.error()
        backend = self._core.backend_for(level)
        if backend.capabilities().key_for(key_spec) is None:
            raise InvalidParameter("KeySpec", f"level {level} has no {key_spec} keys here")

    def _add(self, key: Key, material: KeyRef | None = None) -> Key:
        with self._core.database.write() as transaction:
            if material is not None:
                cancel_destruction(transaction, material)
            transaction.add(key)
        return key

    def _add_with_generated_material(self, key: Key) -> Key:
        core = self._core
        backend = core.backend_for(key.protection_level)
        with core.objects.pending(backend, key.key_spec) as pending:
            imported = generate_material(core.imports, key.cmk(), pending)
            core.objects.require_pending(imported.key, pending)
            core.step("material imported")
            key.state = KeyState.ENABLED
            key.hold(imported, core.key_set_of(imported.key))
            self._add(key, imported.key)
        core.step("row committed")
        return key
