"""SM2 public keys as SubjectPublicKeyInfo: exactly one form, 91 bytes of DER.

AlgorithmIdentifier id-ecPublicKey (1.2.840.10045.2.1) with the named curve, then the uncompressed
point (RFC 5480, GM/T 0009). Anything else that BER or RFC 5480 would allow is refused.
"""

from __future__ import annotations

from typing import Final

from hsmwrap.sm2.curve import OID_DER, POINT_BYTES, decode_point

_HEAD: Final = (
    bytes.fromhex("3059301306072a8648ce3d0201") + OID_DER + bytes([0x03, POINT_BYTES + 1, 0x00])
)


def encode_spki(point: bytes) -> bytes:
    """Wrap an uncompressed point (65 bytes) into DER SubjectPublicKeyInfo (91 bytes).

    Raises:
        ValueError: ``point`` is not an uncompressed point of the SM2 curve.
    """
    decode_point(point)
    return _HEAD + point


def decode_spki(der: bytes) -> bytes:
    """Take the uncompressed point (65 bytes) out of what :func:`encode_spki` makes.

    Raises:
        ValueError: ``der`` is not that form, byte for byte, or its point is not on the curve.
    """
    if not der.startswith(_HEAD):
        raise ValueError("not an SM2 SubjectPublicKeyInfo with a named curve")
    point = der[len(_HEAD) :]
    decode_point(point)
    return point
