"""Use of keys: encrypt, decrypt, generate data keys."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from hsmwrap.arguments import checked_methods
from hsmwrap.backend import Backend, KeyRef
from hsmwrap.errors import HsmError, KeyNotFound
from hsmwrap.kms.blobs import CiphertextBlob, additional_data
from hsmwrap.kms.core import Core
from hsmwrap.kms.errors import KeyUnusable
from hsmwrap.kms.schema import Key
from hsmwrap.kms.states import require

_Use = Callable[[Backend, KeyRef], bytes]


@dataclass(frozen=True, slots=True)
class Encrypted:
    """A ciphertext and the key that encrypted it."""

    key: Key
    ciphertext_blob: bytes


@dataclass(frozen=True, slots=True)
class Decrypted:
    """A plaintext and the key that decrypted it."""

    key: Key
    plaintext: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class DataKey:
    """A data key, in plaintext and encrypted."""

    encrypted: Encrypted
    plaintext: bytes = field(repr=False)


@checked_methods
class KeyUse:
    """Operations with keys.

    Each raises KeyNotFound for an unknown key id, Rejected… if the key is not Enabled, KeyUnusable
    if no configured backend has it,
    UnsupportedOperation if the backend can store such keys but not use them, and
    ServiceUnavailable if the backend is unavailable.
    """

    def __init__(self, core: Core) -> None:
        """Take the parts of the KMS."""
        self._core = core

    def encrypt(self, key_id: str, plaintext: bytes, context: Mapping[str, str]) -> Encrypted:
        """Encrypt bytes; the encryption context is authenticated."""
        return self._encrypt("Encrypt", key_id, plaintext, context)

    def decrypt(self, blob: CiphertextBlob, context: Mapping[str, str]) -> Decrypted:
        """Decrypt a result of :meth:`encrypt` or :meth:`generate_data_key`.

        Raises:
            InvalidCiphertext: It does not decrypt with its key and this context.
        """
        data = additional_data(blob.key_id, context)
        key, plaintext = self._use(
            "Decrypt",
            blob.key_id,
            lambda backend, key: backend.decrypt(key, blob.ciphertext, data),
        )
        return Decrypted(key, plaintext)

    def re_encrypt(
        self,
        blob: CiphertextBlob,
        source_context: Mapping[str, str],
        destination: str,
        destination_context: Mapping[str, str],
    ) -> Encrypted:
        """Decrypt a ciphertext and encrypt its plaintext under the key ``destination``.

        The plaintext is in this process's memory for a moment.

        Raises:
            InvalidCiphertext: It does not decrypt with its key and the source context.
        """
        decrypted = self.decrypt(blob, source_context)
        return self._encrypt("ReEncrypt", destination, decrypted.plaintext, destination_context)

    def generate_data_key(self, key_id: str, length: int, context: Mapping[str, str]) -> DataKey:
        """Generate ``length`` random bytes and encrypt them; the context is authenticated."""
        plaintext = secrets.token_bytes(length)
        return DataKey(self._encrypt("GenerateDataKey", key_id, plaintext, context), plaintext)

    def _encrypt(
        self, operation: str, key_id: str, plaintext: bytes, context: Mapping[str, str]
    ) -> Encrypted:
        def use(backend: Backend, key: KeyRef) -> bytes:
            return backend.encrypt(key, plaintext, additional_data(key_id, context))

        key, ciphertext = self._use(operation, key_id, use)
        return Encrypted(key, CiphertextBlob(key_id, ciphertext).to_bytes())

    def _use(self, operation: str, key_id: str, use: _Use) -> tuple[Key, bytes]:
        key, reference = self._usable(operation, key_id)
        try:
            result = self._use_once(key, reference, use)
        except (KeyNotFound, KeyUnusable) as error:
            # A re-import or a deletion may have destroyed the object since the row was read.
            key, replaced_by = self._usable(operation, key_id)
            if replaced_by == reference:
                raise self._core.unusable.found(key, error) from None
            result = self._use_once(key, replaced_by, use)
        self._core.unusable.works(key_id)
        return key, result

    def _use_once(self, key: Key, reference: bytes, use: _Use) -> bytes:
        parsed = KeyRef.from_bytes(reference)
        return use(self._core.backend_of(key, parsed), parsed)

    def _usable(self, operation: str, key_id: str) -> tuple[Key, bytes]:
        key = self._core.current(key_id)
        require(operation, key.state)
        if key.reference is None:
            raise HsmError(f"key {key_id} is in state {key.state} but has no material")
        return key, key.reference
