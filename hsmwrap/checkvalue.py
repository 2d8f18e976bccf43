"""Check values (KCV, key check value): they tell equal key material from different material.

A check value is one byte for the method, then 16 bytes: a constant block, encrypted by AES under
the key. An Aliyun_SM4 key is used as an AES-128 key for this. HMAC would be the cleaner choice, but
SoftHSM refuses HMAC-SHA-256 keys under 32 bytes (field note 28), and backends should agree on the
value. An HSM that has SM4 and no AES encrypts the same block by SM4.

Method bytes: 0 is unused, 1 is AES, 2 is SM4, 3 to 127 are reserved for hsmwrap, 128 to 255 are for
plug-ins whose HSM cannot do these. Check values are compared
whole, so the same material has different check values under different methods. If a backend changes
its method, or a CMK moves to a backend with another method, the re-import of the same material is
refused as different material. Such a change needs a migration of the stored values.
"""

from __future__ import annotations

import hmac

METHOD_AES_ECB = 1
"""AES of :data:`CHECK_BLOCK` under the key material."""
METHOD_SM4_ECB = 2
"""SM4 of it, where the HSM has no AES."""
METHODS = (METHOD_AES_ECB, METHOD_SM4_ECB)
"""Those of :func:`check_value`."""
OWN_METHODS = 128
"""From here on: methods of plug-ins."""

# The key is also used for GCM with 12-byte nonces. GCM encrypts nonce ‖ counter with a counter of 1
# or more (NIST SP 800-38D, 7.1: J0 ends in 1), and the all-zero block for the hash key. It never
# encrypts a non-zero block that ends in counter 0, so the check value is not part of any keystream.
# Nor is it of CCM, whose blocks begin with other flags (NIST SP 800-38C, A.2 and A.3).
CHECK_BLOCK = b"hsmwrap-kcv\x01" + bytes(4)
"""The block that is encrypted: 16 bytes."""


def check_value(material: bytes, method: int = METHOD_AES_ECB) -> bytes:
    """Check value (KCV) of key material (16, 24 or 32 bytes): method ‖ ECB(block), 17 bytes."""
    # Each backend's check values are looked at by the numbers above, few are computed here.
    from cryptography.hazmat.primitives.ciphers import (  # noqa: PLC0415
        Cipher,
        algorithms,
        modes,
    )

    cipher = {METHOD_AES_ECB: algorithms.AES, METHOD_SM4_ECB: algorithms.SM4}[method]
    # ECB is safe for a single constant block.
    ecb = Cipher(cipher(material), modes.ECB()).encryptor()  # noqa: S305
    return bytes([method]) + ecb.update(CHECK_BLOCK) + ecb.finalize()


def same_check_value(expected: bytes, actual: bytes) -> bool:
    """Whether two check values (method byte included) are equal, in constant time."""
    return hmac.compare_digest(expected, actual)
