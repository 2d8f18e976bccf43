"""The life of a key: create, describe, list, enable, disable, schedule and cancel deletion."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import func, or_, select

from hsmwrap import policy
from hsmwrap.backend import KeyRef
from hsmwrap.catalog import KeySpec, Origin, ProtectionLevel, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.errors import InvalidParameter
from hsmwrap.kms.core import Core, remove_material
from hsmwrap.kms.material import make_own_material
from hsmwrap.kms.objects import cancel_destruction
from hsmwrap.kms.schema import Key
from hsmwrap.kms.states import KeyState, require


@dataclass(frozen=True, slots=True)
class KeyPage:
    """One page of ListKeys; ``total`` counts the keys of all pages."""

    keys: tuple[Key, ...]
    total: int


class KeyLifecycle:
    """The operations on a key as such. Each raises KeyNotFound for an unknown key id."""

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
        """Make a key: without material if EXTERNAL, else with material of the KMS's own.

        Raises:
            UnsupportedProtectionLevel: No HSM in this region, or no backend for this level.
            InvalidParameter: The backend does not take this key spec, or no material of the
                KMS's own.
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
        return self._add_with_own_material(key)

    def describe_key(self, key_id: str) -> Key:
        """The key's settled row."""
        return self._core.current(key_id)

    def list_keys(self, page_number: int, page_size: int) -> KeyPage:
        """One page of the keys, oldest first; pages count from 1."""
        there = or_(Key.deletion_at.is_(None), Key.deletion_at > self._core.clock())
        page = select(Key).where(there).order_by(Key.created_at, Key.key_id)
        page = page.offset((page_number - 1) * page_size).limit(page_size)
        with self._core.database.read() as transaction:
            total = transaction.scalar(select(func.count()).select_from(Key).where(there)) or 0
            return KeyPage(tuple(transaction.scalars(page)), total)

    def enable_key(self, key_id: str) -> Key:
        """Let the key be used.

        Raises:
            StateModifiedFailed: It has no material, or is about to be deleted.
        """
        return self._change("EnableKey", key_id, _enable)

    def disable_key(self, key_id: str) -> Key:
        """Let the key not be used.

        Raises:
            StateModifiedFailed: It has no material, or is about to be deleted.
        """
        return self._change("DisableKey", key_id, _disable)

    def schedule_key_deletion(self, key_id: str, pending_window_in_days: int) -> Key:
        """Have the key deleted for good once the days are over.

        Raises:
            StateModifiedFailed: That is so already.
        """
        deletion_at = self._core.clock() + timedelta(days=pending_window_in_days)

        def schedule(key: Key) -> None:
            key.state, key.deletion_at = KeyState.PENDING_DELETION, deletion_at

        return self._change("ScheduleKeyDeletion", key_id, schedule)

    def cancel_key_deletion(self, key_id: str) -> Key:
        """Keep the key: Enabled if it has material, PendingImport if not.

        Raises:
            StateModifiedFailed: It is not about to be deleted.
        """
        return self._change("CancelKeyDeletion", key_id, _keep)

    def delete_due(self, key_id: str, now: datetime) -> bool:
        """Delete the key for good if its time has come; False if it has not, or is gone."""
        with self._core.database.write() as transaction:
            key = transaction.get(Key, key_id, with_for_update=True)
            if key is None or key.deletion_at is None or key.deletion_at > now:
                return False
            remove_material(transaction, key, now)
            transaction.delete(key)
        return True

    def _change(self, operation: str, key_id: str, change: Callable[[Key], None]) -> Key:
        with self._core.locked(key_id, self._core.clock()) as (_, key):
            require(operation, key.state)
            change(key)
        return key

    def _require_served(self, key_spec: KeySpec, level: ProtectionLevel) -> None:
        # This row is offered everywhere: what refuses it refuses the protection level itself.
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
            raise InvalidParameter("KeySpec", f"backend {backend.name} takes no {key_spec}")

    def _add(self, key: Key, material: KeyRef | None = None) -> Key:
        with self._core.database.write() as transaction:
            if material is not None:
                cancel_destruction(transaction, material)
            transaction.add(key)
        return key

    def _add_with_own_material(self, key: Key) -> Key:
        core = self._core
        backend = core.backend_for(key.protection_level)
        with core.objects.pending(backend, key.key_spec) as pending:
            imported = make_own_material(core.imports, key.cmk(), pending)
            core.objects.require_pending(imported.key, pending)
            core.step("material imported")
            key.state, key.reference = KeyState.ENABLED, imported.key.to_bytes()
            key.check_value, key.exposure = imported.check_value, imported.exposure
            self._add(key, imported.key)
        core.step("row committed")
        return key


def _enable(key: Key) -> None:
    key.state = KeyState.ENABLED


def _disable(key: Key) -> None:
    key.state = KeyState.DISABLED


def _keep(key: Key) -> None:
    key.deletion_at = None
    key.state = KeyState.PENDING_IMPORT if key.reference is None else KeyState.ENABLED
