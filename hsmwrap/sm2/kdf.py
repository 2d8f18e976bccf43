"""SM3, and the KDF of SM2."""

from __future__ import annotations

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.x963kdf import X963KDF


def sm3(data: bytes) -> bytes:
    """SM3 of ``data``, 32 bytes (GB/T 32905)."""
    digest = hashes.Hash(hashes.SM3())
    digest.update(data)
    return digest.finalize()


def sm2_kdf(x2: bytes, y2: bytes, length: int) -> bytes:
    """KDF(x2 ‖ y2, length) of GB/T 32918.4, 5.4.3; coordinates of 32 bytes, ``length`` in bytes.

    It is the KDF of ANSI X9.63 with SM3 and no shared info.
    """
    return X963KDF(hashes.SM3(), length, sharedinfo=None).derive(x2 + y2)


def xor(left: bytes, right: bytes) -> bytes:
    """Bytewise exclusive or of two strings of the same length."""
    return bytes(a ^ b for a, b in zip(left, right, strict=True))
