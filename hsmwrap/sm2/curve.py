"""The SM2 curve, and what makes a point acceptable.

Source: GB/T 32918.5 (GM/T 0003.5), OID 1.2.156.10197.1.301. The curve has prime order, so a point
that satisfies the equation needs no further subgroup check.
"""

from __future__ import annotations

from typing import Final

from hsmwrap.sm2.power import FixedPower

P: Final = 0xFFFFFFFEFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF00000000FFFFFFFFFFFFFFFF
A: Final = P - 3
B: Final = 0x28E9FA9E9D9F5E344D5A9E4BCF6509A7F39789F515AB8F92DDBCBD414D940E93
N: Final = 0xFFFFFFFEFFFFFFFFFFFFFFFFFFFFFFFF7203DF6B21C6052B53BBF40939D54123
GX: Final = 0x32C4AE2C1F1981195F9904466A39C9948FE30BBFF2660BE1715A4589334C74C7
GY: Final = 0xBC3736A2F4F6779C59BDCEE36B692153D0A9877CC62A474002DF32E52139F0A0

FIELD_BYTES: Final = 32
"""Length of a coordinate, of a private scalar and of an SM3 hash."""

POINT_BYTES: Final = 1 + 2 * FIELD_BYTES
"""Length of an uncompressed point: 04 ‖ x ‖ y."""

OID_DER: Final = bytes.fromhex("06082a811ccf5501822d")
"""DER of the curve's OID, as in EC_PARAMS and SubjectPublicKeyInfo."""

_FIELD: Final = range(P)
_UNCOMPRESSED: Final = b"\x04"

_root = FixedPower((P + 1) // 4, P)
"""The square root of a square: p ≡ 3 (mod 4)."""


def is_on_curve(x: int, y: int) -> bool:
    """Whether (x, y) is a point of the curve, both coordinates within 0..p-1.

    The point at infinity has no coordinates; (0, 0) is not on the curve.
    """
    return x in _FIELD and y in _FIELD and y * y % P == _right_side(x)


def recover_y(x: int) -> int | None:
    """One of the two y of the points with this x (the other is p - y); None if there are none.

    The root is r^((p+1)/4), as p ≡ 3 (mod 4) (GB/T 32918.1, B.1.4), and verified.
    """
    y = _root(_right_side(x))
    return y if is_on_curve(x, y) else None


def decode_point(data: bytes) -> tuple[int, int]:
    """Read an uncompressed point, 65 bytes: 04 ‖ x ‖ y.

    Raises:
        ValueError: Another form (compressed, hybrid, infinity) or length, or not on the curve.
    """
    x, y = int.from_bytes(data[1 : 1 + FIELD_BYTES]), int.from_bytes(data[1 + FIELD_BYTES :])
    if len(data) != POINT_BYTES or data[:1] != _UNCOMPRESSED or not is_on_curve(x, y):
        raise ValueError("not an uncompressed point of the SM2 curve")
    return x, y


def encode_point(x: int, y: int) -> bytes:
    """Write a point as 04 ‖ x ‖ y, 65 bytes.

    Raises:
        ValueError: (x, y) is not on the curve.
    """
    if not is_on_curve(x, y):
        raise ValueError("not a point of the SM2 curve")
    return _UNCOMPRESSED + x.to_bytes(FIELD_BYTES) + y.to_bytes(FIELD_BYTES)


def _right_side(x: int) -> int:
    return ((x * x + A) * x + B) % P
