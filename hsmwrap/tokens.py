"""Import tokens: stateless, authenticated, readable by any node on the same backend.

Layout, all integers big-endian::

    version (1) | key set id: length (1), ASCII | body | HMAC-SHA-256 (32)

    body: token id (16) | expiry, Unix seconds (8) | spec (1) | algorithm (1) | level (1) |
          custody (1) | key spec (1) | SHA-256 of the public key (32) |
          CMK id: length (1), UTF-8 | backend: length (1), ASCII |
          private key reference: length (2), bytes

The MAC covers version and body under a key that lives in the backend; the key set's id selects
it. There is exactly one encoding of given claims, and decoding accepts no other.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TypeVar

from hsmwrap.backend import Custody, Mac, PrivateKeyRef
from hsmwrap.catalog import KeySpec, ProtectionLevel, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.errors import (
    ConfigurationError,
    HsmError,
    InvalidImportToken,
    InvalidMac,
    InvalidParameter,
)

TOKEN_VERSION = 1
TOKEN_ID_LENGTH = 16
MAX_TOKEN_LENGTH = 4096
"""Longest token accepted, in bytes; a sealed RSA-2048 private key makes about 1,400."""
MAX_CMK_ID_LENGTH = 255
"""Longest CMK id that fits, in bytes of UTF-8."""

_TAG_LENGTH = 32
_DIGEST_LENGTH = 32
_MAX_ASCII_LENGTH = 255
_EPOCH = datetime.fromtimestamp(0, UTC)
_HEAD = struct.Struct(">BB")
_FIXED = struct.Struct(f">{TOKEN_ID_LENGTH}sQBBBBB{_DIGEST_LENGTH}s")
_LENGTH1 = struct.Struct(">B")
_LENGTH2 = struct.Struct(">H")

# Codes on the wire: never reused, never renumbered.
_SPECS = (WrappingKeySpec.RSA_2048, WrappingKeySpec.EC_SM2)
_ALGORITHMS = (
    WrappingAlgorithm.RSAES_PKCS1_V1_5,
    WrappingAlgorithm.RSAES_OAEP_SHA_1,
    WrappingAlgorithm.RSAES_OAEP_SHA_256,
    WrappingAlgorithm.SM2PKE,
)
_LEVELS = (ProtectionLevel.SOFTWARE, ProtectionLevel.HSM)
_CUSTODIES = (Custody.HSM_INTERNAL, Custody.HSM_ENCRYPTED_DATABASE)
_KEY_SPECS = (KeySpec.ALIYUN_AES_256, KeySpec.ALIYUN_SM4)

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class ImportTokenClaims:
    """What an import token says.

    Attributes:
        token_id: 16 random bytes, the token's name in logs and for single use.
        cmk_id: Id of the CMK that the token was issued for.
        key_spec: Key spec of that CMK.
        spec: Wrapping key spec.
        algorithm: Wrapping algorithm.
        protection_level: Protection level of the CMK.
        backend: Name of the backend that holds the private key.
        public_key_sha256: SHA-256 of the public key's DER SubjectPublicKeyInfo.
        expires_at: Aware time, whole seconds.
        private_key: The wrapped private key, or the id of a resident one.
    """

    token_id: bytes
    cmk_id: str
    key_spec: KeySpec
    spec: WrappingKeySpec
    algorithm: WrappingAlgorithm
    protection_level: ProtectionLevel
    backend: str
    public_key_sha256: bytes
    expires_at: datetime
    private_key: PrivateKeyRef = field(repr=False)


def encode(claims: ImportTokenClaims, mac: Callable[[bytes], Mac]) -> bytes:
    """Serialise and authenticate ``claims``; ``mac`` is the backend's.

    Raises:
        InvalidParameter: The CMK id has more than 255 bytes, or cannot be encoded as UTF-8.
        ConfigurationError: The expiry is not an aware time in whole seconds, 1970 or later.
        HsmError: Anything else does not fit: what the backend made is wrong or too large.
    """
    body = _encode_body(claims)
    authenticated = mac(_mac_input(body))
    key_set = _ascii(authenticated.key_set, "the id of its key set")
    if len(authenticated.tag) != _TAG_LENGTH:
        raise _unfit(
            f"a MAC of {len(authenticated.tag)} bytes where HMAC-SHA-256 has {_TAG_LENGTH}"
        )
    token = _HEAD.pack(TOKEN_VERSION, len(key_set)) + key_set + body + authenticated.tag
    if len(token) > MAX_TOKEN_LENGTH:
        raise _unfit(f"an import token of {len(token)} bytes, and {MAX_TOKEN_LENGTH} is the most")
    return token


def decode(token: bytes, verify_mac: Callable[[bytes, Mac], None]) -> ImportTokenClaims:
    """Authenticate ``token`` with the backend's ``verify_mac``, then read its claims.

    Nothing of the body is looked at before the MAC is right. Expiry is not checked here.

    Raises:
        InvalidImportToken: Not a token of a known version, or not authentic.
    """
    try:
        body, mac = _open_envelope(token)
    except (struct.error, UnicodeDecodeError):
        raise InvalidImportToken("the import token is cut short or damaged") from None
    try:
        verify_mac(_mac_input(body), mac)
    except InvalidMac:
        raise InvalidImportToken("the import token was not issued here, or was changed") from None
    return _decode_body(body)


def _mac_input(body: bytes) -> bytes:
    # The context keeps a token's MAC from meaning anything to another use of the MAC key.
    return b"hsmwrap import token" + _LENGTH1.pack(TOKEN_VERSION) + body


def _open_envelope(token: bytes) -> tuple[bytes, Mac]:
    if len(token) > MAX_TOKEN_LENGTH:
        raise InvalidImportToken(f"an import token has at most {MAX_TOKEN_LENGTH} bytes")
    version, id_length = _HEAD.unpack_from(token)
    if version != TOKEN_VERSION:
        raise InvalidImportToken(f"import token version {version} is not known here")
    start, end = _HEAD.size + id_length, len(token) - _TAG_LENGTH
    if end < start:
        raise InvalidImportToken("the import token is cut short")
    return token[start:end], Mac(token[_HEAD.size : start].decode("ascii"), token[end:])


def _encode_body(claims: ImportTokenClaims) -> bytes:
    _require_exact(claims)
    try:
        fixed = _FIXED.pack(
            claims.token_id,
            _seconds(claims.expires_at),
            _SPECS.index(claims.spec),
            _ALGORITHMS.index(claims.algorithm),
            _LEVELS.index(claims.protection_level),
            _CUSTODIES.index(claims.private_key.custody),
            _KEY_SPECS.index(claims.key_spec),
            claims.public_key_sha256,
        )
        private_key = _prefixed(_LENGTH2, claims.private_key.data)
    except (struct.error, ValueError):
        raise _unfit(
            "a wrapping key or key spec of no known kind, or too large a reference"
        ) from None
    backend = _ascii(claims.backend, "its name")
    return fixed + _cmk_id(claims.cmk_id) + _prefixed(_LENGTH1, backend) + private_key


def _require_exact(claims: ImportTokenClaims) -> None:
    # struct cuts and fills bytes to a field's length without a word.
    lengths = len(claims.token_id), len(claims.public_key_sha256)
    if lengths != (TOKEN_ID_LENGTH, _DIGEST_LENGTH):
        raise _unfit("the token id has 16 bytes and the public key's SHA-256 has 32")


def _seconds(expires_at: datetime) -> int:
    # Fractions of a second would be lost, and times before 1970 cannot be encoded.
    if expires_at.tzinfo is None or expires_at.microsecond or expires_at < _EPOCH:
        raise ConfigurationError(
            "an import token expires at an aware time in whole seconds, 1970 or later: "
            "check the clock and the token's lifetime"
        )
    return int(expires_at.timestamp())


def _cmk_id(cmk_id: str) -> bytes:
    try:
        return _prefixed(_LENGTH1, cmk_id.encode())
    except (struct.error, UnicodeEncodeError):
        detail = f"takes 1 to {MAX_CMK_ID_LENGTH} bytes of UTF-8"
        raise InvalidParameter("KeyId", detail) from None


def _ascii(text: str, what: str) -> bytes:
    if not text.isascii() or len(text) > _MAX_ASCII_LENGTH:
        raise _unfit(f"{what} is not ASCII of at most {_MAX_ASCII_LENGTH} characters")
    return text.encode("ascii")


def _unfit(reason: str) -> HsmError:
    return HsmError(f"what the backend made does not fit an import token: {reason}")


def _decode_body(body: bytes) -> ImportTokenClaims:
    # An authentic body that does not parse was made by a newer or broken hsmwrap: same answer.
    try:
        token_id, expiry, spec, algorithm, level, custody, key_spec, digest = _FIXED.unpack_from(
            body
        )
        cmk_id, at = _take(_LENGTH1, body, _FIXED.size)
        backend, at = _take(_LENGTH1, body, at)
        private_key, at = _take(_LENGTH2, body, at)
        if at != len(body):
            raise InvalidImportToken("the import token has bytes left over or too few")
        return ImportTokenClaims(
            token_id=token_id,
            cmk_id=cmk_id.decode(),
            key_spec=_member(_KEY_SPECS, key_spec),
            spec=_member(_SPECS, spec),
            algorithm=_member(_ALGORITHMS, algorithm),
            protection_level=_member(_LEVELS, level),
            backend=backend.decode("ascii"),
            public_key_sha256=digest,
            expires_at=datetime.fromtimestamp(expiry, UTC),
            private_key=PrivateKeyRef(_member(_CUSTODIES, custody), private_key),
        )
    except (struct.error, ValueError, OverflowError, OSError):
        raise InvalidImportToken("the import token does not parse") from None


def _prefixed(length: struct.Struct, data: bytes) -> bytes:
    return length.pack(len(data)) + data


def _take(length: struct.Struct, body: bytes, at: int) -> tuple[bytes, int]:
    start = at + length.size
    (count,) = length.unpack_from(body, at)
    return body[start : start + count], start + count


def _member(members: Sequence[_T], code: int) -> _T:
    if code >= len(members):
        raise ValueError("unknown code")
    return members[code]
