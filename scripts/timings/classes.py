"""Classes of ciphertexts: each fault of each wrapping algorithm, and two controls.

All are sent to a CMK that has material already, so that valid material is refused as well, and
nothing but the control ``good`` is imported.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Mapping
from functools import partial

from benchmarks import clients
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import load_der_public_key

from hsmwrap.catalog import WrappingAlgorithm
from hsmwrap.oaep import HashName, mgf1
from hsmwrap.sm2 import parse
from hsmwrap.sm2.curve import P

Maker = Callable[[], bytes]
"""Makes a fresh ciphertext of a class."""

GOOD = "good"
"""The material that the CMK has: imported. The control that has to differ."""
AGAIN = "the same again"
"""The first class once more. The control that must not differ."""

_LENGTH = 32
_BLOCK = 256
_LENGTHS = (0, 1, 15, 16, 24, 31, 33)
_HASHES: Mapping[WrappingAlgorithm, HashName] = {
    WrappingAlgorithm.RSAES_OAEP_SHA_1: "sha1",
    WrappingAlgorithm.RSAES_OAEP_SHA_256: "sha256",
}


def classes(
    algorithm: WrappingAlgorithm, public_key: bytes, material: bytes
) -> Mapping[str, Maker]:
    """The classes of an algorithm by name; all others are compared with the first.

    Args:
        algorithm: The wrapping algorithm.
        public_key: DER SubjectPublicKeyInfo of the wrapping key.
        material: The material that the CMK has, 32 bytes.
    """
    encrypted = partial(clients.encrypt, algorithm, public_key)
    if algorithm is WrappingAlgorithm.SM2PKE:
        faults = _sm2(lambda: encrypted(material))
        lengths: tuple[int, ...] = (31, 33)
    else:
        key = load_der_public_key(public_key)
        assert isinstance(key, rsa.RSAPublicKey)  # noqa: S101  # a key of RSA_2048
        hashed = _HASHES.get(algorithm)
        blocks = _oaep(hashed, material) if hashed else _pkcs1(material)
        longest = _BLOCK - 2 - 2 * hashlib.new(hashed).digest_size if hashed else _BLOCK - 11
        faults = {name: partial(_raw, key.public_numbers(), make) for name, make in blocks.items()}
        lengths = (*_LENGTHS, longest)
    first = next(iter(faults.values()))

    def of_length(length: int) -> bytes:
        return encrypted(secrets.token_bytes(length))

    by_length = {f"length {length}": partial(of_length, length) for length in lengths}
    return {
        **faults,
        **by_length,
        AGAIN: first,
        "other material": lambda: encrypted(secrets.token_bytes(_LENGTH)),
        GOOD: lambda: encrypted(material),
    }


def _raw(numbers: rsa.RSAPublicNumbers, make: Maker) -> bytes:
    """Encrypt a whole block, whatever its padding."""
    return pow(int.from_bytes(make()), numbers.e, numbers.n).to_bytes(_BLOCK)


def _random_block() -> bytes:
    # Less than any modulus, and not 00 02 nor the 00 of OAEP at the start: what a client gets that
    # multiplies a captured ciphertext.
    return b"\x01" + secrets.token_bytes(_BLOCK - 1)


def _pkcs1(material: bytes) -> dict[str, Maker]:
    """Blocks that EME-PKCS1-v1_5 decoding (RFC 8017, 7.2.2) has to refuse."""

    def block(head: bytes, material: bytes, damage: Callable[[bytearray], None]) -> bytes:
        filling = bytes(1 + each % 255 for each in secrets.token_bytes(253 - len(material)))
        made = bytearray(head + filling + b"\0" + material)
        damage(made)
        return bytes(made)

    def untouched(_: bytearray) -> None:
        """Only the head is wrong."""

    def short_filling(made: bytearray) -> None:
        made[9] = 0

    def no_separator(made: bytearray) -> None:
        made[2:] = bytes(each or 1 for each in made[2:])

    return {
        "padding: random block": _random_block,
        "padding: first byte": lambda: block(b"\1\2", material, untouched),
        "padding: block type 1": lambda: block(b"\0\1", material, untouched),
        "padding: short filling": lambda: block(b"\0\2", material, short_filling),
        "padding: no separator": lambda: block(b"\0\2", material, no_separator),
    }


def _oaep(hashed: HashName, material: bytes) -> dict[str, Maker]:
    """Blocks that EME-OAEP decoding (RFC 8017, 7.1.2) has to refuse."""
    size = hashlib.new(hashed).digest_size

    def block(first: int, label: bytes, filling: int, separator: int) -> bytes:
        length = _BLOCK - 2 - 2 * size - len(material)
        data = hashlib.new(hashed, label).digest() + bytes([filling]) * length
        data += bytes([separator]) + material
        seed = secrets.token_bytes(size)
        masked = _xor(data, mgf1(seed, len(data), hashed))
        return bytes([first]) + _xor(seed, mgf1(masked, size, hashed)) + masked

    return {
        "padding: random block": _random_block,
        "padding: first byte": lambda: block(1, b"", 0, 1),
        "padding: label": lambda: block(0, b"x", 0, 1),
        "padding: filling": lambda: block(0, b"", 2, 1),
        "padding: separator": lambda: block(0, b"", 0, 2),
    }


def _xor(left: bytes, right: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(left, right, strict=True))


def _sm2(good: Maker) -> dict[str, Maker]:
    """Ciphertexts in layout C1C3C2 that SM2 decryption (GB/T 32918.4, 7.1) has to refuse."""

    def made(change: Callable[[int, int, bytes, bytes], tuple[int, int, bytes, bytes]]) -> bytes:
        parts = parse(good(), _LENGTH)
        x, y, c3, c2 = change(parts.x, parts.y, parts.c3, parts.c2)
        return b"\x04" + x.to_bytes(_LENGTH) + y.to_bytes(_LENGTH) + c3 + c2

    def other_point(_x: int, _y: int, c3: bytes, c2: bytes) -> tuple[int, int, bytes, bytes]:
        other = parse(good(), _LENGTH)
        return other.x, other.y, c3, c2

    return {
        "C3": lambda: made(lambda x, y, c3, c2: (x, y, _flipped(c3), c2)),
        "C2": lambda: made(lambda x, y, c3, c2: (x, y, c3, _flipped(c2))),
        "C1: another point": lambda: made(other_point),
        "C1: off the curve": lambda: made(lambda x, y, c3, c2: (x, y ^ 1, c3, c2)),
        "C1: x is p": lambda: made(lambda _x, y, c3, c2: (P, y, c3, c2)),
        "layout: DER": lambda: _flipped(good()),
    }


def _flipped(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]
