"""What a customer does with the answer of GetParametersForImport: encrypt key material under it.

RSA by pyca/cryptography, SM2 by libcrypto; no backend, no HSM, no network. All of a customer's
mistakes that can be seen here are refused here, with their names: the KMS answers each of them by
the same ``InvalidKeyMaterial``, or, where the material has the right length, by a key that is not
what the customer believes.
"""

from __future__ import annotations

import ast
import binascii
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.hashes import SHA1, SHA256
from cryptography.hazmat.primitives.serialization import load_der_public_key

from hsmwrap.catalog import COMPATIBILITY_TABLE, KeySpec, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.errors import (
    ConfigurationError,
    ExpiredImportToken,
    InvalidParameter,
    MissingParameter,
    strip_tracebacks,
)
from hsmwrap.sm2 import decode_spki, open_engine

PADDINGS: Final[Mapping[WrappingAlgorithm, padding.AsymmetricPadding]] = MappingProxyType(
    {
        WrappingAlgorithm.RSAES_PKCS1_V1_5: padding.PKCS1v15(),
        WrappingAlgorithm.RSAES_OAEP_SHA_1: padding.OAEP(
            padding.MGF1(SHA1()),  # noqa: S303  # the API's algorithm
            SHA1(),  # noqa: S303  # as above
            label=None,
        ),
        WrappingAlgorithm.RSAES_OAEP_SHA_256: padding.OAEP(
            padding.MGF1(SHA256()), SHA256(), label=None
        ),
    }
)
"""pyca's padding for each wrapping algorithm of RSA."""

_RSA_BITS: Final = 2048
_TEXT = re.compile(rb"[\t\n\r -~]+")
_FORMS: Final = (
    (re.compile(rb"\s*-----BEGIN .*", re.DOTALL), "PEM", "give the bytes that it encodes"),
    (re.compile(rb"\s*(0[xX])?[0-9A-Fa-f\s:]+"), "hexadecimal text", "xxd -r -p turns it to bytes"),
    (re.compile(rb"\s*[A-Za-z0-9+/_-]+=*\s*"), "base64 text", "base64 -d turns it to bytes"),
    (_TEXT, "text", "a key is random bytes, not a password"),
)


@dataclass(frozen=True, slots=True)
class AnsweredParameters:
    """An answer of GetParametersForImport, checked.

    Attributes:
        key_id: The CMK that they are for.
        import_token: In base64, as it goes into ImportKeyMaterial.
        public_key: DER SubjectPublicKeyInfo.
        spec: What kind of key it is.
        expires_at: When the KMS stops taking the token.
    """

    key_id: str
    import_token: str
    public_key: bytes
    spec: WrappingKeySpec
    expires_at: datetime

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the public key's DER, in hex: to compare between two machines."""
        return hashlib.sha256(self.public_key).hexdigest()

    def require_usable(self, algorithm: WrappingAlgorithm, now: datetime) -> None:
        """Check that the KMS would still take them, and that the algorithm fits the public key.

        Raises:
            ExpiredImportToken: They have expired by the clock of this machine.
            InvalidParameter: The algorithm is for another kind of key.
        """
        if now >= self.expires_at:
            raise ExpiredImportToken(
                f"these parameters expired at {self.expires_at:%Y-%m-%dT%H:%M:%SZ}, and this "
                f"machine's clock says {now:%Y-%m-%dT%H:%M:%SZ}: call GetParametersForImport again"
            )
        fitting = [row.algorithm for row in COMPATIBILITY_TABLE if row.spec == self.spec]
        if algorithm not in fitting:
            raise InvalidParameter(
                "WrappingAlgorithm",
                f"{algorithm} does not go with the PublicKey, which is of {self.spec}; use what "
                f"GetParametersForImport was asked for: {', '.join(fitting)}",
            )


def read_parameters(text: str) -> AnsweredParameters:
    """Read what GetParametersForImport answered: the API's JSON, or what an SDK prints of it.

    That is the answer itself or a document with the answer as ``body``, in JSON or as Python prints
    it, with names such as ``PublicKey``, ``publicKey`` or ``public_key``.

    Raises:
        MissingParameter: A part of the answer is not there.
        InvalidParameter: It is something else, or a part is not as the API writes it.
    """
    answer = _answer_in(text)
    return AnsweredParameters(
        key_id=_part(answer, "KeyId"),
        import_token=_base64(answer, "ImportToken")[0],
        public_key=(der := _base64(answer, "PublicKey")[1]),
        spec=_spec_of(der),
        expires_at=_time(answer, "TokenExpireTime"),
    )


@strip_tracebacks
def require_key_material(material: bytes, key_spec: KeySpec) -> None:
    """Check that these bytes can be meant as key material of a CMK of this key spec.

    Raises:
        InvalidParameter: Wrong length, or text: hexadecimal, base64, PEM. Of 16 random bytes
            one in five million are text by chance, of 32 practically none. The error says nothing
            of the bytes.
    """
    expected, length = key_spec.material_length, len(material)
    what = f"{key_spec} takes {expected} bytes"
    for form, name, advice in _FORMS:
        if form.fullmatch(material):
            raise InvalidParameter("key material", f"is {name}; {what}: {advice}")
    if length != expected:
        rest = material[expected:]
        line_end = ", and these have a line end after them" if rest in {b"\n", b"\r\n"} else ""
        raise InvalidParameter("key material", f"has {length} bytes; {what}{line_end}")
    if len(set(material)) == 1:
        raise InvalidParameter("key material", f"is one byte repeated; {what}, drawn at random")


@strip_tracebacks
def encrypt_key_material(algorithm: WrappingAlgorithm, public_key: bytes, material: bytes) -> bytes:
    """Encrypt key material as ImportKeyMaterial takes it.

    Args:
        algorithm: What GetParametersForImport was asked for.
        public_key: DER SubjectPublicKeyInfo.
        material: The raw bytes, 1 to 190.

    Returns:
        256 bytes for RSA; for SM2PKE C1 ‖ C3 ‖ C2 (GB/T 32918.4), C1 with its leading 04, which is
        97 bytes more than the material.

    Raises:
        InvalidParameter: The public key is of another kind.
        ConfigurationError: libcrypto is not there, or has no SM2.
        SelfTestFailed: It does not compute SM2.
    """
    if algorithm is WrappingAlgorithm.SM2PKE:
        if _spec_of(public_key) is not WrappingKeySpec.EC_SM2:
            raise InvalidParameter("PublicKey", f"{algorithm} is for keys of EC_SM2")
        try:
            engine = open_engine("libcrypto")
        except ConfigurationError:
            raise ConfigurationError(
                f"{algorithm} needs the distribution's OpenSSL 3 with SM2 (libcrypto.so.3), which "
                "is not here; RHEL and its relatives build it without"
            ) from None
        return engine.encrypt(decode_spki(public_key), material).to_c1c3c2()
    key = load_der_public_key(public_key)
    if not isinstance(key, RSAPublicKey):
        raise InvalidParameter("PublicKey", f"{algorithm} is for keys of RSA_2048")
    return key.encrypt(material, PADDINGS[algorithm])


def _answer_in(text: str) -> Mapping[str, Any]:
    """The answer, with its names in small letters and without underscores."""
    document: Any = text
    # The older SDK for Python returns bytes, which print as b'{"KeyId": …}'.
    while isinstance(document, str | bytes):
        document = _parsed(document)
    while isinstance(document, dict):
        document = {str(n).replace("_", "").lower(): value for n, value in document.items()}
        if "body" not in document:
            break
        document = document["body"]
    if not isinstance(document, dict):
        raise InvalidParameter(
            "parameters", "are not the JSON object that GetParametersForImport answers"
        )
    if "code" in document and "publickey" not in document:
        raise InvalidParameter("parameters", "are an error that the KMS answered")
    return document


def _parsed(text: str | bytes) -> Any:
    readers: tuple[Callable[[Any], Any], ...] = (json.loads, ast.literal_eval)
    for read in readers:
        try:
            return read(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return None


def _part(answer: Mapping[str, Any], name: str) -> str:
    value = answer.get(name.lower())
    if not value:
        raise MissingParameter(name)
    if not isinstance(value, str):
        raise InvalidParameter(name, "is not a text")
    return value


def _base64(answer: Mapping[str, Any], name: str) -> tuple[str, bytes]:
    text = _part(answer, name)
    try:
        return text, binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        raise InvalidParameter(
            name, "is not base64 in one line, as the API answers it; was a part lost in copying?"
        ) from None


def _time(answer: Mapping[str, Any], name: str) -> datetime:
    text = _part(answer, name)
    try:
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except ValueError:
        raise InvalidParameter(name, "is not a time such as 2026-03-01T12:00:00Z") from None


def _spec_of(der: bytes) -> WrappingKeySpec:
    try:
        decode_spki(der)
    except ValueError:
        pass
    else:
        return WrappingKeySpec.EC_SM2
    try:
        key = load_der_public_key(der)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, RSAPublicKey) or key.key_size != _RSA_BITS:
        raise InvalidParameter(
            "PublicKey",
            f"is neither an RSA key of {_RSA_BITS} bits nor an SM2 key (DER SubjectPublicKeyInfo)",
        )
    return WrappingKeySpec.RSA_2048
