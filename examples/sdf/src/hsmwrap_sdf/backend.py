"""The backend: SM2PKE and SM4 of hsmwrap's contract, by the functions of GM/T 0018.

A wrapping key is a pair of the pool, leased. An import encrypts the client's key for the storage
pair inside the device (SDF_ExchangeDigitEnvelopeBaseOnECC); that envelope, with a MAC, is the
sealed key, which SDF_ImportKeyWithISK_ECC turns into a key of the session at each use. The key
itself is never in the host.
"""

from __future__ import annotations

import hmac
import re
import secrets
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Self

from hsmwrap import ccm
from hsmwrap.backend import (
    CONTRACT_VERSION,
    Backend,
    Capabilities,
    ChecksSettings,
    CountsObjects,
    Custody,
    DescribesHsm,
    Exposure,
    HasKeySets,
    Health,
    HsmDescription,
    ImportedKey,
    KeepsTrialsApart,
    KeyCapability,
    KeyRef,
    KeySetInfo,
    Mac,
    ManagesKeySets,
    MissingCapability,
    PrivateKeyRef,
    ReapReport,
    ReapsWrappingKeys,
    ReSealsKeys,
    WrappingCapability,
    WrappingKey,
)
from hsmwrap.catalog import KeySpec, ProtectionLevel, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.checkvalue import CHECK_BLOCK, same_check_value
from hsmwrap.errors import (
    ConfigurationError,
    HsmError,
    InvalidImportToken,
    InvalidKeyMaterial,
    InvalidMac,
    KeyNotFound,
)
from hsmwrap.sm2 import Sm2Ciphertext, encode_point, encode_spki, parse
from hsmwrap_sdf.binding import FIELD, HASH, Library, SdfError
from hsmwrap_sdf.device import Device, Key, Session
from hsmwrap_sdf.keysets import KeySet, KeySets
from hsmwrap_sdf.leases import NUMBER_LENGTH, Lease, Leases
from hsmwrap_sdf.probe import EXCHANGE, Findings, probe
from hsmwrap_sdf.settings import SdfSettings

METHOD_SM4_ECB = 128
"""Method of the check values: SM4 of :data:`hsmwrap.checkvalue.CHECK_BLOCK` under the key.

A counter block of CCM begins with 2, and the first block of its MAC with 3A or 7A: the check value
is not a part of any key stream.
"""

SEALED, RESIDENT = Custody.HSM_ENCRYPTED_DATABASE, Custody.HSM_INTERNAL
SM4 = KeySpec.ALIYUN_SM4
SM2PKE = (WrappingKeySpec.EC_SM2, WrappingAlgorithm.SM2PKE)

_REFERENCE = struct.Struct(f">I{NUMBER_LENGTH}s")
_BLOB = struct.Struct(f">BH{FIELD}s{FIELD}s{HASH}s{SM4.material_length}s")
_BLOB_VERSION = 1
_TAG_LENGTH = 32
_TOKENS, _SEALED_KEYS = b"import token", b"sealed key"
_LEASES = "leases.sqlite"


class SdfBackend(
    Backend,
    ChecksSettings,
    CountsObjects,
    DescribesHsm,
    HasKeySets,
    KeepsTrialsApart,
    ManagesKeySets,
    ReapsWrappingKeys,
    ReSealsKeys,
):
    """A device, or several with the same keys, through its SDF library."""

    contract_version: ClassVar[int] = CONTRACT_VERSION

    def __init__(self, settings: SdfSettings) -> None:
        """Open the device, and try what it can.

        Raises:
            ConfigurationError: The settings do not fit each other or the device's key sets.
            PinError: The device refused the password.
            SelfTestFailed: The device computes something wrong.
            HsmUnavailable, HsmError: It does not answer as it should.
        """
        self._settings = settings
        self._key_sets = KeySets(settings.key_sets())
        self._require_separate_pairs()
        self._device = _device(settings)
        try:
            with self._device.session() as session:
                current = self._key_sets.current()
                findings = probe(session, current.storage_index)
                current.mac(session, _TOKENS, b"")
        except BaseException:
            self._device.close()
            raise
        self._refusal = findings.refusal
        self._report = _report(settings, findings)
        self._leases = _leases(settings)

    def _require_separate_pairs(self) -> None:
        sets = map(self._key_sets.get, self._key_sets.numbers())
        for each in (self._settings, *sets):
            if each is not None and each.storage_index in self._settings.pool:
                raise ConfigurationError(
                    f"sdf backend: index {each.storage_index} is in the pool, and its pair seals "
                    "keys: clients must not encrypt for that pair"
                )

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """Open it from plain settings, see :class:`SdfSettings`."""
        return cls(SdfSettings.from_mapping(settings))

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any]) -> frozenset[ProtectionLevel]:
        """Look at the settings and the files that they name."""
        read = SdfSettings.from_mapping(settings)
        read.password()
        KeySets(read.key_sets()).current()
        return frozenset({ProtectionLevel.HSM})

    def __repr__(self) -> str:
        return f"<SdfBackend {self._settings} {self._device!r}>"

    @property
    def name(self) -> str:
        """As the settings say."""
        return self._settings.name

    def capabilities(self) -> Capabilities:
        """What was found when it was opened."""
        return self._report

    # --- wrapping keys -----------------------------------------------------------------------

    def generate_wrapping_key(
        self, spec: WrappingKeySpec, algorithm: WrappingAlgorithm, *, expires_at: datetime
    ) -> WrappingKey:
        """Lease a pair of the pool.

        Raises:
            TooManyWrappingKeys: All are leased or used up.
        """
        with self._device.session() as session:
            lease, key = self._leases.take(expires_at, session.public_key)
        point = encode_point(int.from_bytes(key.x), int.from_bytes(key.y))
        reference = PrivateKeyRef(RESIDENT, _REFERENCE.pack(lease.pair, lease.number))
        return WrappingKey(spec, algorithm, encode_spki(point), reference)

    def discard_wrapping_key(self, private_key: PrivateKeyRef) -> None:
        """Give the pair back."""
        self._leases.end(_lease(private_key))

    def reap(self, now: datetime) -> ReapReport:
        """End the leases that expired a grace ago."""
        examined, ended = self._leases.end_expired(now)
        return ReapReport(examined, tuple(f"{each.pair}/{each.number.hex()}" for each in ended))

    # --- imports -----------------------------------------------------------------------------

    def unwrap_material(
        self,
        private_key: PrivateKeyRef,
        algorithm: WrappingAlgorithm,  # noqa: ARG002  # there is one
        encrypted_material: bytes,
        *,
        key_spec: KeySpec,
        expected_check_value: bytes | None = None,  # noqa: ARG002  # the guard compares
        object_id: bytes | None = None,  # noqa: ARG002  # imported keys are sealed
    ) -> ImportedKey:
        """Encrypt the client's key for the storage pair, inside the device."""
        lease = _lease(private_key)
        with self._device.session() as session:
            self._leases.require(lease, session.public_key)
            layouts = self._settings.sm2_layouts
            ciphertext = parse(encrypted_material, key_spec.material_length, layouts)
            self._leases.require_first(lease, ciphertext.to_c1c3c2())
            current = self._key_sets.current()
            storage = session.public_key(current.storage_index)
            try:
                envelope = session.exchange(lease.pair, storage, ciphertext)
            except SdfError as error:
                if (error.function, error.code) != (EXCHANGE, self._refusal):
                    raise
                raise InvalidKeyMaterial from None
            with session.opened(current.storage_index, envelope) as key:
                value = _check_value(key)
            data = self._seal(session, current, key_spec, envelope)
        return ImportedKey(KeyRef(self.name, key_spec, SEALED, data), value, Exposure.IN_HSM)

    def _seal(
        self, session: Session, key_set: KeySet, key_spec: KeySpec, envelope: Sm2Ciphertext
    ) -> bytes:
        if len(envelope.c2) != key_spec.material_length:
            raise HsmError("the device made an envelope of another length than the key's")
        x, y = envelope.x.to_bytes(FIELD), envelope.y.to_bytes(FIELD)
        blob = _BLOB.pack(_BLOB_VERSION, key_set.number, x, y, envelope.c3, envelope.c2)
        return blob + key_set.mac(session, _SEALED_KEYS, self._bound(key_spec, blob))

    def _bound(self, key_spec: KeySpec, blob: bytes) -> bytes:
        return f"{self.name}/{key_spec}/".encode() + blob

    def _open(self, session: Session, key: KeyRef) -> tuple[KeySet, Sm2Ciphertext]:
        """The key set of a sealed key, and its envelope.

        Raises:
            KeyNotFound: It is damaged, or its key set is gone.
        """
        number = _key_set_of(key)
        key_set = self._key_sets.get(number)
        if key_set is None:
            raise KeyNotFound(f"key set {number}, which sealed this key, is not there (any more)")
        blob, tag = key.data[: _BLOB.size], key.data[_BLOB.size :]
        right = key_set.mac(session, _SEALED_KEYS, self._bound(key.key_spec, blob))
        if not hmac.compare_digest(right, tag):
            raise KeyNotFound("not a sealed key of this backend, or damaged")
        _, _, x, y, c3, c2 = _BLOB.unpack(blob)
        return key_set, Sm2Ciphertext(int.from_bytes(x), int.from_bytes(y), c3, c2)

    # --- use ---------------------------------------------------------------------------------

    def encrypt(self, key: KeyRef, plaintext: bytes, additional_data: bytes = b"") -> bytes:
        """SM4-CCM."""
        with self._used(key) as sm4:
            return ccm.encrypt(sm4.ecb, sm4.cbc, plaintext, additional_data)

    def decrypt(self, key: KeyRef, ciphertext: bytes, additional_data: bytes = b"") -> bytes:
        """SM4-CCM backwards."""
        with self._used(key) as sm4:
            return ccm.decrypt(sm4.ecb, sm4.cbc, ciphertext, additional_data)

    @contextmanager
    def _used(self, key: KeyRef) -> Iterator[Key]:
        with self._device.session() as session:
            key_set, envelope = self._open(session, key)
            with session.opened(key_set.storage_index, envelope) as sm4:
                yield sm4

    # --- import tokens -----------------------------------------------------------------------

    def mac(self, data: bytes) -> Mac:
        """The MAC of the current key set, see :mod:`hsmwrap_sdf.keysets`."""
        current = self._key_sets.current()
        with self._device.session() as session:
            return Mac(str(current.number), current.mac(session, _TOKENS, data))

    def verify_mac(self, data: bytes, mac: Mac) -> None:
        """Compute it again and compare."""
        is_number = re.fullmatch("[1-9][0-9]{0,4}", mac.key_set)
        key_set = self._key_sets.get(int(mac.key_set)) if is_number else None
        if key_set is None:
            raise InvalidMac(f"key set {mac.key_set} does not exist")
        with self._device.session() as session:
            right = key_set.mac(session, _TOKENS, data)
        if not hmac.compare_digest(right, mac.tag):
            raise InvalidMac("the MAC is not right for these data")

    # --- upkeep ------------------------------------------------------------------------------

    def health(self) -> Health:
        """Whether the device is open, and how many pairs are left."""
        counts = self._leases.counts()
        pool = {"pairs_free": counts.free, "pairs_leased": counts.leased}
        facts = {**pool, "pairs_used_up": counts.used_up}
        if self._device.failed:
            return Health(ready=False, detail=self._device.state, facts=facts)
        if self._device.refuses_password(self._key_sets.current().storage_index):
            detail = "the device refused the password for the storage pair"
            return Health(ready=False, detail=detail, facts=facts)
        detail = "ready" if counts.free else "ready; no key pair of the pool is free"
        return Health(ready=True, detail=detail, facts=facts)

    def close(self) -> None:
        """Close the device."""
        self._device.close()

    # --- key sets ----------------------------------------------------------------------------

    def current_key_set(self) -> str:
        """The one with the highest number."""
        return str(self._key_sets.current().number)

    def key_set_of(self, key: KeyRef) -> str | None:
        """Its number, from the blob."""
        return str(_key_set_of(key))

    def reseal(self, key: KeyRef, *, expected_check_value: bytes | None = None) -> KeyRef:
        """Encrypt it for the current storage pair, inside the device."""
        current = self._key_sets.current()
        with self._device.session() as session:
            key_set, envelope = self._open(session, key)
            if key_set.number != current.number:
                storage = session.public_key(current.storage_index)
                envelope = session.exchange(key_set.storage_index, storage, envelope)
            with session.opened(current.storage_index, envelope) as sm4:
                value = _check_value(sm4)
            if expected_check_value and not same_check_value(expected_check_value, value):
                raise HsmError("the key does not have the expected check value")
            if key_set.number == current.number:
                return key
            return replace(key, data=self._seal(session, current, key.key_spec, envelope))

    @classmethod
    def list_keys(cls, settings: Mapping[str, Any]) -> tuple[KeySetInfo, ...]:
        """All key sets, oldest first."""
        sets = KeySets(SdfSettings.from_mapping(settings).key_sets())
        numbers = sets.numbers()
        known = [each for each in map(sets.get, numbers) if each is not None]
        return tuple(_info(each, current=each.number == numbers[-1]) for each in known)

    @classmethod
    def initialise_keys(
        cls,
        settings: Mapping[str, Any],
        *,
        so_pin_file: str | None = None,  # noqa: ARG003  # SDF has no such officer
    ) -> KeySetInfo:
        """Make key set 1, and the directory if it is not there."""
        read = SdfSettings.from_mapping(settings)
        with suppress(OSError):  # what is wrong is said below
            Path(read.state_directory).mkdir(mode=0o700, exist_ok=True)
            read.key_sets().mkdir(mode=0o700, exist_ok=True)
        if KeySets(read.key_sets()).numbers():
            raise ConfigurationError("sdf backend: there are key sets already")
        return _make(read, 1)

    @classmethod
    def rotate_keys(
        cls,
        settings: Mapping[str, Any],
        *,
        so_pin_file: str | None = None,  # noqa: ARG003  # SDF has no such officer
    ) -> KeySetInfo:
        """Make a key set with the next number, and the indexes that the settings have now."""
        read = SdfSettings.from_mapping(settings)
        return _make(read, KeySets(read.key_sets()).current().number + 1)

    @classmethod
    def retire_keys(cls, settings: Mapping[str, Any], key_set: str) -> None:
        """Remove the file of a key set that is not current."""
        sets = KeySets(SdfSettings.from_mapping(settings).key_sets())
        if key_set not in map(str, sets.numbers()[:-1]):
            raise ConfigurationError(f"sdf backend: no key set {key_set}, or it is current")
        sets.remove(int(key_set))

    def describe_hsm(self) -> HsmDescription:
        """What the device says it is; its serial number is left out."""
        with self._device.session() as session:
            info = session.info()
        return HsmDescription(
            manufacturer=info.issuer,
            model=info.name,
            firmware_version=f"{info.version:#010x}",
            library=f"SDF, version {info.standard} of GM/T 0018",
        )

    # --- trials of the conformance kit -------------------------------------------------------

    @classmethod
    def trial_settings(cls, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """With key sets in a directory of their own; the leases are the host's."""
        SdfSettings.from_mapping(settings)
        return {**settings, "trial": secrets.token_hex(8)}

    @classmethod
    def end_trial(cls, settings: Mapping[str, Any]) -> None:
        """Remove the key sets, and give the pairs back."""
        read = SdfSettings.from_mapping(settings)
        if read.trial is None:
            raise ConfigurationError("sdf backend: these are not settings of a trial")
        shutil.rmtree(read.key_sets(), ignore_errors=True)
        _leases(read).end_trial()

    def count_objects(self) -> int:
        """Leased pairs, and key handles of this process: the interface lists nothing."""
        return self._leases.counts().leased + len(self._device.keys)


def _device(settings: SdfSettings) -> Device:
    library = Library(settings.library)
    return Device(library, settings.password(), settings.sessions, settings.session_timeout)


def _leases(settings: SdfSettings) -> Leases:
    file, reuse = settings.state() / _LEASES, settings.reuse_pairs
    return Leases(file, settings.pool, reuse=reuse, trial=settings.trial)


def _make(settings: SdfSettings, number: int) -> KeySetInfo:
    device = _device(settings)
    try:
        with device.session() as session:
            session.public_key(settings.storage_index)  # it has to be there
            mac_key = session.generate_under_kek(settings.kek_index)
            key_set = KeySet(number, settings.storage_index, settings.kek_index, mac_key)
            key_set.mac(session, _TOKENS, b"")
    finally:
        device.close()
    KeySets(settings.key_sets()).add(key_set)
    return _info(key_set, current=True)


def _info(key_set: KeySet, *, current: bool) -> KeySetInfo:
    detail = f"storage pair {key_set.storage_index}, key-encryption key {key_set.kek_index}"
    return KeySetInfo(str(key_set.number), current, detail)


def _lease(private_key: PrivateKeyRef) -> Lease:
    try:
        return Lease(*_REFERENCE.unpack(private_key.data))
    except struct.error:
        raise InvalidImportToken("not a wrapping key of this backend") from None


def _key_set_of(key: KeyRef) -> int:
    if len(key.data) != _BLOB.size + _TAG_LENGTH or key.data[0] != _BLOB_VERSION:
        raise KeyNotFound("not a sealed key of a version known here")
    number: int = _BLOB.unpack(key.data[: _BLOB.size])[1]
    return number


def _check_value(key: Key) -> bytes:
    return bytes([METHOD_SM4_ECB]) + key.ecb(CHECK_BLOCK)


def _report(settings: SdfSettings, findings: Findings) -> Capabilities:
    seals = findings.refusal is not None
    path = f"{EXCHANGE}, SDF_ImportKeyWithISK_ECC"
    missing = [
        MissingCapability(
            WrappingKeySpec.RSA_2048,
            algorithm,
            "The interface makes no RSA wrapping keys, and a device need not have RSA at all.",
        )
        for algorithm in WrappingAlgorithm
        if algorithm is not WrappingAlgorithm.SM2PKE
    ]
    if not seals:
        why = f"The device has no {EXCHANGE}: the edition of 2023 left it out."
        missing.append(MissingCapability(*SM2PKE, why, findings.failed))
    served = WrappingCapability(*SM2PKE, Exposure.IN_HSM, RESIDENT, path)
    again = (
        "A pair of the pool serves again when its import token has expired: a ciphertext that was "
        "made for it before and never came here could be imported with a later token."
    )
    once = "A pair of the pool serves one import token; its index then waits for a new pair."
    return Capabilities(
        backend=settings.name,
        protection_levels=frozenset({ProtectionLevel.HSM}),
        wrapping=(served,) if seals else (),
        keys=(KeyCapability(SM4, usable=True, custody=SEALED),) if seals else (),
        notes=(
            again if settings.reuse_pairs else once,
            "AES keys are refused: the interface has the national algorithms only.",
            "SM4 keys encrypt in CCM mode (message version 2), from the device's ECB and CBC.",
        ),
        missing=tuple(missing),
        failed=findings.failed,
        protections=(findings.protection,),
    )
