"""The backend contract: what a plug-in author reads first.

A backend makes wrapping key pairs, turns encrypted key material into usable keys, uses these keys,
and authenticates import tokens. It knows nothing of CMKs, policy or the API. Two backends come with
hsmwrap (``software``, ``pkcs11``); others are found by the entry point group ``hsmwrap.backends``,
whose entries name a :class:`Backend` subclass::

    [project.entry-points."hsmwrap.backends"]
    acme = "acme_hsm:AcmeBackend"

PLUGINS.md is the guide, with a plug-in that runs; the conformance kit
(:mod:`hsmwrap.testing.conformance`) tests what is written here.

hsmwrap puts a guard around each backend (:mod:`hsmwrap.guard`), so a plug-in need not do what is
the same for all. The guard

* refuses calls after :meth:`Backend.close`, which waits for those that run;
* refuses what the capabilities do not list, key references of another backend, a wrapping key under
  another algorithm than its own, and ciphertexts and messages of impossible length;
* compares check values on a re-import, and destroys a key that is not the expected one;
* checks each result, and destroys what was made if it is not what was asked for;
* makes a typed error of any other exception, and removes tracebacks, which can hold secrets.

What is left for the plug-in:

* A call succeeds, or raises a :class:`hsmwrap.errors.HsmwrapError` and leaves nothing behind,
  session objects included.
* Whatever is wrong with a client's ciphertext is one error, ``InvalidKeyMaterial()``.
* Every method may be called from any thread, and in a child after ``fork()``.
* Import tokens and key references hold in every process on the same keys, and after a restart.
* No secret in a repr, a log record or an exception.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, ClassVar, Self, TypeVar

from hsmwrap.catalog import KeySpec, ProtectionLevel, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.ckr import answered
from hsmwrap.errors import HsmError, KeyNotFound

CONTRACT_VERSION = 2
"""Version of this contract. A plug-in declares the one that it was written for."""

_A = TypeVar("_A")


class Backend(ABC):
    """A cryptographic backend. Subclass it, register the class as an entry point.

    Class attributes:
        contract_version: The :data:`CONTRACT_VERSION` that the plug-in was written for.
    """

    contract_version: ClassVar[int]

    @classmethod
    @abstractmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """Open a backend from plain settings (strings, numbers, booleans, lists of them).

        Raises:
            ConfigurationError: A setting is unknown, missing or of the wrong kind.
        """

    @property
    @abstractmethod
    def name(self) -> str:
        """Name in import tokens and key references (1 to 32 ASCII characters).

        It says whose keys they are, so it is the same in all processes on the same keys, differs
        between two partitions that one KMS uses, and never changes while tokens or keys exist.
        It may be the entry point's name (what a configuration calls the plug-in), or a setting.
        """

    @abstractmethod
    def capabilities(self) -> Capabilities:
        """Report what this backend can do, as measured.

        Called several times in each request: measure once, keep the report, and make no object
        and no round trip to the HSM here.
        """

    @abstractmethod
    def generate_wrapping_key(
        self, spec: WrappingKeySpec, algorithm: WrappingAlgorithm, *, expires_at: datetime
    ) -> WrappingKey:
        """Make a fresh wrapping key pair.

        Args:
            spec: The wrapping key spec.
            algorithm: The one algorithm that the pair will be used with.
            expires_at: Aware time after which a resident private key may be reaped.
        """

    def discard_wrapping_key(self, private_key: PrivateKeyRef) -> None:  # noqa: B027  # a default
        """Destroy a wrapping key that will not be used; a second call does nothing.

        The import of a discarded resident key raises ``InvalidImportToken``. A backend whose
        wrapping keys are all sealed keeps this default, which does nothing.
        """

    @abstractmethod
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
        """Turn encrypted key material into a usable key.

        OAEP: MGF1 with the same hash, empty label; :func:`hsmwrap.oaep.decode` decodes it in the
        host for an HSM that has raw RSA only. SM2PKE: clients send three layouts, C1 ‖ C3 ‖ C2
        (97 bytes over the material), the same without the leading 04 (96) and DER
        ``SEQUENCE {x, y, hash, ciphertext}``; all three have to be read, and C1 has to be on the
        curve before the private key touches it. :func:`hsmwrap.sm2.parse` does both, and
        :func:`hsmwrap.sm2.decrypt_with_x2` finishes what an HSM with plain ECDH begins.

        Args:
            private_key: From the authenticated import token.
            algorithm: From the authenticated import token. The guard has checked that it is the
                one that ``private_key`` was issued for: one key under two paddings makes each an
                oracle for the other (Bardou et al., 2012).
            encrypted_material: The client's ciphertext, raw bytes.
            key_spec: What the material has to become; its length is exact.
            expected_check_value: On a re-import, the check value of the material before. The guard
                compares it with that of the key that you made, and destroys the key if they
                differ. Compare earlier where a key object would cost or show more than that.
            object_id: 16 bytes that name the object where custody is HSM_INTERNAL, chosen by the
                caller so that it can write down its intent first: the reference's ``data`` is
                then these bytes. The guard chooses them when the caller does not. They are random
                and new for each call; if an object has this id all the same, fail with
                ``HsmError`` and leave that object as it is.

        Raises:
            InvalidKeyMaterial: It did not become that key; says nothing more, neither by text nor
                by type, attribute, note or cause.
            InvalidImportToken: The private key is not there (any more), or its reference is
                damaged.
        """

    @abstractmethod
    def encrypt(self, key: KeyRef, plaintext: bytes, additional_data: bytes = b"") -> bytes:
        """Encrypt under an imported key: version ‖ nonce (12) ‖ ciphertext ‖ tag (16), by GCM.

        Where the HSM has no GCM, :mod:`hsmwrap.ccm` makes CCM of its ECB and CBC, in messages with
        a version of their own.

        No nonce may come twice under one key, in whatever thread, process, forked child, machine
        or instance after a restart: one repetition reveals GCM's authentication key. Twelve
        random bytes do (for up to 2^32 messages per key, NIST SP 800-38D, 8.3); a counter does
        only if the HSM keeps it.

        Raises:
            KeyNotFound: The key is not there (any more).
        """

    @abstractmethod
    def decrypt(self, key: KeyRef, ciphertext: bytes, additional_data: bytes = b"") -> bytes:
        """Decrypt what :meth:`encrypt` made.

        Raises:
            InvalidCiphertext: It does not decrypt under this key and additional data.
            KeyNotFound: The key is not there (any more).
        """

    def destroy_key(self, key: KeyRef) -> None:  # noqa: B027  # a default
        """Destroy an imported key's object; a second call does nothing.

        After an error the object may still be there: call again. A backend may do so by itself.
        A backend whose imported keys are all sealed keeps this default, which does nothing.
        """

    @abstractmethod
    def mac(self, data: bytes) -> Mac:
        """Authenticate ``data`` under the current key set's MAC key."""

    @abstractmethod
    def verify_mac(self, data: bytes, mac: Mac) -> None:
        """Return if ``mac`` is right for ``data``; compares in constant time.

        Raises:
            InvalidMac: It is not, or its key set is not there (any more).
        """

    @abstractmethod
    def health(self) -> Health:
        """Report the state without waiting for a lost HSM. Also called after :meth:`close`."""

    def close(self) -> None:  # noqa: B027  # a default
        """Wait for running calls, then free everything. Callers may call it again.

        The guard does the waiting: a plug-in's ``close`` is called once, when no call runs in this
        process, and only :meth:`health` comes after it.
        """

    def ability(self, kind: type[_A]) -> _A | None:
        """This backend as ``kind``, or None; :meth:`Ability.of` asks for optional interfaces."""
        return self if isinstance(self, kind) else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


# --- what not every backend can do --------------------------------------------------------------


class Ability(ABC):  # noqa: B024  # what the interfaces below have in common
    """Base of the optional interfaces: a plug-in inherits from those that it has."""

    @classmethod
    def of(cls, backend: Backend) -> Self | None:
        """``backend`` as one with this ability, None if it has not got it.

        Ask in this way, not by ``isinstance``: the ability is found through what is wrapped
        around a backend (guard, observer), and its calls go through that too.
        """
        return backend.ability(cls)


class ReapsWrappingKeys(Ability):
    """For backends that keep wrapping keys as objects (custody HSM_INTERNAL)."""

    @abstractmethod
    def reap(self, now: datetime) -> ReapReport:
        """Destroy resident wrapping keys that expired before ``now``, whichever process made them.

        Leave those alone that expired so recently that another machine's clock may be behind.
        """


class HasKeySets(Ability):
    """For backends whose keys are sealed under key sets that are rotated."""

    @abstractmethod
    def current_key_set(self) -> str:
        """Id of the key set that seals now; cheap, as key-pair pools ask once a second."""


class ListsKeySets(Ability):
    """For backends with :class:`HasKeySets` that can say which they have: a lost one is noticed."""

    @abstractmethod
    def key_set_ids(self) -> tuple[str, ...]:
        """Ids of the key sets that open keys now, oldest first; a KMS asks once a minute."""


class ReSealsKeys(Ability):
    """For backends with :class:`HasKeySets` whose sealed keys can move to the current key set."""

    @abstractmethod
    def key_set_of(self, key: KeyRef) -> str | None:
        """Id of the key set that a sealed key needs; None for a resident key, which needs none.

        Read from the reference alone, without a round trip, also if that key set is gone: a KMS
        asks for each of its keys before a key set is retired.

        Raises:
            KeyNotFound: The reference does not parse.
        """

    @abstractmethod
    def reseal(self, key: KeyRef, *, expected_check_value: bytes | None = None) -> KeyRef:
        """Seal a key under the current key set.

        The key itself does not change: its messages decrypt, its check value is the same. ``key``
        stays valid until its key set is retired, so a caller stores the answer first. The guard
        answers for resident keys, whose references stay as they are.

        Args:
            key: Reference to a sealed key.
            expected_check_value: From the key's import, if the caller has it: a key that the
                backend can use has to have the same.

        Returns:
            Its reference under the current key set: ``key`` if it is that already.

        Raises:
            KeyNotFound: The key does not open: its key set is gone, for example.
            UnsupportedOperation: Keys of its key set cannot move; it says why.
            HsmError: The key has another check value.
        """


class ChecksSettings(Ability):
    """For backends whose settings can be checked without their HSM; called before one is opened."""

    @classmethod
    @abstractmethod
    def check_settings(cls, settings: Mapping[str, Any]) -> frozenset[ProtectionLevel]:
        """Refuse what :meth:`Backend.from_settings` would refuse and what can be seen from here.

        Files, their modes and environment variables are looked at; nothing is changed, no HSM is
        called, no PIN is tried.

        Returns:
            The protection levels that a backend with these settings may serve.

        Raises:
            ConfigurationError: As :meth:`Backend.from_settings`.
        """


class ManagesKeySets(Ability):
    """For backends whose key sets are made by ``hsmwrap keys``; called before one is opened."""

    @classmethod
    @abstractmethod
    def list_keys(cls, settings: Mapping[str, Any]) -> tuple[KeySetInfo, ...]:
        """All key sets, oldest first."""

    @classmethod
    @abstractmethod
    def initialise_keys(
        cls, settings: Mapping[str, Any], *, so_pin_file: str | None = None
    ) -> KeySetInfo:
        """Make the first key set.

        Args:
            settings: As for :meth:`Backend.from_settings`.
            so_pin_file: File with the security officer's PIN, for backends where that officer
                can make the keys stronger.

        Raises:
            ConfigurationError: There is one already.
        """

    @classmethod
    @abstractmethod
    def rotate_keys(
        cls, settings: Mapping[str, Any], *, so_pin_file: str | None = None
    ) -> KeySetInfo:
        """Make another key set and make it current; older ones keep opening what they sealed.

        Raises:
            ConfigurationError: There is none yet.
        """

    @classmethod
    @abstractmethod
    def retire_keys(cls, settings: Mapping[str, Any], key_set: str) -> None:
        """Destroy a key set that is not current, and with it the use of all that it sealed.

        Raises:
            ConfigurationError: It is not there, or it is current.
        """


class ClonesKeySets(Ability):
    """For backends whose key sets can be copied to another HSM, never in plaintext outside one.

    Three steps, on two machines if the HSMs never share one. What was sealed on one side opens on
    the other. Called while no backend is open.
    """

    @classmethod
    @abstractmethod
    def make_transport_key(
        cls, settings: Mapping[str, Any], *, so_pin_file: str | None = None
    ) -> KeySetFile:
        """On the target: make a key that unwraps key sets and nothing else; its public half.

        Raises:
            UnsupportedOperation: This HSM cannot protect key sets that come from another one.
        """

    @classmethod
    @abstractmethod
    def export_keys(
        cls,
        settings: Mapping[str, Any],
        transport_key: str,
        fingerprint: str,
        *,
        so_pin_file: str | None = None,
    ) -> KeySetFile:
        """On the source: wrap all key sets that can be cloned for a transport key.

        Args:
            settings: As for :meth:`Backend.from_settings`.
            transport_key: Content of the target's file.
            fingerprint: Of that file, as the target showed it by another way.
            so_pin_file: File with the security officer's PIN.

        Raises:
            ConfigurationError: The fingerprint is another one, or no key set can be cloned.
        """

    @classmethod
    @abstractmethod
    def import_keys(
        cls,
        settings: Mapping[str, Any],
        exported: str,
        fingerprint: str,
        *,
        so_pin_file: str | None = None,
    ) -> tuple[KeySetInfo, ...]:
        """On the target: unwrap key sets; those that are there already are left alone.

        Args:
            settings: As for :meth:`Backend.from_settings`.
            exported: Content of the source's file.
            fingerprint: Of that file, as the source showed it by another way.
            so_pin_file: File with the security officer's PIN.

        Returns:
            All key sets of the target.

        Raises:
            ConfigurationError: The fingerprint is another one, the file is for another target, or
                the target has another key set of the same id. Nothing was made.
            HsmError: A key does not unwrap; nothing is kept of its key set.
        """

    @classmethod
    def discard_transport_key(
        cls, settings: Mapping[str, Any], *, so_pin_file: str | None = None
    ) -> None:
        """On the target: destroy the transport key, as no key sets will come for it.

        Called where a clone failed after :meth:`make_transport_key`. Without it (the default) the
        transport key stays until the next one replaces it.
        """


class BacksUpKeySets(Ability):
    """For backends whose key sets can be wrapped under a key that the caller has.

    :mod:`hsmwrap.backup` makes the file around it, and the shares of the key. Called while no
    backend is open.
    """

    @classmethod
    @abstractmethod
    def back_up_keys(
        cls, settings: Mapping[str, Any], backup_key: bytes, *, so_pin_file: str | None = None
    ) -> str:
        """Wrap all key sets that can be backed up; what it returns is stored, and not a secret.

        Args:
            settings: As for :meth:`Backend.from_settings`.
            backup_key: An AES key of 32 bytes, for this backup alone. Keep it nowhere.
            so_pin_file: File with the security officer's PIN.

        Raises:
            ConfigurationError: No key set can be backed up.
        """

    @classmethod
    @abstractmethod
    def restore_keys(
        cls,
        settings: Mapping[str, Any],
        backup: str,
        backup_key: bytes,
        *,
        so_pin_file: str | None = None,
    ) -> tuple[KeySetInfo, ...]:
        """Unwrap key sets; those that are there already are left alone.

        Args:
            settings: As for :meth:`Backend.from_settings`.
            backup: What :meth:`back_up_keys` returned, authenticated by the caller.
            backup_key: The same key.
            so_pin_file: File with the security officer's PIN.

        Returns:
            All key sets that there are then.

        Raises:
            ConfigurationError: There is another key set of the same id. Nothing was made.
            UnsupportedOperation: This HSM cannot protect key sets that come from another one.
            HsmError: A key does not unwrap; nothing is kept of its key set.
        """

    @classmethod
    @abstractmethod
    def drill_keys(
        cls,
        settings: Mapping[str, Any],
        backup: str,
        backup_key: bytes,
        examine: Callable[[Mapping[str, Any]], None],
        *,
        so_pin_file: str | None = None,
    ) -> tuple[KeySetInfo, ...]:
        """On a scratch HSM: restore, let ``examine`` look, and leave the HSM as it was.

        Args:
            settings: Of the scratch HSM.
            backup: As for :meth:`restore_keys`.
            backup_key: As for :meth:`restore_keys`.
            examine: Gets the settings under which a backend opens that uses the restored key sets.
            so_pin_file: File with the security officer's PIN.

        Returns:
            The key sets that were restored.

        Raises:
            ConfigurationError: It is the HSM that the backup is of, or one that has key sets.
            UnsupportedOperation, HsmError: As for :meth:`restore_keys`.
        """


class KeepsTrialsApart(Ability):
    """For backends that can keep the key sets of a trial apart from all others in the same HSM.

    The conformance kit makes, rotates and clones key sets in such places alone. Called while no
    backend is open.
    """

    @classmethod
    @abstractmethod
    def trial_settings(cls, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """``settings``, changed so that their key sets are in a place that is new and empty.

        Nothing is made. Places are chosen at random, so two trials at one time do not meet.

        Raises:
            ConfigurationError: As :meth:`Backend.from_settings`.
        """

    @classmethod
    @abstractmethod
    def end_trial(cls, settings: Mapping[str, Any]) -> None:
        """Destroy every key set, the current one too, and every other object of a trial.

        Raises:
            ConfigurationError: These are not settings that :meth:`trial_settings` made.
        """


class CountsObjects(Ability):
    """For backends that can count the objects in their HSM: a call that leaves some is found."""

    @abstractmethod
    def count_objects(self) -> int:
        """How many there are: of any kind, in the HSM or in a session, of any user."""


class DescribesHsm(Ability):
    """For backends that can say what their HSM is."""

    @abstractmethod
    def describe_hsm(self) -> HsmDescription:
        """Ask the HSM and its library."""


# --- what the calls take and return -------------------------------------------------------------


class Exposure(StrEnum):
    """Where key material was in plaintext during an import.

    IN_HSM: only inside the HSM. HOST: also, for a moment, in this process's memory.
    """

    IN_HSM = "in_hsm"
    HOST = "host"


class Custody(StrEnum):
    """Where a key stays, in Alibaba's own two words.

    HSM_INTERNAL, *resident*: an object inside the backend; references name it.
    HSM_ENCRYPTED_DATABASE, *sealed*: encrypted under a key-encryption key that never leaves the
    backend; the caller keeps the blob.
    """

    HSM_INTERNAL = "HsmInternal"
    HSM_ENCRYPTED_DATABASE = "HsmEncryptedDatabase"


@dataclass(frozen=True, slots=True)
class FailedTrial:
    """A step that a backend tried on its HSM, and that does not work there.

    Attributes:
        step: What was tried, as a phrase: ``unwrap a key by RSAES_OAEP_SHA_256``.
        function: The HSM's function, ``C_UnwrapKey``; None where none failed.
        mechanism: What it was called with, ``CKM_RSA_PKCS_OAEP``; None for a function without.
        code: What it answered; None where the answer was not an error, but wrong.
        wrong: What was wrong with the answer then; empty where there is a code.
        consequence: What is done instead, or what is not served for it.
    """

    step: str
    function: str | None = None
    mechanism: str | None = None
    code: int | None = None
    wrong: str = ""
    consequence: str = ""

    @property
    def answer(self) -> str:
        """What the HSM said, in the form of :func:`hsmwrap.ckr.answered`, or what was wrong."""
        if self.code is None:
            return self.wrong
        return answered(self.code, self.function, self.mechanism)


class Outcome(StrEnum):
    """What a trial said of a protection."""

    HONOURED = "honoured"
    """An attack failed on a key that has it, and succeeded on the control, which has not."""
    NOT_HONOURED = "not honoured"
    """The HSM refuses the attribute, or the attack succeeded on a key that has it."""
    NOT_PROVABLE = "not provable"
    """No attack that was tried succeeds on the control, so none shows what the attribute does."""


@dataclass(frozen=True, slots=True)
class Protection:
    """Something that keeps the holder of the HSM's PIN from reading or misusing keys, as tried.

    Attributes:
        name: What it is called in the HSM's interface, ``CKA_UNWRAP_TEMPLATE``.
        outcome: Whether the HSM honours it; only HONOURED is a promise.
        control: What was tried on a key with it and on one without, and what came of both: a
            sentence.
        consequence: What is weaker where it is not honoured, as a sentence; empty where it is.
    """

    name: str
    outcome: Outcome
    control: str
    consequence: str = ""


@dataclass(frozen=True, slots=True)
class WrappingCapability:
    """One pair of wrapping key spec and algorithm that a backend serves.

    Attributes:
        spec: The wrapping key spec.
        algorithm: The wrapping algorithm.
        exposure: Where imported material is in plaintext on this path.
        custody: How the private wrapping key is kept while its import token is valid.
        path: How it is done, for the operator (``C_UnwrapKey CKM_RSA_PKCS_OAEP``).
        reason: Why the exposure is not IN_HSM, as a sentence; empty where it is.
        tried: The better paths, and what failed of each.
    """

    spec: WrappingKeySpec
    algorithm: WrappingAlgorithm
    exposure: Exposure
    custody: Custody
    path: str
    reason: str = ""
    tried: tuple[FailedTrial, ...] = ()


@dataclass(frozen=True, slots=True)
class MissingCapability:
    """One pair of wrapping key spec and algorithm that a backend does not serve.

    Attributes:
        spec: The wrapping key spec.
        algorithm: The wrapping algorithm.
        reason: Why not, as a sentence.
        tried: The paths, and what failed of each.
    """

    spec: WrappingKeySpec
    algorithm: WrappingAlgorithm
    reason: str
    tried: tuple[FailedTrial, ...] = ()


@dataclass(frozen=True, slots=True)
class KeyCapability:
    """One key spec that a backend can import; ``usable`` says whether it can also encrypt."""

    key_spec: KeySpec
    usable: bool
    custody: Custody


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can do, as found out by asking it, not by reading its brochure.

    Attributes:
        backend: Name of the backend, as in import tokens and key references.
        protection_levels: Levels of the CMKs that this backend may serve.
        wrapping: Pairs of wrapping key spec and algorithm that it serves.
        keys: Key specs that it can import.
        production: False for development engines and modes.
        notes: Sentences for the operator: what is weaker here than it could be, and why.
        missing: Pairs of the catalogue that it does not serve, and why.
        failed: What was tried of the HSM and does not work there, whichever pair needs it.
        protections: What was tried of the HSM's protections; empty for a backend without an HSM.
    """

    backend: str
    protection_levels: frozenset[ProtectionLevel]
    wrapping: tuple[WrappingCapability, ...]
    keys: tuple[KeyCapability, ...]
    production: bool = True
    notes: tuple[str, ...] = ()
    missing: tuple[MissingCapability, ...] = ()
    failed: tuple[FailedTrial, ...] = ()
    protections: tuple[Protection, ...] = ()

    def wrapping_for(
        self, spec: WrappingKeySpec, algorithm: WrappingAlgorithm
    ) -> WrappingCapability | None:
        """The capability for this pair, or None."""
        return next((w for w in self.wrapping if (w.spec, w.algorithm) == (spec, algorithm)), None)

    def key_for(self, key_spec: KeySpec) -> KeyCapability | None:
        """The capability for this key spec, or None."""
        return next((k for k in self.keys if k.key_spec == key_spec), None)


MAX_REFERENCE_LENGTH = 3678
"""Most bytes of the data of a :class:`PrivateKeyRef`."""


@dataclass(frozen=True, slots=True)
class PrivateKeyRef:
    """A private wrapping key, as an import token carries it.

    ``data`` is the wrapped private key (HSM_ENCRYPTED_DATABASE) or the id of a resident object
    (HSM_INTERNAL), in a form that only its backend reads. It is not a secret by itself: clients
    see it.

    At most 3,678 bytes: an import token has 4,096 (:mod:`hsmwrap.tokens`), of which the longest
    CMK id, backend name and key set id leave as much, and the guard takes one for the algorithm.
    A wrapped RSA-2048 PKCS#8 takes 1,250.
    """

    custody: Custody
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class WrappingKey:
    """A fresh wrapping key pair.

    Attributes:
        spec: The wrapping key spec.
        algorithm: The one algorithm that this pair may be used with.
        public_key: DER SubjectPublicKeyInfo (RSA-2048: 294 bytes, SM2: 91 bytes).
        private_key: Reference to the private key.
        key_set: Id of the key set that a sealed private key needs; None where no rotation
            concerns it. With an id the backend also says which set is current
            (:class:`HasKeySets`).
    """

    spec: WrappingKeySpec
    algorithm: WrappingAlgorithm
    public_key: bytes
    private_key: PrivateKeyRef
    key_set: str | None = None


_REF_VERSION = 1
_REF_HEAD = struct.Struct(">BBBB")
# Codes on the wire: never reused, never renumbered.
_REF_SPECS = (KeySpec.ALIYUN_AES_256, KeySpec.ALIYUN_SM4)
_REF_CUSTODIES = (Custody.HSM_INTERNAL, Custody.HSM_ENCRYPTED_DATABASE)


@dataclass(frozen=True, slots=True)
class KeyRef:
    """An imported key, as a KMS stores it: a sealed blob or the id of an object.

    Holds no plaintext. ``to_bytes`` is what goes into a database row.
    """

    backend: str
    key_spec: KeySpec
    custody: Custody
    data: bytes = field(repr=False)

    def to_bytes(self) -> bytes:
        """Serialise: version, key spec, custody, length of the backend's name, name, data.

        Raises:
            HsmError: The backend filled it with what is not of the contract.
        """
        try:
            name = self.backend.encode("ascii")
            head = _REF_HEAD.pack(
                _REF_VERSION,
                _REF_SPECS.index(self.key_spec),
                _REF_CUSTODIES.index(self.custody),
                len(name),
            )
        except (ValueError, struct.error):
            raise HsmError(
                f"backend {self.backend[:32]!r} made a key reference that cannot be stored: its "
                "name is ASCII of at most 32 characters, key spec and custody are of the contract"
            ) from None
        return head + name + self.data

    @classmethod
    def from_bytes(cls, raw: bytes) -> Self:
        """Parse what :meth:`to_bytes` made.

        Raises:
            KeyNotFound: The bytes are not a key reference of a known version.
        """
        try:
            version, spec, custody, length = _REF_HEAD.unpack_from(raw)
            end = _REF_HEAD.size + length
            if version != _REF_VERSION or len(raw) < end:
                raise KeyNotFound("not a key reference of a version known here")
            name = raw[_REF_HEAD.size : end].decode("ascii")
            return cls(name, _REF_SPECS[spec], _REF_CUSTODIES[custody], raw[end:])
        except (struct.error, IndexError, UnicodeDecodeError):
            raise KeyNotFound("not a key reference of a version known here") from None


@dataclass(frozen=True, slots=True)
class ImportedKey:
    """The outcome of an import.

    Attributes:
        key: Reference for later use of the key.
        check_value: Tells equal material from different material on a re-import; reveals nothing
            else about it. The first byte names the method: 1 is the common one, computed by
            :func:`hsmwrap.checkvalue.check_value`, 2 the same by SM4; a backend that can neither
            takes one from 128 on.
            Values of two methods never match, so a backend keeps to one method for a key spec:
            after a change, and on another backend, the same material is refused on re-import.
        exposure: Where the material was in plaintext.
    """

    key: KeyRef
    check_value: bytes = field(repr=False)
    exposure: Exposure


@dataclass(frozen=True, slots=True)
class Mac:
    """A message authentication code under a MAC key that lives in the backend.

    Attributes:
        key_set: Id of the key set that the MAC key is of (ASCII, 1 to 32 characters).
        tag: HMAC-SHA-256, 32 bytes; of a device that has none, another MAC of this length that is
            as hard to forge.
    """

    key_set: str
    tag: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ReapReport:
    """What :meth:`ReapsWrappingKeys.reap` removed.

    Attributes:
        examined: Resident wrapping keys looked at.
        removed: Ids of the expired ones that were destroyed.
        failed: Ids of the expired ones that could not be destroyed this time.
    """

    examined: int = 0
    removed: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Health:
    """The state of a backend, answered without waiting for a lost HSM.

    Attributes:
        ready: Whether calls can succeed now.
        detail: One sentence for the operator.
        facts: Numbers and words for metrics (sessions in use, generation, breaker state).
    """

    ready: bool
    detail: str
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class KeySetInfo:
    """One set of a backend's own keys: a MAC key for import tokens, and key-encryption keys.

    Attributes:
        key_set: Its id, as in :attr:`Mac.key_set`.
        current: Whether it is used for what is made now; the others only open and verify.
        detail: One phrase for the operator.
        finished: False for what is left of one that was never complete, and so sealed nothing.
    """

    key_set: str
    current: bool
    detail: str
    finished: bool = True


@dataclass(frozen=True, slots=True)
class KeySetFile:
    """A file of :class:`ClonesKeySets`: not a secret, but to be compared before it is used.

    Attributes:
        content: The text of the file.
        fingerprint: SHA-256, 64 hexadecimal digits.
    """

    content: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class HsmDescription:
    """What an HSM and its library say they are; empty where they do not say it.

    It is for reports that are published, so nothing in it names one HSM or one customer: no serial
    number, no label, no path.

    Attributes:
        manufacturer: Of the HSM.
        model: Of the HSM.
        hardware_version: ``3.1``, for example.
        firmware_version: As above.
        library: Manufacturer and description of the library that it is called by.
        library_version: As above.
        profile: What of its vendor's own it was driven by, where settings choose that.
    """

    manufacturer: str = ""
    model: str = ""
    hardware_version: str = ""
    firmware_version: str = ""
    library: str = ""
    library_version: str = ""
    profile: str = ""


MESSAGE_VERSION = 1
"""First byte of what :meth:`Backend.encrypt` returns: AES-256-GCM or SM4-GCM, 12-byte nonce."""

MESSAGE_VERSION_CCM = 2
"""The same for CCM, of HSMs that have no GCM: see :mod:`hsmwrap.ccm`."""

CHECK_VALUE_LENGTH = 17
"""Bytes of a check value: one for its method, and 16."""

NONCE_LENGTH = 12
TAG_LENGTH = 16
