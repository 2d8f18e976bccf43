"""The software backend's capability report."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from hsmwrap.backend import Capabilities, Custody, Exposure, KeyCapability, WrappingCapability
from hsmwrap.catalog import KeySpec, ProtectionLevel, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.software import cipher, rsa
from hsmwrap.software.schemes import Scheme
from hsmwrap.software.settings import SoftwareSettings

NAME = "software"
"""Name of the backend in import tokens and key references."""

_HOST = "Keys and key material are in this process's memory while they are used."
_PKCS1 = (
    "RSAES_PKCS1_V1_5 has no integrity, and its padding is decoded in this process. "
    "Prefer RSAES_OAEP_SHA_256, and refuse it by refused_algorithms where no client needs it. "
)
_IMPLICIT = (
    "pyca's OpenSSL rejects implicitly (tried): a wrong ciphertext decrypts to random bytes, of "
    "which about 1 in 200 pass for a key."
)
_EXPLICIT = (
    "pyca's OpenSSL DOES NOT REJECT IMPLICITLY (tried): wrong padding is one error with the rest, "
    "but its timing can be an oracle that decrypts a captured ciphertext (Bleichenbacher 1998)."
)
_REFUSED = (
    "RSAES_PKCS1_V1_5 is refused by require_implicit_rejection: pyca's OpenSSL answers wrong "
    "padding with an error (tried)."
)
_NO_HSM = "The software backend has no HSM."
_EPHEMERAL = (
    "EPHEMERAL KEYRING: no keyring_file is configured. Every import token and every imported key "
    "dies with this process. Not for production."
)
_HSM_LEVEL = (
    "DEVELOPMENT MODE serve_hsm_level: CMKs of protection level HSM are kept in software. "
    "Not for production."
)


def report(settings: SoftwareSettings, schemes: Collection[Scheme]) -> Capabilities:
    """The capabilities of a backend with these settings and schemes."""
    warnings = tuple(_warnings(settings, schemes))
    levels = ProtectionLevel if settings.serve_hsm_level else (ProtectionLevel.SOFTWARE,)
    served = any(s.algorithm is WrappingAlgorithm.RSAES_PKCS1_V1_5 for s in schemes)
    pkcs1 = _PKCS1 + (_IMPLICIT if rsa.rejects_implicitly() else _EXPLICIT)
    sealed = Custody.HSM_ENCRYPTED_DATABASE
    return Capabilities(
        backend=NAME,
        protection_levels=frozenset(levels),
        wrapping=tuple(
            WrappingCapability(s.spec, s.algorithm, Exposure.HOST, sealed, s.path, _NO_HSM)
            for s in schemes
        ),
        keys=tuple(KeyCapability(spec, cipher.is_usable(spec), sealed) for spec in KeySpec),
        production=not warnings,
        notes=(*warnings, _HOST, pkcs1 if served else _REFUSED, *_missing(schemes)),
    )


def _warnings(settings: SoftwareSettings, schemes: Collection[Scheme]) -> Iterator[str]:
    """Reasons why this backend is not for production."""
    if settings.serve_hsm_level:
        yield _HSM_LEVEL
    if settings.keyring_file is None:
        yield _EPHEMERAL
    for scheme in schemes:
        if not scheme.production:
            yield f"{scheme.path} leaks by timing. Not for production."


def _missing(schemes: Collection[Scheme]) -> Iterator[str]:
    """Functions that are missing because of the installed libraries."""
    if not any(scheme.spec is WrappingKeySpec.EC_SM2 for scheme in schemes):
        yield "SM2PKE is not served: libcrypto has no SM2 here."
    for spec in KeySpec:
        if not cipher.is_usable(spec):
            yield f"{spec} keys can be imported but not used: pyca's OpenSSL lacks the cipher."
