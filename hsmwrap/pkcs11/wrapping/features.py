"""What the probe found of an HSM token, and what follows for each wrapping algorithm."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from pkcs11 import MGF
from pkcs11.constants import Attribute
from pkcs11.mechanisms import KeyType, Mechanism

from hsmwrap.backend import Custody, Exposure, FailedTrial, Protection
from hsmwrap.catalog import KeySpec, WrappingAlgorithm
from hsmwrap.checkvalue import CHECK_BLOCK, METHOD_AES_ECB, METHOD_SM4_ECB
from hsmwrap.pkcs11.binding.objects import Way
from hsmwrap.pkcs11.binding.templates import AES_KEY_WRAP, Template, without
from hsmwrap.pkcs11.binding.traits import AES, DATA_SPECIFIED, BlockCipher
from hsmwrap.pkcs11.keysets.keys import Role
from hsmwrap.pkcs11.wrapping.use import MessageCipher


class _OaepParams(ctypes.Structure):
    """CK_RSA_PKCS_OAEP_PARAMS (PKCS#11 v2.40, 2.1.8)."""

    _fields_ = (
        ("hash", ctypes.c_ulong),
        ("mgf", ctypes.c_ulong),
        ("source", ctypes.c_ulong),
        ("data", ctypes.c_void_p),
        ("data_length", ctypes.c_ulong),
    )


def _oaep(digest: Mechanism, mgf: MGF, source: int) -> bytes:
    return bytes(_OaepParams(digest, mgf, source, None, 0))


_OAEP = {
    WrappingAlgorithm.RSAES_OAEP_SHA_1: (Mechanism.SHA_1, MGF.SHA1),
    WrappingAlgorithm.RSAES_OAEP_SHA_256: (Mechanism.SHA256, MGF.SHA256),
}
RSA_ALGORITHMS = (WrappingAlgorithm.RSAES_PKCS1_V1_5, *_OAEP)


def oaep_hash(algorithm: WrappingAlgorithm) -> Mechanism | None:
    """The hash of an OAEP algorithm; None for another."""
    return _OAEP[algorithm][0] if algorithm in _OAEP else None


def mechanism_of(
    algorithm: WrappingAlgorithm, source: int = DATA_SPECIFIED
) -> tuple[Mechanism, bytes | None]:
    """Mechanism and parameter of an RSA wrapping algorithm."""
    if algorithm not in _OAEP:
        return Mechanism.RSA_PKCS, None
    return Mechanism.RSA_PKCS_OAEP, _oaep(*_OAEP[algorithm], source)


@dataclass(frozen=True, slots=True)
class CheckMethod:
    """A way to encrypt the block of the check value: all of a cipher give the same 16 bytes."""

    number: int
    mechanism: Mechanism
    parameter: bytes | None
    block: bytes

    def of(self, key: Any) -> bytes:
        """Encrypt it under a key object.

        Raises:
            PKCS11Error: The HSM token refuses; this is not a key of the cipher.
        """
        return bytes(
            key.encrypt(self.block, mechanism=self.mechanism, mechanism_param=self.parameter)
        )


_ZEROS = bytes(len(CHECK_BLOCK))


def check_methods(cipher: BlockCipher) -> tuple[CheckMethod, ...]:
    """Those that there may be, in the order in which they are tried."""
    number = METHOD_AES_ECB if cipher.key_type == KeyType.AES else METHOD_SM4_ECB
    modes = (
        (cipher.ecb, None, CHECK_BLOCK),
        (cipher.cbc, _ZEROS, CHECK_BLOCK),
        # CK_AES_CTR_PARAMS: a counter of 32 bits, in the block that is encrypted.
        (cipher.ctr, bytes(ctypes.c_ulong(32)) + CHECK_BLOCK, _ZEROS),
    )
    return tuple(CheckMethod(number, m, *rest) for m, *rest in modes if m is not None)


class ImportPath(Enum):
    """How material gets in; value: key-encryption key role, exposure, description."""

    UNWRAP = (Role.WRAPPING_UNWRAP, Exposure.IN_HSM, "C_UnwrapKey")
    DECRYPT = (Role.WRAPPING_DECRYPT, Exposure.HOST, "C_Decrypt, then C_CreateObject")
    RAW = (Role.WRAPPING_DECRYPT, Exposure.HOST, "CKM_RSA_X_509, OAEP decoded in the host")
    DERIVE = (Role.WRAPPING_DERIVE, Exposure.HOST, "CKM_ECDH1_DERIVE, KDF and C3 in the host")
    VENDOR = (Role.WRAPPING_DERIVE, Exposure.HOST, "vendor mechanism")
    VENDOR_UNWRAP = (
        Role.WRAPPING_SM2_UNWRAP,
        Exposure.IN_HSM,
        "C_UnwrapKey by the vendor's mechanism",
    )

    @property
    def role(self) -> Role:
        """Role of the key-encryption key for private keys of this path."""
        return self.value[0]

    @property
    def exposure(self) -> Exposure:
        """Where the material is in plaintext."""
        return self.value[1]

    @property
    def description(self) -> str:
        """For the capability report."""
        return self.value[2]


@dataclass(frozen=True, slots=True)
class Row:
    """How the HSM token serves one wrapping algorithm: an import was done in this way.

    Attributes:
        path: The best path that works.
        custody: Of the private wrapping key.
        source: Source field of OAEP parameters.
    """

    path: ImportPath
    custody: Custody
    source: int = DATA_SPECIFIED


@dataclass(frozen=True, slots=True)
class Ways:
    """How unwrapped keys come to have the attributes of their templates, by what is unwrapped.

    Attributes:
        material: Clients' ciphertexts, by RSA.
        sm2_material: Clients' ciphertexts, by SM2.
        sealed_secret: Imported keys, by key wrap.
        sealed_private: Private wrapping keys, by key wrap.
    """

    material: Way = Way.AS_ASKED
    sm2_material: Way = Way.AS_ASKED
    sealed_secret: Way = Way.AS_ASKED
    sealed_private: Way = Way.AS_ASKED


@dataclass(frozen=True, slots=True)
class TokenFeatures:
    """What the probe found.

    Attributes:
        rows: The wrapping algorithms that it serves, by imports with known answers.
        tried: What was tried for an algorithm before, or in vain.
        failed: What else was tried and does not work.
        session_objects: Keys can be session objects.
        cipher: Whose keys stand for key material while it is tried: AES where the token has it.
        key_wraps: Mechanism of key wrap with padding, by the type of the key-encryption key.
        wrapped_lengths: Length of keys of that cipher of each material length, in bytes, wrapped as
            the current key set does; empty where the token does not wrap and unwrap them. Not the
            same everywhere: SoftHSM pads by RFC 5649, NSS as PKCS#7 does (field note 39).
        check: How the check value is computed in the token; None: it has no mechanism for that.
        ciphers: What works on imported keys of a key spec, additional data and forgery check
            included, the best first. None where it is empty or left out.
        sm4: Imported SM4 keys are of the vendor's type; False: generic secrets.
        key_specs: What can be imported by each of the rows.
        value_length: CKA_VALUE_LEN of an unwrapped key tells its true length.
        implicit_rejection: A ciphertext of wrong PKCS#1 v1.5 padding becomes random bytes, in each
            function that serves RSAES_PKCS1_V1_5; False where it is an error.
        creates_keys: C_CreateObject makes AES keys from plaintext.
        ways: How unwrapped keys come to have the attributes of their templates.
        refused: Hardening attributes that the token's keys have to do without.
        protections: What the token honours, each tried with a control.
    """

    rows: Mapping[WrappingAlgorithm, Row] = field(default_factory=dict)
    tried: Mapping[WrappingAlgorithm, tuple[FailedTrial, ...]] = field(default_factory=dict)
    failed: tuple[FailedTrial, ...] = ()
    session_objects: bool = True
    cipher: BlockCipher = AES
    key_wraps: Mapping[int, Mechanism] = field(default_factory=dict)
    wrapped_lengths: Mapping[int, int] = field(default_factory=dict)
    check: CheckMethod | None = None
    ciphers: Mapping[KeySpec, tuple[MessageCipher, ...]] = field(default_factory=dict)
    sm4: bool = False
    key_specs: frozenset[KeySpec] = frozenset()
    value_length: bool = False
    implicit_rejection: bool = False
    creates_keys: bool = False
    ways: Ways = Ways()
    refused: frozenset[Attribute] = frozenset()
    protections: tuple[Protection, ...] = ()

    @property
    def wraps_secret_keys(self) -> bool:
        """Key wrap wraps and unwraps secret keys."""
        return bool(self.wrapped_lengths)

    def key_wrap(self, cipher: BlockCipher) -> Mechanism:
        """What key-encryption keys of this cipher wrap by."""
        return self.key_wraps.get(cipher.key_type, AES_KEY_WRAP)

    @property
    def knows_length(self) -> bool:
        """The length of an unwrapped key can be told."""
        return self.wraps_secret_keys or self.value_length

    def fit(self, template: Mapping[Attribute, Any]) -> Template:
        """The template without the attributes that this token refuses."""
        return without(template, self.refused)
