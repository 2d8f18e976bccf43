"""The software backend: all keys are blobs sealed under the keyring; nothing is resident."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self

from hsmwrap.backend import (
    Backend,
    Capabilities,
    ChecksSettings,
    Custody,
    Exposure,
    HasKeySets,
    Health,
    ImportedKey,
    KeepsTrialsApart,
    KeyRef,
    KeySetInfo,
    ListsKeySets,
    Mac,
    ManagesKeySets,
    PrivateKeyRef,
    ReSealsKeys,
    WrappingKey,
)
from hsmwrap.catalog import KeySpec, ProtectionLevel, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.checkvalue import check_value, same_check_value
from hsmwrap.errors import (
    BackendClosed,
    ConfigurationError,
    HsmError,
    InvalidImportToken,
    InvalidKeyMaterial,
    KeyNotFound,
)
from hsmwrap.locks import LIBCRYPTO
from hsmwrap.software import cipher, rsa
from hsmwrap.software._keyring import Keyring
from hsmwrap.software._keyring_file import KeyringFile
from hsmwrap.software._report import NAME, report
from hsmwrap.software._sealing import BlobRejected, Purpose, Sealer, key_set_of
from hsmwrap.software.schemes import Scheme, open_schemes
from hsmwrap.software.settings import SoftwareSettings

_MASTER_KEY = "master key"
_TRIAL = ".trial-"


class SoftwareBackend(
    Backend,
    ChecksSettings,
    HasKeySets,
    ListsKeySets,
    ManagesKeySets,
    KeepsTrialsApart,
    ReSealsKeys,
):
    """RSA, AES and SM4 by pyca/cryptography, SM2 by libcrypto; custody is always sealed blobs.

    Open it by :func:`hsmwrap.registry.open_backend`, or put the guard around it
    (:func:`hsmwrap.guard.guarded`): keys, material and plaintext are in variables of what is called
    from here, and the guard keeps them out of tracebacks.
    """

    contract_version: ClassVar[int] = 2

    def __init__(self, settings: SoftwareSettings | None = None) -> None:
        """Open the backend: test the SM2 engine and read the keyring.

        Raises:
            ConfigurationError: The keyring file or the SM2 engine cannot be used.
            SelfTestFailed: The SM2 engine fails its known-answer test.
        """
        self._settings = settings or SoftwareSettings()
        self._keyring = _open_keyring(self._settings.keyring_file)
        self._keyring()
        self._sealer = Sealer(self._keyring)
        self._schemes = open_schemes(self._settings)
        with LIBCRYPTO.read():
            self._capabilities = report(self._settings, self._schemes.values())

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """Open a backend from plain settings, see :class:`SoftwareSettings`."""
        return cls(SoftwareSettings.from_mapping(settings))

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any]) -> frozenset[ProtectionLevel]:
        """Open a backend, which needs no HSM."""
        with cls.from_settings(settings) as backend:
            return backend.capabilities().protection_levels

    @classmethod
    def list_keys(cls, settings: Mapping[str, Any]) -> tuple[KeySetInfo, ...]:
        """The master keys of the keyring file."""
        keyring = _keyring_file(settings).read()
        return tuple(KeySetInfo(i, i == keyring.current, _MASTER_KEY) for i in keyring.ids)

    @classmethod
    def initialise_keys(
        cls, settings: Mapping[str, Any], *, so_pin_file: str | None = None
    ) -> KeySetInfo:
        """Create the keyring file; needs no PIN."""
        return KeySetInfo(
            _keyring_file(settings).create().current, current=True, detail="master key"
        )

    @classmethod
    def rotate_keys(
        cls, settings: Mapping[str, Any], *, so_pin_file: str | None = None
    ) -> KeySetInfo:
        """Add a master key; running processes use it at once."""
        return KeySetInfo(
            _keyring_file(settings).rotate().current, current=True, detail="master key"
        )

    @classmethod
    def retire_keys(cls, settings: Mapping[str, Any], key_set: str) -> None:
        """Remove a master key that is not current."""
        try:
            _keyring_file(settings).retire(key_set)
        except KeyNotFound as error:
            raise ConfigurationError(str(error)) from None

    @classmethod
    def trial_settings(cls, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """With a keyring file of its own, beside the one that they name."""
        beside = SoftwareSettings.from_mapping(settings).keyring_file
        if beside is None:
            raise ConfigurationError(
                "software backend: keyring_file: a trial needs one; in memory nothing is shared"
            )
        return {**settings, "keyring_file": f"{beside}{_TRIAL}{secrets.token_hex(8)}"}

    @classmethod
    def end_trial(cls, settings: Mapping[str, Any]) -> None:
        """Remove the keyring file."""
        file = SoftwareSettings.from_mapping(settings).keyring_file or ""
        if not re.search(f"{re.escape(_TRIAL)}[0-9a-f]{{16}}$", file):
            raise ConfigurationError("software backend: keyring_file: is not one of a trial")
        Path(file).unlink(missing_ok=True)

    @property
    def name(self) -> str:
        """``software``."""
        return NAME

    def __repr__(self) -> str:
        return f"<SoftwareBackend {self._settings}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a backend does not pickle or copy: it holds keys")

    def capabilities(self) -> Capabilities:
        """Report what this backend can do."""
        return self._capabilities

    def generate_wrapping_key(
        self,
        spec: WrappingKeySpec,
        algorithm: WrappingAlgorithm,
        *,
        expires_at: datetime,  # noqa: ARG002  # nothing is resident, so nothing expires
    ) -> WrappingKey:
        """Make a fresh pair; the private key is a blob that opens for ``algorithm`` only."""
        # No fork during a call into libcrypto: the child would inherit locked locks.
        with LIBCRYPTO.read():
            public_key, secret = self._schemes[algorithm].generate()
            blob = self._sealer.seal(Purpose.WRAPPING_KEY, secret, NAME, spec, algorithm)
            private_key = PrivateKeyRef(Custody.HSM_ENCRYPTED_DATABASE, blob)
            return WrappingKey(spec, algorithm, public_key, private_key, key_set_of(blob))

    def unwrap_material(
        self,
        private_key: PrivateKeyRef,
        algorithm: WrappingAlgorithm,
        encrypted_material: bytes,
        *,
        key_spec: KeySpec,
        expected_check_value: bytes | None = None,  # noqa: ARG002  # the guard compares
        object_id: bytes | None = None,  # noqa: ARG002  # no object is made that it could name
    ) -> ImportedKey:
        """Turn encrypted key material into a sealed key."""
        with LIBCRYPTO.read():
            scheme = self._schemes[algorithm]
            secret = self._open_wrapping_key(private_key, scheme)
            material = scheme.decrypt(secret, encrypted_material, key_spec.material_length)
            if len(material) != key_spec.material_length:
                raise InvalidKeyMaterial
            key = self._sealed(material, key_spec)
            return ImportedKey(key, check_value(material), Exposure.HOST)

    def encrypt(self, key: KeyRef, plaintext: bytes, additional_data: bytes = b"") -> bytes:
        """Encrypt under an imported key, see :mod:`hsmwrap.software.cipher`."""
        with LIBCRYPTO.read():
            return cipher.encrypt(key.key_spec, self._open_key(key), plaintext, additional_data)

    def decrypt(self, key: KeyRef, ciphertext: bytes, additional_data: bytes = b"") -> bytes:
        """Decrypt what :meth:`encrypt` made."""
        with LIBCRYPTO.read():
            return cipher.decrypt(key.key_spec, self._open_key(key), ciphertext, additional_data)

    def mac(self, data: bytes) -> Mac:
        """Authenticate ``data`` under the current master key's import-token key."""
        with LIBCRYPTO.read():
            return self._sealer.mac(data)

    def verify_mac(self, data: bytes, mac: Mac) -> None:
        """Return if ``mac`` is right for ``data``."""
        with LIBCRYPTO.read():
            self._sealer.verify_mac(data, mac)

    def current_key_set(self) -> str:
        """Id of the current master key."""
        return self._keyring().current

    def key_set_ids(self) -> tuple[str, ...]:
        """Ids of the master keys."""
        return self._keyring().ids

    def key_set_of(self, key: KeyRef) -> str | None:
        """Id of the master key that the key is sealed under."""
        try:
            return key_set_of(key.data)
        except BlobRejected:
            raise KeyNotFound("the key reference does not parse") from None

    def reseal(self, key: KeyRef, *, expected_check_value: bytes | None = None) -> KeyRef:
        """Open the key and seal it under the current master key."""
        with LIBCRYPTO.read():
            material, expected = self._open_key(key), expected_check_value
            if expected is not None and not same_check_value(expected, check_value(material)):
                raise HsmError("the key to seal again does not have the expected check value")
            is_current = key_set_of(key.data) == self._keyring().current
            return key if is_current else self._sealed(material, key.key_spec)

    def health(self) -> Health:
        """Report whether the keyring can be read."""
        try:
            keyring = self._keyring()
        except BackendClosed:
            return Health(ready=False, detail="closed")
        except ConfigurationError as error:
            return Health(ready=False, detail=str(error))
        facts = {
            "master_keys": len(keyring.ids),
            "implicit_rejection": rsa.rejects_implicitly(),
        }
        return Health(ready=True, detail="ready", facts=facts)

    def close(self) -> None:
        """Let go of the keys."""
        self._keyring = _closed_keyring
        self._sealer = Sealer(_closed_keyring)

    def _sealed(self, material: bytes, key_spec: KeySpec) -> KeyRef:
        blob = self._sealer.seal(Purpose.KEY_MATERIAL, material, NAME, key_spec)
        return KeyRef(NAME, key_spec, Custody.HSM_ENCRYPTED_DATABASE, blob)

    def _open_wrapping_key(self, private_key: PrivateKeyRef, scheme: Scheme) -> bytes:
        context = (NAME, scheme.spec, scheme.algorithm)
        try:
            return self._sealer.open(Purpose.WRAPPING_KEY, private_key.data, *context)
        except BlobRejected:
            raise InvalidImportToken(
                "the wrapping key in the import token does not open: it is for another algorithm, "
                "or its master key is not in the keyring"
            ) from None

    def _open_key(self, key: KeyRef) -> bytes:
        try:
            return self._sealer.open(Purpose.KEY_MATERIAL, key.data, key.backend, key.key_spec)
        except BlobRejected:
            needed = self.key_set_of(key)
            if needed not in self._keyring().ids:
                raise KeyNotFound(
                    f"key set {needed}, which sealed this key, was retired: the keyring has no "
                    "such master key"
                ) from None
            raise KeyNotFound(
                "the key does not open: it belongs to another backend, or is damaged"
            ) from None


def _open_keyring(path: str | None) -> Callable[[], Keyring]:
    if path is not None:
        return KeyringFile(path).read
    keyring = Keyring.generate()
    return lambda: keyring


def _keyring_file(settings: Mapping[str, Any]) -> KeyringFile:
    path = SoftwareSettings.from_mapping(settings).keyring_file
    if path is None:
        raise ConfigurationError(
            "keyring_file: required; the keys of an ephemeral keyring cannot be managed"
        )
    return KeyringFile(path)


def _closed_keyring() -> Keyring:
    raise BackendClosed("this software backend was closed: open a new one")
