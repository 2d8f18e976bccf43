"""Forged ciphertexts, which a backend has to refuse, and all layouts that it has to read.

For authors of backends; the conformance kit uses it. Everything here is made from the public key
alone, as an attacker can.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_der_public_key

from hsmwrap.catalog import WrappingAlgorithm
from hsmwrap.sm2 import recover_y, sm2_kdf, sm3
from hsmwrap.sm2.curve import FIELD_BYTES, N, P
from hsmwrap.testing._conformance.points import G, add, multiples_of, multiply, small_order_points
from hsmwrap.testing.clients import pyca_encrypt

_MODULUS_BYTES = 256
_HASHES = {
    WrappingAlgorithm.RSAES_OAEP_SHA_1: "sha1",
    WrappingAlgorithm.RSAES_OAEP_SHA_256: "sha256",
}

Ciphertexts = Iterator[tuple[str, bytes]]
"""What is wrong with each one (or its layout), and the ciphertext."""


def oaep_forgeries(
    algorithm: WrappingAlgorithm, public_key: bytes, material_length: int
) -> Ciphertexts:
    """RSA ciphertexts of material of the right length, each with one thing wrong about OAEP.

    A backend that accepts one of them omits a check (RFC 8017, 7.1.2).
    """
    # Without the bytes 00 and 01, of which OAEP's padding consists.
    material = bytes(2 + byte % 254 for byte in secrets.token_bytes(material_length))
    key = load_der_public_key(public_key)
    if not isinstance(key, RSAPublicKey):
        raise TypeError("OAEP is for RSA keys")
    name = _HASHES[algorithm]
    other = next(o for o in _HASHES.values() if o != name)
    blocks = {
        "hash of another label": _oaep(name, material, label=b"another"),
        "first byte not 00": _oaep(name, material, first=1),
        "padding not of zeros": _oaep(name, material, filler=b"\x00\x02"),
        "no separator": _oaep(name, material, separator=b"\x00"),
        "another separator": _oaep(name, material, separator=b"\x02"),
        "MGF1 with the other hash": _oaep(name, material, mask=other),
        "OAEP with the other hash": _oaep(other, material),
        "no padding at all": material.rjust(_MODULUS_BYTES, b"\0"),
    }
    for what, block in blocks.items():
        yield what, _raw_rsa(key, block)
    pkcs1 = WrappingAlgorithm.RSAES_PKCS1_V1_5
    yield "PKCS#1 v1.5 padding", pyca_encrypt(pkcs1, public_key, material)


def sm2_layouts(public_key: bytes, material: bytes) -> Ciphertexts:
    """Valid SM2 ciphertexts of ``material`` (it may be empty), in every layout to be read."""
    x2y2: tuple[int, int] | None = None
    while x2y2 is None:
        k = 1 + secrets.randbelow(N - 1)
        c1 = multiply(k, multiples_of(G))
        x2y2 = multiply(k, multiples_of(_point(public_key[-2 * FIELD_BYTES :])))
    assert c1 is not None  # noqa: S101  # 0 < k < n, for mypy
    c3, c2 = _under(x2y2, material)
    yield from _written("", c1, c3, c2)


def sm2_forgeries(public_key: bytes, material_length: int) -> Ciphertexts:
    """SM2 ciphertexts with C1, C2 or C3 wrong, in every layout."""
    material = secrets.token_bytes(material_length)
    (_, honest), *_ = sm2_layouts(public_key, material)
    c1, c3, c2 = _point(honest[1:65]), honest[65:97], honest[97:]
    small_x = next(x for x in range(1, 100) if recover_y(x) is not None)
    small_y = recover_y(small_x) or 0
    points = {
        "C1 another point": add(c1, G) or G,
        "C1 the public key": _point(public_key[-2 * FIELD_BYTES :]),
        "C1 off the curve": (c1[0], c1[1] ^ 1),
        "C1 swapped": (c1[1], c1[0]),
        "C1 of zeros": (0, 0),
        "C1 with x = p": (P, c1[1]),
        "C1 with x over p": (small_x + P, small_y),
    }
    for what, point in points.items():
        yield from _written(what, point, c3, c2)
    for at in (0, len(c3) // 2, len(c3) - 1):
        yield from _written(f"C3 changed at {at}", c1, _changed(c3, at), c2)
    for at in (0, len(c2) // 2, len(c2) - 1):
        yield from _written(f"C2 changed at {at}", c1, c3, _changed(c2, at))
    yield "C1 at infinity", bytes(len(honest))
    yield "C1 compressed", bytes([2 + c1[1] % 2]) + honest[1:33] + c3 + c2
    yield "C1 hybrid", bytes([6 + c1[1] % 2]) + honest[1:]
    yield from small_order_forgeries(material_length)


def small_order_forgeries(material_length: int) -> Ciphertexts:
    """C1 of small order on another curve, with C2 and C3 for each point that [d]C1 may be.

    A backend that does not check C1 decrypts one of them, and so reveals d modulo the order. They
    work for any public key, but if 6 divides d (one key in six) none of them decrypts: try several
    keys.
    """
    material = secrets.token_bytes(material_length)
    for order, point in small_order_points().items():
        for sign, shared in (("", point), ("-", (point[0], -point[1] % P))):
            yield from _written(f"C1 of {order} ({sign}C1)", point, *_under(shared, material))


def _raw_rsa(key: RSAPublicKey, block: bytes) -> bytes:
    numbers = key.public_numbers()
    return pow(int.from_bytes(block, "big"), numbers.e, numbers.n).to_bytes(_MODULUS_BYTES, "big")


def _oaep(
    name: str,
    material: bytes,
    *,
    label: bytes = b"",
    first: int = 0,
    filler: bytes = b"\0",
    separator: bytes = b"\x01",
    mask: str | None = None,
) -> bytes:
    size = hashlib.new(name).digest_size
    tail = separator + material
    room = _MODULUS_BYTES - 2 * size - 1 - len(tail)
    block = hashlib.new(name, label).digest() + (filler * room)[:room] + tail
    seed = secrets.token_bytes(size)
    masked = _xor(block, _mgf1(seed, len(block), mask or name))
    return bytes([first]) + _xor(seed, _mgf1(masked, size, mask or name)) + masked


def _mgf1(seed: bytes, length: int, name: str) -> bytes:
    counters = (counter.to_bytes(4, "big") for counter in range(length // 20 + 1))
    return b"".join(hashlib.new(name, seed + counter).digest() for counter in counters)[:length]


def _under(shared: tuple[int, int], material: bytes) -> tuple[bytes, bytes]:
    """C3 and C2 of ``material`` under the shared point."""
    x2, y2 = (number.to_bytes(FIELD_BYTES, "big") for number in shared)
    mask = sm2_kdf(x2, y2, len(material)) if material else b""
    return sm3(x2 + material + y2), _xor(material, mask)


def _written(what: str, c1: tuple[int, int], c3: bytes, c2: bytes) -> Ciphertexts:
    bare = b"".join(number.to_bytes(FIELD_BYTES, "big") for number in c1) + c3 + c2
    integers = b"".join(_tlv(2, n.to_bytes(n.bit_length() // 8 + 1, "big")) for n in c1)
    der = _tlv(0x30, integers + _tlv(4, c3) + _tlv(4, c2))
    for layout, ciphertext in (("C1C3C2", b"\x04" + bare), ("without 04", bare), ("DER", der)):
        yield f"{what} ({layout})", ciphertext


def _tlv(tag: int, value: bytes) -> bytes:
    long_form = b"" if len(value) < 128 else b"\x81"  # noqa: PLR2004  # no value here has over 255
    return bytes([tag]) + long_form + bytes([len(value)]) + value


def _point(raw: bytes) -> tuple[int, int]:
    return int.from_bytes(raw[:FIELD_BYTES], "big"), int.from_bytes(raw[FIELD_BYTES:], "big")


def _changed(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def _xor(left: bytes, right: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(left, right, strict=True))
