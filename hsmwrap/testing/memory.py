"""A complete backend without an HSM, for the tests of a KMS and as a model for plug-ins.

:class:`MemoryBackend` keeps its "HSM" in this process's memory, or in a directory that several
processes share, and does all that the contract has: both protection levels, both custodies, every
wrapping algorithm, key sets, reaping. It passes the conformance kit. It protects nothing and is not
registered as a plug-in: a test opens it by its class.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from hsmwrap.backend import (
    CONTRACT_VERSION,
    NONCE_LENGTH,
    Backend,
    BacksUpKeySets,
    Capabilities,
    ClonesKeySets,
    CountsObjects,
    Custody,
    Exposure,
    HasKeySets,
    Health,
    ImportedKey,
    KeepsTrialsApart,
    KeyCapability,
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
    WrappingCapability,
    WrappingKey,
)
from hsmwrap.catalog import KeySpec, ProtectionLevel, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.checkvalue import check_value, same_check_value
from hsmwrap.errors import (
    ConfigurationError,
    HsmError,
    InvalidImportToken,
    InvalidKeyMaterial,
    InvalidMac,
    KeyNotFound,
)
from hsmwrap.settings import NAME, TEXT, Kind, Settings, choice, setting, several, typed
from hsmwrap.sm2.engine import open_engine
from hsmwrap.sm2.formats import DEFAULT_LAYOUTS, LAYOUTS, Layout
from hsmwrap.software import cipher
from hsmwrap.software.rsa import RsaScheme
from hsmwrap.software.schemes import Scheme
from hsmwrap.software.sm2 import Sm2Scheme

GRACE = timedelta(minutes=15)
"""How long after its expiry a wrapping key is reaped: another machine's clock may be behind."""

_TRANSPORT = "transport"
_TRIAL = ".trial-"
_EXPIRY = struct.Struct(">d")
_E = TypeVar("_E", bound=StrEnum)

Store = MutableMapping[str, bytes]
"""The "HSM": objects by name. A test may look into it, and share it between backends."""


def _some_of(members: type[_E]) -> Kind:
    return several(choice(members), ", ".join(members))


@dataclass(frozen=True, slots=True)
class MemorySettings(Settings):
    """The checked settings of a :class:`MemoryBackend`."""

    component: ClassVar[str] = "memory backend"

    name: str = setting(NAME, "Name of the backend in import tokens and keys.", "memory")
    directory: str | None = setting(TEXT, "Directory of the objects, for several processes.")
    store: Store | None = setting(
        Kind("a dictionary", lambda value: typed(value, MutableMapping)),
        "The objects, for backends that share them in one process.",
        show=False,
    )
    wrapping_custody: Custody = setting(
        choice(Custody), "Private wrapping keys.", Custody.HSM_ENCRYPTED_DATABASE
    )
    material_custody: Custody = setting(
        choice(Custody), "Imported keys.", Custody.HSM_ENCRYPTED_DATABASE
    )
    protection_levels: tuple[ProtectionLevel, ...] = setting(
        _some_of(ProtectionLevel), "Levels of the CMKs that it serves.", tuple(ProtectionLevel)
    )
    algorithms: tuple[WrappingAlgorithm, ...] = setting(
        _some_of(WrappingAlgorithm), "Wrapping algorithms that it serves.", tuple(WrappingAlgorithm)
    )
    key_specs: tuple[KeySpec, ...] = setting(
        _some_of(KeySpec), "Key specs that it imports.", tuple(KeySpec)
    )
    usable: tuple[KeySpec, ...] = setting(
        _some_of(KeySpec), "Key specs that it encrypts with.", tuple(KeySpec)
    )
    exposure: Exposure = setting(
        choice(Exposure), "What it says of where material is in plaintext.", Exposure.HOST
    )
    sm2_layouts: tuple[Layout, ...] = setting(
        LAYOUTS, "SM2 ciphertext layouts that it reads.", DEFAULT_LAYOUTS
    )

    def open_store(self) -> Store:
        """The objects."""
        if self.directory is not None:
            return DirectoryStore(self.directory)
        return {} if self.store is None else self.store


class _TrialStore(dict[str, bytes]):
    """The objects of a trial."""


class MemoryBackend(
    Backend,
    HasKeySets,
    ListsKeySets,
    ManagesKeySets,
    ClonesKeySets,
    BacksUpKeySets,
    KeepsTrialsApart,
    CountsObjects,
    ReapsWrappingKeys,
    ReSealsKeys,
):
    """The smallest backend that keeps the whole contract; makes its first key set when opened."""

    contract_version: ClassVar[int] = CONTRACT_VERSION

    def __init__(self, settings: MemorySettings | None = None) -> None:
        """Open it on its objects."""
        self.settings = settings or MemorySettings()
        self.store = self.settings.open_store()
        self.store.setdefault(_key_set(1), secrets.token_bytes(32))
        sm2 = Sm2Scheme(open_engine("libcrypto"), self.settings.sm2_layouts)
        schemes: list[Scheme] = [*map(RsaScheme, RsaScheme.ALGORITHMS), sm2]
        self.schemes = {each.algorithm: each for each in schemes}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """Open it from plain settings, see :class:`MemorySettings`."""
        return cls(MemorySettings.from_mapping(settings))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.settings}>"

    @property
    def name(self) -> str:
        """As the settings say."""
        return self.settings.name

    def capabilities(self) -> Capabilities:
        """What the settings leave of everything."""
        s = self.settings
        return Capabilities(
            backend=self.name,
            protection_levels=frozenset(s.protection_levels),
            wrapping=tuple(
                WrappingCapability(
                    *(each.spec, each.algorithm, s.exposure, s.wrapping_custody, "memory"),
                    reason="" if s.exposure is Exposure.IN_HSM else "Memory is not an HSM.",
                )
                for each in self.schemes.values()
                if each.algorithm in s.algorithms
            ),
            keys=tuple(
                KeyCapability(spec, spec in s.usable and cipher.is_usable(spec), s.material_custody)
                for spec in s.key_specs
            ),
            production=False,
            notes=("A backend for tests: it protects nothing.",),
        )

    # --- wrapping keys -----------------------------------------------------------------------

    def generate_wrapping_key(
        self, spec: WrappingKeySpec, algorithm: WrappingAlgorithm, *, expires_at: datetime
    ) -> WrappingKey:
        """Make a pair; the private key is sealed, or an object that knows when it expires."""
        public_key, secret = self.make_pair(algorithm)
        custody = self.settings.wrapping_custody
        if custody is Custody.HSM_INTERNAL:
            object_id = secrets.token_bytes(16)
            self.store[_wrapping(object_id)] = _EXPIRY.pack(expires_at.timestamp()) + secret
            return WrappingKey(spec, algorithm, public_key, PrivateKeyRef(custody, object_id))
        key_set = self.current_key_set()
        blob = self.seal(key_set, algorithm, secret)
        return WrappingKey(spec, algorithm, public_key, PrivateKeyRef(custody, blob), key_set)

    def make_pair(self, algorithm: WrappingAlgorithm) -> tuple[bytes, bytes]:
        """Public key (DER SubjectPublicKeyInfo) and secret of a new pair; RSA takes 50 ms."""
        return self.schemes[algorithm].generate()

    def discard_wrapping_key(self, private_key: PrivateKeyRef) -> None:
        """Remove the object."""
        self.store.pop(_wrapping(private_key.data), None)

    def unwrap_material(
        self,
        private_key: PrivateKeyRef,
        algorithm: WrappingAlgorithm,
        encrypted_material: bytes,
        *,
        key_spec: KeySpec,
        expected_check_value: bytes | None = None,  # noqa: ARG002  # the guard compares
        object_id: bytes | None = None,
    ) -> ImportedKey:
        """Decrypt, look at the length, keep."""
        secret = self.fetch(private_key, algorithm)
        length = key_spec.material_length
        material = self.schemes[algorithm].decrypt(secret, encrypted_material, length)
        if len(material) != length:
            raise InvalidKeyMaterial
        data = self.keep(material, key_spec, object_id or secrets.token_bytes(16))
        key = KeyRef(self.name, key_spec, self.settings.material_custody, data)
        return ImportedKey(key, check_value(material), self.settings.exposure)

    def fetch(self, private_key: PrivateKeyRef, algorithm: WrappingAlgorithm) -> bytes:
        """The secret of a wrapping key.

        Raises:
            InvalidImportToken: It is not there (any more), or does not open.
        """
        try:
            if private_key.custody is Custody.HSM_INTERNAL:
                return self.store[_wrapping(private_key.data)][_EXPIRY.size :]
            return self.open(algorithm, private_key.data)
        except KeyError:
            raise InvalidImportToken("the wrapping key of this import token is gone") from None

    def keep(self, material: bytes, key_spec: KeySpec, object_id: bytes) -> bytes:
        """Keep material as an object or sealed; returns the reference's data."""
        if self.settings.material_custody is Custody.HSM_ENCRYPTED_DATABASE:
            return self.seal(self.current_key_set(), key_spec, material)
        if self.store.setdefault(_material(object_id), material) is not material:
            raise HsmError("there is an object with this object_id")
        return object_id

    # --- use ---------------------------------------------------------------------------------

    def encrypt(self, key: KeyRef, plaintext: bytes, additional_data: bytes = b"") -> bytes:
        """AES-256-GCM or SM4-GCM."""
        return cipher.encrypt(key.key_spec, self.material(key), plaintext, additional_data)

    def decrypt(self, key: KeyRef, ciphertext: bytes, additional_data: bytes = b"") -> bytes:
        """The same backwards."""
        return cipher.decrypt(key.key_spec, self.material(key), ciphertext, additional_data)

    def destroy_key(self, key: KeyRef) -> None:
        """Remove the object."""
        self.store.pop(_material(key.data), None)

    def material(self, key: KeyRef) -> bytes:
        """The material of an imported key.

        Raises:
            KeyNotFound: It is not there (any more), or does not open.
        """
        try:
            if key.custody is Custody.HSM_INTERNAL:
                return self.store[_material(key.data)]
            return self.open(key.key_spec, key.data)
        except KeyError:
            why = "the key is not in this backend (any more)"
            if key.custody is not Custody.HSM_INTERNAL:
                needed = int.from_bytes(key.data[:2], "big")
                if _key_set(needed) not in self.store:
                    why = f"key set {needed}, which sealed this key, was retired"
            raise KeyNotFound(why) from None

    # --- import tokens -----------------------------------------------------------------------

    def mac(self, data: bytes) -> Mac:
        """HMAC-SHA-256 under the current key set."""
        key_set = self.current_key_set()
        return Mac(key_set, hmac.digest(self._key(key_set, "mac"), data, "sha256"))

    def verify_mac(self, data: bytes, mac: Mac) -> None:
        """Compute it again and compare."""
        try:
            key = self._key(mac.key_set, "mac")
        except KeyError:
            raise InvalidMac(f"key set {mac.key_set} does not exist") from None
        if not hmac.compare_digest(hmac.digest(key, data, "sha256"), mac.tag):
            raise InvalidMac("the MAC is not right for these data")

    # --- upkeep ------------------------------------------------------------------------------

    def reap(self, now: datetime) -> ReapReport:
        """Remove wrapping keys that expired :data:`GRACE` ago."""
        resident = [name for name in self.store if name.startswith(_wrapping(b""))]
        over = (now - GRACE).timestamp()
        expired = [name for name in resident if _EXPIRY.unpack_from(self.store[name])[0] < over]
        for name in expired:
            self.store.pop(name, None)
        ids = tuple(name.removeprefix(_wrapping(b"")) for name in expired)
        return ReapReport(len(resident), ids)

    def count_objects(self) -> int:
        """All of them, key sets too."""
        return len(self.store)

    def health(self) -> Health:
        """Ready."""
        return Health(ready=True, detail="ready")

    # --- key sets ----------------------------------------------------------------------------

    def current_key_set(self) -> str:
        """The one with the highest number."""
        return str(_key_sets(self.store)[-1])

    def key_set_ids(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(map(str, _key_sets(self.store)))

    def key_set_of(self, key: KeyRef) -> str | None:
        """Its number, from the blob."""
        return str(int.from_bytes(key.data[:2], "big"))

    def reseal(self, key: KeyRef, *, expected_check_value: bytes | None = None) -> KeyRef:
        """Open and seal again."""
        material, expected = self.material(key), expected_check_value
        if expected is not None and not same_check_value(expected, check_value(material)):
            raise HsmError("the key does not have the expected check value")
        key_set = self.current_key_set()
        if self.key_set_of(key) == key_set:
            return key
        return replace(key, data=self.seal(key_set, key.key_spec, material))

    @classmethod
    def list_keys(cls, settings: Mapping[str, Any]) -> tuple[KeySetInfo, ...]:
        """All key sets, oldest first."""
        numbers = _key_sets(MemorySettings.from_mapping(settings).open_store())
        return tuple(KeySetInfo(str(n), n == numbers[-1], "a key in memory") for n in numbers)

    @classmethod
    def initialise_keys(
        cls,
        settings: Mapping[str, Any],
        *,
        so_pin_file: str | None = None,  # noqa: ARG003  # a key set here has no officer
    ) -> KeySetInfo:
        """Make key set 1; opening the backend makes it as well."""
        return _make_key_set(MemorySettings.from_mapping(settings).open_store(), 1)

    @classmethod
    def rotate_keys(
        cls,
        settings: Mapping[str, Any],
        *,
        so_pin_file: str | None = None,  # noqa: ARG003  # a key set here has no officer
    ) -> KeySetInfo:
        """Make a key set with the next number."""
        store = MemorySettings.from_mapping(settings).open_store()
        numbers = _key_sets(store)
        if not numbers:
            raise ConfigurationError("memory backend: no key set yet; initialise one")
        return _make_key_set(store, numbers[-1] + 1)

    @classmethod
    def retire_keys(cls, settings: Mapping[str, Any], key_set: str) -> None:
        """Destroy a key set that is not current."""
        store = MemorySettings.from_mapping(settings).open_store()
        if key_set not in map(str, _key_sets(store)[:-1]):
            raise ConfigurationError(f"memory backend: no key set {key_set}, or it is current")
        del store[_key_set(key_set)]

    @classmethod
    def make_transport_key(
        cls,
        settings: Mapping[str, Any],
        *,
        so_pin_file: str | None = None,  # noqa: ARG003  # a key set here has no officer
    ) -> KeySetFile:
        """Make an X25519 pair, which replaces an older one; the file is the public half."""
        private = X25519PrivateKey.generate()
        MemorySettings.from_mapping(settings).open_store()[_TRANSPORT] = private.private_bytes_raw()
        return _file(private.public_key().public_bytes_raw())

    @classmethod
    def export_keys(
        cls,
        settings: Mapping[str, Any],
        transport_key: str,
        fingerprint: str,
        *,
        so_pin_file: str | None = None,  # noqa: ARG003  # a key set here has no officer
    ) -> KeySetFile:
        """The sender's public half, and the key sets under what both halves agree on."""
        theirs = _confirmed(transport_key, fingerprint)
        ours = X25519PrivateKey.generate()
        key = _agreed(ours, theirs)
        wrapped = cls.wrap_key_sets(MemorySettings.from_mapping(settings).open_store(), key)
        return _file(theirs + ours.public_key().public_bytes_raw() + wrapped)

    @classmethod
    def import_keys(
        cls,
        settings: Mapping[str, Any],
        exported: str,
        fingerprint: str,
        *,
        so_pin_file: str | None = None,  # noqa: ARG003  # a key set here has no officer
    ) -> tuple[KeySetInfo, ...]:
        """Take them in, and destroy the transport key."""
        content = _confirmed(exported, fingerprint)
        store = MemorySettings.from_mapping(settings).open_store()
        private = X25519PrivateKey.from_private_bytes(store.get(_TRANSPORT, bytes(32)))
        if private.public_key().public_bytes_raw() != content[:32]:
            raise ConfigurationError("memory backend: the file is for another transport key")
        cls.unwrap_key_sets(store, content[64:], _agreed(private, content[32:64]))
        del store[_TRANSPORT]
        return cls.list_keys(settings)

    @classmethod
    def back_up_keys(
        cls,
        settings: Mapping[str, Any],
        backup_key: bytes,
        *,
        so_pin_file: str | None = None,  # noqa: ARG003  # a key set here has no officer
    ) -> str:
        """All key sets, encrypted by AES-GCM, in hexadecimal digits."""
        store = MemorySettings.from_mapping(settings).open_store()
        return cls.wrap_key_sets(store, backup_key).hex()

    @classmethod
    def restore_keys(
        cls,
        settings: Mapping[str, Any],
        backup: str,
        backup_key: bytes,
        *,
        so_pin_file: str | None = None,  # noqa: ARG003  # a key set here has no officer
    ) -> tuple[KeySetInfo, ...]:
        """Decrypt them."""
        store = MemorySettings.from_mapping(settings).open_store()
        cls.unwrap_key_sets(store, _from_hex(backup), backup_key)
        return cls.list_keys(settings)

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
        """Restore in a place of its own; the HSM of the backup has key sets and is refused too."""
        if cls.list_keys(settings):
            raise ConfigurationError("memory backend: there are key sets; a drill takes none")
        own = cls.trial_settings(settings)
        try:
            restored = cls.restore_keys(own, backup, backup_key, so_pin_file=so_pin_file)
            examine(own)
        finally:
            cls.end_trial(own)
        return restored

    @classmethod
    def wrap_key_sets(cls, store: Store, key: bytes) -> bytes:
        """All key sets, encrypted: nonce, GCM output over the number and bytes of each."""
        plain = b"".join(n.to_bytes(2, "big") + store[_key_set(n)] for n in _key_sets(store))
        if not plain:
            raise ConfigurationError("memory backend: no key set yet; initialise one")
        nonce = secrets.token_bytes(NONCE_LENGTH)
        return nonce + AESGCM(key).encrypt(nonce, plain, None)

    @classmethod
    def unwrap_key_sets(cls, store: Store, wrapped: bytes, key: bytes) -> None:
        """Add those that are not there.

        Raises:
            HsmError: It does not decrypt.
            ConfigurationError: There is another one of the same number. Nothing was added.
        """
        try:
            plain = AESGCM(key).decrypt(wrapped[:NONCE_LENGTH], wrapped[NONCE_LENGTH:], None)
        except (InvalidTag, ValueError):
            raise HsmError("the key sets do not decrypt: changed, or for another key") from None
        entries = (plain[at : at + 34] for at in range(0, len(plain), 34))
        found = {_key_set(int.from_bytes(entry[:2], "big")): entry[2:] for entry in entries}
        if any(store.get(name, value) != value for name, value in found.items()):
            raise ConfigurationError("memory backend: there is another key set of this number")
        for name, value in found.items():
            store.setdefault(name, value)

    @classmethod
    def trial_settings(cls, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """With a directory beside theirs, or a store of their own."""
        beside = MemorySettings.from_mapping(settings).directory
        if beside is None:
            return {**settings, "store": _TrialStore()}
        return {**settings, "directory": f"{beside}{_TRIAL}{secrets.token_hex(8)}"}

    @classmethod
    def end_trial(cls, settings: Mapping[str, Any]) -> None:
        """Remove all objects, and the directory."""
        checked = MemorySettings.from_mapping(settings)
        if isinstance(checked.store, _TrialStore):
            checked.store.clear()
        elif re.search(f"{re.escape(_TRIAL)}[0-9a-f]{{16}}$", checked.directory or ""):
            shutil.rmtree(str(checked.directory), ignore_errors=True)
        else:
            raise ConfigurationError("memory backend: these are not settings of a trial")

    def seal(self, key_set: str, purpose: str, secret: bytes) -> bytes:
        """Encrypt under a key set, for one purpose: two bytes for its number, nonce, GCM output."""
        nonce = secrets.token_bytes(NONCE_LENGTH)
        sealed = AESGCM(self._key(key_set, purpose)).encrypt(nonce, secret, None)
        return int(key_set).to_bytes(2, "big") + nonce + sealed

    def open(self, purpose: str, blob: bytes) -> bytes:
        """Decrypt what :meth:`seal` made.

        Raises:
            KeyError: It does not open, or its key set is gone.
        """
        key = self._key(str(int.from_bytes(blob[:2], "big")), purpose)
        nonce, sealed = blob[2 : 2 + NONCE_LENGTH], blob[2 + NONCE_LENGTH :]
        try:
            return AESGCM(key).decrypt(nonce, sealed, None)
        except (InvalidTag, ValueError):
            raise KeyError from None

    def _key(self, key_set: str, purpose: str) -> bytes:
        return hmac.digest(self.store[_key_set(key_set)], purpose.encode(), "sha256")


class DirectoryStore(MutableMapping[str, bytes]):
    """Objects as files: every process on the same directory has the same ones."""

    def __init__(self, directory: str | Path) -> None:
        """Take the directory, which is made if it is not there."""
        self._directory = Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)

    def __getitem__(self, name: str) -> bytes:
        try:
            return (self._directory / name).read_bytes()
        except OSError:
            raise KeyError(name) from None

    def __setitem__(self, name: str, value: bytes) -> None:
        whole = self._write(value)
        whole.replace(self._directory / name)

    def setdefault(self, name: str, default: bytes) -> bytes:
        """The object; ``default``, which becomes it, if there is none: one process wins."""
        whole = self._write(default)
        try:
            os.link(whole, self._directory / name)
        except FileExistsError:
            return self[name]
        finally:
            whole.unlink()
        return default

    def __delitem__(self, name: str) -> None:
        try:
            (self._directory / name).unlink()
        except OSError:
            raise KeyError(name) from None

    def __iter__(self) -> Iterator[str]:
        return (path.name for path in self._directory.iterdir() if path.name[0] != ".")

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _write(self, value: bytes) -> Path:
        # Under another name first: a reader sees the whole object or none.
        path = self._directory / f".{secrets.token_hex(8)}"
        path.write_bytes(value)
        return path


def _key_set(number: int | str) -> str:
    return f"key-set-{number}"


def _wrapping(object_id: bytes) -> str:
    return f"wrapping-{object_id.hex()}"


def _material(object_id: bytes) -> str:
    return f"material-{object_id.hex()}"


def _file(content: bytes) -> KeySetFile:
    return KeySetFile(content.hex(), hashlib.sha256(content).hexdigest())


def _from_hex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise ConfigurationError("memory backend: not a file of key sets") from None


def _confirmed(text: str, fingerprint: str) -> bytes:
    content = _from_hex(text)
    if not hmac.compare_digest(hashlib.sha256(content).hexdigest(), fingerprint):
        raise ConfigurationError("memory backend: the file has another fingerprint")
    return content


def _agreed(private: X25519PrivateKey, public: bytes) -> bytes:
    shared = private.exchange(X25519PublicKey.from_public_bytes(public))
    return hmac.digest(shared, b"key sets", "sha256")


def _key_sets(store: Store) -> list[int]:
    found = (re.fullmatch(r"key-set-(\d+)", name) for name in store)
    return sorted(int(match[1]) for match in found if match)


def _make_key_set(store: Store, number: int) -> KeySetInfo:
    made = secrets.token_bytes(32)
    if store.setdefault(_key_set(number), made) is not made:
        raise ConfigurationError(f"memory backend: there is a key set {number}")
    return KeySetInfo(str(number), current=True, detail="a key in memory")
