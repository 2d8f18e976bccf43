"""SM3, and the KDF of SM2."""

from __future__ import annotations

import functools
from typing import Final

from cryptography.hazmat.primitives import hashes

_HASH_BYTES: Final = 32


def sm3(data: bytes) -> bytes:
    """SM3 of ``data``, 32 bytes (GB/T 32905).

    Raises:
        UnsupportedAlgorithm: pyca's OpenSSL was built or configured without SM3.
    """
    digest = _fresh().copy()
    digest.update(data)
    return digest.finalize()


def sm2_kdf(x2: bytes, y2: bytes, length: int) -> bytes:
    """KDF(x2 ‖ y2, length) of GB/T 32918.4, 5.4.3; coordinates of 32 bytes, ``length`` in bytes.

    Block i, counted from 1, is SM3(x2 ‖ y2 ‖ i), with i as 4 bytes big-endian. By itself and not by
    pyca's X963KDF, which is the same: an import hashes four times, and it is the same code then.
    """
    shared = x2 + y2
    blocks = -(-length // _HASH_BYTES)
    return b"".join([sm3(shared + i.to_bytes(4)) for i in range(1, blocks + 1)])[:length]


@functools.cache
def _fresh() -> hashes.Hash:
    # Copied for each use: making one looks the algorithm up each time (field note 62).
    return hashes.Hash(hashes.SM3())


def xor(left: bytes, right: bytes) -> bytes:
    """Bytewise exclusive or of two strings of the same length."""
    if len(left) != len(right):
        raise ValueError("exclusive or of strings of different lengths")
    return (int.from_bytes(left) ^ int.from_bytes(right)).to_bytes(len(left))
