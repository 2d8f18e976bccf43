"""The secret of an access key, in a form that checks signatures and is not the secret.

A server needs the secret for every request, so it would be in each core dump. HMAC (RFC 2104)
hashes a block that is made of the key before the text, inside and outside: the states after those
two blocks are all that is kept. They sign as the secret does, but do not show it.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from types import MappingProxyType
from typing import NoReturn

from cryptography.hazmat.primitives import hashes

_BLOCK = 64  # bytes; of all three hashes
_INNER, _OUTER = 0x36, 0x5C
# Version 1 of Alibaba's signatures appends an ampersand to the secret.
_SCHEMES: Mapping[str, tuple[hashes.HashAlgorithm, bytes]] = MappingProxyType(
    {"sha1&": (hashes.SHA1(), b"&"), "sha256": (hashes.SHA256(), b""), "sm3": (hashes.SM3(), b"")}  # noqa: S303 (the API's)
)


class SigningSecret:
    """Computes the HMACs of one secret; shows it in no way."""

    __slots__ = ("_states",)

    def __init__(self, secret: str | bytearray) -> None:
        """Take the secret; a ``bytearray`` (UTF-8) is overwritten."""
        own = bytearray(secret, "utf-8") if isinstance(secret, str) else secret
        self._states = {
            name: _states(algorithm, own, suffix) for name, (algorithm, suffix) in _SCHEMES.items()
        }
        _wipe(own)

    def mac(self, scheme: str, text: bytes) -> bytes:
        """HMAC of ``text``: by ``sha256`` or ``sm3``, or ``sha1&`` with the secret and ``&``."""
        inner, outer = (state.copy() for state in self._states[scheme])
        inner.update(text)
        outer.update(inner.finalize())
        return outer.finalize()

    def __repr__(self) -> str:
        return "<SigningSecret>"

    def __eq__(self, other: object) -> bool:
        """Compare in constant time, by what the two sign."""
        if not isinstance(other, SigningSecret):
            return NotImplemented
        return hmac.compare_digest(self.mac("sha256", b""), other.mac("sha256", b""))

    # A hash would be a check value of the secret.
    __hash__ = None  # type: ignore[assignment]

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        """Refuse to be pickled."""
        raise TypeError("a secret is not serialised")


def _states(
    algorithm: hashes.HashAlgorithm, secret: bytearray, suffix: bytes
) -> tuple[hashes.Hash, hashes.Hash]:
    block = bytearray(_BLOCK)
    length = len(secret) + len(suffix)
    if length > _BLOCK:
        digest = hashes.Hash(algorithm)
        digest.update(secret)
        digest.update(suffix)
        block[: algorithm.digest_size] = digest.finalize()
    else:
        block[: len(secret)] = secret
        block[len(secret) : length] = suffix
    states = tuple(_after(algorithm, block, pad) for pad in (_INNER, _OUTER))
    _wipe(block)
    return states[0], states[1]


def _after(algorithm: hashes.HashAlgorithm, block: bytearray, pad: int) -> hashes.Hash:
    padded = bytearray(byte ^ pad for byte in block)
    state = hashes.Hash(algorithm)
    state.update(padded)
    _wipe(padded)
    return state


def _wipe(data: bytearray) -> None:
    data[:] = bytes(len(data))
