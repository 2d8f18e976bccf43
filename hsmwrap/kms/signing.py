"""The secret of an access key, in a form that checks signatures and is not the secret.

A server needs the secret for every request, so it would be in each core dump. HMAC (RFC 2104)
hashes a block that is made of the key before the text, inside and outside: the states after those
two blocks are all that pyca's HMAC keeps (tried: the key, plain and as both blocks have it, is not
in the memory of the process). They sign as the secret does, but do not show it.
"""

from __future__ import annotations

import hmac
from typing import NoReturn

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.hmac import HMAC


class SigningSecret:
    """Computes the HMACs of one secret; shows it in no way."""

    __slots__ = ("_keyed",)

    def __init__(self, secret: str | bytearray) -> None:
        """Take the secret; a ``bytearray`` (UTF-8) is overwritten."""
        own = bytearray(secret, "utf-8") if isinstance(secret, str) else secret
        # Version 1 of Alibaba's signatures appends an ampersand to the secret.
        followed = own + b"&"
        self._keyed = {
            "sha1&": HMAC(followed, hashes.SHA1()),  # noqa: S303 (the API's)
            "sha256": HMAC(own, hashes.SHA256()),
            "sm3": HMAC(own, hashes.SM3()),
        }
        for copy in (own, followed):
            copy[:] = bytes(len(copy))

    def mac(self, scheme: str, text: bytes) -> bytes:
        """HMAC of ``text``: by ``sha256`` or ``sm3``, or ``sha1&`` with the secret and ``&``."""
        mac = self._keyed[scheme].copy()
        mac.update(text)
        return mac.finalize()

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
