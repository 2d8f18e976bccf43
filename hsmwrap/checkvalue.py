"""Check values: tell equal key material from different material, and nothing else.

A check value is one byte that names the method, then 16 bytes: one constant block, encrypted by AES
under the key. An Aliyun_SM4 key is taken as an AES-128 key for this. HMAC would be the cleaner
choice for it, but SoftHSM takes no HMAC-SHA-256 key under 32 bytes (field note 28), and backends
should agree on the value.

Method bytes: 0 is none, 1 is this one, 2 to 127 are kept for later ones of hsmwrap, 128 to 255 are
the plug-ins' own, for an HSM that cannot do method 1 (with its SM4 keys, for example). Check values
are compared whole, so material imported under one method does not match under another: on a
backend that changes its method, or after a move to a backend with another one, the re-import of
the same material is refused as different. Such a change is a migration, as is one of the value.
"""

from __future__ import annotations

import hmac

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

METHOD_AES_ECB = 1
"""AES of :data:`CHECK_BLOCK` under the key material."""

# The key's other job is GCM with 12-byte nonces. There the block cipher sees nonce ‖ counter with
# a counter of 1 or more (NIST SP 800-38D, 7.1: J0 ends in 1), and the all-zero block for the hash
# key. A block that is not zero and ends in counter 0 is never encrypted, so its ciphertext is no
# piece of any keystream.
CHECK_BLOCK = b"hsmwrap-kcv\x01" + bytes(4)
"""What the key is applied to: 16 bytes, one AES block."""
CHECK_VALUE_LENGTH = 16
"""Length in bytes of the value that follows the method byte."""


def check_value(material: bytes) -> bytes:
    """Check value of key material (16, 24 or 32 bytes): 0x01 ‖ AES-ECB(block), 17 bytes."""
    # One constant block, once per key: what ECB is bad at does not occur.
    aes = Cipher(algorithms.AES(material), modes.ECB()).encryptor()  # noqa: S305
    return bytes([METHOD_AES_ECB]) + aes.update(CHECK_BLOCK) + aes.finalize()


def same_check_value(expected: bytes, actual: bytes) -> bool:
    """Whether two check values (method byte included) are equal, in constant time."""
    return hmac.compare_digest(expected, actual)
