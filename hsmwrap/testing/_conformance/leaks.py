"""Whether bytes or text contain a secret, in any common encoding."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_der_public_key

from hsmwrap.catalog import WrappingKeySpec
from hsmwrap.sm2.curve import FIELD_BYTES, N
from hsmwrap.testing._conformance.points import G, multiples_of, multiply

_PIECE = 8
# Base64 encodes three bytes at a time: of three successive pieces of nine bytes one is aligned.
_BASE64_PIECE = 9
_PRIME_BYTES = 128
_NOT_BASE64 = re.compile(rb"-----[^-]*-----|[^0-9A-Za-z+/=_-]")


def leaks(secret: bytes, seen: bytes) -> bool:
    """Whether ``seen`` contains eight bytes of ``secret``: raw, hex, base64, repr or numbers."""
    return any(piece in seen for piece in _spellings(secret))


def private_key_in(data: bytes, spec: WrappingKeySpec, public_key: bytes) -> bool:
    """Whether ``data`` holds the private key of ``public_key``: raw, hex or base64."""
    find = _prime_in if spec is WrappingKeySpec.RSA_2048 else _scalar_in
    return any(find(reading, public_key) for reading in _readings(data))


def _spellings(secret: bytes) -> Iterator[bytes]:
    for piece in _windows(secret, _PIECE):
        yield piece
        yield piece[::-1]
        yield piece.hex().encode()
        yield piece.hex().upper().encode()
        yield repr(piece)[2:-1].encode()
        yield ", ".join(map(str, piece)).encode()
    for piece in _windows(secret, _BASE64_PIECE):
        yield base64.b64encode(piece)
        yield base64.urlsafe_b64encode(piece)


def _windows(data: bytes, length: int) -> Iterator[bytes]:
    return (data[at : at + length] for at in range(len(data) - length + 1))


def _readings(data: bytes) -> Iterable[bytes]:
    """The data as it is, and decoded if it is hex or base64 (PEM)."""
    yield data
    with suppress(ValueError):
        yield bytes.fromhex(data.decode("ascii"))
    text = _NOT_BASE64.sub(b"", data).rstrip(b"=").translate(bytes.maketrans(b"-_", b"+/"))
    if text.isascii() and len(text) > len(data) // 2:
        text = text[: len(text) - (len(text) % 4 == 1)]
        yield base64.b64decode(text + b"=" * (-len(text) % 4))


def _prime_in(data: bytes, public_key: bytes) -> bool:
    key = load_der_public_key(public_key)
    assert isinstance(key, RSAPublicKey)  # noqa: S101  # this is a test kit
    n = key.public_numbers().n
    numbers = (
        int.from_bytes(window, order)
        for window in _windows(data, _PRIME_BYTES)
        for order in ("big", "little")
    )
    return any(number > 1 and n % number == 0 for number in numbers)


def _scalar_in(data: bytes, public_key: bytes) -> bool:
    x = int.from_bytes(public_key[-2 * FIELD_BYTES : -FIELD_BYTES], "big")
    table = multiples_of(G)
    scalars = (int.from_bytes(window, "big") for window in _windows(data, FIELD_BYTES))
    points = (multiply(scalar, table) for scalar in scalars if 0 < scalar < N)
    return any(point is not None and point[0] == x for point in points)
