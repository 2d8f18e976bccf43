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

import secrets
from dataclasses import replace
from datetime import datetime

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import load_der_public_key

from hsmwrap.backend import Exposure, ImportedKey, KeyRef
from hsmwrap.catalog import Origin, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.checkvalue import same_check_value
from hsmwrap.errors import HsmError, InvalidKeyMaterial, UnsupportedOrigin
from hsmwrap.imports import Cmk, ImportParameters, ImportResult, ImportService
from hsmwrap.kms.core import Core, lock_settled, remove_material
from hsmwrap.kms.objects import doom, lift
from hsmwrap.kms.schema import Key
from hsmwrap.kms.states import KeyState, require


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
            ServiceUnavailable: The backend or the database is away for now.
        """
        core = self._core
        key = core.current(key_id)
        _require_external(key)
        require("ImportKeyMaterial", key.state)
        intended = core.objects.intend(core.backend_for(key.protection_level), key.key_spec)
        core.step("intent written")
        try:
            result = core.imports.import_key_material(
                key.cmk(),
                encrypted_key_material,
                import_token,
                key_material_expire,
                object_id=None if intended is None else intended.data,
            )
            core.objects.require_as_intended(result.imported.key, intended)
            core.step("material imported")
            key = self._commit(key_id, result)
        except BaseException:
            core.objects.abandon(intended)
            raise
        core.step("row committed")
        core.objects.destroy_due(core.clock())
        return key

    def delete_key_material(self, key_id: str) -> Key:
        """Delete the key's material; only the same material may come back.

        Raises:
            UnsupportedOrigin: The KMS made the material itself.
        """
        core = self._core
        with core.database.write() as transaction:
            key = lock_settled(transaction, key_id, core.clock())
            _require_external(key)
            require("DeleteKeyMaterial", key.state)
            remove_material(transaction, key, core.clock())
        core.step("row committed")
        core.objects.destroy_due(core.clock())
        return key

    def _commit(self, key_id: str, result: ImportResult) -> Key:
        imported, now = result.imported, self._core.clock()
        with self._core.database.write() as transaction:
            key = lock_settled(transaction, key_id, now)
            require("ImportKeyMaterial", key.state)
            if key.check_value is not None and not same_check_value(
                key.check_value, imported.check_value
            ):
                raise InvalidKeyMaterial
            lift(transaction, imported.key)
            if key.reference is not None:
                doom(transaction, KeyRef.from_bytes(key.reference), now)
            key.reference, key.exposure = imported.key.to_bytes(), imported.exposure
            key.check_value = imported.check_value
            key.material_expires_at = result.expires_at
            if key.state is KeyState.PENDING_IMPORT:
                key.state = KeyState.ENABLED
        return key


def make_own_material(
    imports: ImportService, cmk: Cmk, intended: KeyRef | None = None
) -> ImportedKey:
    """Make random material and import it for a CMK of origin Aliyun_KMS.

    Args:
        imports: The import service.
        cmk: The CMK.
        intended: The object that was written down for it.

    Raises:
        HsmwrapError: As issuing and importing raise it.
    """
    as_external = replace(cmk, origin=Origin.EXTERNAL)
    parameters = imports.get_parameters_for_import(
        as_external, WrappingKeySpec.RSA_2048, WrappingAlgorithm.RSAES_OAEP_SHA_256
    )
    result = imports.import_key_material(
        as_external,
        _encrypted(parameters.public_key, secrets.token_bytes(cmk.key_spec.material_length)),
        parameters.import_token,
        object_id=None if intended is None else intended.data,
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
