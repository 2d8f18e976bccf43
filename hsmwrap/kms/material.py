"""Key material: parameters for import, import, deletion; and material that the KMS generates.

An import is atomic. The HSM works without a lock on the row. The commit locks the row, checks again
that the import is allowed, and compares the check value again. So two imports, or an import and a
deletion, take effect one after the other.

Material of keys with origin Aliyun_KMS: backends cannot generate keys, only import them. So the KMS
generates random bytes and imports them with RSAES_OAEP_SHA_256, as a client would. The material is
in this process's memory for a moment: exposure ``host``, also at protection level HSM. If the
configuration requires ``in_hsm``, such keys are refused.
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

from hsmwrap.arguments import checked_methods
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


@checked_methods
class KeyMaterial:
    """Operations on key material. Each raises KeyNotFound for an unknown key id."""

    def __init__(self, core: Core) -> None:
        """Take the parts of the KMS."""
        self._core = core

    def get_parameters_for_import(
        self,
        key_id: str,
        wrapping_key_spec: WrappingKeySpec | str,
        wrapping_algorithm: WrappingAlgorithm | str,
    ) -> ImportParameters:
        """Issue a wrapping key and an import token; raises what the import service raises."""
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
        """Import key material; raises what the import service raises, and these.

        Args:
            key_id: The key.
            encrypted_key_material: The client's ciphertext, raw bytes.
            import_token: The import token, raw bytes.
            key_material_expire: Aware time when the material is deleted; None: never.

        Raises:
            StateModifiedFailed: The key is scheduled for deletion.
            LeaseLost: The import took longer than its lease and was cancelled.
            CommitUnknown: The database failed during the commit; DescribeKey shows the result.
            ServiceUnavailable: The backend or the database is unavailable.
        """
        core = self._core
        key = core.current(key_id)
        _require_external(key)
        require("ImportKeyMaterial", key.state)
        backend = core.imports.backend_for_import(key.cmk(), import_token)
        with core.objects.pending(backend, key.key_spec) as pending:
            result = core.imports.import_key_material(
                key.cmk(),
                encrypted_key_material,
                import_token,
                key_material_expire,
                object_id=None if pending is None else pending.data,
            )
            with self._token_released_on_failure(result):
                core.objects.require_pending(result.imported.key, pending)
                core.step("material imported")
                key, replaced = self._commit(key_id, result)
        core.step("row committed")
        core.objects.destroy(replaced)
        return key

    def delete_key_material(self, key_id: str) -> Key:
        """Delete the key's material; only the same material can be imported again.

        Raises:
            UnsupportedOrigin: The KMS generated the material itself.
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
            key.hold(imported, self._core.key_set_of(imported.key))
            key.material_expires_at = result.expires_at
            if key.state is KeyState.PENDING_IMPORT:
                key.state = KeyState.ENABLED
        return key, replaced

    @contextmanager
    def _token_released_on_failure(self, result: ImportResult) -> Iterator[None]:
        """Release a single-use token if the import fails and is rolled back after unwrapping."""
        try:
            yield
        except Exception as error:
            if surely_rolled_back(error):
                self._release_token(result.token_id)
            raise

    def _release_token(self, token_id: bytes) -> None:
        used = self._core.used_tokens
        if used is None:
            return
        try:
            used.release(token_id)
        except HsmwrapError as error:
            facts = {"token_id": token_id.hex(), "code": error.code}
            _log.warning("import token of a failed import stays used", extra=facts)


def generate_material(
    imports: ImportService, cmk: Cmk, pending: KeyRef | None = None
) -> ImportedKey:
    """Generate random material and import it for a CMK of origin Aliyun_KMS.

    Args:
        imports: The import service.
        cmk: The CMK.
        pending: Reference to the object that the import makes; None for sealed blobs.

    Raises:
        CombinationRefused: The backend or the required exposure refuses it; names Origin.
        HsmwrapError: As for issuing and importing.
    """
    as_external = replace(cmk, origin=Origin.EXTERNAL)
    try:
        parameters = imports.get_parameters_for_import(
            as_external, WrappingKeySpec.RSA_2048, WrappingAlgorithm.RSAES_OAEP_SHA_256
        )
    except CombinationRefused as error:
        # The error names WrappingAlgorithm, which is not a parameter of CreateKey.
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
        raise HsmError("the backend did not return an RSA key for RSA_2048")
    oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), label=None)
    return key.encrypt(material, oaep)


def _require_external(key: Key) -> None:
    if key.origin is not Origin.EXTERNAL:
        raise UnsupportedOrigin(f"key {key.key_id} has origin {key.origin}, not EXTERNAL")
