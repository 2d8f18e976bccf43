"""The PKCS#11 backend: the contract over one HSM token."""

from __future__ import annotations

import hmac
import os
import re
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from pkcs11.constants import Attribute
from pkcs11.mechanisms import Mechanism

from hsmwrap import backend as contract
from hsmwrap.backend import (
    Backend,
    BacksUpKeySets,
    Capabilities,
    ChecksSettings,
    ClonesKeySets,
    CountsObjects,
    Custody,
    DescribesHsm,
    HasKeySets,
    Health,
    HsmDescription,
    ImportedKey,
    KeepsTrialsApart,
    KeyRef,
    KeySetFile,
    KeySetInfo,
    ListsKeySets,
    Mac,
    ManagesKeySets,
    PrivateKeyRef,
    ReapReport,
    ReapsWrappingKeys,
    ReSealsKeys,
    WrappingKey,
)
from hsmwrap.catalog import KeySpec, ProtectionLevel, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.errors import (
    ConfigurationError,
    HsmResourceExhausted,
    HsmwrapError,
    InvalidCiphertext,
    InvalidMac,
)
from hsmwrap.pkcs11.binding.gcm import Gcm
from hsmwrap.pkcs11.binding.identity import ObjectIds
from hsmwrap.pkcs11.binding.templates import Template
from hsmwrap.pkcs11.binding.traits import DATA_SPECIFIED
from hsmwrap.pkcs11.keysets import admin, cloning
from hsmwrap.pkcs11.keysets import backup as key_set_backup
from hsmwrap.pkcs11.keysets.keys import KeySets, Role
from hsmwrap.pkcs11.sessions.connection import Connection
from hsmwrap.pkcs11.sessions.identity import describe_module, describe_token
from hsmwrap.pkcs11.sessions.session import PendingObject, PooledSession, count_objects
from hsmwrap.pkcs11.settings import Pkcs11Settings
from hsmwrap.pkcs11.token.pin import PinSource, officer_pin
from hsmwrap.pkcs11.wrapping import reaper, report, rsa, sm2
from hsmwrap.pkcs11.wrapping.custody import (
    WrappingKeyStore,
    new_object_id,
    parse_ref,
)
from hsmwrap.pkcs11.wrapping.features import (
    ImportPath,
    Row,
    TokenFeatures,
)
from hsmwrap.pkcs11.wrapping.material import (
    HostMaterial,
    MaterialSource,
    MaterialStore,
    kept_open,
    material_custody,
    parse_key_ref,
)
from hsmwrap.pkcs11.wrapping.probe import probe
from hsmwrap.pkcs11.wrapping.use import authenticated
from hsmwrap.sm2 import Sm2Ciphertext, parse

_TRIAL = "trial-"
_MESSAGE_HEAD = 1 + contract.NONCE_LENGTH
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _Token:
    """What is known of the HSM token once it has been probed."""

    features: TokenFeatures
    trusted: bool
    wrapping: WrappingKeyStore
    material: MaterialStore
    capabilities: Capabilities


@dataclass(frozen=True, slots=True)
class _Wrapped:
    """Key material as a client sent it."""

    algorithm: WrappingAlgorithm
    ciphertext: bytes
    key_spec: KeySpec


class Pkcs11Backend(
    Backend,
    ChecksSettings,
    HasKeySets,
    ManagesKeySets,
    ClonesKeySets,
    BacksUpKeySets,
    KeepsTrialsApart,
    CountsObjects,
    DescribesHsm,
    ListsKeySets,
    ReapsWrappingKeys,
    ReSealsKeys,
):
    """CMKs of protection level HSM, on one HSM token."""

    contract_version: ClassVar[int] = 2

    def __init__(self, settings: Pkcs11Settings) -> None:
        """Connect to the HSM token; see :class:`Connection` for the errors."""
        self._settings = settings
        self._vendor = settings.vendor
        self._keys = KeySets(
            settings.key_prefix,
            must_be_trusted=settings.require_trusted_keys,
            vendor=self._vendor,
            sm4=settings.sm4,
        )
        self._probed: _Token | None = None
        self._connection = Connection(settings, self._trial)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """Open from plain settings: see :class:`hsmwrap.pkcs11.settings.Pkcs11Settings`.

        Raises:
            ConfigurationError, TokenSelectionError, PinError, HsmUnavailable
        """
        return cls(Pkcs11Settings.from_mapping(settings))

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any]) -> frozenset[ProtectionLevel]:
        """Check settings, module file and PIN source; what may come later with ``lazy`` is not."""
        checked = Pkcs11Settings.from_mapping(settings)
        # A name without a slash is looked for by the dynamic linker.
        if "/" in checked.module:
            if not os.access(checked.module, os.R_OK):
                raise ConfigurationError(
                    f"module {checked.module}: is not there, or cannot be read"
                )
            if not Path(checked.module).is_file():
                raise ConfigurationError(f"module {checked.module}: is not a file")
        if checked.pin is not None and not checked.lazy:
            checked.pin.check()
        return report.LEVELS

    @classmethod
    def list_keys(cls, settings: Mapping[str, Any]) -> tuple[KeySetInfo, ...]:
        """All key sets in the HSM token, oldest first."""
        return admin.list_key_sets(Pkcs11Settings.from_mapping(settings))

    @classmethod
    def initialise_keys(
        cls, settings: Mapping[str, Any], *, so_pin_file: str | None = None
    ) -> KeySetInfo:
        """Make the first key set; with the SO PIN its keys are CKA_TRUSTED."""
        return admin.initialise(Pkcs11Settings.from_mapping(settings), officer_pin(so_pin_file))

    @classmethod
    def rotate_keys(
        cls, settings: Mapping[str, Any], *, so_pin_file: str | None = None
    ) -> KeySetInfo:
        """Make another key set and make it current."""
        return admin.rotate(Pkcs11Settings.from_mapping(settings), officer_pin(so_pin_file))

    @classmethod
    def retire_keys(cls, settings: Mapping[str, Any], key_set: str) -> None:
        """Destroy a key set that is not current."""
        admin.retire(Pkcs11Settings.from_mapping(settings), key_set)

    @classmethod
    def make_transport_key(
        cls, settings: Mapping[str, Any], *, so_pin_file: str | None = None
    ) -> KeySetFile:
        """Make a transport key in the HSM token; needs the SO PIN."""
        made = cloning.make_transport_key(*_officer(settings, so_pin_file))
        return KeySetFile(made.to_json(), made.fingerprint)

    @classmethod
    def discard_transport_key(
        cls, settings: Mapping[str, Any], *, so_pin_file: str | None = None
    ) -> None:
        """Destroy the transport key in the HSM token; needs the SO PIN."""
        cloning.discard_transport_key(*_officer(settings, so_pin_file))

    @classmethod
    def export_keys(
        cls,
        settings: Mapping[str, Any],
        transport_key: str,
        fingerprint: str,
        *,
        so_pin_file: str | None = None,
    ) -> KeySetFile:
        """Wrap the movable key sets for a transport key; needs the SO PIN."""
        wanted = cloning.TransportKey.from_json(transport_key)
        made = cloning.export(*_officer(settings, so_pin_file), wanted, fingerprint)
        return KeySetFile(made.to_json(), made.fingerprint)

    @classmethod
    def import_keys(
        cls,
        settings: Mapping[str, Any],
        exported: str,
        fingerprint: str,
        *,
        so_pin_file: str | None = None,
    ) -> tuple[KeySetInfo, ...]:
        """Unwrap key sets with the HSM token's transport key; needs the SO PIN."""
        wrapped = cloning.WrappedSets.from_json(exported)
        return cloning.import_sets(*_officer(settings, so_pin_file), wrapped, fingerprint)

    @classmethod
    def back_up_keys(
        cls, settings: Mapping[str, Any], backup_key: bytes, *, so_pin_file: str | None = None
    ) -> str:
        """Wrap the movable key sets under a backup key; needs the SO PIN."""
        return key_set_backup.back_up(*_officer(settings, so_pin_file), backup_key).to_json()

    @classmethod
    def restore_keys(
        cls,
        settings: Mapping[str, Any],
        backup: str,
        backup_key: bytes,
        *,
        so_pin_file: str | None = None,
    ) -> tuple[KeySetInfo, ...]:
        """Unwrap key sets of a backup; needs the SO PIN."""
        made = key_set_backup.Backup.from_json(backup)
        return key_set_backup.restore(*_officer(settings, so_pin_file), made, backup_key)

    @classmethod
    def drill_keys(
        cls,
        settings: Mapping[str, Any],
        backup: str,
        backup_key: bytes,
        examine: Callable[[Mapping[str, Any]], None],
        *,
        so_pin_file: str | None = None,
    ) -> tuple[KeySetInfo, ...]:
        """Restore under a ``key_prefix`` of its own, and destroy that again; needs the SO PIN."""
        made = key_set_backup.Backup.from_json(backup)

        def under(key_prefix: str) -> None:
            examine({**settings, "key_prefix": key_prefix})

        return key_set_backup.drill(*_officer(settings, so_pin_file), made, backup_key, under)

    @classmethod
    def trial_settings(cls, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """With a ``key_prefix`` of its own."""
        return {**settings, "key_prefix": f"{_TRIAL}{secrets.token_hex(8)}"}

    @classmethod
    def end_trial(cls, settings: Mapping[str, Any]) -> None:
        """Destroy every token object whose label begins with the ``key_prefix``."""
        checked = Pkcs11Settings.from_mapping(settings)
        if not re.fullmatch(f"{_TRIAL}[0-9a-f]{{16}}", checked.key_prefix):
            raise ConfigurationError(f"key_prefix {checked.key_prefix} is not one of a trial")
        admin.destroy_all(checked)

    def __repr__(self) -> str:
        return f"<Pkcs11Backend {self.name} {self._connection!r}>"

    @property
    def name(self) -> str:
        """Name in import tokens and key references."""
        return self._settings.name

    def capabilities(self) -> Capabilities:
        """Report what the HSM token can do, as probed once."""
        return self._token().capabilities

    # --- wrapping keys -----------------------------------------------------------------------

    def generate_wrapping_key(
        self, spec: WrappingKeySpec, algorithm: WrappingAlgorithm, *, expires_at: datetime
    ) -> WrappingKey:
        """Generate a pair in the HSM token; the private key is sealed, or stays there."""
        token = self._token()
        capability = token.capabilities.wrapping_for(spec, algorithm)
        resident = capability is None or capability.custody is Custody.HSM_INTERNAL
        role = token.features.rows[algorithm].path.role
        if resident:
            public_key, private_key = self._keep_pair(token, spec, algorithm, role, expires_at)
            return WrappingKey(spec, algorithm, public_key, private_key)
        public_key, private_key = self._seal_pair(token, spec, role)
        key_set = str(parse_ref(private_key)[1])
        return WrappingKey(spec, algorithm, public_key, private_key, key_set)

    def _seal_pair(
        self, token: _Token, spec: WrappingKeySpec, role: Role
    ) -> tuple[bytes, PrivateKeyRef]:
        def operation(pooled: PooledSession) -> tuple[bytes, PrivateKeyRef]:
            number = self._keys.current(pooled)
            trusted = self._keys.trusts(number)
            template = token.wrapping.sealing_template(role, trusted=trusted)
            with pooled.lock.yielded():  # session objects both, and it takes long
                public, private = self._generate(pooled, spec, template)
            try:
                der = _public_key_der(spec, public)
                return der, token.wrapping.seal(pooled, role, private, number)
            finally:
                private.destroy()
                public.destroy()

        return self._run(operation, retry=False)

    def _keep_pair(
        self,
        token: _Token,
        spec: WrappingKeySpec,
        algorithm: WrappingAlgorithm,
        role: Role,
        expires_at: datetime,
    ) -> tuple[bytes, PrivateKeyRef]:
        pending = PendingObject(new_object_id())

        def operation(pooled: PooledSession) -> bytes:
            trusted = self._keys.trusts(self._keys.current(pooled))
            template = token.wrapping.resident_template(
                role, algorithm, pending.object_id, expires_at, trusted=trusted
            )
            stays = (Attribute.TOKEN, Attribute.ID, Attribute.LABEL)
            placed = {} if token.features.session_objects else {a: template[a] for a in stays}
            epoch = pooled.epoch.number
            with pooled.creating(pending):
                public, private = self._generate(pooled, spec, template, placed)
            try:
                der = _public_key_der(spec, public)
            finally:
                public.destroy()
            pooled.keep_handle(pending.object_id, private, epoch)
            return der

        der = self._run(operation, retry=False, pending=pending)
        return der, token.wrapping.resident(role, pending.object_id)

    def _generate(
        self,
        pooled: PooledSession,
        spec: WrappingKeySpec,
        template: Template,
        placed: Template | None = None,
    ) -> tuple[Any, Any]:
        if spec is WrappingKeySpec.RSA_2048:
            return rsa.generate(pooled.session, template, placed)
        return sm2.generate(pooled.session, template, self._vendor, placed)

    def discard_wrapping_key(self, private_key: PrivateKeyRef) -> None:
        """Destroy a resident wrapping key; nothing to do for a sealed one."""
        if private_key.custody is Custody.HSM_INTERNAL:
            object_id, token = parse_ref(private_key)[2], self._probed
            self._connection.destroy(
                object_id,
                lambda pooled: (
                    token is not None and token.wrapping.destroy_known(pooled, object_id)
                ),
            )

    # --- import ------------------------------------------------------------------------------

    def unwrap_material(
        self,
        private_key: PrivateKeyRef,
        algorithm: WrappingAlgorithm,
        encrypted_material: bytes,
        *,
        key_spec: KeySpec,
        expected_check_value: bytes | None = None,
        object_id: bytes | None = None,
    ) -> ImportedKey:
        """Unwrap inside the HSM token where it can, else through the host."""
        token = self._token()
        pending = PendingObject(object_id or new_object_id())
        wrapped = _Wrapped(algorithm, encrypted_material, key_spec)

        def operation(pooled: PooledSession) -> ImportedKey:
            with token.wrapping.fetched(pooled, private_key) as (role, private):
                source = self._source(token.features, role, private, wrapped)
                key, check = token.material.make(
                    pooled, source, key_spec, expected_check_value, pending
                )
            return ImportedKey(key, check, source.exposure)

        return self._run(operation, pending=pending)

    def _source(
        self, features: TokenFeatures, role: Role, private: Any, wrapped: _Wrapped
    ) -> MaterialSource:
        row = features.rows.get(wrapped.algorithm)
        if role is Role.WRAPPING_SM2_UNWRAP:
            parsed = partial(self._parsed, wrapped)
            return sm2.wrapped_material(self._vendor, private, parsed, features.ways.sm2_material)
        if role is Role.WRAPPING_UNWRAP:
            source = DATA_SPECIFIED if row is None else row.source
            way = features.ways.material
            return rsa.wrapped_material(private, wrapped.algorithm, wrapped.ciphertext, way, source)
        decrypt = cache(partial(self._decrypted, row, role, private, wrapped))
        return HostMaterial(decrypt, wrapped.key_spec.material_length)

    def _decrypted(self, row: Row | None, role: Role, private: Any, wrapped: _Wrapped) -> bytes:
        if role is Role.WRAPPING_DERIVE:
            return sm2.decrypt(private, self._parsed(wrapped), self._vendor)
        native = row is None or row.path is not ImportPath.RAW
        source = DATA_SPECIFIED if row is None else row.source
        return rsa.decrypt(
            private, wrapped.algorithm, wrapped.ciphertext, native=native, source=source
        )

    def _parsed(self, wrapped: _Wrapped) -> Sm2Ciphertext:
        length = wrapped.key_spec.material_length
        return parse(wrapped.ciphertext, length, self._settings.sm2_layouts)

    # --- use ---------------------------------------------------------------------------------

    def encrypt(self, key: KeyRef, plaintext: bytes, additional_data: bytes = b"") -> bytes:
        """Encrypt inside the HSM token with a random nonce: by GCM, or by CCM where SM4 has none.

        Raises:
            InvalidParameter: The plaintext is too long for CCM (16 MiB).
        """
        cipher = self._token().features.ciphers[key.key_spec][0]
        nonce = secrets.token_bytes(contract.NONCE_LENGTH)
        data = authenticated(cipher.version, additional_data)
        sealed = self._use(key, lambda obj: cipher.encrypt(obj, nonce, plaintext, data))
        return bytes([cipher.version]) + nonce + sealed

    def decrypt(self, key: KeyRef, ciphertext: bytes, additional_data: bytes = b"") -> bytes:
        """Decrypt inside the HSM token."""
        version, nonce = ciphertext[0], ciphertext[1:_MESSAGE_HEAD]
        sealed = ciphertext[_MESSAGE_HEAD:]
        known = {each.version: each for each in self._token().features.ciphers[key.key_spec]}
        if version not in known:
            raise InvalidCiphertext
        data = authenticated(version, additional_data)
        return self._use(key, lambda obj: known[version].decrypt(obj, nonce, sealed, data))

    def _use(self, key: KeyRef, operation: Callable[[Any], bytes]) -> bytes:
        material = self._token().material

        def in_session(pooled: PooledSession) -> bytes:
            with material.opened(pooled, key) as obj:
                return operation(obj)

        return self._run(in_session)

    def destroy_key(self, key: KeyRef) -> None:
        """Destroy an imported key's object; nothing to do for a sealed blob."""
        if key.custody is Custody.HSM_INTERNAL:
            self._connection.destroy(parse_key_ref(key)[1])

    # --- import tokens -----------------------------------------------------------------------

    def mac(self, data: bytes) -> Mac:
        """SHA256-HMAC inside the HSM token, under the current key set's MAC key."""

        def operation(pooled: PooledSession) -> Mac:
            number = self._keys.current(pooled)
            key = self._keys.require(pooled, Role.MAC, number)
            return Mac(str(number), _tag(key, data))

        return self._run(operation)

    def verify_mac(self, data: bytes, mac: Mac) -> None:
        """Compute the tag again, inside the HSM token, and compare."""
        number = _key_set_number(mac)

        def operation(pooled: PooledSession) -> bytes | None:
            key = self._keys.find(pooled, Role.MAC, number, authentic=False)
            return None if key is None else _tag(key, data)

        # Judged outside: an error inside would close the session, for each token that is forged.
        tag = self._run(operation)
        if tag is None:
            raise InvalidMac(f"the HSM token has no key set {number}")
        if not hmac.compare_digest(tag, mac.tag):
            raise InvalidMac("the MAC is not right for these data")

    def current_key_set(self) -> str:
        """Number of the current key set."""
        # By a MAC: a handle that this process has kept does not show that the set was retired.
        return self.mac(b"").key_set

    def key_set_ids(self) -> tuple[str, ...]:
        """Numbers of the key sets that are finished."""
        sets = self._run(lambda pooled: self._keys.list(pooled.session))
        return tuple(str(each.number) for each in sets if each.finished)

    def key_set_of(self, key: KeyRef) -> str | None:
        """Number of the key set that the key is sealed under."""
        return str(parse_key_ref(key)[0])

    def reseal(self, key: KeyRef, *, expected_check_value: bytes | None = None) -> KeyRef:
        """Unwrap the key and wrap it under the current key set, both inside the HSM token."""
        material = self._token().material
        return self._run(lambda pooled: material.reseal(pooled, key, expected_check_value))

    # --- upkeep ------------------------------------------------------------------------------

    def reap(self, now: datetime) -> ReapReport:
        """Destroy expired resident wrapping keys of all processes, and our own pending objects.

        Sealed keys that were open for too long are closed.
        """
        self._connection.close_opened_keys(expired=True)
        self._connection.destroy_pending()
        prefix = self._settings.key_prefix
        return self._connection.run(lambda pooled: reaper.reap(pooled, prefix, now))

    def _run(
        self,
        operation: Callable[[PooledSession], _T],
        *,
        retry: bool = True,
        pending: PendingObject | None = None,
    ) -> _T:
        """As :meth:`Connection.run`; an HSM without memory gets rid of what need not be there.

        That is expired wrapping keys, and keys that sessions keep open: these must not be why a
        call fails, so it is made once more.
        """
        try:
            return self._connection.run(operation, retry=retry, pending=pending)
        except HsmResourceExhausted:
            with suppress(HsmwrapError):
                self._connection.close_opened_keys()
                self.reap(datetime.now(UTC))
            if not (self._settings.opened_keys and retry):
                raise
        return self._connection.run(operation, retry=retry, pending=pending)

    def count_objects(self) -> int:
        """Token objects and session objects that the user sees."""
        return self._connection.run(lambda pooled: count_objects(pooled.session))

    def describe_hsm(self) -> HsmDescription:
        """What HSM token and module say."""
        token, module = describe_token(self._connection), describe_module(self._settings)
        return HsmDescription(
            manufacturer=token["manufacturer"],
            model=token["model"],
            hardware_version=token["hardware_version"],
            firmware_version=token["firmware_version"],
            library=f"{module['manufacturer']} {module['description']}".strip(),
            library_version=module["version"],
            profile=self._settings.profile_told,
        )

    def health(self) -> Health:
        """State of the connection; never waits for the HSM."""
        ready, detail, facts = self._connection.health()
        if self._probed is not None:
            facts["implicit_rejection"] = self._probed.features.implicit_rejection
        return Health(ready, detail, facts)

    def close(self) -> None:
        """Wait for running calls, then close every session."""
        self._connection.close()

    def _trial(self, pooled: PooledSession) -> None:
        """Use a key that every call needs, of the set that is found now."""
        self._keys.look(pooled)
        _tag(self._keys.require(pooled, Role.MAC, self._keys.current(pooled)), b"")

    # --- the probe ---------------------------------------------------------------------------

    def _token(self) -> _Token:
        self._connection.require_open()
        # Two threads may probe at the same time; both find the same.
        if self._probed is None:
            self._probed = self._run(self._probe, retry=False)
        return self._probed

    def _probe(self, pooled: PooledSession) -> _Token:
        number = self._keys.current(pooled)
        gcm, ids = Gcm(self._settings.module), ObjectIds(self._settings.module)
        features = probe(pooled, self._keys, self._settings, gcm, self._vendor)
        trusted = self._keys.trusts(number)
        custody = material_custody(self._settings, features)
        prefix = self._settings.key_prefix
        return _Token(
            features=features,
            trusted=trusted,
            wrapping=WrappingKeyStore(self._keys, prefix, features, ids),
            material=MaterialStore(
                self.name, self._keys, prefix, custody, features, kept_open(self._settings)
            ),
            capabilities=report.capabilities(
                self._settings,
                features,
                trusted=trusted,
                origin_told=bool(self._keys.origin_told(pooled.session)),
            ),
        )


def _officer(
    settings: Mapping[str, Any], so_pin_file: str | None
) -> tuple[Pkcs11Settings, PinSource]:
    checked, so_pin = Pkcs11Settings.from_mapping(settings), officer_pin(so_pin_file)
    if so_pin is None:
        raise ConfigurationError("this takes the security officer: give so_pin_file")
    return checked, so_pin


def _key_set_number(mac: Mac) -> int:
    written = mac.key_set
    if not written.isascii() or not written.isdecimal() or str(int(written)) != written:
        raise InvalidMac("the MAC names no key set: that is a number")
    return int(written)


def _tag(key: Any, data: bytes) -> bytes:
    return bytes(key.sign(data, mechanism=Mechanism.SHA256_HMAC))


def _public_key_der(spec: WrappingKeySpec, public: Any) -> bytes:
    if spec is WrappingKeySpec.RSA_2048:
        return rsa.public_key_der(public)
    return sm2.public_key_der(public)
