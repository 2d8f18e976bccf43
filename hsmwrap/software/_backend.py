"""The software backend: all keys are blobs sealed under the keyring; nothing is resident."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any, ClassVar, NoReturn, Self

from hsmwrap.backend import (
    Backend,
    Capabilities,
    Custody,
    Exposure,
    Health,
    ImportedKey,
    KeyRef,
    KeySetInfo,
    Mac,
    PrivateKeyRef,
    ReapReport,
    WrappingKey,
)
from hsmwrap.catalog import KeySpec, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.checkvalue import check_value, same_check_value
from hsmwrap.errors import (
    BackendClosed,
    ConfigurationError,
    InvalidImportToken,
    InvalidKeyMaterial,
    KeyNotFound,
    UnsupportedOperation,
    strip_tracebacks,
)
from hsmwrap.gate import Gate
from hsmwrap.locks import LIBCRYPTO
from hsmwrap.software import _cipher as cipher
from hsmwrap.software._keyring import Keyring
from hsmwrap.software._keyring_file import KeyringFile
from hsmwrap.software._report import NAME, report
from hsmwrap.software._schemes import Scheme, open_schemes
from hsmwrap.software._sealing import BlobRejected, Purpose, Sealer
from hsmwrap.software.settings import SoftwareSettings

_MASTER_KEY = "master key"


class SoftwareBackend(Backend):
    """RSA, AES and SM4 by pyca/cryptography, SM2 by libcrypto; custody is always sealed blobs.

    Keys, material and plaintext are in local variables of the called functions, so every public
    call is :func:`~hsmwrap.errors.strip_tracebacks`.
    """

    contract_version: ClassVar[int] = 1

    @strip_tracebacks
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
        self._gate = Gate("software backend")

    @classmethod
    @strip_tracebacks
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """Open a backend from plain settings, see :class:`SoftwareSettings`."""
        return cls(SoftwareSettings.from_mapping(settings))

    @classmethod
    @strip_tracebacks
    def list_keys(cls, settings: Mapping[str, Any]) -> tuple[KeySetInfo, ...]:
        """The master keys of the keyring file."""
        keyring = _keyring_file(settings).read()
        return tuple(KeySetInfo(i, i == keyring.current, _MASTER_KEY) for i in keyring.ids)

    @classmethod
    @strip_tracebacks
    def initialise_keys(
        cls, settings: Mapping[str, Any], *, so_pin_file: str | None = None
    ) -> KeySetInfo:
        """Create the keyring file; needs no PIN."""
        return KeySetInfo(
            _keyring_file(settings).create().current, current=True, detail="master key"
        )

    @classmethod
    @strip_tracebacks
    def rotate_keys(
        cls, settings: Mapping[str, Any], *, so_pin_file: str | None = None
    ) -> KeySetInfo:
        """Add a master key; running processes use it at once."""
        return KeySetInfo(
            _keyring_file(settings).rotate().current, current=True, detail="master key"
        )

    @classmethod
    @strip_tracebacks
    def retire_keys(cls, settings: Mapping[str, Any], key_set: str) -> None:
        """Remove a master key that is not current."""
        try:
            _keyring_file(settings).retire(key_set)
        except KeyNotFound as error:
            raise ConfigurationError(str(error)) from None

    @property
    def name(self) -> str:
        """``software``."""
        return NAME

    def __repr__(self) -> str:
        return f"<SoftwareBackend {self._settings} {self._gate}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a backend does not pickle or copy: it holds keys")

    @contextmanager
    def _inside(self) -> Iterator[None]:
        # No fork during a call into libcrypto: the child would inherit locked locks.
        with self._gate.enter(), LIBCRYPTO.read():
            yield

    @strip_tracebacks
    def capabilities(self) -> Capabilities:
        """Report what this backend can do."""
        with self._inside():
            return self._capabilities

    @strip_tracebacks
    def generate_wrapping_key(
        self,
        spec: WrappingKeySpec,
        algorithm: WrappingAlgorithm,
        *,
        expires_at: datetime,  # noqa: ARG002  # nothing is resident, so nothing expires
    ) -> WrappingKey:
        """Generate a pair; the private key is a sealed blob, bound to ``algorithm``."""
        with self._inside():
            scheme = self._scheme(algorithm)
            if scheme.spec is not spec:
                raise UnsupportedOperation(f"{algorithm} does not go with {spec}")
            public_key, secret = scheme.generate()
            blob = self._sealer.seal(Purpose.WRAPPING_KEY, secret, NAME, spec, algorithm)
            private_key = PrivateKeyRef(Custody.HSM_ENCRYPTED_DATABASE, blob)
            return WrappingKey(spec, algorithm, public_key, private_key)

    @strip_tracebacks
    def discard_wrapping_key(self, private_key: PrivateKeyRef) -> None:  # noqa: ARG002  # as below
        """Do nothing: the caller has the only copy of the blob."""
        with self._inside():
            return

    @strip_tracebacks
    def unwrap_material(
        self,
        private_key: PrivateKeyRef,
        algorithm: WrappingAlgorithm,
        encrypted_material: bytes,
        *,
        key_spec: KeySpec,
        expected_check_value: bytes | None = None,
        object_id: bytes | None = None,  # noqa: ARG002  # keys are blobs, not objects
    ) -> ImportedKey:
        """Decrypt key material and seal it as a key."""
        with self._inside():
            scheme = self._scheme(algorithm)
            secret = self._open_wrapping_key(private_key, scheme)
            material = scheme.decrypt(secret, encrypted_material, key_spec.material_length)
            check_value = _checked_value(key_spec, material, expected_check_value)
            blob = self._sealer.seal(Purpose.KEY_MATERIAL, material, NAME, key_spec)
            key = KeyRef(NAME, key_spec, Custody.HSM_ENCRYPTED_DATABASE, blob)
            return ImportedKey(key, check_value, Exposure.HOST)

    @strip_tracebacks
    def encrypt(self, key: KeyRef, plaintext: bytes, additional_data: bytes = b"") -> bytes:
        """Encrypt under an imported key, see :mod:`hsmwrap.software._cipher`."""
        with self._inside():
            return cipher.encrypt(key.key_spec, self._open_key(key), plaintext, additional_data)

    @strip_tracebacks
    def decrypt(self, key: KeyRef, ciphertext: bytes, additional_data: bytes = b"") -> bytes:
        """Decrypt a result of :meth:`encrypt`."""
        with self._inside():
            return cipher.decrypt(key.key_spec, self._open_key(key), ciphertext, additional_data)

    @strip_tracebacks
    def destroy_key(self, key: KeyRef) -> None:  # noqa: ARG002  # a blob is the caller's to delete
        """Do nothing: the caller has the only copy of the blob."""
        with self._inside():
            return

    @strip_tracebacks
    def mac(self, data: bytes) -> Mac:
        """Authenticate ``data`` under the current master key's import-token key."""
        with self._inside():
            return self._sealer.mac(data)

    @strip_tracebacks
    def verify_mac(self, data: bytes, mac: Mac) -> None:
        """Return if ``mac`` is right for ``data``."""
        with self._inside():
            self._sealer.verify_mac(data, mac)

    @strip_tracebacks
    def reap(self, now: datetime) -> ReapReport:  # noqa: ARG002  # nothing resident can expire
        """Report nothing: no key is resident."""
        with self._inside():
            return ReapReport()

    @strip_tracebacks
    def health(self) -> Health:
        """Report whether the backend is open and its keyring can be read."""
        facts = {"in_flight": self._gate.in_flight}
        if self._gate.closed:
            return Health(ready=False, detail="closed", facts=facts)
        try:
            keyring = self._keyring()
        except BackendClosed:  # in between
            return Health(ready=False, detail="closed", facts=facts)
        except ConfigurationError as error:
            return Health(ready=False, detail=str(error), facts=facts)
        facts["master_keys"] = len(keyring.ids)
        return Health(ready=True, detail="ready", facts=facts)

    @strip_tracebacks
    def close(self) -> None:
        """Wait for running calls, then release the keys. Safe to call again."""
        self._gate.close()
        self._keyring = _closed_keyring
        self._sealer = Sealer(_closed_keyring)

    def _scheme(self, algorithm: WrappingAlgorithm) -> Scheme:
        try:
            return self._schemes[algorithm]
        except KeyError:
            raise UnsupportedOperation(f"this backend does not serve {algorithm}") from None

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
        if not cipher.is_usable(key.key_spec):
            raise UnsupportedOperation(f"{key.key_spec}: pyca's OpenSSL lacks the cipher")
        try:
            return self._sealer.open(Purpose.KEY_MATERIAL, key.data, key.backend, key.key_spec)
        except BlobRejected:
            raise KeyNotFound(
                "the key does not open: it belongs to another backend, is damaged, or its master "
                "key is not in the keyring"
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
    raise BackendClosed("this software backend is closed; open a new one")


def _checked_value(key_spec: KeySpec, material: bytes, expected: bytes | None) -> bytes:
    """The check value (KCV) of the material, after length and expected value were checked."""
    if len(material) != key_spec.material_length:
        raise InvalidKeyMaterial
    value = check_value(material)
    if expected is not None and not same_check_value(expected, value):
        raise InvalidKeyMaterial
    return value
