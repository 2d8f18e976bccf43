"""SM2 ciphertexts: the layouts that clients send, and how they are told apart.

Three layouts are in the field (C1 = 04 ‖ x ‖ y): C1 ‖ C3 ‖ C2, the same without the 04 (Python
``gmssl``), and DER ``SEQUENCE {x, y, hash, ct}`` (GM/T 0009; OpenSSL). The oldest, C1 ‖ C2 ‖ C3,
cannot be told from the first and is read only where the configuration says so.

With the length m of the key material known, the length tells them apart: 97+m, 96+m, or DER. DER
with INTEGERs of lx and ly content bytes has 42+m+lx+ly bytes (one more once the content passes 127
bytes), for m = 16 or 32 as well as 96+m where lx+ly is 54 and 97+m where it is 55. An honest C1
comes that short with a chance of about 2^-70, but a sender may choose a short x. Then:

* 97+m bytes: C1C3C2 starts with 04 and DER with 30, so at most one of them fits;
* 96+m bytes: the 64 bytes that C1C3C2_BARE takes for its point are two DER headers, 54 bytes of
  INTEGERs, and two bytes of hash. Both points on the curve are two 256-bit conditions on 446 free
  bits: the expected number of such strings in existence is below 2^-60.

So neither is preferred and nothing is decided by the first byte alone: every configured layout is
tried whole (exact lengths, C1 on the curve, the same bytes when written again), and bytes with
other than exactly one reading are refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from hsmwrap.errors import ConfigurationError, InvalidKeyMaterial
from hsmwrap.settings import Kind, typed
from hsmwrap.sm2.curve import FIELD_BYTES, POINT_BYTES, is_on_curve

_HASH_BYTES: Final = 32
_OCTET_STRING, _SEQUENCE = 0x04, 0x30
_LONG_FORM: Final = 0x80


class Layout(StrEnum):
    """How the parts of a ciphertext follow each other."""

    C1C3C2 = "C1C3C2"
    C1C3C2_BARE = "C1C3C2_BARE"
    DER = "DER"
    C1C2C3 = "C1C2C3"


DEFAULT_LAYOUTS: Final = (Layout.C1C3C2, Layout.C1C3C2_BARE, Layout.DER)


@dataclass(frozen=True, slots=True)
class Sm2Ciphertext:
    """An SM2 ciphertext that is worth decrypting: C1 on the curve, C3 whole, C2 not empty.

    Attributes:
        x: x coordinate of C1.
        y: y coordinate of C1.
        c3: SM3(x2 ‖ plaintext ‖ y2), 32 bytes.
        c2: The masked plaintext, as long as the plaintext.

    Raises:
        InvalidKeyMaterial: It is not.
    """

    x: int
    y: int
    c3: bytes
    c2: bytes

    def __post_init__(self) -> None:
        if not (is_on_curve(self.x, self.y) and len(self.c3) == _HASH_BYTES and self.c2):
            raise InvalidKeyMaterial

    @property
    def c1(self) -> bytes:
        """C1 as an uncompressed point, 65 bytes."""
        return b"\x04" + self.x.to_bytes(FIELD_BYTES) + self.y.to_bytes(FIELD_BYTES)

    def to_c1c3c2(self) -> bytes:
        """Write C1 ‖ C3 ‖ C2 (GB/T 32918.4), 97 bytes more than the plaintext."""
        return self.c1 + self.c3 + self.c2

    def to_der(self) -> bytes:
        """Write DER ``SEQUENCE {x INTEGER, y INTEGER, hash OCTET STRING, ct OCTET STRING}``."""
        x, y, c3 = _minimal(self.x), _minimal(self.y), self.c3
        # All three are short; a call for each would cost more than the rest of it.
        head = b"\x02%c%b\x02%c%b\x04%c%b" % (len(x), x, len(y), y, len(c3), c3)
        return _tlv(_SEQUENCE, head + _tlv(_OCTET_STRING, self.c2))

    def write(self, layout: Layout) -> bytes:
        """Write it in this layout."""
        return _CODECS[layout][1](self)


def check_layouts(layouts: Iterable[str]) -> frozenset[Layout]:
    """Turn a configured set of layouts (members or their names) into one that is unambiguous.

    Raises:
        ConfigurationError: A name is unknown, none is given, or C1C2C3 stands beside C1C3C2.
    """
    try:
        chosen = frozenset(map(Layout, layouts))
    except ValueError:
        known = ", ".join(Layout)
        raise ConfigurationError(f"unknown SM2 ciphertext layout; there are {known}") from None
    if not chosen:
        raise ConfigurationError("no SM2 ciphertext layout is configured; name at least one")
    if {Layout.C1C3C2, Layout.C1C2C3} <= chosen:
        raise ConfigurationError(
            "C1C3C2 and C1C2C3 have the same length and cannot be told apart; configure one of them"
        )
    return chosen


def _read_layouts(value: object) -> tuple[Layout, ...]:
    names = [typed(name, str) for name in typed(value, list, tuple)]
    check_layouts(names)
    return tuple(dict.fromkeys(map(Layout, names)))


LAYOUTS = Kind(f"a list of {', '.join(Layout)}", _read_layouts)
"""What the setting ``sm2_layouts`` takes."""


def parse(
    data: bytes, material_length: int, layouts: Collection[Layout] = DEFAULT_LAYOUTS
) -> Sm2Ciphertext:
    """Read a client's ciphertext, strictly.

    Args:
        data: The ciphertext, raw bytes.
        material_length: Exact length of the plaintext in bytes.
        layouts: The layouts to accept.

    Raises:
        InvalidKeyMaterial: Not exactly one layout fits, whatever the reason.
        ConfigurationError: See :func:`check_layouts`.
    """
    chosen = _checked(tuple(layouts))
    readings = [_read(layout, data, material_length) for layout in chosen]
    fitting = [reading for reading in readings if reading is not None]
    if len(fitting) != 1:
        raise InvalidKeyMaterial
    return fitting.pop()


_checked = functools.cache(check_layouts)


def _read(layout: Layout, data: bytes, material_length: int) -> Sm2Ciphertext | None:
    """The one reading of ``data`` that writes back to the same bytes; None if there is none."""
    overhead = _OVERHEADS.get(layout)
    if overhead is not None and len(data) != overhead + material_length:
        return None
    read, write = _CODECS[layout]
    try:
        ciphertext = read(data)
    except (InvalidKeyMaterial, IndexError):
        return None
    exact = len(ciphertext.c2) == material_length and write(ciphertext) == data
    return ciphertext if exact else None


def _from_c1c3c2(data: bytes) -> Sm2Ciphertext:
    c1, rest = data[:POINT_BYTES], data[POINT_BYTES:]
    return _from_parts(c1, rest[:_HASH_BYTES], rest[_HASH_BYTES:])


def _from_c1c2c3(data: bytes) -> Sm2Ciphertext:
    c1, rest = data[:POINT_BYTES], data[POINT_BYTES:]
    return _from_parts(c1, rest[-_HASH_BYTES:], rest[:-_HASH_BYTES])


def _from_parts(c1: bytes, c3: bytes, c2: bytes) -> Sm2Ciphertext:
    x, y = c1[1 : 1 + FIELD_BYTES], c1[1 + FIELD_BYTES :]
    return Sm2Ciphertext(int.from_bytes(x), int.from_bytes(y), c3, c2)


def _from_der(data: bytes) -> Sm2Ciphertext:
    """Read leniently; that the bytes were DER, and minimal, shows when they are written again."""
    content, _ = _value(data)
    x, content = _value(content)
    y, content = _value(content)
    c3, content = _value(content)
    c2, _ = _value(content)
    return Sm2Ciphertext(int.from_bytes(x), int.from_bytes(y), c3, c2)


def _value(data: bytes) -> tuple[bytes, bytes]:
    """Split the first TLV's value from what follows it. IndexError if there is none."""
    start, length = 2, data[1]
    if length >= _LONG_FORM:
        start += length - _LONG_FORM
        length = int.from_bytes(data[2:start])
    return data[start : start + length], data[start + length :]


def _tlv(tag: int, value: bytes) -> bytes:
    length = len(value)
    if length < _LONG_FORM:
        return bytes([tag, length]) + value
    octets = length.to_bytes((length.bit_length() + 7) // 8)
    return bytes([tag, _LONG_FORM + len(octets)]) + octets + value


def _minimal(number: int) -> bytes:
    """A non-negative INTEGER's content: no leading octet beyond the one that keeps the sign."""
    return number.to_bytes(number.bit_length() // 8 + 1)


_OVERHEADS: Final[Mapping[Layout, int]] = MappingProxyType(
    {
        Layout.C1C3C2: POINT_BYTES + _HASH_BYTES,
        Layout.C1C3C2_BARE: POINT_BYTES + _HASH_BYTES - 1,
        Layout.C1C2C3: POINT_BYTES + _HASH_BYTES,
    }
)
"""How much longer than the plaintext a ciphertext is; that of DER depends on its INTEGERs."""

_CODECS: Final[
    Mapping[Layout, tuple[Callable[[bytes], Sm2Ciphertext], Callable[[Sm2Ciphertext], bytes]]]
] = MappingProxyType(
    {
        Layout.C1C3C2: (_from_c1c3c2, Sm2Ciphertext.to_c1c3c2),
        Layout.C1C3C2_BARE: (
            lambda data: _from_c1c3c2(b"\x04" + data),
            lambda ciphertext: ciphertext.to_c1c3c2()[1:],
        ),
        Layout.C1C2C3: (_from_c1c2c3, lambda c: c.c1 + c.c2 + c.c3),
        Layout.DER: (_from_der, Sm2Ciphertext.to_der),
    }
)
