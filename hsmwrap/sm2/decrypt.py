"""SM2 decryption from the shared point on (GB/T 32918.4, 7.1, steps B4 to B6).

The scalar multiplication [d]C1 = (x2, y2) happens elsewhere: in an HSM token that offers ECDH and
gives x2 alone, or in an engine that gives both coordinates.
"""

from __future__ import annotations

import hmac

from hsmwrap.errors import InvalidKeyMaterial
from hsmwrap.sm2.curve import FIELD_BYTES, P, recover_y
from hsmwrap.sm2.formats import Sm2Ciphertext
from hsmwrap.sm2.kdf import sm2_kdf, sm3, xor


def decrypt_with_x2(ciphertext: Sm2Ciphertext, x2: bytes) -> bytes:
    """Decrypt with the x coordinate alone (32 bytes): C3 tells which of the two y it was.

    Both candidates are always tried to the end, so the time tells nothing about either.

    Raises:
        InvalidKeyMaterial: x2 belongs to no point, or neither candidate is confirmed by C3.
    """
    y = recover_y(int.from_bytes(x2))
    if y is None:
        raise InvalidKeyMaterial
    return _single([_candidate(ciphertext, x2, root.to_bytes(FIELD_BYTES)) for root in (y, P - y)])


def decrypt_with_point(ciphertext: Sm2Ciphertext, x2: bytes, y2: bytes) -> bytes:
    """Decrypt with both coordinates of the shared point (32 bytes each).

    Raises:
        InvalidKeyMaterial: C3 does not confirm the plaintext.
    """
    return _single([_candidate(ciphertext, x2, y2)])


def _candidate(ciphertext: Sm2Ciphertext, x2: bytes, y2: bytes) -> tuple[bool, bytes]:
    """Whether C3 confirms this shared point, and the plaintext under it."""
    mask = sm2_kdf(x2, y2, len(ciphertext.c2))
    plaintext = xor(ciphertext.c2, mask)
    confirmed = hmac.compare_digest(sm3(x2 + plaintext + y2), ciphertext.c3)
    # Step B4: a mask of zeros would be no encryption; no honest sender lets it through (A5).
    masked = not hmac.compare_digest(mask, bytes(len(mask)))
    return confirmed & masked, plaintext


def _single(candidates: list[tuple[bool, bytes]]) -> bytes:
    plaintexts = [plaintext for confirmed, plaintext in candidates if confirmed]
    if len(plaintexts) != 1:
        raise InvalidKeyMaterial
    return plaintexts.pop()
