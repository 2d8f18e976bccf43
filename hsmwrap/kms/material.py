"""Key material: parameters for import, import, deletion; and material of the KMS's own.

An import is whole or not at all. No lock is held while the HSM works; the commit locks the row,
asks again whether the import is still allowed, and compares the check value again, so that of
two imports, or an import and a deletion, one comes after the other.

Material of the KMS's own (origin Aliyun_KMS): backends make no keys, they import them. So the KMS
takes random bytes and imports them as a client would, by RSAES_OAEP_SHA_256. It is in this
process's memory for a moment, exposure ``host``, also at protection level HSM; where the
configuration demands ``in_hsm`` the key is refused.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import load_der_public_key

from hsmwrap.backend import Exposure, ImportedKey, KeyRef
from hsmwrap.catalog import Origin, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.checkvalue import same_check_value
from hsmwrap.errors import (
    CombinationRefused,
    HsmError,
    HsmwrapError,
    InvalidKeyMaterial,
    UnsupportedOrigin,
)
from hsmwrap.imports import Cmk, ImportParameters, ImportResult, ImportService
from hsmwrap.kms.core import Core, remove_material
from hsmwrap.kms.database import surely_rolled_back
from hsmwrap.kms.objects import cancel_destruction, schedule_destruction
from hsmwrap.kms.schema import Key
from hsmwrap.kms.states import KeyState, require

_log = logging.getLogger(__name__)


class KeyMaterial:
    """The operations on a key's material. Each raises KeyNotFound for an unknown key id."""

    def __init__(self, core: Core) -> None:
        """Take the parts of the KMS."""
        self._core = core

    def get_parameters_for_import(
        self,
        key_id: str,
        wrapping_key_spec: WrappingKeySpec | str,
        wrapping_algorithm: WrappingAlgorithm | str,
    ) -> ImportParameters:
        """Issue a public wrapping key and an import token; raises as the import service does."""
        key = self._core.current(key_id)
        require("GetParametersForImport", key.state)
        return self._core.imports.get_parameters_for_import(
            key.cmk(), wrapping_key_spec, wrapping_algorithm
        )

    def import_key_material(
        self,
        key_id: str,
        encrypted_key_material: bytes,
        import_token: bytes,
        key_material_expire: datetime | None = None,
    ) -> Key:
        """Import key material; raises as the import service does.

        Args:
            key_id: The key.
            encrypted_key_material: The client's ciphertext, raw bytes.
            import_token: The import token, raw bytes.
            key_material_expire: Aware time of deletion; None: never.

        Raises:
            StateModifiedFailed: The key is about to be deleted.
            LeaseLost: It took so long that others gave it up.
            CommitUnknown: The database failed during the commit: DescribeKey tells what is there.
            ServiceUnavailable: The backend or the database is away for now.
        """
        core = self._core
        key = core.current(key_id)
        _require_external(key)
        require("ImportKeyMaterial", key.state)
        backend = core.backend_for(key.protection_level)
        with core.objects.pending(backend, key.key_spec) as pending:
            result = core.imports.import_key_material(
                key.cmk(),
                encrypted_key_material,
                import_token,
                key_material_expire,
                object_id=None if pending is None else pending.data,
            )
            with self._token_back_if_undone(result):
                core.objects.require_pending(result.imported.key, pending)
                core.step("material imported")
                key, replaced = self._commit(key_id, result)
        core.step("row committed")
        core.objects.destroy(replaced)
        return key

    def delete_key_material(self, key_id: str) -> Key:
        """Delete the key's material; only the same material may come back.

        Raises:
            UnsupportedOrigin: The KMS made the material itself.
        """
        core, now = self._core, self._core.clock()
        with core.locked(key_id, now) as (transaction, key):
            _require_external(key)
            require("DeleteKeyMaterial", key.state)
            deleted = key.reference
            remove_material(transaction, key, now)
        core.step("row committed")
        core.objects.destroy(deleted)
        return key

    def _commit(self, key_id: str, result: ImportResult) -> tuple[Key, bytes | None]:
        """Put the material into the row; schedule the destruction of the object it replaces."""
        imported, now = result.imported, self._core.clock()
        with self._core.locked(key_id, now) as (transaction, key):
            require("ImportKeyMaterial", key.state)
            if key.check_value is not None and not same_check_value(
                key.check_value, imported.check_value
            ):
                raise InvalidKeyMaterial
            cancel_destruction(transaction, imported.key)
            replaced = key.reference
            if replaced is not None:
                schedule_destruction(transaction, KeyRef.from_bytes(replaced), now)
            key.reference, key.exposure = imported.key.to_bytes(), imported.exposure
            key.check_value = imported.check_value
            key.material_expires_at = result.expires_at
            if key.state is KeyState.PENDING_IMPORT:
                key.state = KeyState.ENABLED
        return key, replaced

    @contextmanager
    def _token_back_if_undone(self, result: ImportResult) -> Iterator[None]:
        """Let a single-use token be used again if what follows the unwrapping came to nothing."""
        try:
            yield
        except Exception as error:
            if surely_rolled_back(error):
                self._give_token_back(result.token_id)
            raise

    def _give_token_back(self, token_id: bytes) -> None:
        used = self._core.used_tokens
        if used is None:
            return
        try:
            used.release(token_id)
        except HsmwrapError as error:
            facts = {"token_id": token_id.hex(), "code": error.code}
            _log.warning("import token of a failed import stays used", extra=facts)


def make_own_material(
    imports: ImportService, cmk: Cmk, pending: KeyRef | None = None
) -> ImportedKey:
    """Make random material and import it for a CMK of origin Aliyun_KMS.

    Args:
        imports: The import service.
        cmk: The CMK.
        pending: Reference to the object that the import makes; None for sealed blobs.

    Raises:
        CombinationRefused: The backend or the required exposure refuses it; names Origin.
        HsmwrapError: As issuing and importing raise it.
    """
    as_external = replace(cmk, origin=Origin.EXTERNAL)
    try:
        parameters = imports.get_parameters_for_import(
            as_external, WrappingKeySpec.RSA_2048, WrappingAlgorithm.RSAES_OAEP_SHA_256
        )
    except CombinationRefused as error:
        # CreateKey has no parameter of the name that this error has.
        why = f"has to be {Origin.EXTERNAL} here: {error}"
        raise CombinationRefused("Origin", error.rule, why) from error
    result = imports.import_key_material(
        as_external,
        _encrypted(parameters.public_key, secrets.token_bytes(cmk.key_spec.material_length)),
        parameters.import_token,
        object_id=None if pending is None else pending.data,
    )
    return replace(result.imported, exposure=Exposure.HOST)


def _encrypted(public_key: bytes, material: bytes) -> bytes:
    key = load_der_public_key(public_key)
    if not isinstance(key, rsa.RSAPublicKey):
        raise HsmError("the backend answered RSA_2048 with another kind of key")
    oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), label=None)
    return key.encrypt(material, oaep)


def _require_external(key: Key) -> None:
    if key.origin is not Origin.EXTERNAL:
        raise UnsupportedOrigin(f"key {key.key_id} has origin {key.origin}, not EXTERNAL")
