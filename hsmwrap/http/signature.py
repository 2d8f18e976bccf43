"""Parses the signature of a request into a claim, and checks its form.

Two schemes: version 1 (HMAC-SHA1, in the parameters) and ACS3 (HMAC-SHA-256 or HMAC-SM3, in the
headers). :mod:`hsmwrap.http.authentication` verifies the claim.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cryptography.hazmat.primitives import hashes

from hsmwrap.catalog import loggable
from hsmwrap.errors import InvalidParameter
from hsmwrap.http import canonical
from hsmwrap.http.errors import IncompleteSignature
from hsmwrap.http.message import RpcMessage
from hsmwrap.kms.api import OPERATIONS
from hsmwrap.kms.signing import SigningSecret

_SECRET = frozenset({"CiphertextBlob", "EncryptedKeyMaterial", "ImportToken", "Plaintext"})
_SHOWN = frozenset(
    {
        *("AccessKeyId", "Action", "Format", "RegionId", "SignatureMethod", "SignatureNonce"),
        *("SignatureType", "SignatureVersion", "Timestamp", "Version"),
        *(name for operation in OPERATIONS.values() for name in operation.parameters),
    }
    - _SECRET
)
"""Parameters whose values an error may have. Another name may be a secret one's, misspelt."""


@dataclass(frozen=True, slots=True)
class Claim:
    """The content of a signature, not verified.

    Attributes:
        access_key_id: The access key that signed, as claimed.
        timestamp: Time of signing, as written.
        nonce: Makes the request unique.
        action: API action that was signed; empty: none.
        version: API version that was signed; empty: none.
        string_to_sign: The server's own string to sign; None if the body differs from the signed
            one.
        disclosed: Makes ``string_to_sign`` with ``***`` for values that an error must not have.
        signature: The signature as received.
        scheme: The HMAC, as :class:`hsmwrap.kms.signing.SigningSecret` names it.
        encode: Makes an HMAC the signature that a request carries.
    """

    access_key_id: str
    timestamp: str
    nonce: str
    action: str
    version: str
    string_to_sign: str | None = field(repr=False)
    disclosed: Callable[[], str] = field(repr=False)
    signature: str = field(repr=False)
    scheme: str
    encode: Callable[[bytes], str] = field(repr=False)

    def is_signed_with(self, secret: SigningSecret) -> bool:
        """Whether the signature is right for ``secret``; compared in constant time."""
        if self.string_to_sign is None:
            return False
        # latin-1: ACS3 signs header bytes, which WSGI passes as latin-1 text.
        right = self.encode(secret.mac(self.scheme, self.string_to_sign.encode("latin-1")))
        return hmac.compare_digest(right.encode(), self.signature.encode())


def read_claim(message: RpcMessage) -> Claim:
    """Parse the claim of either scheme.

    Raises:
        IncompleteSignature: A part is missing, malformed or not signed.
        InvalidParameter: A signature method or version that is not served.
    """
    if "authorization" in message.headers:
        return _read_acs3(message)
    return _read_v1(message)


# --- version 1 --------------------------------------------------------------------------------

_V1_NEEDED = ("AccessKeyId", "Signature", "SignatureNonce", "Timestamp")
_V1_FIXED = {"SignatureMethod": "HMAC-SHA1", "SignatureVersion": "1.0", "SignatureType": ""}


def _read_v1(message: RpcMessage) -> Claim:
    parameters = message.parameters
    _require(parameters, _V1_NEEDED)
    for name, only in _V1_FIXED.items():
        if parameters.get(name, only) != only:
            raise InvalidParameter(name, f"only {only!r} is served")
    signature = parameters.pop("Signature")

    def disclosed() -> str:
        shown = {name: text if name in _SHOWN else "***" for name, text in parameters.items()}
        return canonical.v1_string_to_sign(message.method, shown)

    return Claim(
        access_key_id=parameters["AccessKeyId"],
        timestamp=parameters["Timestamp"],
        nonce=parameters["SignatureNonce"],
        action=parameters.get("Action", ""),
        version=parameters.get("Version", ""),
        string_to_sign=canonical.v1_string_to_sign(message.method, parameters),
        disclosed=disclosed,
        signature=signature,
        scheme="sha1&",
        encode=lambda mac: base64.b64encode(mac).decode("ascii"),
    )


# --- ACS3 -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Suite:
    digest: Callable[[bytes], str]
    scheme: str


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _sm3(data: bytes) -> str:
    digest = hashes.Hash(hashes.SM3())
    digest.update(data)
    return digest.finalize().hex()


_SUITES: Mapping[str, _Suite] = {
    "ACS3-HMAC-SHA256": _Suite(_sha256, "sha256"),
    "ACS3-HMAC-SM3": _Suite(_sm3, "sm3"),
}
_AUTHORIZATION = re.compile(
    r"(?P<algorithm>ACS3-[A-Z0-9-]+) +Credential=(?P<access_key_id>[^,\s]+), *"
    r"SignedHeaders=(?P<signed>[a-z0-9_;-]+), *Signature=(?P<signature>[0-9a-f]{64})",
    re.ASCII,
)
_ACS3_NEEDED = (
    "host",
    "x-acs-action",
    "x-acs-content-sha256",
    "x-acs-date",
    "x-acs-signature-nonce",
    "x-acs-version",
)


def _read_acs3(message: RpcMessage) -> Claim:
    authorization = _AUTHORIZATION.fullmatch(message.headers["authorization"])
    if authorization is None:
        raise IncompleteSignature("the Authorization header is malformed")
    suite = _SUITES.get(authorization["algorithm"])
    if suite is None:
        raise IncompleteSignature(f"the signature algorithm has to be one of {', '.join(_SUITES)}")
    headers = _signed_headers(message, authorization["signed"].split(";"))
    body_digest = suite.digest(message.body)
    string_to_sign = _acs3_string_to_sign(
        authorization["algorithm"], suite, message, headers, body_digest
    )
    body_is_signed = hmac.compare_digest(
        headers["x-acs-content-sha256"].encode(), body_digest.encode()
    )
    return Claim(
        access_key_id=authorization["access_key_id"],
        timestamp=headers["x-acs-date"],
        nonce=headers["x-acs-signature-nonce"],
        action=headers["x-acs-action"],
        version=headers["x-acs-version"],
        string_to_sign=string_to_sign if body_is_signed else None,
        disclosed=lambda: string_to_sign,
        signature=authorization["signature"],
        scheme=suite.scheme,
        encode=bytes.hex,
    )


def _acs3_string_to_sign(
    algorithm: str, suite: _Suite, message: RpcMessage, headers: Mapping[str, str], digest: str
) -> str:
    request = canonical.acs3_request(message.method, message.query, headers.items(), digest)
    return f"{algorithm}\n{suite.digest(request.encode('latin-1'))}"


def _signed_headers(message: RpcMessage, names: list[str]) -> dict[str, str]:
    """The signed headers by name, sorted; all that have to be signed are there."""
    needed = {n for n in message.headers if n.startswith("x-acs-")} | set(_ACS3_NEEDED)
    if message.body:
        needed.add("content-type")
    _require(message.headers, _ACS3_NEEDED)
    unsigned = sorted(needed - set(names))
    if unsigned:
        raise IncompleteSignature(f"{loggable(unsigned[0])} is not among the signed headers")
    if set(names) - message.headers.keys():
        raise IncompleteSignature("a signed header is missing")
    return {name: message.headers[name].strip() for name in sorted(names)}


def _require(found: Mapping[str, str], names: tuple[str, ...]) -> None:
    missing = [name for name in names if not found.get(name)]
    if missing:
        raise IncompleteSignature(f"{missing[0]} is missing")
